"""CE timing, the budget and the isolates, against numbers worked out by hand."""

import json

import pytest
from test_analysis_synthetic import make_config, read_rows, run_folder, write_run

from kdclimb.analysis import budget
from kdclimb.analysis.tables import AnalysisError, RunFolder
from kdclimb.config import RunConfig

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


def staged(seed=0, horizon=100, **schedule):
    """A CE config of two stages, the second with twice the tokens a step."""
    values = make_config(horizon, seed, batch_tokens=(1000, 2000)).to_dict()
    return RunConfig.from_dict(values | {"schedule": values["schedule"] | schedule})


def project(tmp_path, horizon, configs, steps, **edits):
    """The budget of a CE run of so many steps, from one run of each config with these milliseconds of its steps.

    `edits` are for the second run.
    """
    runs = [
        run_folder(tmp_path / "runs", "ce", "CE", config, val=VAL, step_ms=ms, **(edits if i == 1 else {}))
        for i, (config, ms) in enumerate(zip(configs, steps, strict=True))
    ]
    budget.ce_baseline(runs, tmp_path / "timing.csv")
    budget.set_budget(tmp_path / "timing.csv", 0.1, tmp_path / "budget.json", horizon, runs)
    return json.loads((tmp_path / "budget.json").read_text())


STAGES = [[10.0] * 50 + [30.0] * 50, [12.0] * 50 + [30.0] * 50, [20.0] * 50 + [40.0] * 50]
WINDOWS = {"windows": [[8, 16]] * 2, "extension_windows": [16, 32]}


def test_a_longer_budget_is_projected_from_each_stages_median_step(tmp_path):
    """150 steps of each stage: 6000, 6300 and 9000 ms. A slow step changes no median."""
    steps = [[*times[:-1], 999.0] for times in STAGES]
    found = project(tmp_path, 300, map(staged, range(3)), steps)
    assert (found["ce_train_time_ms"], found["budget_ms"]) == (6300.0, pytest.approx(630.0))
    assert (found["horizon"], found["projected_from"]) == (300, 100)
    assert budget.projection(found["projected_from"]) == " (projected from 100-step runs)"


def test_a_projected_stage_has_the_steps_that_the_schedule_gives_it(tmp_path):
    """Of 301 steps the second stage begins at the 150th, counted from 0."""
    found = project(tmp_path, 301, [staged()], STAGES[:1])
    assert found["ce_train_time_ms"] == 150 * 10.0 + 151 * 30.0


def test_a_projected_time_is_at_the_speed_of_the_median_anchor(tmp_path):
    """The second run's 6300 ms, on a machine that takes twice as long, are 3150."""
    found = project(tmp_path, 300, map(staged, range(3)), STAGES, anchor_before_ms=20.0, anchor_after_ms=20.0)
    assert (found["anchor_ms"], found["ce_train_time_ms"]) == (10.0, 6000.0)


def test_an_extension_is_projected_by_its_own_steps_where_its_windows_differ(tmp_path):
    steps = [[10.0] * 45 + [30.0] * 45 + [50.0] * 10]
    apart = project(tmp_path / "apart", 300, [staged(extension_frac=0.1, **WINDOWS)], steps)
    assert apart["ce_train_time_ms"] == 135 * 10.0 + 135 * 30.0 + 30 * 50.0
    within = project(tmp_path / "within", 300, [staged(extension_frac=0.1)], steps)
    assert within["ce_train_time_ms"] == 135 * 10.0 + 165 * 30.0


def test_the_time_of_the_longest_horizon_itself_is_measured(tmp_path):
    found = project(tmp_path, 100, [staged()], STAGES[:1], train_time_ms=2222)
    assert (found["ce_train_time_ms"], found["horizon"], found["projected_from"]) == (2000.0, 100, None)
    assert budget.projection(None) == ""


@pytest.mark.parametrize(
    ("schedule", "steps", "stage"),
    [
        ({}, [10.0] * 50, "stage 2 of 2"),
        ({"extension_frac": 0.004, **WINDOWS}, STAGES[0], "the extension"),  # 0.4 steps of 100, 1.2 of 300
    ],
)
def test_a_stage_that_no_step_was_measured_of_is_named(tmp_path, schedule, steps, stage):
    lacks = rf"steps\.csv: holds no step of {stage}, so the time of 300 steps can't be projected"
    with pytest.raises(AnalysisError, match=lacks):
        project(tmp_path, 300, [staged(**schedule)], [steps])
    assert not (tmp_path / "budget.json").exists()


def test_a_stage_that_the_longer_run_lacks_too_is_not_asked_for(tmp_path):
    found = project(tmp_path, 120, [staged(extension_frac=0.004, **WINDOWS)], STAGES[:1])
    assert found["ce_train_time_ms"] == 60 * 10.0 + 60 * 30.0


def test_a_run_without_its_folder_projects_nothing(tmp_path):
    runs = [run_folder(tmp_path / "runs", "ce", "CE", staged(seed), val=VAL) for seed in range(2)]
    budget.ce_baseline(runs, tmp_path / "timing.csv")
    with pytest.raises(AnalysisError, match=f"no folder was given of {runs[1].run_id}"):
        budget.set_budget(tmp_path / "timing.csv", 0.1, tmp_path / "budget.json", 300, runs[:1])


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
    kd = {"step_ms": [99.0, 99.0, 22.0, 20.0, 24.0], "shares": [0.5] * 5}
    runs = [
        run_folder(tmp_path, "isolate", "CE only", make_config(**stop), step_ms=[99.0, 99.0, 10.0, 12.0, 11.0]),
        run_folder(tmp_path, "isolate", "CE + KD", make_config(kd={}, **stop), **kd),
    ]
    budget.kd_isolates(runs, tmp_path / "isolates.csv")
    rows = read_rows(tmp_path / "isolates.csv")
    assert [row["step_ms_median"] for row in rows] == ["11.0", "22.0"]
    assert [row["ratio_to_ce"] for row in rows] == ["1.0", "2.0"]


def test_isolates_are_compared_over_the_steps_that_have_kd(tmp_path):
    """KD ends after the fourth step, and the batch grows: what comes then says nothing of KD."""
    stop = {"stop_step": 6}
    times = {"CE only": [9.0, 9.0, 10.0, 10.0, 30.0, 30.0], "CE + KD": [9.0, 9.0, 15.0, 15.0, 30.0, 30.0]}
    times |= {"CE + teacher inference": [9.0, 9.0, 12.0, 12.0, 36.0, 36.0]}
    runs = []
    for label, step_ms in times.items():
        kd = {"CE only": None, "CE + KD": {}}.get(label, {"infer_only": True})
        values = {"step_ms": step_ms, "shares": [0.5] * 4}
        runs.append(run_folder(tmp_path, "isolate", label, make_config(kd=kd, **stop), **values))
    budget.kd_isolates(runs, tmp_path / "isolates.csv")
    rows = read_rows(tmp_path / "isolates.csv")
    assert [row["step_ms_median"] for row in rows] == ["10.0", "15.0", "12.0"]
    assert [row["ratio_to_ce"] for row in rows] == ["1.0", "1.5", "1.2"]


def test_isolates_that_cant_be_compared_have_no_ratio(tmp_path):
    stop = {"stop_step": 5}
    ce = run_folder(tmp_path, "isolate", "CE only", make_config(**stop), val=VAL[:1])
    oom = run_folder(
        tmp_path, "isolate", "infer", make_config(kd={"infer_only": True}, **stop), status="oom", reason="x"
    )
    shared = run_folder(tmp_path, "isolate", "CE + KD", make_config(kd={}, **stop), shares=[0.5] * 5, shared_device=1)
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
