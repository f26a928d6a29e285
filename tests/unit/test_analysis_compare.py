"""KD against CE: savings by hand, the verdict in each of its cases, and what forbids a claim."""

import pytest
from test_analysis_synthetic import make_config, run_folder

from kdclimb.analysis import compare, verdict
from kdclimb.analysis.paired import Rules
from kdclimb.analysis.tables import AnalysisError
from kdclimb.analysis.tested import verdict_rows

TEACHER = {"run_id": "teacher", "candidate": "A", "train_time_ms": 300.0, "final_val": 5.0, "budget_ms": 400.0}
TEACHER |= {"imported": False}
BUDGET = {"budget_ms": 400.0, "fraction": 0.1, "horizon": 100, "projected_from": None, "clock": "measured"}
TARGET = {"value": 5.0, "consecutive": 2, "source": "teacher_final_val", "reason": "of a test", "fixed": []}
RULES = Rules(confidence=0.95, p_value=0.01, power=0.8)
POINTS = {"points": ["T1"], "reason": "best 1 of 1"}
AT_50, AT_75, NEVER = [6.0, 4.9, 4.8, 4.7], [6.0, 5.5, 4.8, 4.6], [6.5, 6.2, 6.0, 5.9]
AT_25 = [4.9, 4.8, 4.7, 4.5]
OOM = {"status": "oom", "reason": "9 GiB", "step_ms": []}


def make(folder, arm, losses, seed=0, horizon=100, **values):
    """A run of an arm with these losses at 25, 50, ... steps; a KD step takes 12 ms, another 10."""
    of_ce = arm not in ("kd", "screen", "control_random")
    kd = None if of_ce else {"random_teacher": arm == "control_random"}
    boost = (1.5, 0.15, 0.35) if arm == "control_boost" else None
    config = make_config(horizon, seed, kd=kd, boost=boost, clock=values.pop("config_clock", "measured"))
    values = {
        "val": [(25 * i, loss) for i, loss in enumerate((7.0, *losses))],
        "step_ms": 12.0 if kd else 10.0,
    } | values
    if values.get("status"):
        values["val"] = []
    label = {"ce": f"CE {horizon}", "control_tuned": "LR1.4"}.get(arm, "T1")
    return run_folder(folder / arm, arm, label, config, **values)  # tuned CE differs by what is left out here


def judge(runs, clock="measured", exploratory=False, points=POINTS, budget=BUDGET):
    rows = compare.compare_rows(runs, TARGET, TEACHER)
    tested = verdict_rows(compare.reach(runs, TARGET, TEACHER, amortize=10), RULES, 100, imported=False)
    doubts = verdict.doubts_of(rows, runs, points["points"], clock, exploratory)
    return verdict.verdict(rows, tested, budget, TEACHER, TARGET, points, doubts)


def pairs(folder, *pairs, **values):
    """CE and KD runs, a pair of curves for each seed; `values` go to the KD runs."""
    runs = []
    for seed, (ce, kd) in enumerate(pairs):
        runs.append(make(folder, "ce", ce, seed))
        runs.append(
            make(folder, "kd", NEVER, seed, **kd) if isinstance(kd, dict) else make(folder, "kd", kd, seed, **values)
        )
    return runs


def test_row_against_ce_of_the_same_horizon_and_seed(tmp_path):
    runs = [make(tmp_path, "kd", AT_50), make(tmp_path, "ce", AT_75), make(tmp_path, "ce", AT_25, seed=1)]
    runs.append(make(tmp_path, "ce", AT_50[:2], horizon=50))
    rows = compare.compare_rows(runs, TARGET, TEACHER)
    assert [(row["arm"], row["horizon"]) for row in rows] == [("ce", 100), ("ce", 100), ("ce", 50), ("kd", 100)]
    kd = rows[-1]
    assert (kd["steps_to_target"], kd["tokens_to_target"], kd["time_to_target_ms"]) == (50, 50000, 600.0)
    assert kd["time_to_target_with_teacher_ms"] == 900.0
    assert (kd["steps_saved"], kd["tokens_saved"]) == (25, 25000)
    assert (kd["time_saved_ms"], kd["time_saved_with_teacher_ms"]) == (150.0, -150.0)
    assert kd["final_val_delta"] == pytest.approx(0.1) and kd["first_val_delta"] == 0.0
    assert all(rows[0][key] is None for key in (*compare.SAVINGS, "final_val_delta", "first_val_delta"))


def test_teacher_counts_for_kd_and_for_no_control(tmp_path):
    arms = ("ce", "control_boost", "control_random", "screen")
    rows = compare.compare_rows([make(tmp_path, arm, AT_50) for arm in arms], TARGET, TEACHER)
    added = {row["arm"]: row["time_to_target_with_teacher_ms"] - row["time_to_target_ms"] for row in rows}
    assert added == {"ce": 0.0, "control_boost": 0.0, "control_random": 0.0, "screen": 300.0}


def test_no_match_leaves_savings_empty(tmp_path):
    rows = compare.compare_rows([make(tmp_path, "ce", AT_75, seed=1), make(tmp_path, "kd", AT_50)], TARGET, TEACHER)
    assert rows[-1]["steps_saved"] is None and rows[-1]["final_val_delta"] is None


def test_another_teacher_is_refused(tmp_path):
    run = make(tmp_path, "kd", AT_50)
    with pytest.raises(AnalysisError, match=r"config\.json: kd\.teacher teacher is not the selected teacher"):
        compare.compare_rows([run], TARGET, TEACHER | {"run_id": "other"})


@pytest.mark.parametrize(
    ("edit", "note"),
    [
        ({"shared_device": 1}, "shared its device"),
        ({"device": "cuda"}, "device cuda against cpu"),
        ({"threads": 4}, "threads 4 against 2"),
    ],
)
def test_times_that_cant_be_compared_are_left_out_and_steps_stay(tmp_path, edit, note):
    result = judge(pairs(tmp_path, *[(AT_75, AT_50)] * 3, **edit))
    assert result["steps_saved_mean"] == 25.0 and result["kd_pays_steps"] is True
    assert result["time_saved_ms_mean"] is None and result["kd_pays_time_with_teacher"] is None
    assert "Times are not compared." in result["sentence"]
    (doubt,) = result["not_claimable_because"]
    assert doubt.startswith("times only: ") and note in doubt


def test_kd_pays_in_steps_and_not_in_time_with_its_teacher(tmp_path):
    slower = [7.5, 4.9, 4.8, 4.7]
    result = judge(pairs(tmp_path, (AT_75, AT_50), (AT_75, AT_50), (AT_75, slower)))
    assert (result["steps_saved_mean"], result["steps_saved_min"], result["steps_saved_max"]) == (25.0, 25, 25)
    assert result["tokens_saved_mean"] == 25000.0
    assert result["time_saved_ms_mean"] == 150.0  # 750 - 600
    assert result["time_saved_with_teacher_ms_mean"] == -150.0
    assert (result["kd_pays_steps"], result["kd_pays_time_with_teacher"], result["n_seeds"]) == (True, False, 3)
    assert (result["claimable"], result["not_claimable_because"]) == (True, [])
    assert (result["teacher_ms"], result["budget_ms"], result["budget_share"]) == (300.0, 400.0, 0.75)
    assert result["sentence"].startswith(
        "KD pays in steps: it reached the target of 5.0000 nats (the teacher's final validation loss) 25 steps "
        "earlier than CE (with each of 3 seeds; 100-step schedule); "
    )
    assert "one-sided p = 0.00" in result["sentence"] and "3 seeds" in result["sentence"]
    assert (
        "With the teacher's 300 ms of training counted it needed 150 ms more; without, 150 ms less"
        in result["sentence"]
    )


def test_kd_pays_in_time_too_where_it_covers_its_teacher(tmp_path):
    result = judge(pairs(tmp_path, *[(AT_75, AT_25)] * 3))
    assert result["time_saved_with_teacher_ms_mean"] == 150.0 and result["kd_pays_time_with_teacher"] is True
    assert "counted it needed 150 ms less; without, 450 ms less" in result["sentence"]


def test_a_projected_budget_is_named_and_forbids_no_claim(tmp_path):
    runs = pairs(tmp_path, *[(AT_75, AT_50)] * 3)
    measured, result = judge(runs), judge(runs, budget=BUDGET | {"horizon": 1555, "projected_from": 1000})
    words = "The teacher's budget of 400 ms is 10% of CE's time over 1,555 steps, projected from 1,000-step runs."
    assert result["sentence"] == f"{measured['sentence']} {words}"
    assert result["claimable"] and (result["budget_projected_from"], result["horizon"]) == (1000, 100)


def test_kd_later_than_ce_does_not_pay(tmp_path):
    result = judge(pairs(tmp_path, *[(AT_25, AT_75)] * 3))
    assert result["steps_saved_mean"] == -50.0 and result["kd_pays_steps"] is False
    assert result["sentence"].startswith("KD does not pay: it reached the target of 5.0000 nats")
    assert "50 steps later than CE" in result["sentence"]


def test_gain_on_average_but_not_with_every_seed_is_not_called_paying(tmp_path):
    result = judge(pairs(tmp_path, (AT_75, AT_25), (AT_75, AT_25), (AT_50, AT_75)))
    assert result["steps_saved_mean"] == 25.0 and result["kd_pays_steps"] is False
    assert result["sentence"].startswith("KD is not shown to pay: it reached the target")
    assert "could have shown a saving of" in result["sentence"] and "one of this size needs" in result["sentence"]


def test_no_difference_does_not_pay(tmp_path):
    result = judge(pairs(tmp_path, *[(AT_50, AT_50)] * 3))
    assert result["kd_pays_steps"] is False and "as soon as CE (with each of 3 seeds" in result["sentence"]
    assert "schedule); read between validations, " in result["sentence"]  # which may be another answer


def test_two_seeds_judge_nothing(tmp_path):
    result = judge(pairs(tmp_path, *[(AT_75, AT_50)] * 2))
    assert result["kd_pays_steps"] is None and result["kd_pays_time_with_teacher"] is None
    assert (
        result["sentence"].startswith("KD is not judged: it reached the target") and "2 of the 3" in result["sentence"]
    )


def test_an_arm_that_is_only_its_lr_is_called_an_artefact(tmp_path):
    """KD is sooner than CE with every seed, and so is the same LR without KD, as much or more."""
    runs = pairs(tmp_path, *[(AT_75, AT_50)] * 3)
    runs += [make(tmp_path, "control_boost", AT_50, seed) for seed in range(3)]
    result = judge(runs)
    assert (result["kd_pays_steps"], result["explained_by"]) == (False, ["control_boost"])
    assert result["sentence"].startswith("KD saves steps, but not by what it teaches")
    assert "CE with KD's LR is sooner than CE too, and KD is not sooner than it" in result["sentence"]


def test_a_control_that_is_as_slow_as_ce_explains_nothing(tmp_path):
    runs = pairs(tmp_path, *[(AT_75, AT_50)] * 3)
    runs += [make(tmp_path, "control_boost", AT_75, seed) for seed in range(3)]
    result = judge(runs)
    assert (result["kd_pays_steps"], result["explained_by"], result["not_told_apart_from"]) == (True, [], [])
    assert result["sentence"].endswith("KD is sooner than CE with KD's LR.")


def test_a_control_of_another_label_explains_the_gain_too(tmp_path):
    runs = pairs(tmp_path, *[(AT_75, AT_50)] * 3)
    runs += [make(tmp_path, "control_tuned", AT_25, seed) for seed in range(3)]
    result = judge(runs)
    assert (result["explained_by"], result["not_told_apart_from"]) == (["control_tuned"], [])
    assert "CE as tuned as KD is sooner than CE too, and KD is not sooner than it" in result["sentence"]


def test_in_time_kd_must_be_better_than_controls_that_need_no_teacher(tmp_path):
    """Tuned CE takes more steps than KD, and less time than KD and its teacher."""
    runs = pairs(tmp_path, *[(AT_75, AT_25)] * 3)
    assert judge(runs)["kd_pays_time_with_teacher"] is True
    runs += [make(tmp_path, "control_tuned", AT_50, seed) for seed in range(3)]
    result = judge(runs)
    assert (result["kd_pays_steps"], result["kd_pays_time_with_teacher"]) == (True, False)
    assert (result["explained_by"], result["explained_in_time_by"]) == ([], ["control_tuned"])
    assert "KD is sooner than CE as tuned as KD." in result["sentence"]
    assert "saves against CE, and is not shown to be better than CE as tuned as KD." in result["sentence"]


@pytest.mark.parametrize(("end", "pays"), [(4.2, False), (4.8, True)])
@pytest.mark.parametrize("arm", ["control_extra", "control_batch"])
def test_in_time_kd_must_end_below_the_controls_of_more_steps(tmp_path, arm, end, pays):
    runs = pairs(tmp_path, *[(AT_75, AT_25)] * 3)
    runs += [make(tmp_path, arm, [*AT_75, end], seed, horizon=125) for seed in range(3)]
    result = judge(runs)
    assert (result["kd_pays_steps"], result["kd_pays_time_with_teacher"]) == (True, pays)
    assert result["explained_in_time_by"] == ([] if pays else [arm]) and result["explained_by"] == []


def test_a_control_that_failed_with_one_seed_gives_kd_no_credit(tmp_path):
    runs = pairs(tmp_path, *[(AT_75, AT_50)] * 3)
    runs += [make(tmp_path, "control_boost", AT_75, seed, **({} if seed else OOM)) for seed in range(3)]
    runs += [make(tmp_path, "control_extra", [*AT_75, 4.2], s, horizon=125, **({} if s else OOM)) for s in range(3)]
    result = judge(runs)
    assert (result["kd_pays_steps"], result["not_told_apart_from"]) == (False, ["control_boost"])
    assert "inf" not in result["sentence"] and "nan" not in result["sentence"]


def test_the_teacher_alone_reaches_its_own_loss(tmp_path):
    """It stands there once, at its end."""
    teacher = make(tmp_path, "teacher", [6.0, 5.5, 5.2, 5.0])
    selected = TEACHER | {"run_id": teacher.run_id}
    (found,) = (r for r in compare.reach([teacher], TARGET, selected, 10) if r.place["measure"] == "crossing")
    assert found.row()["steps"] == 100.0 and found.row()["time_with_teacher_ms"] == 1000.0


def test_a_control_with_too_few_seeds_leaves_it_open(tmp_path):
    runs = [*pairs(tmp_path, *[(AT_75, AT_50)] * 3), make(tmp_path, "control_boost", AT_75)]
    result = judge(runs)
    assert (result["kd_pays_steps"], result["not_told_apart_from"]) == (False, ["control_boost"])


def test_target_never_reached_by_kd(tmp_path):
    result = judge(pairs(tmp_path, *[(AT_50, NEVER)] * 3))
    assert (result["kd_pays_steps"], result["kd_pays_time_with_teacher"], result["n_seeds"]) == (False, False, 0)
    assert result["sentence"].startswith("KD does not pay: CE reached the target")
    assert "best val 5.9000 against target 5.0000" in result["sentence"]


@pytest.mark.parametrize("seeds", [1, 2])
def test_with_few_seeds_a_target_that_kd_missed_is_not_judged(tmp_path, seeds):
    result = judge(pairs(tmp_path, *[(AT_50, NEVER)] * seeds))
    assert result["kd_pays_steps"] is None
    assert result["sentence"].startswith(f"KD is not judged, with {seeds} of the 3 seeds that this needs: CE reached")


def test_target_never_reached_by_ce(tmp_path):
    result = judge(pairs(tmp_path, *[(NEVER, AT_50)] * 6, (NEVER, AT_75)))
    assert (result["kd_pays_steps"], result["kd_pays_time_with_teacher"]) == (True, False)  # 600 + 300 of 1000 ms
    assert result["steps_saved_mean"] is None and not result["claimable"]
    assert (
        "KD reached the target of 5.0000 nats" in result["sentence"]
        and "at step 50, 50, 50, 50, 50, 50, 75" in result["sentence"]
    )
    assert "can't be counted" in result["sentence"]


def test_target_never_reached_by_either(tmp_path):
    result = judge(pairs(tmp_path, (NEVER, NEVER), (NEVER, NEVER)))
    assert (result["kd_pays_steps"], result["kd_pays_time_with_teacher"]) == (None, None)
    assert result["sentence"].startswith("Neither KD nor CE reached the target")


def test_seed_on_which_kd_failed_counts_against_it(tmp_path):
    result = judge(pairs(tmp_path, (AT_75, AT_50), (AT_75, OOM), (NEVER, NEVER)))
    assert (result["kd_pays_steps"], result["n_seeds"], result["steps_saved_mean"]) == (False, 1, 25.0)
    assert not result["claimable"]
    assert "only CE reached it with 1 of 3 seeds, neither did with 1 of 3 seeds" in result["sentence"]


def test_no_kd_run_succeeded(tmp_path):
    result = judge(pairs(tmp_path, (AT_75, OOM), (AT_75, OOM)))
    assert (result["kd_pays_steps"], result["n_seeds"], result["claimable"]) == (None, 0, False)
    assert result["sentence"].startswith("No KD run succeeded") and "seed 1: oom: 9 GiB" in result["sentence"]


def test_nothing_was_promoted(tmp_path):
    result = judge([make(tmp_path, "ce", AT_75)], points={"points": [], "reason": "every screened run failed: x"})
    assert result["sentence"] == "KD was not compared with CE at the full horizon: every screened run failed: x."
    assert set(result["kd_alive"].values()) == {None}


def test_first_promoted_point_is_judged_even_where_another_does_better(tmp_path):
    runs = pairs(tmp_path, *[(AT_75, AT_50)] * 3)
    config = make_config(100, kd={"temperature": 2.0})
    val = [(25 * i, loss) for i, loss in enumerate((7.0, *AT_25))]
    runs.append(run_folder(tmp_path, "kd", "T2", config, val=val))
    result = judge(runs, points={"points": ["T1", "T2"], "reason": "best 2 of 2"})
    assert (result["point"], result["steps_saved_mean"], result["n_seeds"]) == ("T1", 25.0, 3)


@pytest.mark.parametrize(
    ("seeds", "clock", "exploratory", "edit", "doubts"),
    [
        (3, "measured", False, {}, []),
        (3, "modelled", False, {}, ["time is modelled from FLOPs, not measured"]),
        (3, "measured", True, {}, ["the campaign is exploratory: a lock was lifted"]),
        (1, "measured", False, {}, ["KD and CE both reached the target with 1 seed; a claim needs 3 or more"]),
        (3, "measured", False, {"code_hash": "b"}, ["the runs come from 2 versions of the code: b, c0de00000000"]),
    ],
)
def test_what_forbids_a_claim(tmp_path, seeds, clock, exploratory, edit, doubts):
    result = judge(pairs(tmp_path, *[(AT_75, AT_50)] * seeds, **edit), clock, exploratory)
    assert result["not_claimable_because"] == doubts
    assert result["claimable"] is not bool(doubts)


def test_kd_alive_compares_the_first_validations_at_the_screen(tmp_path):
    runs = [
        make(tmp_path, "ce", [5.8, 5.0], horizon=50),
        make(tmp_path, "ce", [5.1, 5.0], horizon=50, seed=1),
        make(tmp_path, "ce", AT_75),
        make(tmp_path, "screen", [5.2, 5.0], horizon=50),
        make(tmp_path, "control_random", [6.6, 6.0], horizon=50),
    ]
    assert judge(runs)["kd_alive"] == {
        "first_val_kd": 5.2,
        "first_val_ce": 5.8,
        "first_val_random": 6.6,
        "kd_below_ce": True,
        "random_below_ce": False,
    }
    alive = judge(runs[:4])["kd_alive"]
    assert (alive["first_val_random"], alive["random_below_ce"], alive["kd_below_ce"]) == (None, None, True)


def test_a_control_that_is_not_told_apart_says_why():
    """Three pairs of which one is censored leave a sign test, which three seeds can't pass."""
    row = {"against": "control_smooth", "note": "1 of 3 pairs censored: median and sign test"}
    found = {"explained_by": [], "not_told_apart_from": ["control_smooth"]}
    said = verdict._controls_part(found, {"controls": {"steps": [row]}})
    assert said == f"Controls: CE with label smoothing is not told apart ({row['note']})."
