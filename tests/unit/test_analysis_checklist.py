"""The checklist of teachers, the stop conditions, and the table of all candidates."""

import pytest
from test_analysis_synthetic import make_config, run_folder

from kdclimb.analysis import checklist
from kdclimb.analysis.selection import EARLY_COLUMNS

PROBE = {"status": "ok", "projected_ms": 80.0}
FALLING = (7.0, 6.0, 5.5, 5.4)
TEACHER = {
    "run_id": "t",
    "candidate": "A",
    "train_time_ms": 90.0,
    "budget_ms": 100.0,
    "final_val": 5.0,
    "reason": "best",
}


def trained(losses=FALLING, ms=90.0, **values):
    row = {"status": "ok", "train_time_ms": ms, "missing_artifacts": "", "imported": 0}
    losses = [*losses, *[None] * (len(EARLY_COLUMNS) - len(losses))]
    return row | dict(zip(EARLY_COLUMNS, losses, strict=True)) | values


def test_all_points_met():
    found = checklist.checks(PROBE, trained(), 100.0)
    assert {found[check] for check in checklist.CHECKS} == {"yes"} and found["promoted"] == "yes"
    assert found["check_budget_by"] == "measured: 90 ms of 100 ms"
    assert found["check_falling_by"] == "7.0000, 6.0000, 5.5000, 5.4000"
    assert found["projection_error"] == pytest.approx(90 / 80 - 1)


@pytest.mark.parametrize(
    ("row", "check"),
    [
        (trained(ms=100.1), "check_budget"),
        (trained((7.0, 6.0, 6.0, 5.4)), "check_falling"),
        (trained((7.0,)), "check_falling"),
        (trained(status="oom"), "check_no_oom"),
        (trained(missing_artifacts="val.csv"), "check_artifacts"),
    ],
)
def test_one_point_missed_is_no_promotion(row, check):
    found = checklist.checks(PROBE, row, 100.0)
    assert [name for name in checklist.CHECKS if found[name] == "no"] == [check] and found["promoted"] == "no"


def test_untrained_is_judged_by_its_projection_and_not_promoted():
    found = checklist.checks(PROBE, None, 70.0)
    assert (found["check_budget"], found["check_budget_by"]) == ("no", "projected: 80 ms of 70 ms")
    assert (found["check_falling"], found["check_artifacts"], found["promoted"]) == (None, None, "no")


def test_an_imported_teachers_early_losses_are_not_asked_for():
    found = checklist.checks({}, trained((5.0,), imported=1), 100.0)
    assert (found["check_budget_by"], found["promoted"]) == ("declared: 90 ms of 100 ms", "yes")
    assert (found["check_falling"], found["check_falling_by"], found["projection_error"]) == (None, "not known", None)


def side(steps, miss=""):
    return {"seed": 0, "steps_to_target": steps, "miss_reason": miss}


def conditions(teacher=TEACHER, pairs=(), share=0.9):
    teachers = [{"candidate": "A", "promoted": "yes"}, {"candidate": "B", "promoted": "no"}]
    verdict = {"budget_share": share, "sentence": "KD pays."}
    return {row["condition"]: row for row in checklist.stop_conditions(teachers, teacher, list(pairs), verdict)}


def test_stop_conditions_with_a_teacher_and_a_comparison():
    found = conditions(pairs=[{"kd": side(50), "ce": side(None, "never reached: best val 5.1")}])
    assert [row["met"] for row in found.values()] == ["yes", "yes", "yes"]
    assert found["teacher search"]["evidence"].startswith("1 of 2 pass the checklist; A took 90 ms of 100 ms")
    assert found["KD campaign"]["evidence"] == "seed 0: KD 50 steps, CE never reached: best val 5.1"
    assert found["final"]["evidence"] == "teacher: 90% of the budget; KD pays."


def test_stop_conditions_without():
    found = conditions(TEACHER | {"run_id": None, "reason": "no teacher meets it"}, share=None)
    assert [row["met"] for row in found.values()] == ["no", "no", "no"]
    assert "no teacher meets it" in found["teacher search"]["evidence"]


def test_summary_lists_every_teacher_and_kd_run(tmp_path):
    counted = [
        run_folder(tmp_path, "ngram_teacher", name, make_config(seed=i), val=[(0, 6.0)], train_time_ms=ms)
        for i, (name, ms) in enumerate((("2-gram", 50.0), ("3-gram", 150.0)))
    ]
    nothing = dict.fromkeys(checklist.SUMMARY_COLUMNS)
    run = nothing | {"run_id": "r", "status": "ok", "reason": "", "miss_reason": "never reached", "label": "T1"}
    rows = checklist.summary(
        [nothing | {"candidate": "A", "verdict": "selected"}],
        counted,
        100.0,
        [run | {"arm": "ce"}, run | {"arm": "screen"}, run | {"arm": "kd", "label": "T2"}],
        "T1",
    )
    assert [(row["kind"], row["candidate"], row["verdict"]) for row in rows] == [
        ("teacher", "A", "selected"),
        ("ngram_teacher", "2-gram", "within the budget"),
        ("ngram_teacher", "3-gram", "rejected"),
        ("kd_screen", "T1", "promoted"),
        ("kd_full", "T2", "not promoted"),
    ]
    assert rows[3]["reason"] == "never reached"
