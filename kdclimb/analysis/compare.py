"""KD against CE: the tidy tables of a campaign.

A run is compared with the CE run of the same horizon and seed, so that neither the LR schedule nor the
seed can pass for an effect of KD. Saved = CE minus the run (positive is better); delta = the run minus
CE (for losses, negative is better).
"""

from __future__ import annotations

from pathlib import Path

from kdclimb.analysis.budget import anchor_of, at_one_speed, read_budget, refuse_timing
from kdclimb.analysis.checklist import CHECK_COLUMNS, STOP_COLUMNS, SUMMARY_COLUMNS, checks, stop_conditions, summary
from kdclimb.analysis.paired import Rules
from kdclimb.analysis.savings import BREAK_EVEN_COLUMNS, TREND_COLUMNS, break_even_rows, teacher_shares, trend_rows
from kdclimb.analysis.selection import PROBE_COLUMNS, SELECTED_KEYS, TRAINED_COLUMNS, at_budgets_speed
from kdclimb.analysis.tables import (
    RUN_COLUMNS,
    AnalysisError,
    RunFolder,
    read_csv,
    read_json,
    write_csv,
    write_json,
)
from kdclimb.analysis.targets import (
    REACHED_COLUMNS,
    SCREEN_COLUMNS,
    Reached,
    all_targets,
    by_crossing,
    by_final,
    by_horizon,
    cache_ms_of,
    crossing,
    first_val,
    read_target,
)
from kdclimb.analysis.tested import VERDICT_COLUMNS, verdict_rows
from kdclimb.analysis.tuning import TUNING_COLUMNS, tuning, tuning_rows
from kdclimb.analysis.verdict import SAVINGS, doubts_of, ngram_sentence, no_teacher, pair_up, verdict
from kdclimb.imported import LOGGED

CURVE_COLUMNS = tuple(
    "arm label run_id seed horizon step tokens train_time_ms val_loss kd_active teacher_kl time_with_teacher_ms".split()
)
COMPARED_ARMS = tuple(
    "ce kd ngram control_boost control_tuned control_smooth control_batch control_extra control_growth "
    "screen control_random log".split()
)
JUDGED_ARMS = tuple(arm for arm in COMPARED_ARMS if arm not in ("screen", "control_random", "log"))
COMPARE_COLUMNS = tuple(
    "arm label run_id horizon seed status steps_to_target steps_to_target_interp tokens_to_target time_to_target_ms "
    "time_to_target_with_teacher_ms miss_reason final_val first_val steps_saved tokens_saved time_saved_ms "
    "time_saved_with_teacher_ms final_val_delta first_val_delta anchor_ms speed time_note".split()
)
TEACHER_COLUMNS = (
    *"candidate imported verdict reason projected_ms train_time_ms budget_ms final_val best_val params_stored".split(),
    *"params_active flops_per_token probe_step_ms probe_run_id run_id status steps".split(),
    *CHECK_COLUMNS,
)


def compare(
    runs: list[RunFolder],
    budget: Path,
    probe: Path,
    projected: Path,
    trained: Path,
    measured: Path,
    selected: Path,
    target: Path,
    screen: Path,
    ce_screen: Path,
    promoted: Path,
    rules: dict,
    clock: str,
    exploratory: bool,
    out_curves: Path,
    out_runs: Path,
    out_compare: Path,
    out_teachers: Path,
    out_reached: Path,
    out_tests: Path,
    out_trend: Path,
    out_break_even: Path,
    out_stop: Path,
    out_tuning: Path,
    out_summary: Path,
    out_verdict: Path,
) -> None:
    """Write the tables and the verdict of a campaign from all its runs and decisions.

    `rules` is the config's section `verdict` with `anchor.max_drift`, and is copied into the verdict. All times but
    those of runs.csv are at one speed of the machine, by the runs' anchors.

    Raises AnalysisError for a missing or malformed input, and where a run was made under another clock.
    """
    for run in runs:
        if run.config.clock != clock and not run.imported:
            raise AnalysisError(f"{run.folder / 'config.json'}: clock {run.config.clock}; the campaign's is {clock}")
    write_csv(out_runs, RUN_COLUMNS, [run.row() for run in runs])
    runs = at_one_speed(runs, rules["max_drift"])
    limit, teacher, goal = read_budget(budget), read_json(selected, SELECTED_KEYS), read_target(target)
    counted = [run for run in runs if run.arm == "ngram_teacher"]
    teacher["counted_ms"] = {run.run_id: run.summary["train_time_ms"] for run in counted}
    own = next((run for run in runs if run.run_id == teacher["run_id"]), None)
    if own is not None:  # the runs' speed, should the budget be a log's, which has no anchor
        teacher["train_time_ms"] *= own.speed / teacher["speed"]
    logged = limit["clock"] == LOGGED
    last = max(run.horizon for run in runs if run.arm == "ce")  # the budget may be of another
    points = read_json(promoted, ["points", "reason"])
    rows = compare_rows([run for run in runs if run.arm in COMPARED_ARMS], goal, teacher)
    write_csv(out_curves, CURVE_COLUMNS, [row for run in runs for row in curve_rows(run, teacher)])
    write_csv(out_compare, COMPARE_COLUMNS, rows)
    teachers = read_teachers(probe, projected, trained, measured, limit, teacher)
    write_csv(out_teachers, TEACHER_COLUMNS, teachers)
    judged = Rules(*(rules[key] for key in ("confidence", "p_value", "power")))
    reached = reach(runs, goal, teacher, rules["amortize"])
    tested = verdict_rows(reached, judged, last, bool(teacher["imported"]))
    write_csv(out_reached, REACHED_COLUMNS, [found.row() for found in reached])
    write_csv(out_tests, VERDICT_COLUMNS, tested)
    write_csv(out_trend, TREND_COLUMNS, trend_rows(runs, last))
    break_even = break_even_rows(runs, tested, reached, last, teacher, rules["amortize"])
    write_csv(out_break_even, BREAK_EVEN_COLUMNS, break_even)
    doubts = doubts_of(rows, runs, points["points"], clock, exploratory, bool(teacher["imported"]), logged)
    if own is not None and own.unsteady:
        doubts.append(f"times with the teacher only: {own.unsteady}")
    found = verdict(rows, tested, limit, teacher, goal, points, doubts)
    found |= teacher_shares(limit, teacher, break_even, found["point"])
    screened = {"kd": read_csv(screen, SCREEN_COLUMNS), "ce": read_csv(ce_screen, SCREEN_COLUMNS)}
    tuned = tuning_rows(screened, runs, found["point"], points.get("ce_point"))
    write_csv(out_tuning, TUNING_COLUMNS, tuned)
    found |= {"rules": rules, "tuning": tuning(tuned), "ngram": ngram_sentence(tested, counted, limit)}
    if teacher["run_id"] is None:
        found["sentence"] = no_teacher(teachers, limit)
    pairs = pair_up(rows, found["point"]) if found["point"] else []
    write_csv(out_stop, STOP_COLUMNS, stop_conditions(teachers, teacher, pairs, found))
    write_csv(out_summary, SUMMARY_COLUMNS, summary(teachers, counted, limit["budget_ms"], rows, found["point"]))
    write_json(out_verdict, found)


def teacher_cost_ms(run: RunFolder, teacher: dict) -> float:
    """Training time (ms) of the teacher that the run learns from, and the whole of what writing its targets took."""
    return teacher_ms_of(run, teacher) + cache_ms_of(run)


def teacher_ms_of(run: RunFolder, teacher: dict) -> float:
    """Training time (ms) of the teacher that the run learns from; 0 for CE and for a random teacher."""
    kd = run.config.kd
    own = teacher["train_time_ms"] if teacher["run_id"] else 0.0
    if kd is None or kd.random_teacher:
        return own if getattr(run.config, "grown_from", None) else 0.0
    if kd.teacher in teacher.get("counted_ms", {}):
        return teacher["counted_ms"][kd.teacher]
    if kd.teacher != teacher["run_id"]:
        raise AnalysisError(f"{run.folder / 'config.json'}: kd.teacher {kd.teacher} is not the selected teacher")
    return own


def reach(runs: list[RunFolder], goal: dict, teacher: dict, amortize: int) -> list[Reached]:
    """What it took the arms to reach every target, by crossing and by horizon, and where those at the end ended.

    All but what the screen chose with; the selected teacher is among them, alone.
    """
    judged = sorted((run for run in runs if run.arm in JUDGED_ARMS), key=lambda run: JUDGED_ARMS.index(run.arm))
    alone = [run for run in runs if run.arm == "teacher" and run.run_id == teacher["run_id"]]
    last = max((run.horizon for run in judged if run.arm == "ce"), default=0)
    series: dict[tuple, list[RunFolder]] = {}
    for run in judged:
        if run.arm in ("ce", "kd"):
            label = "" if run.arm == "ce" else run.label
            series.setdefault((run.arm, label, run.config.seed), []).append(run)
    whole = [group for group in series.values() if any(run.horizon == last for run in group)]
    found = []
    for name, target in all_targets(goal).items():
        for run in alone:  # it stands at its own final loss once
            found.append(by_crossing(run, name, target | {"consecutive": 1}, 0.0, amortize))
        for run in judged:
            found.append(by_crossing(run, name, target, teacher_ms_of(run, teacher), amortize))
        for group in whole:
            found.append(by_horizon(group, name, target, teacher_ms_of(group[0], teacher), amortize))
    return found + [by_final(run) for run in judged if run.horizon >= last]


def curve_rows(run: RunFolder, teacher: dict) -> list[dict]:
    """The run's validations as rows of CURVE_COLUMNS."""
    place = {"arm": run.arm, "label": run.label, "run_id": run.run_id, "seed": run.config.seed, "horizon": run.horizon}
    cost = teacher_cost_ms(run, teacher)
    counted = [None if row["train_time_ms"] is None else row["train_time_ms"] + cost for row in run.val]
    return [place | row | {"time_with_teacher_ms": time} for row, time in zip(run.val, counted, strict=True)]


def compare_rows(runs: list[RunFolder], target: dict, teacher: dict) -> list[dict]:
    """One row of COMPARE_COLUMNS for each run, in the order of the arms; savings against the matching CE run."""
    runs = sorted(runs, key=lambda run: COMPARED_ARMS.index(run.arm))
    rows = [_reached(run, target, teacher) for run in runs]
    ce = {(row["horizon"], row["seed"]): row for row in rows if row["arm"] == "ce"}
    for row in rows:
        row.update(_against(row, None if row["arm"] == "ce" else ce.get((row["horizon"], row["seed"]))))
    return rows


def _reached(run: RunFolder, target: dict, teacher: dict) -> dict:
    reached = crossing(run, target)
    with_teacher = None if reached.time_ms is None else reached.time_ms + teacher_cost_ms(run, teacher)
    columns = reached.columns() | {"time_to_target_with_teacher_ms": with_teacher, "first_val": first_val(run)}
    return run.row() | columns | {"anchor_ms": anchor_of(run.summary), "speed": run.speed}


def _against(row: dict, ce: dict | None) -> dict:
    timed = ce is not None and row["status"] == ce["status"] == "ok"
    note = (refuse_timing(row, ce) or refuse_timing(ce, ce)) if timed else ""
    against = {"time_note": note}
    for saved, column in SAVINGS.items():
        refused = note and column.startswith("time")
        against[saved] = None if refused or ce is None else _minus(ce[column], row[column])
    for column in ("final_val", "first_val"):
        against[f"{column}_delta"] = None if ce is None else _minus(row[column], ce[column])
    return against


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def read_teachers(
    probe: Path, projected: Path, trained: Path, measured: Path, limit: dict, teacher: dict
) -> list[dict]:
    """Rows of TEACHER_COLUMNS from what the sweep's stages left, times at the speed of the budget `limit`.

    `teacher` is what was selected. Raises AnalysisError for a missing or malformed file.
    """
    tables = read_csv(probe, PROBE_COLUMNS), read_csv(trained, TRAINED_COLUMNS)
    candidates = [at_budgets_speed(rows, limit) for rows in tables]
    rejected = [read_json(path, ["rejected"])["rejected"] for path in (projected, measured)]
    return teacher_rows(*candidates, rejected[0] | rejected[1], teacher)


def teacher_rows(probes: list[dict], trained: list[dict], rejected: dict, teacher: dict) -> list[dict]:
    """One row of TEACHER_COLUMNS for each candidate, the imported ones last: projected and measured (or declared) time,
    loss, verdict and its reason, the checklist.
    """
    by_name = {row["candidate"]: row for row in trained}
    nothing, unprobed = dict.fromkeys(TRAINED_COLUMNS), dict.fromkeys(("projected_ms", "probe_step_ms", "probe_run_id"))
    own = [
        key for key in TEACHER_COLUMNS if key in PROBE_COLUMNS and key not in ("reason", "run_id", "status", "steps")
    ]
    limit, rows = teacher["budget_ms"], []
    for probe in probes:
        found = by_name.get(probe["candidate"])
        row = (found or nothing | {"status": probe["status"]}) | {key: probe[key] for key in own}
        rows.append(row | {"probe_run_id": probe["run_id"], "imported": 0} | checks(probe, found, limit))
    rows += [row | unprobed | checks({}, row, limit) for row in trained if row["imported"]]
    return [row | _judged(row["candidate"], rejected, teacher) for row in rows]


def _judged(name: str, rejected: dict, teacher: dict) -> dict:
    budget = {"budget_ms": teacher["budget_ms"]}
    if name == teacher["candidate"]:
        return budget | {"verdict": "selected", "reason": teacher["reason"]}
    if name in rejected:
        return budget | {"verdict": "rejected", "reason": rejected[name]}
    return budget | {"verdict": "survivor", "reason": "within the budget, but not the lowest loss"}
