"""When a target counts as reached, and how the screen ranks."""

import pytest
from test_analysis_synthetic import make_config, read_rows, run_folder

from kdclimb.analysis import targets
from kdclimb.artifacts import write_json

TARGET = {"value": 5.0, "consecutive": 2, "source": "teacher_final_val", "reason": "of a test", "fixed": []}


def cross(tmp_path, losses, target=TARGET, **values):
    """The crossing of a run validated every 25 steps, step 0 first; a step takes 10 ms and 1000 tokens."""
    val = [(25 * i, loss) for i, loss in enumerate(losses)]
    run = run_folder(tmp_path, "ce", "CE", make_config(200), val=val, **values)
    return targets.crossing(run, target)


def test_first_of_two_in_a_row_counts(tmp_path):
    found = cross(tmp_path, [7.0, 6.0, 4.5, 4.4, 4.3])
    assert (found.step, found.tokens, found.time_ms, found.miss) == (50, 50000, 500.0, "")
    assert found.interp == pytest.approx(25 + 25 * (6.0 - 5.0) / (6.0 - 4.5))


def test_equal_to_the_target_counts(tmp_path):
    found = cross(tmp_path, [7.0, 6.0, 5.0, 5.0])
    assert (found.step, found.interp) == (50, 50.0)


def test_single_dip_does_not_count(tmp_path):
    assert cross(tmp_path, [7.0, 4.9, 5.1, 4.8, 4.7]).step == 75


def test_dip_at_the_last_validation_is_not_confirmed(tmp_path):
    found = cross(tmp_path, [7.0, 6.0, 4.9])
    assert found.step is None
    assert found.miss == "met at step 50, but never for 2 validations in a row: best val 4.9000 against target 5.0000"


def test_step_0_never_counts(tmp_path):
    assert cross(tmp_path, [4.0, 4.0, 4.0]).step == 25
    assert cross(tmp_path / "b", [4.0, 4.0, 6.0]).step is None


def test_crossing_right_after_step_0_interpolates_from_it(tmp_path):
    assert cross(tmp_path, [6.0, 4.0, 4.0]).interp == 12.5


def test_three_in_a_row_where_asked(tmp_path):
    losses = [7.0, 4.9, 4.9, 5.1, 4.8, 4.7, 4.6]
    assert cross(tmp_path, losses, TARGET | {"consecutive": 3}).step == 100


@pytest.mark.parametrize(
    ("losses", "values", "miss"),
    [
        ([7.0, 6.0, 5.5, 5.6], {}, "never reached: best val 5.5000 against target 5.0000"),
        ([7.0, float("nan"), float("nan")], {}, "no validation after step 0"),
        ([7.0], {}, "no validation after step 0"),
        ([], {"status": "diverged", "reason": "NaN at 3", "step_ms": []}, "diverged: NaN at 3"),
        ([], {"status": "oom", "step_ms": []}, "oom: no reason recorded"),
    ],
)
def test_miss_says_why(tmp_path, losses, values, miss):
    found = cross(tmp_path, losses, **values)
    assert (found.step, found.interp, found.tokens, found.time_ms, found.miss) == (None, None, None, None, miss)


def test_failed_run_does_not_reach_a_target_it_passed(tmp_path):
    found = cross(tmp_path, [7.0, 4.0, 4.0], status="diverged", reason="later", step_ms=[10.0] * 60)
    assert found.step is None


def test_no_target(tmp_path):
    found = cross(tmp_path, [7.0, 4.0, 4.0], TARGET | {"value": None, "reason": "no teacher was selected", "fixed": []})
    assert (found.step, found.miss) == (None, "no target: no teacher was selected")


def test_stability_sums_the_upward_moves(tmp_path):
    val = [(0, 6.0), (25, 5.0), (50, 5.25), (75, 5.0), (100, 5.5)]
    run = run_folder(tmp_path, "screen", "T1", make_config(100, kd={}), val=val)
    assert targets.stability(run) == 0.75
    assert targets.first_val(run) == 5.0


def ending(folder, *ends, arm="ce", **values):
    """Complete runs at 50, 100, 200, ... steps of one seed with these final losses; a step takes 10 ms."""
    runs = []
    for i, loss in enumerate(ends):
        horizon = 50 * 2**i
        config = make_config(horizon, kd=None if arm == "ce" else {})
        val = [(0, 7.0), (25, 6.0), (horizon, loss)]
        runs.append(run_folder(folder, arm, "T1", config, val=val, **values))
    return runs


def needed(runs, value=5.0, cost_ms=0.0):
    return targets.by_horizon(runs, "x", TARGET | {"value": value}, cost_ms, amortize=4)


def test_the_shortest_complete_horizon_lies_between_those_that_miss_and_meet_the_target(tmp_path):
    """Losses fall by 0.5 with each doubling, so 5.25 is half a doubling past 100 steps."""
    found = needed(ending(tmp_path, 6.0, 5.5, 5.0), 5.25, cost_ms=80.0)
    row = found.row()
    assert row["steps"] == pytest.approx(100 * 2**0.5) and row["miss_reason"] == ""
    assert row["tokens"] == pytest.approx(1000 * row["steps"]) and row["time_ms"] == pytest.approx(10 * row["steps"])
    assert row["time_with_teacher_ms"] - row["time_ms"] == pytest.approx(80.0)
    assert row["time_amortized_ms"] - row["time_ms"] == pytest.approx(20.0)


def test_a_complete_horizon_has_the_cache_of_its_own_length_and_students_share_the_teacher_alone(tmp_path):
    runs = ending(tmp_path, 6.0, 5.5, 5.0, arm="kd")
    for run, cache_ms in zip(runs, (10.0, 20.0, 40.0), strict=True):
        run.summary["kd_cache_ms"] = cache_ms
    row = needed(runs, 5.25, cost_ms=80.0).row()
    cache_ms = 0.2 * row["steps"]  # 141 steps lie between 20 and 40 ms
    assert row["time_with_teacher_ms"] - row["time_ms"] == pytest.approx(80.0 + cache_ms)
    assert row["time_amortized_ms"] - row["time_ms"] == pytest.approx(20.0 + cache_ms)
    crossed = targets.by_crossing(runs[-1], "x", TARGET | {"value": 6.5, "consecutive": 1}, 80.0, 4).row()
    assert crossed["time_with_teacher_ms"] - crossed["time_ms"] == pytest.approx(80.0 + 40.0)
    assert crossed["time_amortized_ms"] - crossed["time_ms"] == pytest.approx(20.0 + 40.0)
    assert needed(runs, 4.0, cost_ms=80.0).seen["time_with_teacher_ms"][0] == pytest.approx(2000 + 40.0 + 80.0)


def test_a_run_that_failed_leaves_its_complete_horizons_unknown(tmp_path):
    runs = ending(tmp_path, 6.0, 5.5, 5.2, 5.0)
    failed = run_folder(tmp_path / "b", "ce", "T1", make_config(200), status="diverged", reason="loss is nan")
    found = needed([*runs[:2], failed, runs[3]], 5.25)
    assert found.seen["steps"] == (0.0, float("inf"))
    assert found.miss == "1 of 4 runs failed: 200 steps, diverged: loss is nan"


def test_a_bump_is_made_monotone(tmp_path):
    """5.0 and 5.2 at 100 and 200 steps become 5.1 at both, so 5.05 is met only after 200."""
    assert needed(ending(tmp_path, 6.0, 5.0, 5.2, 5.0), 5.05).seen["steps"][0] == pytest.approx(200 * 2**0.5)


def test_horizons_that_all_miss_or_all_meet_the_target_bound_it(tmp_path):
    runs = ending(tmp_path, 6.0, 5.5, 5.2)
    longer, shorter = needed(runs, 5.0), needed(runs, 6.5)
    assert longer.seen["steps"] == (200.0, float("inf")) and shorter.seen["steps"] == (0.0, 50.0)
    assert longer.row()["steps"] is None and "longer than the longest horizon, 200 steps" in longer.miss
    assert "shorter than the shortest horizon, 50 steps, which ends at 6.0000 against target 6.5000" in shorter.miss


def test_two_horizons_are_too_few(tmp_path):
    found = needed(ending(tmp_path, 6.0, 4.0))
    assert found.seen["steps"] == (0.0, float("inf")) and found.miss == "2 of the 3 horizons that this needs"


def test_by_crossing_counts_the_teacher_and_bounds_what_was_not_reached(tmp_path):
    (run,) = ending(tmp_path, 4.9)
    reached = targets.by_crossing(run, "x", TARGET | {"value": 6.5, "consecutive": 1}, 80.0, 4)
    assert reached.row()["steps"] == 12.5 and reached.row()["time_with_teacher_ms"] == 125.0 + 80.0
    missed = targets.by_crossing(run, "x", TARGET | {"value": 4.0}, 80.0, 4)
    assert missed.seen["time_with_teacher_ms"] == (580.0, float("inf")) and missed.row()["steps"] is None
    failed = run_folder(tmp_path / "b", "ce", "CE", make_config(50), status="oom", reason="9 GiB")
    assert targets.by_crossing(failed, "x", TARGET, 0.0, 4).miss == "oom: 9 GiB"


def test_targets_have_names(tmp_path):
    names = targets.all_targets(TARGET | {"fixed": [4.6, 4.25]})
    assert {name: target["value"] for name, target in names.items()} == {
        "teacher_final_val": 5.0,
        "4.6": 4.6,
        "4.25": 4.25,
    }
    assert list(targets.all_targets(TARGET | {"value": None})) == []


def screened(tmp_path, **points):
    """screen.csv of points {label: write_run values}, told apart by their temperature."""
    runs = []
    for i, (label, values) in enumerate(points.items()):
        boost = (1.5, 0.15, 0.35) if label.endswith("b") else None
        config = make_config(100, kd={"temperature": 1.0 + i}, boost=boost)
        runs.append(run_folder(tmp_path / "runs", "screen", label, config, **values))
    write_json(tmp_path / "target.json", TARGET)
    targets.kd_screen(runs, tmp_path / "target.json", tmp_path / "screen.csv")
    return read_rows(tmp_path / "screen.csv")


def curve(*losses):
    return {"val": [(25 * i, loss) for i, loss in enumerate((7.0, *losses))]}


def test_screen_ranks_by_steps_then_stability_then_loss_then_label(tmp_path):
    rows = screened(
        tmp_path,
        failed={"status": "diverged", "reason": "NaN", "step_ms": [10.0] * 30, "val": [(0, 7.0), (25, 3.0)]},
        never=curve(5.5, 5.4, 5.3, 5.2),
        never_bumpy=curve(5.1, 5.2, 5.1, 5.05),
        late=curve(6.0, 5.5, 4.0, 3.0),
        soon_bumpy=curve(6.0, 4.5, 4.6, 3.0),
        soon_worse=curve(6.0, 4.5, 4.4, 4.3),
        soon=curve(6.0, 4.5, 4.4, 4.2),
        a_soon=curve(6.0, 4.5, 4.4, 4.2),
    )
    order = ["a_soon", "soon", "soon_worse", "soon_bumpy", "late", "never", "never_bumpy", "failed"]
    assert [row["label"] for row in rows] == order
    assert [row["rank"] for row in rows] == [str(i) for i in range(1, 9)]
    assert [row["steps_to_target"] for row in rows] == ["50"] * 4 + ["75", "", "", ""]
    assert rows[-1]["miss_reason"] == "diverged: NaN"


def test_screen_columns(tmp_path):
    values = curve(6.0, 4.5, 4.4, 4.3) | {"shares": [0.5, 0.3, 0.1, 0.0, 0.0], "kd_stop_step": 50}
    boosted, plain = screened(tmp_path, b=values, a=curve(6.0, 5.5, 5.0, 4.9))
    assert (boosted["lr_boost_mult"], boosted["lr_boost_hold_frac"], boosted["lr_boost_drop_frac"]) == (
        "1.5",
        "0.15",
        "0.35",
    )
    assert (plain["lr_boost_mult"], plain["lr_boost_hold_frac"], plain["temperature"]) == ("1.0", "", "2.0")
    assert float(boosted["kd_share_mean"]) == pytest.approx(0.3)
    assert (boosted["kd_stop_step"], plain["kd_share_mean"], boosted["first_val"]) == ("50", "", "6.0")


def test_collected_rows_carry_crossing_and_summary(tmp_path):
    run = run_folder(tmp_path / "runs", "kd", "T1", make_config(100, 3, kd={}), **curve(6.0, 4.5, 4.4, 4.3))
    write_json(tmp_path / "target.json", TARGET)
    targets.collect([run], tmp_path / "target.json", tmp_path / "full.csv")
    (row,) = read_rows(tmp_path / "full.csv")
    expected = {"arm": "kd", "kind": "kd", "label": "T1", "seed": "3", "horizon": "100", "steps_to_target": "50"}
    expected |= {"tokens_to_target": "50000", "time_to_target_ms": "500.0", "final_val": "4.3", "status": "ok"}
    assert {key: row[key] for key in expected} == expected
