"""Steps saved over the loss, and the break-even table, by hand."""

import pytest
from test_analysis_synthetic import make_config, run_folder

from kdclimb.analysis import savings
from kdclimb.analysis.paired import Rules
from kdclimb.analysis.targets import by_crossing
from kdclimb.analysis.tested import verdict_rows

TARGET = {"value": 5.0, "consecutive": 2, "source": "teacher_final_val", "reason": "of a test", "fixed": []}
TEACHER = {"run_id": "teacher", "train_time_ms": 150.0}
CE, KD = [6.0, 5.5, 5.0, 4.5], [5.5, 5.0, 4.8, 4.6]


def make(folder, arm, losses, seed=0, **values):
    """A run of 100 steps. CE takes 10 ms a step; KD 20 ms in the 50 steps in which it is on, then 10 ms."""
    kd = None if arm == "ce" else {}
    val = [(25 * i, loss) for i, loss in enumerate((7.0, *losses))]
    times = {"step_ms": [20.0] * 50 + [10.0] * 50, "shares": [0.5] * 50} if kd is not None else {"step_ms": 10.0}
    return run_folder(
        folder, arm, "CE" if arm == "ce" else "T1", make_config(100, seed, kd=kd), val=val, **times | values
    )


def tables(runs, amortize=5):
    reached = [by_crossing(run, "teacher_final_val", TARGET, 150.0 * (run.arm == "kd"), amortize) for run in runs]
    tested = verdict_rows(reached, Rules(0.95, 0.01, 0.8), 100, imported=False)
    return savings.break_even_rows(runs, tested, reached, 100, TEACHER, amortize)


def test_trend_holds_kd_against_each_loss_of_ce(tmp_path):
    rows = savings.trend_rows([make(tmp_path, "ce", CE), make(tmp_path, "kd", KD)], 100)
    assert [(row["ce_step"], row["kd_step"], row["steps_saved"]) for row in rows] == [
        (25, pytest.approx(50 / 3), pytest.approx(25 / 3)),  # KD passes 6.0 on its way from 7.0 to 5.5
        (50, 25.0, 25.0),
        (75, 50.0, 25.0),
        (100, None, None),
    ]
    assert rows[-1]["miss_reason"] == "never reached: best val 4.6000 against target 4.5000"


def test_trend_leaves_out_where_ce_went_up(tmp_path):
    rows = savings.trend_rows([make(tmp_path, "ce", [5.5, 5.6, 5.2, 5.1]), make(tmp_path, "kd", KD)], 100)
    assert [row["ce_step"] for row in rows] == [25, 75, 100]


def test_break_even_by_hand(tmp_path):
    """CE takes 750 ms to the target, the teacher a fifth of that; all 50 steps of KD to it cost twice a step of CE."""
    runs = [make(tmp_path, arm, losses, seed) for seed in range(3) for arm, losses in (("ce", CE), ("kd", KD))]
    (row,) = tables(runs)
    assert (row["overhead"], row["kd_share_of_tokens"]) == (pytest.approx(1.0), 1.0)
    assert (row["ce_time_ms"], row["teacher_share"]) == (750.0, pytest.approx(0.2))
    assert row["needed"] == pytest.approx(1 - 0.8 / 2) and row["needed_amortized"] == pytest.approx(1 - 0.96 / 2)
    assert row["measured"] == pytest.approx(1 / 3) and row["pays"] == 0


def test_the_teachers_share_of_the_budgets_run_and_of_ces_time_to_the_target(tmp_path):
    """150 ms: exactly a tenth of the whole run, and a fifth of the 750 ms to the target."""
    runs = [make(tmp_path, arm, losses, seed) for seed in range(3) for arm, losses in (("ce", CE), ("kd", KD))]
    budget = {"ce_train_time_ms": 1500.0, "fraction": 0.1}
    found = savings.teacher_shares(budget, TEACHER, tables(runs), "T1")
    assert (found["teacher_share_of_ce"], found["within_of_ce"]) == (0.1, True)
    assert (found["teacher_share_to_target"], found["within_to_target"]) == (pytest.approx(0.2), False)
    assert found["ce_time_to_target_ms"] == 750.0


@pytest.mark.parametrize(("teacher", "known"), [(TEACHER, 0.1), ({"run_id": None, "train_time_ms": None}, None)])
def test_a_share_of_what_is_not_known_is_none(teacher, known):
    found = savings.teacher_shares({"ce_train_time_ms": 1500.0, "fraction": 0.1}, teacher, [], None)
    assert found["teacher_share_of_ce"] == known
    assert [found[key] for key in ("ce_time_to_target_ms", "teacher_share_to_target", "within_to_target")] == [None] * 3


def test_break_even_is_level_where_times_are(tmp_path):
    """At the saving that it asks for, KD's time with its teacher is CE's."""
    runs = [make(tmp_path, arm, losses) for arm, losses in (("ce", CE), ("kd", KD))]
    (row,) = tables(runs)
    time = (1 - row["needed"]) * (1 + row["kd_share_of_tokens"] * row["overhead"]) + row["teacher_share"]
    assert time == pytest.approx(1.0)


def test_break_even_counts_tokens_where_batches_grow(tmp_path):
    """Time goes by tokens, 20 ms for each second half's step: the last 25 of CE's 75 steps are half of its time."""
    step_ms = [10.0] * 50 + [20.0] * 50
    runs = []
    for seed in range(3):
        for arm, losses in (("ce", CE), ("kd", KD)):
            config = make_config(100, seed, kd=None if arm == "ce" else {}, batch_tokens=(1000, 2000))
            val = [(25 * i, loss) for i, loss in enumerate((7.0, *losses))]
            shares = {"shares": [0.5] * 60} if arm == "kd" else {}
            label = "CE" if arm == "ce" else "T1"
            runs.append(run_folder(tmp_path, arm, label, config, val=val, step_ms=step_ms, **shares))
    (row,) = tables(runs)
    assert row["measured"] == pytest.approx(0.5) and row["kd_share_of_tokens"] == 1.0
    assert savings.share_with_kd(runs[1], 0.0) == pytest.approx((50 * 1000 + 10 * 2000) / (50 * 1000 + 50 * 2000))


def test_times_of_another_device_leave_it_open(tmp_path):
    (row,) = tables([make(tmp_path, "ce", CE), make(tmp_path, "kd", KD, device="cuda")])
    assert row["needed"] is None and "device cuda against cpu" in row["note"]


def test_without_ces_time_nothing_is_needed(tmp_path):
    (row,) = tables([make(tmp_path, "ce", [6.0, 5.9, 5.8, 5.7]), make(tmp_path, "kd", KD)])
    assert row["needed"] is None and row["note"].startswith("CE never reached this target")
