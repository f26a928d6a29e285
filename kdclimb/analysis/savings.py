"""Where KD saves, and what it would have to save: the trend of steps saved over the loss, and the break-even table."""

from __future__ import annotations

import math
import statistics
from itertools import pairwise

from kdclimb.analysis.budget import refuse_timing
from kdclimb.analysis.tables import WARMUP_STEPS, RunFolder
from kdclimb.analysis.targets import TEACHERS, Reached, crossing

TREND_COLUMNS = ("label", "seed", "horizon", "ce_step", "val_loss", "kd_step", "steps_saved", "miss_reason")
BREAK_EVEN_COLUMNS = (
    "target target_value label n_seeds overhead kd_share_of_tokens teacher_ms cache_ms ce_time_ms teacher_share "
    "cache_share needed needed_amortized amortize measured measured_low measured_high pays note"
).split()


def matched(runs: list[RunFolder], horizon: int) -> list[tuple[RunFolder, RunFolder]]:
    """(KD, CE) at `horizon` with the same seed, for all points and seeds where both ended well."""
    at = [run for run in runs if run.ok and run.arm in ("ce", "kd") and run.horizon == horizon]
    ce = {run.config.seed: run for run in at if run.arm == "ce"}
    return [(run, ce[run.config.seed]) for run in at if run.arm == "kd" and run.config.seed in ce]


def trend_rows(runs: list[RunFolder], horizon: int) -> list[dict]:
    """For each loss at which CE stood at a validation, lower than all before it: CE's step, and how much sooner KD was.

    KD's step is where its curve first meets that loss, between validations by a straight line; it is censored where it
    never does.
    """
    rows = []
    for kd, ce in matched(runs, horizon):
        lowest = float("inf")
        for row in ce.val:
            if row["step"] == 0 or row["val_loss"] >= lowest:
                continue
            lowest = row["val_loss"]
            found = crossing(kd, {"value": lowest, "consecutive": 1})
            saved = None if found.interp is None else row["step"] - found.interp
            place = {"label": kd.label, "seed": kd.config.seed, "horizon": horizon, "ce_step": row["step"]}
            rows.append(
                place | {"val_loss": lowest, "kd_step": found.interp, "steps_saved": saved, "miss_reason": found.miss}
            )
    return rows


def break_even_rows(
    runs: list[RunFolder], tested: list[dict], reached: list[Reached], horizon: int, teacher: dict, amortize: int
) -> list[dict]:
    """What share of CE's tokens KD must save to be level in time, beside what it saved, by target that CE reached.

    With a share s of the tokens saved, KD on for a share w of its tokens at o more time each, and a teacher that takes
    c of CE's time to the target, shared by M students, KD's time is (1 - s)(1 + w o) + c / M of CE's; it is level at
    s = 1 - (1 - c / M) / (1 + w o). A cache of targets is one student's: its cost adds to c / M. In tokens, since time
    goes by them: where batches grow, the steps that KD saves are the longest.
    """
    rows = []
    for test in tested:
        if (test["measure"], test["arm"], test["against"], test["cost"]) != ("crossing", "kd", "ce", "tokens"):
            continue
        pairs = [pair for pair in matched(runs, horizon) if pair[0].label == test["label"]]
        times = [
            found.row()["time_ms"]
            for found in reached
            if (found.place["measure"], found.place["target"]) == ("crossing", test["target"])
            and (found.place["arm"], found.place["horizon"]) == ("ce", horizon)
        ]
        rows.append(_break_even(test, pairs, [ms for ms in times if ms is not None], teacher, amortize))
    return rows


def _break_even(test: dict, pairs: list, times: list[float], teacher: dict, amortize: int) -> dict:
    row = dict.fromkeys(BREAK_EVEN_COLUMNS) | {key: test[key] for key in ("target", "target_value", "label")}
    teacher_ms = None if teacher["run_id"] is None else teacher["train_time_ms"]
    row |= {"n_seeds": len(pairs), "teacher_ms": teacher_ms, "amortize": amortize}
    row["cache_ms"] = statistics.fmean(kd.summary["kd_cache_ms"] or 0.0 for kd, _ in pairs) if pairs else None
    row |= {"measured": None if test["ratio"] is None else 1 - test["ratio"], "note": test["note"]}
    row |= {"measured_low": test["high"] and 1 - test["high"], "measured_high": test["low"] and 1 - test["low"]}
    notes = [
        note for kd, ce in pairs if (note := refuse_timing(kd.row(), ce.row()) or refuse_timing(ce.row(), ce.row()))
    ]
    if notes or not times or not pairs:
        return row | {
            "note": (notes or ["CE never reached this target, so there is no time to set the teacher's against"])[0]
        }
    overhead = statistics.fmean(overhead_of(kd, ce) for kd, ce in pairs)
    share = statistics.fmean(share_with_kd(kd, test["target_value"]) for kd, _ in pairs)
    ce_ms = statistics.fmean(times)
    cached = row["cache_ms"] / ce_ms
    cost = teacher_ms / ce_ms
    step = 1 + share * overhead
    row |= {"overhead": overhead, "kd_share_of_tokens": share, "ce_time_ms": ce_ms}
    row |= {"teacher_share": cost, "cache_share": cached}
    row |= {"needed": 1 - (1 - cost - cached) / step}
    row["needed_amortized"] = 1 - (1 - cost / amortize - cached) / step
    return row | {"pays": None if row["measured"] is None else int(row["measured"] > row["needed"])}


def teacher_shares(budget: dict, teacher: dict, break_even: list[dict], point: str | None) -> dict:
    """What the teacher took of the CE time that sets its budget, and of CE's time (ms) to the target, by the judged
    point's row of break_even.csv, which is stricter; and whether each is within the budget's fraction. None where it is
    not known.
    """
    rows = (row for row in break_even if (row["target"], row["label"]) == (TEACHERS, point))
    to_target = next(rows, dict.fromkeys(BREAK_EVEN_COLUMNS))["ce_time_ms"]
    whole = budget["ce_train_time_ms"]
    found = {"ce_time_to_target_ms": to_target}
    for name, ce_ms in (("of_ce", whole), ("to_target", to_target)):
        known = teacher["run_id"] is not None and ce_ms is not None
        found[f"teacher_share_{name}"] = teacher["train_time_ms"] / ce_ms if known else None
        found[f"within_{name}"] = teacher["train_time_ms"] <= ce_ms * budget["fraction"] if known else None
    return found


def overhead_of(kd: RunFolder, ce: RunFolder) -> float:
    """How much longer a step with KD takes than the same step of CE, as a share; the first steps are left out."""
    spent = [_step_times(run) for run in (kd, ce)]
    on = [i for i, row in enumerate(kd.steps) if row["kd_active"] and WARMUP_STEPS <= i < len(spent[1])]
    # math.fsum: sum() rounds differently from Python 3.12 on, and the record of a campaign is made again by either.
    taken, by_ce = (math.fsum(times[i] for i in on) for times in spent)
    return taken / by_ce - 1 if on else 0.0


def _step_times(run: RunFolder) -> list[float]:
    return [after - before for before, after in pairwise([0.0, *(row["train_time_ms"] for row in run.steps)])]


def share_with_kd(kd: RunFolder, value: float) -> float:
    """The share of the run's tokens in steps with KD, up to where it reached the target, or to its end."""
    taken = kd.steps[: crossing(kd, {"value": value, "consecutive": 1}).step or len(kd.steps)]
    return sum(row["batch_tokens"] for row in taken if row["kd_active"]) / sum(row["batch_tokens"] for row in taken)
