"""Probe projection, the two filters, the choice of the teacher and of the KD points."""

import json

import pytest
from test_analysis_synthetic import make_config, read_rows, run_folder

from kdclimb.analysis import selection, tables, targets
from kdclimb.artifacts import write_json

FALLING = [(0, 6.0), (25, 5.5), (50, 5.2), (75, 5.0), (100, 4.9)]
BUDGET = {
    "anchor_ms": 10.0,
    "budget_ms": 1000.0,
    "ce_train_time_ms": 10000.0,
    "clock": "measured",
    "code_hashes": [],
    "device": "cpu",
    "fraction": 0.1,
    "horizon": 300,
    "projected_from": None,
    "threads": 2,
}


@pytest.fixture
def budget(tmp_path):
    write_json(tmp_path / "budget.json", BUDGET)
    return tmp_path / "budget.json"


def candidates(tmp_path, arm, **edits):
    """Candidates A, B, ... by seed, one for each of `edits`."""
    runs = []
    for seed, (label, values) in enumerate(edits.items()):
        stop = 10 if arm == "probe" else None
        config = make_config(100, seed, stop_step=stop)
        runs.append(run_folder(tmp_path / "runs", arm, label, config, **values))
    return runs


def probe_filter(tmp_path, budget, **edits):
    selection.teacher_probe(candidates(tmp_path, "probe", **edits), tmp_path / "probe.csv")
    selection.filter_projected(tmp_path / "probe.csv", budget, tmp_path / "projected.json")
    return json.loads((tmp_path / "projected.json").read_text())


def measured_filter(tmp_path, budget, **edits):
    selection.teacher_train(candidates(tmp_path, "teacher", **edits), tmp_path / "trained.csv")
    selection.filter_measured(tmp_path / "trained.csv", budget, tmp_path / "measured.json")
    return json.loads((tmp_path / "measured.json").read_text())


def select(tmp_path, budget, rejected=()):
    write_json(tmp_path / "projected.json", {"rejected": dict(rejected)})
    paths = [tmp_path / name for name in ("trained.csv", "projected.json", "measured.json")]
    selection.teacher_select(*paths, budget, tmp_path / "selected.json")
    return json.loads((tmp_path / "selected.json").read_text())


def test_projection_is_the_median_step_times_the_horizon(tmp_path):
    slow_start = [500.0, 100.0, 4.0, 6.0, 5.0, 5.0, 5.0, 5.0, 5.0, 90.0]
    selection.teacher_probe(candidates(tmp_path, "probe", A={"step_ms": slow_start}), tmp_path / "probe.csv")
    (row,) = read_rows(tmp_path / "probe.csv")
    assert (row["probe_step_ms"], row["projected_ms"]) == ("5.0", "500.0")
    assert (row["steps"], row["horizon"], row["flops_per_token"]) == ("10", "100", "6000000.0")


def test_projection_under_a_batch_schedule_goes_by_tokens(tmp_path):
    config = make_config(100, batch_tokens=(1000, 2000, 3000), stop_step=5)
    assert selection.total_tokens(config.schedule) == 33 * 1000 + 34 * 2000 + 33 * 3000
    run = run_folder(tmp_path / "runs", "probe", "A", config, step_ms=[9.0, 9.0, 4.0, 5.0, 6.0])
    selection.teacher_probe([run], tmp_path / "probe.csv")
    (row,) = read_rows(tmp_path / "probe.csv")
    assert row["probe_step_ms"] == "5.0"
    assert float(row["projected_ms"]) == pytest.approx(0.005 * 200000)  # not 5 ms x 100 steps


def test_projected_filter_keeps_config_order_and_the_exact_budget(tmp_path, budget):
    kept = {"Z": {"step_ms": 10.0}, "A": {"step_ms": 9.0}}
    decision = probe_filter(tmp_path, budget, **kept, M={"step_ms": 10.5})
    assert decision["survivors"] == ["Z", "A"]  # Z is exactly at the budget
    assert decision["rejected"] == {"M": "projected time 1,050.0 ms is over the budget of 1,000.0 ms"}
    assert decision["budget_ms"] == 1000.0


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        ({"status": "oom", "reason": "out of memory"}, "no OOM fallback: out of memory"),
        ({"status": "failed", "reason": "no kernel"}, "failed: no kernel"),
        ({"device": "cuda"}, "timing refused: device cuda against cpu"),
        ({"threads": 1}, "timing refused: threads 1 against 2"),
        ({"clock": "modelled"}, "timing refused: clock modelled against measured"),
        ({"shared_device": 1}, "timing refused: the run shared its device; train it again alone"),
    ],
)
def test_projected_filter_gives_its_reason(tmp_path, budget, edit, reason):
    decision = probe_filter(tmp_path, budget, A={}, B=edit)
    assert decision == {"budget_ms": 1000.0, "survivors": ["A"], "rejected": {"B": reason}}


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        ({"val": FALLING}, None),
        ({"val": FALLING[:3]}, None),  # a short run is judged by the validations that it has
        ({"val": FALLING, "step_ms": 10.5}, "measured time 1,050.0 ms is over the budget of 1,000.0 ms"),
        ({"status": "oom", "reason": "9 GiB"}, "no OOM fallback: 9 GiB"),
        ({"status": "diverged", "reason": "NaN"}, "diverged: NaN"),
        ({"val": FALLING, "shared_device": 1}, "timing refused: the run shared its device; train it again alone"),
        (
            {"val": [(0, 6.0), (25, 5.5), (50, 5.5), (75, 5.0)]},
            "validation not falling early: 5.5000, then 5.5000 at validation 2 after step 0",
        ),
        (
            {"val": [(0, 6.0), (25, 6.5), (50, 5.0), (75, 4.0)]},
            "validation not falling early: 6.0000, then 6.5000 at validation 1 after step 0",
        ),
        ({"val": [*FALLING[:4], (100, 5.3)]}, None),  # later bumps are no early warning
        ({"val": FALLING[:1]}, "no validation after step 0"),
    ],
)
def test_measured_checklist(tmp_path, budget, edit, reason):
    decision = measured_filter(tmp_path, budget, A=edit)
    assert decision["rejected"] == ({"A": reason} if reason else {})
    assert decision["survivors"] == ([] if reason else ["A"])


def test_missing_artifacts_are_listed(tmp_path, budget):
    runs = candidates(tmp_path, "teacher", A={"val": FALLING})
    (runs[0].folder / "val_loss.png").unlink()
    (runs[0].folder / "checkpoints" / "model.safetensors").unlink()
    selection.teacher_train(runs, tmp_path / "trained.csv")
    selection.filter_measured(tmp_path / "trained.csv", budget, tmp_path / "measured.json")
    rejected = json.loads((tmp_path / "measured.json").read_text())["rejected"]
    assert rejected == {"A": "artifacts missing: val_loss.png checkpoints/model.safetensors"}


def test_weights_left_elsewhere_are_not_missing_but_their_description_is(tmp_path, budget):
    runs = candidates(tmp_path, "teacher", A={"val": FALLING})
    (runs[0].folder / "checkpoints/model.safetensors").rename(runs[0].folder / selection.ELSEWHERE)
    selection.teacher_train(runs, tmp_path / "trained.csv")
    assert read_rows(tmp_path / "trained.csv")[0]["missing_artifacts"] == ""
    (runs[0].folder / "checkpoints/model.json").unlink()
    selection.teacher_train(runs, tmp_path / "trained.csv")
    assert read_rows(tmp_path / "trained.csv")[0]["missing_artifacts"] == "checkpoints/model.json"


def slow(factor, step_ms, **more):
    """A run on a machine that takes `factor` times as long."""
    return {"step_ms": factor * step_ms, "anchor_before_ms": factor * 10.0, "anchor_after_ms": factor * 10.0} | more


def test_a_candidate_is_not_held_against_the_speed_of_its_machine(tmp_path, budget):
    """Budget 1,000 ms: 9 ms a step are within it on a machine of half the speed too, 11 ms on none."""
    decision = probe_filter(tmp_path, budget, A=slow(2.0, 9.0), B=slow(0.5, 11.0), C=slow(1.0, 11.0))
    assert decision["survivors"] == ["A"]
    assert decision["rejected"] == {
        "B": "projected time 1,100.0 ms (550.0 ms on a machine of another speed) is over the budget of 1,000.0 ms",
        "C": "projected time 1,100.0 ms is over the budget of 1,000.0 ms",
    }
    teachers = {"D": slow(2.0, 9.0, val=FALLING), "E": slow(0.5, 11.0, val=FALLING)}
    decision = measured_filter(tmp_path, budget, **teachers)
    assert decision["survivors"] == ["D"] and "(550.0 ms on a machine" in decision["rejected"]["E"]
    selected = select(tmp_path, budget)
    assert (selected["train_time_ms"], selected["speed"]) == (900.0, 0.5)
    assert selection.as_measured(selected)["train_time_ms"] == 1800.0


def test_several_reasons_stand_together(tmp_path, budget):
    rising = {"val": [(0, 6.0), (25, 6.1)], "step_ms": 20.0}
    reason = measured_filter(tmp_path, budget, A=rising)["rejected"]["A"]
    assert reason.split("; ") == [
        "measured time 2,000.0 ms is over the budget of 1,000.0 ms",
        "validation not falling early: 6.0000, then 6.1000 at validation 1 after step 0",
    ]


def test_teacher_of_lowest_loss_is_selected_and_ties_go_to_the_cheaper(tmp_path, budget):
    worse, best = [*FALLING[:4], (100, 4.95)], FALLING
    edits = {
        "A": {"val": worse, "step_ms": 1.0},
        "B": {"val": best, "step_ms": 9.0},
        "C": {"val": best, "step_ms": 8.0},
    }
    measured_filter(tmp_path, budget, **edits, D={"val": [*FALLING[:4], (100, 3.0)], "step_ms": 11.0})
    selected = select(tmp_path, budget)
    assert (selected["candidate"], selected["final_val"], selected["train_time_ms"]) == ("C", 4.9, 800.0)
    assert selected["run_id"] == make_config(100, 2).run_id
    targets.set_target(tmp_path / "selected.json", [4.0], tmp_path / "target.json")
    target = json.loads((tmp_path / "target.json").read_text())
    assert (target["value"], target["consecutive"], target["source"]) == (4.9, 2, "teacher_final_val")


def test_no_teacher_is_a_result_that_says_why(tmp_path, budget):
    measured_filter(tmp_path, budget, B={"status": "oom", "reason": "9 GiB"})
    selected = select(tmp_path, budget, rejected={"A": "projected time 2,000.0 ms is over"}.items())
    assert selected["run_id"] is None and selected["final_val"] is None
    assert selected["reason"] == (
        "no teacher meets the budget of 1,000.0 ms: A: projected time 2,000.0 ms is over; B: no OOM fallback: 9 GiB"
    )
    targets.set_target(tmp_path / "selected.json", [4.0], tmp_path / "target.json")
    assert json.loads((tmp_path / "target.json").read_text())["value"] is None


def test_a_projected_budget_is_called_so(tmp_path, budget):
    write_json(budget, BUDGET | {"horizon": 1555, "projected_from": 1000})
    rejected = measured_filter(tmp_path, budget, B={"step_ms": 10.1})["rejected"]
    assert "is over the budget of 1,000.0 ms (projected from 1,000-step runs)" in rejected["B"]
    measured_filter(tmp_path / "none", budget, B={"status": "oom", "reason": "x"})
    reason = select(tmp_path / "none", budget)["reason"]
    assert reason.startswith("no teacher meets the budget of 1,000.0 ms (projected from 1,000-step runs): B: ")


def test_nothing_to_train_is_an_empty_table(tmp_path, budget):
    assert measured_filter(tmp_path, budget) == {"budget_ms": 1000.0, "survivors": [], "rejected": {}}


def screen(tmp_path, *rows):
    """A screen.csv with rows of (label, status) in rank order."""
    nothing = dict.fromkeys(targets.SCREEN_COLUMNS)
    rows = [nothing | {"rank": i, "label": label, "status": status} for i, (label, status) in enumerate(rows, 1)]
    tables.write_csv(tmp_path / "screen.csv", targets.SCREEN_COLUMNS, reversed(rows))
    tables.write_csv(tmp_path / "ce.csv", targets.SCREEN_COLUMNS, rows)
    selection.kd_promote(tmp_path / "screen.csv", tmp_path / "ce.csv", 2, tmp_path / "promoted.json")
    return json.loads((tmp_path / "promoted.json").read_text())


def test_best_points_that_trained_are_promoted_in_rank_order(tmp_path):
    decision = screen(tmp_path, ("T2", "ok"), ("T9", "diverged"), ("T1", "ok"), ("T3", "ok"))
    assert decision["points"] == ["T2", "T1"] and decision["ce_point"] == "T2"


def test_nothing_to_promote(tmp_path):
    assert screen(tmp_path) == {"points": [], "ce_point": None, "reason": "nothing was screened"}
    decision = screen(tmp_path, ("T1", "oom"), ("T2", "failed"))
    assert decision["points"] == [] and "T1: no OOM fallback" in decision["reason"]
