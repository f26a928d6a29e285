"""CE timing, the budget and the isolates, against numbers worked out by hand."""

import json

import pytest
from test_analysis_synthetic import make_config, read_rows, run_folder, write_run

from kdclimb.analysis import budget
from kdclimb.analysis.tables import AnalysisError, RunFolder

VAL = [(0, 6.0), (25, 5.0), (50, 4.0)]


def ce_runs(tmp_path, **edits):
    """CE at 50 and 100 steps with seeds 0, 1 and 2; `edits` are for seed 1 at 100 steps."""
    runs = []
    for horizon in (50, 100):
        for seed, ms in enumerate((10.0, 14.0, 11.0)):
            extra = edits if (horizon, seed) == (100, 1) else {}
            values = {"val": VAL, "step_ms": ms} | extra
            runs.append(run_folder(tmp_path, "ce", f"CE {horizon}", make_config(horizon, seed), **values))
    return runs


def set_budget(tmp_path, **edits):
    budget.ce_baseline(ce_runs(tmp_path / "runs", **edits), tmp_path / "timing.csv")
    budget.set_budget(tmp_path / "timing.csv", 0.1, tmp_path / "budget.json")
    return json.loads((tmp_path / "budget.json").read_text())


def test_budget_is_a_share_of_the_median_at_the_longest_horizon(tmp_path):
    decision = set_budget(tmp_path)
    assert decision["ce_train_time_ms"] == 1100.0  # of 1000, 1400 and 1100
    assert decision["budget_ms"] == pytest.approx(110.0)
    assert (decision["horizon"], decision["fraction"], decision["clock"]) == (100, 0.1, "measured")
    assert (decision["device"], decision["threads"], decision["code_hashes"]) == ("cpu", 2, ["c0de00000000"])
    assert decision["ce_run_ids"] == [make_config(100, seed).run_id for seed in range(3)]


def test_a_tenth_of_694_seconds(tmp_path):
    run = run_folder(tmp_path, "ce", "CE 1555", make_config(1555), val=VAL, train_time_ms=694015)
    budget.ce_baseline([run], tmp_path / "timing.csv")
    budget.set_budget(tmp_path / "timing.csv", 0.1, tmp_path / "budget.json")
    assert json.loads((tmp_path / "budget.json").read_text())["budget_ms"] == pytest.approx(69401.5)


def test_the_budget_is_at_the_speed_of_the_median_anchor(tmp_path):
    """1400 ms on a machine that takes twice as long are 700 ms, so the median is no longer 1100 ms."""
    decision = set_budget(tmp_path, anchor_before_ms=20.0, anchor_after_ms=20.0)
    assert (decision["anchor_ms"], decision["ce_train_time_ms"]) == (10.0, 1000.0)


@pytest.mark.parametrize("key,value", [("device", "cuda"), ("threads", 8)])
def test_mixed_timings_set_no_budget(tmp_path, key, value):
    with pytest.raises(AnalysisError, match=rf"timing\.csv: the CE runs at 100 steps differ in {key}"):
        set_budget(tmp_path, **{key: value})


def test_failed_ce_stops_with_run_reason_log_and_remedy(tmp_path):
    runs = ce_runs(tmp_path, status="diverged", reason="loss is NaN at step 31", val=[], step_ms=[])
    with pytest.raises(AnalysisError) as error:
        budget.ce_baseline(runs, tmp_path / "timing.csv")
    run_id = make_config(100, 1).run_id
    for part in (run_id, "diverged (loss is NaN at step 31)", f"{run_id}/train.log", f"kdclimb retry --run {run_id}"):
        assert part in str(error.value)
    assert not (tmp_path / "timing.csv").exists()


def test_shared_device_at_the_last_horizon_stops_under_the_measured_clock(tmp_path):
    with pytest.raises(AnalysisError, match="shared its device"):
        budget.ce_baseline(ce_runs(tmp_path, shared_device=1), tmp_path / "timing.csv")


def test_shared_device_elsewhere_or_modelled_is_no_matter(tmp_path):
    short = run_folder(tmp_path, "ce", "CE 50", make_config(50), val=VAL, shared_device=1)
    full = run_folder(tmp_path, "ce", "CE 100", make_config(100), val=VAL)
    modelled = run_folder(tmp_path, "ce", "CE 100", make_config(100, clock="modelled"), val=VAL, shared_device=1)
    budget.ce_baseline([short, full], tmp_path / "a.csv")
    budget.ce_baseline([modelled], tmp_path / "b.csv")
    assert [row["shared_device"] for row in read_rows(tmp_path / "a.csv")] == ["1", "0"]


def test_isolates_are_ratios_to_ce(tmp_path):
    stop = {"stop_step": 5}
    runs = [
        run_folder(tmp_path, "isolate", "CE only", make_config(**stop), step_ms=[99.0, 99.0, 10.0, 12.0, 11.0]),
        run_folder(tmp_path, "isolate", "CE + KD", make_config(kd={}, **stop), step_ms=[99.0, 99.0, 22.0, 20.0, 24.0]),
    ]
    budget.kd_isolates(runs, tmp_path / "isolates.csv")
    rows = read_rows(tmp_path / "isolates.csv")
    assert [row["step_ms_median"] for row in rows] == ["11.0", "22.0"]
    assert [row["ratio_to_ce"] for row in rows] == ["1.0", "2.0"]


def test_isolates_that_cant_be_compared_have_no_ratio(tmp_path):
    stop = {"stop_step": 5}
    ce = run_folder(tmp_path, "isolate", "CE only", make_config(**stop), val=VAL[:1])
    oom = run_folder(
        tmp_path, "isolate", "infer", make_config(kd={"infer_only": True}, **stop), status="oom", reason="x"
    )
    shared = run_folder(tmp_path, "isolate", "CE + KD", make_config(kd={}, **stop), shared_device=1)
    budget.kd_isolates([ce, oom, shared], tmp_path / "isolates.csv")
    rows = read_rows(tmp_path / "isolates.csv")
    assert [row["ratio_to_ce"] for row in rows] == ["1.0", "", ""]
    assert [row["step_ms_median"] for row in rows] == ["10.0", "", "10.0"]


def test_no_isolates_is_an_empty_table(tmp_path):
    budget.kd_isolates([], tmp_path / "isolates.csv")
    assert read_rows(tmp_path / "isolates.csv") == []


def test_writing_again_gives_the_same_bytes(tmp_path):
    for seed in range(2):
        write_run(tmp_path / "runs", make_config(100, seed), val=VAL)
    texts = []
    for _ in range(2):
        runs = [RunFolder.read(f"ce|CE 100|{folder}") for folder in sorted((tmp_path / "runs").iterdir())]
        budget.ce_baseline(runs, tmp_path / "timing.csv")
        texts.append((tmp_path / "timing.csv").read_bytes())
    assert texts[0] == texts[1]


def test_times_are_divided_by_the_machines_speed_beside_them(tmp_path):
    """A machine at half its speed: twice the time, twice the anchor. CE's median anchor is the speed that counts."""
    speeds = ((0, 10.0, 10.0, 10.0), (1, 20.0, 19.0, 21.0), (2, 10.0, 10.0, 10.0))
    runs = [
        run_folder(
            tmp_path, "ce", "CE", make_config(seed=s), val=VAL, step_ms=ms, anchor_before_ms=a, anchor_after_ms=b
        )
        for s, ms, a, b in speeds
    ]
    at_one = budget.at_one_speed(runs, max_drift=0.25)
    assert [run.speed for run in at_one] == [1.0, 0.5, 1.0]
    assert {run.val[-1]["train_time_ms"] for run in at_one} == {500.0}
    assert {run.steps[0]["train_time_ms"] for run in at_one} == {10.0}
    assert not any(budget.refuse_timing(run.row(), at_one[0].row()) for run in at_one)


def test_times_of_a_machine_that_changed_meanwhile_are_compared_with_none(tmp_path):
    config = [make_config(seed=seed) for seed in range(4)]
    steady = run_folder(tmp_path, "ce", "CE", config[0], val=VAL)
    slowed = run_folder(tmp_path, "kd", "T1", config[1], val=VAL, anchor_before_ms=10.0, anchor_after_ms=13.0)
    without = run_folder(tmp_path, "kd", "T1", config[2], val=VAL, anchor_before_ms="", anchor_after_ms="")
    failed = run_folder(tmp_path, "kd", "T1", config[3], status="oom", reason="x")
    runs = budget.at_one_speed([steady, slowed, without, failed], max_drift=0.25)
    notes = [budget.refuse_timing(run.row(), steady.row()) if run.ok else "" for run in runs]
    assert notes[0] == notes[3] == ""
    assert "anchor went from 10 to 13 ms" in notes[1] and "no anchor beside the run" in notes[2]


def test_without_anchors_times_stay_as_they_are(tmp_path):
    run = run_folder(tmp_path, "ce", "CE", make_config(clock="modelled"), val=VAL)
    assert budget.at_one_speed([run], max_drift=0.25) == [run]


@pytest.mark.parametrize(("stalled", "marked"), [([], False), ([30.0], False), ([500.0] * 10, True)])
def test_a_machine_that_stalls_between_two_steady_ends_is_seen_in_the_steps(tmp_path, stalled, marked):
    """Steps that only KD makes longer are of another kind."""
    steps = [15.0] * 40 + stalled + [10.0] * (60 - len(stalled))
    kd = run_folder(tmp_path, "kd", "T1", make_config(seed=1, kd={}), val=VAL, step_ms=steps, shares=[0.5] * 40)
    ce = run_folder(tmp_path, "ce", "CE", make_config(), val=VAL)
    note = budget.refuse_timing(budget.at_one_speed([ce, kd], max_drift=0.25)[1].row(), ce.row())
    assert ("times their median on average" in note) == bool(note) == marked
