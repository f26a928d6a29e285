"""The targets, and what it takes to reach them: steps, tokens and milliseconds, always together.

There are two measures. The crossing is where a run first meets the target on the way to its own horizon, with an LR
that is still high. The horizon is the shortest complete run that ends at the target, from runs at several horizons:
what it would cost to go there and no further.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import scipy

from kdclimb.analysis.paired import FAILED, UNKNOWN, Seen, beyond, within
from kdclimb.analysis.tables import RUN_COLUMNS, RunFolder, read_json, write_csv, write_json

PLACE = ("step", "tokens", "train_time_ms")
CONSECUTIVE = 2  # validations in a row at or below the target, so that one lucky validation doesn't count
TEACHERS = "teacher_final_val"  # the name of the target that the teacher sets
TARGET_KEYS = ("value", "consecutive", "source", "reason", "fixed")
CROSSING_COLUMNS = ("steps_to_target", "steps_to_target_interp", "tokens_to_target", "time_to_target_ms", "miss_reason")
MIN_HORIZONS = 3
COSTS = ("steps", "tokens", "time_ms", "time_with_teacher_ms", "time_amortized_ms")
REACHED_COLUMNS = (
    *("measure", "target", "target_value", "arm", "label", "seed", "horizon"),
    *COSTS,
    *("val_loss", "miss_reason"),
)
COLLECTED_COLUMNS = (*RUN_COLUMNS, *CROSSING_COLUMNS, "first_val")
SCREEN_COLUMNS = tuple(
    "rank label run_id temperature kd_alpha kd_token_frac adam_lr lr_boost_mult lr_boost_hold_frac lr_boost_drop_frac "
    "status reason steps_to_target miss_reason final_val best_val stability first_val kd_stop_step "
    "kd_share_mean".split()
)


def set_target(selected: Path, fixed: list[float], out: Path) -> None:
    """The target (nats): the selected teacher's final validation loss, or none; beside it those that are fixed."""
    teacher = read_json(selected, ["run_id", "candidate", "final_val"])
    found = teacher["run_id"] is not None
    decision = {
        "value": teacher["final_val"] if found else None,
        "consecutive": CONSECUTIVE,
        "source": TEACHERS,
        "reason": f"final val_loss of teacher {teacher['candidate']}" if found else "no teacher was selected",
        "fixed": fixed,
    }
    write_json(out, decision)


def read_target(path: Path) -> dict:
    return read_json(path, TARGET_KEYS)


def all_targets(target: dict) -> dict[str, dict]:
    """{name: target}: the teacher's, if there is one, then the fixed ones, named by their value."""
    found = {} if target["value"] is None else {TEACHERS: target}
    return found | {f"{value:g}": target | {"value": value} for value in target["fixed"]}


@dataclass(frozen=True)
class Crossing:
    """When a run reached the target: its step, tokens and train_time_ms then, or why it did not.

    `point` has the same three where the straight line between the validations before and at `step` meets the target:
    finer than the validation cadence, and only as good as that line.
    """

    step: int | None = None
    tokens: int | None = None
    time_ms: float | None = None
    point: tuple[float, float, float] | None = None
    miss: str = ""

    @property
    def interp(self) -> float | None:
        """The step of `point`."""
        return None if self.point is None else self.point[0]

    def columns(self) -> dict:
        values = (self.step, self.interp, self.tokens, self.time_ms, self.miss)
        return dict(zip(CROSSING_COLUMNS, values, strict=True))


def crossing(run: RunFolder, target: dict) -> Crossing:
    """The first of `consecutive` validations in a row at or below the target. Step 0 never counts."""
    if not run.ok:
        return Crossing(miss=run.why_not_ok())
    if target["value"] is None:
        return Crossing(miss=f"no target: {target['reason']}")
    value, need, streak = target["value"], target["consecutive"], 0
    for i, row in enumerate(run.val):
        streak = streak + 1 if row["step"] > 0 and row["val_loss"] <= value else 0
        if streak == need:
            first = i - need + 1
            return _crossed(run.val[first], run.val[first - 1] if first else None, value)
    return Crossing(miss=_miss([row for row in run.val if row["step"] > 0], target))


def _crossed(row: dict, before: dict | None, value: float) -> Crossing:
    share = 1.0
    if before is not None and before["val_loss"] > value:
        share = (before["val_loss"] - value) / (before["val_loss"] - row["val_loss"])
    place = [_on_the_line(before or row, row, key, share) for key in PLACE]
    return Crossing(row["step"], row["tokens"], row["train_time_ms"], tuple(place))


def _on_the_line(before: dict, row: dict, key: str, share: float) -> float | None:
    if before[key] is None or row[key] is None:  # an imported log has no tokens
        return None
    return float(before[key] + share * (row[key] - before[key]))


def _miss(rows: list[dict], target: dict) -> str:
    losses = [row["val_loss"] for row in rows if math.isfinite(row["val_loss"])]
    if not losses:
        return "no validation after step 0"
    text = f"best val {min(losses):.4f} against target {target['value']:.4f}"
    met = [row["step"] for row in rows if row["val_loss"] <= target["value"]]
    if not met:
        return f"never reached: {text}"
    return f"met at step {met[-1]}, but never for {target['consecutive']} validations in a row: {text}"


@dataclass(frozen=True)
class Reached:
    """What it took to reach a target by one measure: each of COSTS, as far as it was seen, and why it was not."""

    place: dict  # the first columns of REACHED_COLUMNS
    seen: dict[str, Seen]
    runs: tuple[RunFolder, ...]  # that it was read from
    miss: str

    def row(self) -> dict:
        values = {cost: low if low == high != math.inf else None for cost, (low, high) in self.seen.items()}
        return self.place | dict.fromkeys((*COSTS, "val_loss")) | values | {"miss_reason": self.miss}


def cache_ms_of(run: RunFolder) -> float:
    """What writing the targets that the run learned from took (ms), 0 without a cache."""
    return run.summary["kd_cache_ms"] or 0.0


def by_crossing(run: RunFolder, name: str, target: dict, teacher_ms: float, amortize: int) -> Reached:
    """`teacher_ms` is what the run's teacher took, which `amortize` students share in the last of the costs."""
    found, cache = crossing(run, target), (cache_ms_of(run),) * 2  # all of it, however soon: it is written before
    if found.point is not None:
        seen = _costs(*((figure, figure) for figure in found.point), cache, teacher_ms, amortize)
    elif run.ok and run.val:
        seen = _costs(*(beyond(float(run.val[-1][key])) for key in PLACE), cache, teacher_ms, amortize)
    else:
        seen = dict.fromkeys(COSTS, FAILED)
    return Reached(_place("crossing", name, target, run), seen, (run,), found.miss)


def by_horizon(runs: list[RunFolder], name: str, target: dict, teacher_ms: float, amortize: int) -> Reached:
    """The shortest complete horizon whose final loss meets the target, from runs that differ in their horizon alone.

    The final losses are made monotone (isotonic regression) and joined by straight lines over the logarithm of the
    horizon, along which losses fall nearly straight. No other shape is assumed; beyond the horizons nothing is said.
    With a run that failed it is unknown: a line through the others would leave out what that one shows. `teacher_ms` is
    what the teacher took; each run has its cache of targets, which is as long as its horizon.
    """
    runs = sorted(runs, key=lambda run: run.horizon)
    whole = [run for run in runs if run.ok and run.val and math.isfinite(run.val[-1]["val_loss"])]
    place = _place("horizon", name, target, runs[0]) | {"horizon": None}
    if len(whole) < len(runs):
        first = next(run for run in runs if run not in whole)
        why = f"{len(runs) - len(whole)} of {len(runs)} runs failed: {first.horizon} steps, {first.why_not_ok()}"
        return Reached(place, dict.fromkeys(COSTS, UNKNOWN), tuple(runs), why)
    if len(whole) < MIN_HORIZONS:
        seen, why = dict.fromkeys(COSTS, UNKNOWN), f"{len(whole)} of the {MIN_HORIZONS} horizons that this needs"
        return Reached(place, seen, tuple(runs), why)
    ends = [run.val[-1] for run in whole]
    horizons, losses = [row["step"] for row in ends], [row["val_loss"] for row in ends]
    low, high = shortest_horizon(horizons, losses, target["value"])
    caches = [cache_ms_of(run) for run in whole]
    if low == high:
        figures = [*([row[key] for row in ends] for key in PLACE[1:]), caches]
        seen = [(float(np.interp(low, horizons, values)),) * 2 for values in figures]
        return Reached(place, _costs((low, low), *seen, teacher_ms, amortize), tuple(runs), "")
    i, found, word = (-1, beyond, "long") if high == math.inf else (0, within, "short")
    why = f"{word}er than the {word}est horizon, {horizons[i]} steps, which ends at {losses[i]:.4f}"
    seen = _costs(*(found(float(ends[i][key])) for key in PLACE), found(caches[i]), teacher_ms, amortize)
    return Reached(place, seen, tuple(runs), f"{why} against target {target['value']:.4f}")


def shortest_horizon(horizons: list[float], losses: list[float], value: float) -> Seen:
    """Bounds of the horizon (steps) that ends at the loss `value`, from runs that ended at `losses`, shortest first.

    They are equal where it lies among the horizons. Monotone by isotonic regression, linear in the log of the horizon.
    """
    fitted = scipy.optimize.isotonic_regression(losses, increasing=False).x
    after = int((fitted > value).sum())  # the losses fall: index of the first that meets the target
    if after == len(horizons):
        return beyond(float(horizons[-1]))
    if after == 0:
        return within(float(horizons[0]))
    share = (fitted[after - 1] - value) / (fitted[after - 1] - fitted[after])
    step = float(horizons[after - 1] * (horizons[after] / horizons[after - 1]) ** share)
    return step, step


def by_final(run: RunFolder) -> Reached:
    """Where the run ended (nats): for arms of equal cost in all, whose horizons differ."""
    ended = run.ok and run.val and math.isfinite(run.val[-1]["val_loss"])
    seen = (run.val[-1]["val_loss"],) * 2 if ended else FAILED
    place = _place("final", "", {"value": None}, run) | {"horizon": None}
    return Reached(place, {"val_loss": seen}, (run,), "" if ended else run.why_not_ok())


def _place(measure: str, name: str, target: dict, run: RunFolder) -> dict:
    label = "CE" if run.arm == "ce" else run.label
    place = {"measure": measure, "target": name, "target_value": target["value"], "arm": run.arm, "label": label}
    return place | {"seed": run.config.seed, "horizon": run.horizon}


def _costs(
    steps: Seen, tokens: Seen, time_ms: Seen, cache_ms: Seen, teacher_ms: float, amortize: int
) -> dict[str, Seen]:
    """Of a teacher several students can learn; its targets in a cache are those of one student's tokens."""
    student = [sum(limits) for limits in zip(time_ms, cache_ms, strict=True)]
    counted = [tuple(limit + teacher_ms / share for limit in student) for share in (1, amortize)]
    return dict(zip(COSTS, (steps, tokens, time_ms, *counted), strict=True))


def first_val(run: RunFolder) -> float | None:
    """The validation loss (nats) at the first validation after step 0, if there is one and it is finite."""
    losses = [row["val_loss"] for row in run.val if row["step"] > 0]
    return losses[0] if losses and math.isfinite(losses[0]) else None


def stability(run: RunFolder) -> float | None:
    """Sum of the upward moves of the validation loss (nats); 0 for a curve that only falls."""
    losses = [row["val_loss"] for row in run.val]
    if len(losses) < 2:
        return None
    return math.fsum(max(0.0, after - before) for before, after in pairwise(losses))


def collect(runs: list[RunFolder], target: Path, out: Path) -> None:
    """The runs of a stage, one row each, with what it took them to reach the target."""
    goal = read_target(target)
    rows = [run.row() | crossing(run, goal).columns() | {"first_val": first_val(run)} for run in runs]
    write_csv(out, COLLECTED_COLUMNS, rows)


def kd_screen(runs: list[RunFolder], target: Path, out: Path) -> None:
    """The screened points of KD, or of CE, best first: steps to target, then stability, then final loss; failed ones
    last.
    """
    goal = read_target(target)
    rows = sorted((_screen_row(run, goal) for run in runs), key=_screen_order)
    write_csv(out, SCREEN_COLUMNS, [row | {"rank": i} for i, row in enumerate(rows, start=1)])


def _screen_row(run: RunFolder, target: dict) -> dict:
    boost, kd = run.config.schedule.lr_boost, run.config.kd
    shares = [row["kd_share"] for row in run.steps if row["kd_active"] and row["kd_share"] is not None]
    return (
        run.row()
        | crossing(run, target).columns()
        | {
            "temperature": kd.temperature if kd else None,
            "kd_alpha": kd.alpha if kd else None,
            "kd_token_frac": kd.token_frac if kd else None,
            "adam_lr": run.config.optim.adam.lr,  # all others are in one ratio to it
            "lr_boost_mult": boost.mult if boost else 1.0,
            "lr_boost_hold_frac": boost.hold_frac if boost else None,
            "lr_boost_drop_frac": boost.drop_frac if boost else None,
            "stability": stability(run),
            "first_val": first_val(run),
            "kd_share_mean": statistics.fmean(shares) if shares else None,
        }
    )


def _screen_order(row: dict) -> tuple:
    figures = [row[key] for key in ("steps_to_target", "stability", "final_val")]
    unknown_last = [math.inf if figure is None or math.isnan(figure) else figure for figure in figures]
    return (row["status"] != "ok", *unknown_last, row["label"])
