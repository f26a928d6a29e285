"""KD against CE: the tidy tables of a campaign, and the verdict.

A run is compared with the CE run of the same horizon and seed, so that neither the LR schedule nor the
seed can pass for an effect of KD. Saved = CE minus the run (positive is better); delta = the run minus
CE (for losses, negative is better).
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path

from kdclimb.analysis.budget import read_budget, refuse_timing
from kdclimb.analysis.selection import PROBE_COLUMNS, SELECTED_KEYS, TRAINED_COLUMNS
from kdclimb.analysis.tables import (
    RUN_COLUMNS,
    AnalysisError,
    RunFolder,
    read_csv,
    read_json,
    show_ms,
    show_number,
    write_csv,
)
from kdclimb.analysis.targets import crossing, first_val, read_target
from kdclimb.artifacts import write_json

CURVE_COLUMNS = tuple(
    "arm label run_id seed horizon step tokens train_time_ms val_loss kd_active teacher_kl time_with_teacher_ms".split()
)
COMPARED_ARMS = ("ce", "kd", "ngram", "control_boost", "screen", "control_random")
COMPARE_COLUMNS = tuple(
    "arm label run_id horizon seed status steps_to_target steps_to_target_interp tokens_to_target time_to_target_ms "
    "time_to_target_with_teacher_ms miss_reason final_val first_val steps_saved tokens_saved time_saved_ms "
    "time_saved_with_teacher_ms final_val_delta first_val_delta time_note".split()
)
SAVINGS = {  # what is saved: the column that it is a difference of
    "steps_saved": "steps_to_target",
    "tokens_saved": "tokens_to_target",
    "time_saved_ms": "time_to_target_ms",
    "time_saved_with_teacher_ms": "time_to_target_with_teacher_ms",
}
TEACHER_COLUMNS = tuple(
    "candidate imported verdict reason projected_ms train_time_ms budget_ms final_val best_val params_stored "
    "params_active flops_per_token probe_step_ms probe_run_id run_id".split()
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
    promoted: Path,
    clock: str,
    exploratory: bool,
    out_curves: Path,
    out_runs: Path,
    out_compare: Path,
    out_teachers: Path,
    out_verdict: Path,
) -> None:
    """Write the four tables and the verdict of a campaign from all its runs and decisions.

    Raises AnalysisError for a missing or malformed input, and where a run was made under another clock.
    """
    for run in runs:
        if run.config.clock != clock and not run.imported:
            raise AnalysisError(f"{run.folder / 'config.json'}: clock {run.config.clock}; the campaign's is {clock}")
    limit, teacher, goal = read_budget(budget), read_json(selected, SELECTED_KEYS), read_target(target)
    teacher["counted_ms"] = {run.run_id: run.summary["train_time_ms"] for run in runs if run.arm == "ngram_teacher"}
    points = read_json(promoted, ["points", "reason"])
    rows = compare_rows([run for run in runs if run.arm in COMPARED_ARMS], goal, teacher)
    write_csv(out_curves, CURVE_COLUMNS, [row for run in runs for row in _curve(run, teacher)])
    write_csv(out_runs, RUN_COLUMNS, [run.row() for run in runs])
    write_csv(out_compare, COMPARE_COLUMNS, rows)
    candidates = read_csv(probe, PROBE_COLUMNS), read_csv(trained, TRAINED_COLUMNS)
    rejected = [read_json(path, ["rejected"])["rejected"] for path in (projected, measured)]
    teachers = teacher_rows(*candidates, rejected[0] | rejected[1], teacher)
    write_csv(out_teachers, TEACHER_COLUMNS, teachers)
    doubts = doubts_of(rows, runs, points["points"], clock, exploratory, bool(teacher["imported"]))
    found = verdict(rows, limit, teacher, goal, points, doubts)
    if teacher["run_id"] is None:
        found["sentence"] = no_teacher(teachers, limit)
    write_json(out_verdict, found)


def teacher_cost_ms(run: RunFolder, teacher: dict) -> float:
    """Training time (ms) of the teacher that the run learns from, and the whole of what writing its targets took; 0 for
    CE and for a random teacher.
    """
    kd = run.config.kd
    if kd is None or kd.random_teacher:
        return 0.0
    if kd.teacher in teacher.get("counted_ms", {}):
        return teacher["counted_ms"][kd.teacher]
    if kd.teacher != teacher["run_id"]:
        raise AnalysisError(f"{run.folder / 'config.json'}: kd.teacher {kd.teacher} is not the selected teacher")
    return teacher["train_time_ms"] + (run.summary["kd_cache_ms"] or 0.0)


def _curve(run: RunFolder, teacher: dict) -> list[dict]:
    place = {"arm": run.arm, "label": run.label, "run_id": run.run_id, "seed": run.config.seed, "horizon": run.horizon}
    cost = teacher_cost_ms(run, teacher)
    return [place | row | {"time_with_teacher_ms": row["train_time_ms"] + cost} for row in run.val]


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
    return run.row() | columns


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


def teacher_rows(probes: list[dict], trained: list[dict], rejected: dict, teacher: dict) -> list[dict]:
    """One row of TEACHER_COLUMNS for each candidate, the imported ones last: projected and measured (or declared) time,
    loss, verdict and its reason.
    """
    by_name = {row["candidate"]: row for row in trained}
    nothing, unprobed = dict.fromkeys(TRAINED_COLUMNS), dict.fromkeys(("projected_ms", "probe_step_ms", "probe_run_id"))
    rows = []
    for probe in probes:
        row = nothing | by_name.get(probe["candidate"], {})
        row |= {key: probe[key] for key in TEACHER_COLUMNS if key in PROBE_COLUMNS and key not in ("reason", "run_id")}
        rows.append(row | {"probe_run_id": probe["run_id"], "imported": 0})
    rows += [row | unprobed for row in trained if row["imported"]]
    return [row | _judged(row["candidate"], rejected, teacher) for row in rows]


def _judged(name: str, rejected: dict, teacher: dict) -> dict:
    budget = {"budget_ms": teacher["budget_ms"]}
    if name == teacher["candidate"]:
        return budget | {"verdict": "selected", "reason": teacher["reason"]}
    if name in rejected:
        return budget | {"verdict": "rejected", "reason": rejected[name]}
    return budget | {"verdict": "survivor", "reason": "within the budget, but not the lowest loss"}


def doubts_of(
    rows: list[dict], runs: list[RunFolder], points: list[str], clock: str, exploratory: bool, imported: bool = False
) -> list[str]:
    """Why what is measured can't be claimed; empty where it can. `imported`: the teacher was trained elsewhere."""
    pairs = pair_up(rows, points[0]) if points else []
    compared = sum(pair["outcome"] == "both" for pair in pairs)
    notes = sorted({pair["kd"]["time_note"] for pair in pairs if pair["kd"]["time_note"]})
    hashes = sorted({run.summary["code_hash"] for run in runs if run.summary["code_hash"]})
    doubts = []
    if clock == "modelled":
        doubts.append("time is modelled from FLOPs, not measured")
    if exploratory:
        doubts.append("the campaign is exploratory: a lock was lifted")
    if imported:
        doubts.append("the teacher was imported: its time is declared, not measured, and so is its place in the budget")
    doubts += [f"times only: {note}" for note in notes]
    if compared < 2:
        doubts.append(
            f"KD and CE both reached the target with {compared} seed{'s' * (compared != 1)}; a claim needs 2 or more"
        )
    if len(hashes) > 1:
        doubts.append(f"the runs come from {len(hashes)} versions of the code: {', '.join(hashes)}")
    return doubts


def pair_up(rows: list[dict], point: str) -> list[dict]:
    """The KD runs of one promoted point, each with the CE run of its horizon and seed, and who reached the target."""
    ce = {(row["horizon"], row["seed"]): row for row in rows if row["arm"] == "ce"}
    pairs = []
    for row in rows:
        match = ce.get((row["horizon"], row["seed"]))
        if (row["arm"], row["label"]) != ("kd", point) or match is None:
            continue
        reached = (row["steps_to_target"] is not None, match["steps_to_target"] is not None)
        outcome = {(True, True): "both", (True, False): "kd", (False, True): "ce", (False, False): "neither"}[reached]
        pairs.append({"kd": row, "ce": match, "outcome": outcome})
    return pairs


def verdict(rows: list[dict], budget: dict, teacher: dict, target: dict, promoted: dict, doubts: list[str]) -> dict:
    """Whether KD paid, in steps and in time, over the seeds of the best screened point at the longest horizon.

    The point is the one that the screen ranked first: picking the best of several full runs would flatter
    KD. kd_pays_* is true only where KD was ahead with every seed in which the target was reached, and null
    where nothing can be said, as of a time that counts an imported teacher's declared one.
    """
    points = promoted["points"]
    pairs = pair_up(rows, points[0]) if points else []
    both = [pair["kd"] for pair in pairs if pair["outcome"] == "both"]
    result = {
        "budget_ms": budget["budget_ms"],
        "teacher_ms": teacher["train_time_ms"],
        "teacher_imported": bool(teacher["imported"]),
        "budget_share": None if teacher["run_id"] is None else teacher["train_time_ms"] / budget["budget_ms"],
        "claimable": not doubts,
        "not_claimable_because": doubts,
        "kd_alive": kd_alive(rows, points[0] if points else None),
        "kd_pays_steps": pays(pairs, "steps_saved"),
        "kd_pays_time_with_teacher": None if teacher["imported"] else pays(pairs, "time_saved_with_teacher_ms"),
        "n_seeds": len(both),
        "point": points[0] if points else None,
        "horizon": budget["horizon"],
        "clock": budget["clock"],
    }
    for column in SAVINGS:
        result[f"{column}_mean"] = mean(row[column] for row in both)
    saved = [row["steps_saved"] for row in both]
    result |= {"steps_saved_min": min(saved, default=None), "steps_saved_max": max(saved, default=None)}
    boosted = [row for row in rows if row["arm"] == "control_boost" and points and row["label"] == points[0]]
    result["control_boost_steps_saved_mean"] = mean(row["steps_saved"] for row in boosted)
    result["sentence"] = _no_comparison(promoted, pairs) or _sentence(result, pairs, boosted, target)
    return result


def mean(values) -> float | None:
    """The mean of the values that are not None; None where there is none."""
    values = [value for value in values if value is not None]
    return float(statistics.fmean(values)) if values else None


def pays(pairs: list[dict], column: str) -> bool | None:
    """Whether KD was ahead by `column` with every seed; None where no run succeeded or nobody reached the target."""
    outcomes = {pair["outcome"] for pair in pairs}
    if not any(pair["kd"]["status"] == "ok" for pair in pairs) or outcomes == {"neither"}:
        return None
    if "ce" in outcomes:
        return False
    if "kd" in outcomes and column != "steps_saved":
        return None  # CE's time to the target is unknown, and the teacher's time may exceed what KD saved
    saved = [pair["kd"][column] for pair in pairs if pair["outcome"] == "both"]
    return None if None in saved else all(value > 0 for value in saved)


def kd_alive(rows: list[dict], point: str | None) -> dict:
    """First validations (nats) at the screen's horizon and seed: the promoted point, CE, and a random teacher.

    KD that teaches lies below CE from the start; a random teacher that also does would mean that something
    else than the teacher's knowledge is at work.
    """
    kd = next((row for row in rows if (row["arm"], row["label"]) == ("screen", point)), None)
    found = {}
    for arm in ("ce", "control_random"):
        same = [row for row in rows if kd and row["arm"] == arm and arm_match(row, kd, point)]
        found[arm] = same[0]["first_val"] if same else None
    first_kd, first_ce, first_random = kd and kd["first_val"], found["ce"], found["control_random"]
    return {
        "first_val_kd": first_kd,
        "first_val_ce": first_ce,
        "first_val_random": first_random,
        "kd_below_ce": _below(first_kd, first_ce),
        "random_below_ce": _below(first_random, first_ce),
    }


def arm_match(row: dict, kd: dict, point: str) -> bool:
    """Whether a CE or control row has the horizon and seed of the screened run `kd` (and, a control, its point)."""
    return (row["horizon"], row["seed"]) == (kd["horizon"], kd["seed"]) and (
        row["arm"] == "ce" or row["label"] == point
    )


def _below(a: float | None, b: float | None) -> bool | None:
    return None if a is None or b is None else a < b


def no_teacher(teachers: list[dict], budget: dict) -> str:
    """The sentence where no candidate meets the budget: how many there were, and what became of the nearest one."""
    nearest = min(teachers, key=lambda row: math.inf if row["projected_ms"] is None else row["projected_ms"])
    return (
        f"KD was not tried: none of the {len(teachers)} teacher candidates meets the budget of "
        f"{show_ms(budget['budget_ms'])}. The one projected to be fastest, {nearest['candidate']}, was rejected: "
        f"{nearest['reason']}."
    )


def _no_comparison(promoted: dict, pairs: list[dict]) -> str:
    if not promoted["points"]:
        return f"KD was not compared with CE at the full horizon: {promoted['reason']}."
    if not any(pair["kd"]["status"] == "ok" for pair in pairs):
        failed = "; ".join(f"seed {pair['kd']['seed']}: {pair['kd']['miss_reason']}" for pair in pairs)
        return f"No KD run succeeded at the full horizon, so nothing can be said ({failed or 'none was run'})."
    return ""


def _sentence(result: dict, pairs: list[dict], boosted: list[dict], target: dict) -> str:
    imported = "imported " if result["teacher_imported"] else ""
    goal = f"the target of {target['value']:.4f} nats (the {imported}teacher's final validation loss)"
    counts = {kind: sum(pair["outcome"] == kind for pair in pairs) for kind in ("both", "kd", "ce", "neither")}
    if counts["both"]:
        text = [_steps_part(result, goal), _time_part(result)]
    else:
        text = [_missed_part(counts, pairs, goal, result["horizon"])]
    if counts["both"] and counts["both"] < len(pairs):
        text.append(_other_seeds(counts, len(pairs)))
    if boosted:
        text.append(_control_part(boosted, result["control_boost_steps_saved_mean"]))
    return " ".join(part for part in text if part)


def _steps_part(result: dict, goal: str) -> str:
    average, low, high = (result[f"steps_saved_{key}"] for key in ("mean", "min", "max"))
    n = result["n_seeds"]
    seeds = "one seed" if n == 1 else f"mean of {n} seeds, {show_number(low)} to {show_number(high)}"
    if n > 1 and low == high:
        seeds = f"with each of {n} seeds"
    spread = f"{seeds}; {result['horizon']}-step schedule"
    if average > 0:
        head = "KD pays in steps" if result["kd_pays_steps"] else "KD saves steps on average, but not with every seed"
        return f"{head}: it reached {goal} {show_number(average)} steps earlier than CE ({spread})."
    if average < 0:
        return f"KD does not pay: it reached {goal} {show_number(-average)} steps later than CE ({spread})."
    return f"KD does not pay: it reached {goal} no earlier than CE ({spread})."


def _time_part(result: dict) -> str:
    without, counted = result["time_saved_ms_mean"], result["time_saved_with_teacher_ms_mean"]
    if without is None or counted is None:
        return "Times are not compared."
    modelled = "declared " if result["teacher_imported"] else "modelled " if result["clock"] == "modelled" else ""
    teacher = f"the teacher's {show_ms(result['teacher_ms'])} of {modelled}training"
    return f"With {teacher} counted it needed {_difference(counted)}; without, {_difference(without)}."


def _difference(saved_ms: float) -> str:
    if saved_ms == 0:
        return "the same time"
    return f"{show_ms(abs(saved_ms))} {'less' if saved_ms > 0 else 'more'}"


def _missed_part(counts: dict, pairs: list[dict], goal: str, horizon: int) -> str:
    best = {arm: "; ".join(f"seed {p[arm]['seed']}: {p[arm]['miss_reason']}" for p in pairs) for arm in ("kd", "ce")}
    if counts["kd"] and not counts["ce"]:
        steps = ", ".join(str(p["kd"]["steps_to_target"]) for p in pairs if p["outcome"] == "kd")
        missed = "; ".join(f"seed {p['ce']['seed']}: {p['ce']['miss_reason']}" for p in pairs)
        return (
            f"KD reached {goal} at step {steps}; CE did not within {horizon} steps ({missed}), "
            "so the steps saved can't be counted."
        )
    if counts["ce"] and not counts["kd"]:
        return f"KD does not pay: CE reached {goal}, KD did not within {horizon} steps ({best['kd']})."
    if counts["kd"]:
        return f"KD and CE each reached {goal} with seeds where the other did not: nothing to compare."
    return f"Neither KD nor CE reached {goal} within {horizon} steps (KD {best['kd']}. CE {best['ce']})."


def _other_seeds(counts: dict, total: int) -> str:
    words = {"kd": "only KD reached it", "ce": "only CE reached it", "neither": "neither did"}
    parts = [f"{words[kind]} with {counts[kind]} of {total} seeds" for kind in words if counts[kind]]
    return f"Left out of these means: {', '.join(parts)}."


def _control_part(boosted: list[dict], saved: float | None) -> str:
    if saved is None:
        reason = next((row["miss_reason"] for row in boosted if row["miss_reason"]), "CE did not reach it")
        return f"The same LR boost without KD has no figure to set beside this ({reason})."
    how = f"{show_number(abs(saved))} steps {'earlier' if saved > 0 else 'later'} than" if saved else "no earlier than"
    return f"The same LR boost without KD reached it {how} CE."
