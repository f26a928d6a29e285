"""The verdict in the end: what may be claimed, whether KD paid, and one sentence that says so."""

from __future__ import annotations

import math
import statistics

from kdclimb.analysis import tested as tests
from kdclimb.analysis.budget import projection
from kdclimb.analysis.paired import BETTER, MIN_PAIRS, WORSE
from kdclimb.analysis.tables import RunFolder, show_ms, show_number

CONTROL_NAMES = {
    "control_boost": "CE with KD's LR",
    "control_tuned": "CE as tuned as KD",
    "control_smooth": "CE with label smoothing",
}
TIMES = "times only: "  # before a doubt that steps and tokens don't share
SAVINGS = {  # what is saved: the column that it is a difference of
    "steps_saved": "steps_to_target",
    "tokens_saved": "tokens_to_target",
    "time_saved_ms": "time_to_target_ms",
    "time_saved_with_teacher_ms": "time_to_target_with_teacher_ms",
}


def doubts_of(
    rows: list[dict],
    runs: list[RunFolder],
    points: list[str],
    clock: str,
    exploratory: bool,
    imported: bool = False,
    logged: bool = False,
) -> list[str]:
    """Why what is measured can't be claimed; empty where it can.

    `imported`: the teacher was trained elsewhere; `logged`: the budget is a log's.
    """
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
    if logged:
        doubts.append("the budget comes from a training log: the teacher's time is held against another machine's")
    doubts += [f"{TIMES}{note}" for note in notes]
    if compared < MIN_PAIRS:
        seeds = f"{compared} seed{'s' * (compared != 1)}"
        doubts.append(f"KD and CE both reached the target with {seeds}; a claim needs {MIN_PAIRS} or more")
    if len(hashes) > 1:
        doubts.append(f"the runs come from {len(hashes)} versions of the code: {', '.join(hashes)}")
    return doubts


def pair_up(rows: list[dict], point: str) -> list[dict]:
    """One promoted point's KD runs at the longest horizon, each with CE's of its seed, and who reached the target."""
    last = max((row["horizon"] for row in rows if row["arm"] == "ce"), default=None)
    ce = {(row["horizon"], row["seed"]): row for row in rows if row["arm"] == "ce"}
    pairs = []
    for row in rows:
        match = ce.get((row["horizon"], row["seed"]))
        if (row["arm"], row["label"]) != ("kd", point) or row["horizon"] != last or match is None:
            continue
        reached = (row["steps_to_target"] is not None, match["steps_to_target"] is not None)
        outcome = {(True, True): "both", (True, False): "kd", (False, True): "ce", (False, False): "neither"}[reached]
        pairs.append({"kd": row, "ce": match, "outcome": outcome})
    return pairs


def verdict(
    rows: list[dict], tested: list[dict], budget: dict, teacher: dict, target: dict, promoted: dict, doubts: list[str]
) -> dict:
    """Whether the point that the screen ranked first paid, in steps and in time, at the longest horizon and over all.

    kd_pays_* is true only where the tests show KD to be sooner and no control explains it, and null where nothing can
    be said: below three seeds, where nobody reached the target, of a time that counts an imported teacher's.
    """
    points = promoted["points"]
    point = points[0] if points else None
    pairs = pair_up(rows, point) if points else []
    both = [pair["kd"] for pair in pairs if pair["outcome"] == "both"]
    head = tests.headline(tested, point)
    artefact, untold = tests.explained_by(tested, head["controls"]["steps"])
    time_artefact, time_untold = tests.explained_by(tested, head["controls"][tests.COUNTED])
    alone, alone_in_time = not artefact and not untold, not time_artefact and not time_untold
    somebody = any(pair["outcome"] != "neither" for pair in pairs) and any(
        pair["kd"]["status"] == "ok" for pair in pairs
    )
    result = {
        "budget_ms": budget["budget_ms"],
        "budget_projected_from": budget["projected_from"],
        "teacher_ms": teacher["train_time_ms"],
        "teacher_imported": bool(teacher["imported"]),
        "budget_share": None if teacher["run_id"] is None else teacher["train_time_ms"] / budget["budget_ms"],
        "claimable": not doubts,
        "not_claimable_because": doubts,
        "kd_alive": kd_alive(rows, point),
        "kd_pays_steps": tests.pays(head["crossing"]["steps"], alone) if somebody else None,
        "kd_pays_horizon": tests.pays(head["horizon"]["steps"], alone) if somebody else None,
        "kd_pays_time_with_teacher": tests.pays(head["crossing"][tests.COUNTED], alone_in_time) if somebody else None,
        "explained_by": artefact,
        "not_told_apart_from": untold,
        "explained_in_time_by": time_artefact,
        "not_told_apart_in_time_from": time_untold,
        "n_seeds": len(both),
        "point": point,
        "horizon": max((row["horizon"] for row in rows if row["arm"] == "ce"), default=None),
        "clock": budget["clock"],
    }
    for column in SAVINGS:
        result[f"{column}_mean"] = mean(row[column] for row in both)
    saved = [row["steps_saved"] for row in both]
    result |= {"steps_saved_min": min(saved, default=None), "steps_saved_max": max(saved, default=None)}
    horizon = head["horizon"]["steps"]
    result["steps_saved_horizon_mean"] = horizon["saved_mean"] if horizon else None
    boosted = [row for row in rows if row["arm"] == "control_boost" and points and row["label"] == point]
    result["control_boost_steps_saved_mean"] = mean(row["steps_saved"] for row in boosted)
    ends = [_end_part(tests.at_the_end(tested, point, arm), name) for arm, name in tests.LONGER.items()]
    sentence = _no_comparison(promoted, pairs) or _sentence(result, head, pairs, target)
    result["sentence"] = " ".join(part for part in (sentence, *ends, _projected_part(budget)) if part)
    return result


def ngram_sentence(tested: list[dict], counted: list[RunFolder], budget: dict) -> str:
    """KD from n-grams against CE, by crossing and at the end, and what counting them took; empty if there is none."""
    parts = []
    for run in counted:
        ms = run.summary["train_time_ms"]
        within = "within" if ms <= budget["budget_ms"] else "over, so nothing is claimed,"
        limit = f"{show_ms(budget['budget_ms'])}{projection(budget['projected_from'])}"
        parts.append(f"the {run.label} took {show_ms(ms)}, {within} the budget of {limit}")
    for row in tested:
        if (row["arm"], row["against"]) == ("ngram", "ce"):
            if (row["measure"], row["target"], row["cost"]) == ("crossing", tests.TEACHERS, "time_with_teacher_ms"):
                parts.append(f"{row['label']}, time with its teacher to the target: {tests.describe(row)}")
            if row["measure"] == "final" and row["saved_mean"] is not None:
                side = "below" if row["saved_mean"] > 0 else "above"
                parts.append(f"{row['label']} ends {abs(row['saved_mean']):.4f} nats {side} CE ({row['outcome']})")
    return f"KD from n-grams: {'; '.join(parts)}." if parts else ""


def mean(values) -> float | None:
    """The mean of the values that are not None; None where there is none."""
    values = [value for value in values if value is not None]
    return float(statistics.fmean(values)) if values else None


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
        f"{show_ms(budget['budget_ms'])}{projection(budget['projected_from'])}. The one projected to be fastest, "
        f"{nearest['candidate']}, was rejected: {nearest['reason']}."
    )


def _no_comparison(promoted: dict, pairs: list[dict]) -> str:
    if not promoted["points"]:
        return f"KD was not compared with CE at the full horizon: {promoted['reason']}."
    if not any(pair["kd"]["status"] == "ok" for pair in pairs):
        failed = "; ".join(f"seed {pair['kd']['seed']}: {pair['kd']['miss_reason']}" for pair in pairs)
        return f"No KD run succeeded at the full horizon, so nothing can be said ({failed or 'none was run'})."
    return ""


def _sentence(result: dict, head: dict, pairs: list[dict], target: dict) -> str:
    imported = "imported " if result["teacher_imported"] else ""
    goal = f"the target of {target['value']:.4f} nats (the {imported}teacher's final validation loss)"
    counts = {kind: sum(pair["outcome"] == kind for pair in pairs) for kind in ("both", "kd", "ce", "neither")}
    if counts["both"]:
        text = [_steps_part(result, head["crossing"]["steps"], goal), _time_part(result)]
    else:
        text = [_missed_part(counts, pairs, goal, result["horizon"])]
    if counts["both"] and counts["both"] < len(pairs):
        text.append(_other_seeds(counts, len(pairs)))
    text += [_horizon_part(head["horizon"]["steps"]), _controls_part(result, head), _timed_controls_part(result, head)]
    return " ".join(part for part in text if part)


def _steps_part(result: dict, row: dict, goal: str) -> str:
    """The crossing: what the test says, and the mean on the grid of validations, which one can look up."""
    average, n = result["steps_saved_mean"], result["n_seeds"]
    low, high = result["steps_saved_min"], result["steps_saved_max"]
    seeds = "one seed" if n == 1 else f"mean of {n} seeds, {show_number(low)} to {show_number(high)}"
    if n > 1 and low == high:
        seeds = f"with each of {n} seeds"
    when = (
        f"{show_number(abs(average))} steps {'earlier' if average > 0 else 'later'} than" if average else "as soon as"
    )
    fact = f"it reached {goal} {when} CE ({seeds}; {result['horizon']}-step schedule)"
    tested = tests.describe(row)
    if not average and row["ratio"] is not None:
        tested = f"read between validations, {tested}"
    if not row["outcome"]:
        return f"KD is not judged: {fact}, and {row['note']} are too few."
    if row["outcome"] == BETTER:
        gain = "KD pays in steps" if result["kd_pays_steps"] else "KD saves steps, but not by what it teaches"
        if result["not_told_apart_from"] and not result["explained_by"]:
            gain = "KD saves steps, but is not told apart from its controls"
        return f"{gain}: {fact}; {tested}."
    if row["outcome"] == WORSE:
        return f"KD does not pay: {fact}; {tested}."
    return f"KD is not shown to pay: {fact}; {tested}. {tests.missing(row)}".rstrip()


def _horizon_part(row: dict | None) -> str:
    if row is None:
        return ""
    if row["ratio"] is None and not row["outcome"]:
        return f"By complete horizons nothing is known: {row['note'] or 'the target lies outside them'}."
    words = {BETTER: "needs a shorter one than CE", WORSE: "needs a longer one than CE"}
    said = words.get(row["outcome"], "is not shown to differ from CE")
    return f"By the shortest complete horizon that ends at the target, KD {said}: {tests.describe(row)}."


def _end_part(row: dict | None, name: str) -> str:
    """KD's end against that of the control of this name."""
    if row is None or row["saved_mean"] is None:
        return ""
    nats = f"{abs(row['saved_mean']):.4f} nats {'below' if row['saved_mean'] > 0 else 'above'}"
    sure = {"": "too few seeds to judge"}.get(row["outcome"], row["outcome"])
    return f"At the end KD is {nats} {name} ({sure})."


def _projected_part(budget: dict) -> str:
    """Of which CE run the budget is, where none was so long."""
    if budget["projected_from"] is None:
        return ""
    return (
        f"The teacher's budget of {show_ms(budget['budget_ms'])} is {budget['fraction']:.0%} of CE's time over "
        f"{show_number(budget['horizon'])} steps, projected from {show_number(budget['projected_from'])}-step runs."
    )


def _controls_part(result: dict, head: dict) -> str:
    names = {
        "explained_by": "sooner than CE too, and KD is not sooner than it",
        "not_told_apart_from": "not told apart",
    }
    controls = head["controls"]["steps"]
    notes = {row["against"]: f" ({row['note']})" for row in controls if row["note"]}
    parts = [
        f"{CONTROL_NAMES[arm]} is {words}{notes.get(arm, '')}" for key, words in names.items() for arm in result[key]
    ]
    if parts or not controls:
        return f"Controls: {'; '.join(parts)}." if parts else ""
    return f"KD is sooner than {', '.join(CONTROL_NAMES[row['against']] for row in controls)}."


def _timed_controls_part(result: dict, head: dict) -> str:
    """The controls that take from KD what it saves of CE's time, the teacher's counted."""
    row = head["crossing"][tests.COUNTED]
    others = [*result["explained_in_time_by"], *result["not_told_apart_in_time_from"]]
    if row is None or row["outcome"] != BETTER or not others:
        return ""
    names = ", ".join((CONTROL_NAMES | tests.LONGER)[arm] for arm in others)
    return f"In time, the teacher's counted, KD saves against CE, and is not shown to be better than {names}."


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
        few = f"KD is not judged, with {len(pairs)} of the {MIN_PAIRS} seeds that this needs"
        said = few if len(pairs) < MIN_PAIRS else "KD does not pay"
        return f"{said}: CE reached {goal}, KD did not within {horizon} steps ({best['kd']})."
    if counts["kd"]:
        return f"KD and CE each reached {goal} with seeds where the other did not: nothing to compare."
    return f"Neither KD nor CE reached {goal} within {horizon} steps (KD {best['kd']}. CE {best['ce']})."


def _other_seeds(counts: dict, total: int) -> str:
    words = {"kd": "only KD reached it", "ce": "only CE reached it", "neither": "neither did"}
    parts = [f"{words[kind]} with {counts[kind]} of {total} seeds" for kind in words if counts[kind]]
    return f"Left out of these means: {', '.join(parts)}."
