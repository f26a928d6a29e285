"""The target, and what it takes a run to reach it: steps, tokens and milliseconds, always together."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from kdclimb.analysis.tables import RUN_COLUMNS, RunFolder, read_json, write_csv
from kdclimb.artifacts import write_json

CONSECUTIVE = 2  # validations in a row at or below the target, so that one lucky validation doesn't count
TARGET_KEYS = ("value", "consecutive", "source", "reason")
CROSSING_COLUMNS = ("steps_to_target", "steps_to_target_interp", "tokens_to_target", "time_to_target_ms", "miss_reason")
COLLECTED_COLUMNS = (*RUN_COLUMNS, *CROSSING_COLUMNS, "first_val")
SCREEN_COLUMNS = tuple(
    "rank label run_id temperature lr_boost_mult lr_boost_hold_frac lr_boost_drop_frac status reason steps_to_target "
    "miss_reason final_val best_val stability first_val kd_stop_step kd_share_mean".split()
)


def set_target(selected: Path, out: Path) -> None:
    """The target (nats): the selected teacher's final validation loss, or none."""
    teacher = read_json(selected, ["run_id", "candidate", "final_val"])
    found = teacher["run_id"] is not None
    decision = {
        "value": teacher["final_val"] if found else None,
        "consecutive": CONSECUTIVE,
        "source": "teacher_final_val",
        "reason": f"final val_loss of teacher {teacher['candidate']}" if found else "no teacher was selected",
    }
    write_json(out, decision)


def read_target(path: Path) -> dict:
    return read_json(path, TARGET_KEYS)


@dataclass(frozen=True)
class Crossing:
    """When a run reached the target: its step, tokens and train_time_ms then, or why it did not.

    `interp` is the step at which the straight line between the validations before and at `step` meets the
    target: finer than the validation cadence, and only as good as that line.
    """

    step: int | None = None
    interp: float | None = None
    tokens: int | None = None
    time_ms: float | None = None
    miss: str = ""

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
    interp = float(row["step"])
    if before is not None and before["val_loss"] > value:
        share = (before["val_loss"] - value) / (before["val_loss"] - row["val_loss"])
        interp = before["step"] + share * (row["step"] - before["step"])
    return Crossing(row["step"], interp, row["tokens"], row["train_time_ms"])


def _miss(rows: list[dict], target: dict) -> str:
    losses = [row["val_loss"] for row in rows if math.isfinite(row["val_loss"])]
    if not losses:
        return "no validation after step 0"
    text = f"best val {min(losses):.4f} against target {target['value']:.4f}"
    met = [row["step"] for row in rows if row["val_loss"] <= target["value"]]
    if not met:
        return f"never reached: {text}"
    return f"met at step {met[-1]}, but never for {target['consecutive']} validations in a row: {text}"


def first_val(run: RunFolder) -> float | None:
    """The validation loss (nats) at the first validation after step 0, if there is one and it is finite."""
    losses = [row["val_loss"] for row in run.val if row["step"] > 0]
    return losses[0] if losses and math.isfinite(losses[0]) else None


def stability(run: RunFolder) -> float | None:
    """Sum of the upward moves of the validation loss (nats); 0 for a curve that only falls."""
    losses = [row["val_loss"] for row in run.val]
    if len(losses) < 2:
        return None
    return float(sum(max(0.0, after - before) for before, after in pairwise(losses)))


def collect(runs: list[RunFolder], target: Path, out: Path) -> None:
    """The runs of a stage, one row each, with what it took them to reach the target."""
    goal = read_target(target)
    rows = [run.row() | crossing(run, goal).columns() | {"first_val": first_val(run)} for run in runs]
    write_csv(out, COLLECTED_COLUMNS, rows)


def kd_screen(runs: list[RunFolder], target: Path, out: Path) -> None:
    """The screened KD points, best first: steps to target, then stability, then final loss; failed runs last."""
    goal = read_target(target)
    rows = sorted((_screen_row(run, goal) for run in runs), key=_screen_order)
    write_csv(out, SCREEN_COLUMNS, [row | {"rank": i} for i, row in enumerate(rows, start=1)])


def _screen_row(run: RunFolder, target: dict) -> dict:
    boost = run.config.schedule.lr_boost
    shares = [row["kd_share"] for row in run.steps if row["kd_active"] and row["kd_share"] is not None]
    return (
        run.row()
        | crossing(run, target).columns()
        | {
            "temperature": run.config.kd.temperature,
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
