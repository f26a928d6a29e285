"""Training logs of the speedrun and of the seed's trainer: what they say, and what they leave out. No torch.

A log is text. Of what stands in it (often the whole source first) only these lines count: those of the form
`step:650/1515 val_loss:4.0300 train_time:212851ms step_avg:327.46ms`, whatever further fields they carry, those
of the first trainers, `s:650 tel:4.0300`, and a few on models, memory and early stops.
"""

from __future__ import annotations

import hashlib
import math
import re
import statistics
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from kdclimb.artifacts import (
    STEP_COLUMNS,
    SUMMARY_COLUMNS,
    VAL_COLUMNS,
    plot_run,
    publish,
    write_csv,
    write_json,
    write_via,
)
from kdclimb.imported import LogConfig

STEP_LINE = re.compile(r"^step:(\d+)(?:/(\d+))?\s+(\S.*)$")
OLD_LINE = re.compile(r"^s:(\d+)\s+(tel|trl):(\S+)")
FIELD = re.compile(r"(\w+):(\S+)")
FACTS = {  # name: what it looks like
    "params": re.compile(r"(?:Student model config:.*params=|Total parameters:\s*)([\d,]+)"),
    "teacher_params": re.compile(r"Teacher model config:.*params=([\d,]+)"),
    "peak_mib": re.compile(r"peak memory allocated:\s*(\d+) MiB"),
    "reserved_mib": re.compile(r"peak memory allocated:.*reserved:\s*(\d+) MiB"),
    "device": re.compile(r"^\|\s+\d+\s+((?:NVIDIA|Tesla|AMD)[\w ./-]*?)\s{2,}"),
    "early_stop": re.compile(r"^Early stop triggered at step:\s*(\d+)"),
}
WARMUP_STEPS = 20  # left out of the step times, as in the seed's own reports


@dataclass
class Log:
    """What was read: validations and steps as rows of val.csv and steps.csv, facts, and what is missing or wrong."""

    path: Path
    sha256: str
    total: int | None = None  # steps of its schedule
    vals: list[dict] = field(default_factory=list)
    steps: list[dict] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    kd: dict[str, str] = field(default_factory=dict)  # last KD fields seen
    problems: list[str] = field(default_factory=list)

    @property
    def last(self) -> int:
        return max([row["step"] for row in (*self.vals, *self.steps)], default=0)

    @property
    def train_time_ms(self) -> float | None:
        """Of the whole run: at its last step, whichever line gives it."""
        at_end = [row for row in (*self.vals, *self.steps) if row["step"] == self.last]
        return next((row["train_time_ms"] for row in at_end if row["train_time_ms"] is not None), None)

    @property
    def status(self) -> str:
        return "provisional" if self.problems else "imported"


def read_log(path: Path) -> Log:
    """Read what can be read. Raises ValueError where the file can't be opened or holds no line of a training run."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: can't be read: {error.strerror}") from error
    log = Log(Path(path), hashlib.sha256(content).hexdigest())
    torn = []
    for number, line in enumerate(content.decode(errors="replace").splitlines(), 1):
        try:
            _take(log, line.strip())
        except ValueError as error:
            torn.append(f"line {number}: {error}")
    if not log.vals and not log.steps:
        raise ValueError(f"{path}: no line like 'step:650/1515 val_loss:4.0300 train_time:212851ms' in it")
    log.problems = [*torn[:3], *([f"and {len(torn) - 3} more such lines"] if len(torn) > 3 else []), *_missing(log)]
    return log


def _take(log: Log, line: str) -> None:
    if found := OLD_LINE.match(line):
        step, kind, loss = int(found[1]), found[2], _number(found[3], "loss")
        if kind == "tel":
            _append(log.vals, {"step": step, "train_time_ms": None, "val_loss": loss})
        return
    if found := STEP_LINE.match(line):
        _take_step(log, int(found[1]), found[2] and int(found[2]), dict(FIELD.findall(found[3])))
        return
    for name, pattern in FACTS.items():
        if found := pattern.search(line):
            log.facts.setdefault(name, found[1])


def _take_step(log: Log, step: int, total: int | None, fields: dict[str, str]) -> None:
    if total is not None:
        log.total = total
    row = {"step": step, "train_time_ms": _ms(fields.get("train_time"))}
    if "kd_mode" in fields:
        log.kd = {key: value for key, value in fields.items() if key.startswith(("kd_", "distill_", "teacher_val"))}
        row["kd_active"] = int(fields.get("kd_active") == "True")
    if "val_loss" in fields:
        _append(log.vals, row | {"val_loss": _number(fields["val_loss"], "val_loss")})
    elif "train_time" in fields:
        # train_hard_loss is a sum over the batch there, not a mean, and so not taken for loss_hard
        _append(log.steps, row | {"lr_mult": _number(fields.get("lr_mul", fields.get("kd_lr_mult")), "lr")})
    else:
        raise ValueError(f"step {step} has neither val_loss nor train_time")


def _append(rows: list[dict], row: dict) -> None:
    if rows and row["step"] <= rows[-1]["step"]:
        raise ValueError(f"step {row['step']} after step {rows[-1]['step']}: of another run, and left out")
    rows.append(row)


def _number(text: str | None, what: str) -> float | None:
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{what} {text!r} is not a number") from None


def _ms(text: str | None) -> float | None:
    """Milliseconds of '694015ms' or '694.0s'."""
    if text is None:
        return None
    found = re.fullmatch(r"([\d.]+)(ms|s)", text)
    if not found:
        raise ValueError(f"train_time {text!r} is not a time")
    return float(found[1]) * (1000 if found[2] == "s" else 1)


def _missing(log: Log) -> list[str]:
    missing, ended = [], log.facts.get("early_stop")
    if log.total is None:
        missing.append("the number of steps of its schedule is not in it")
    elif log.last < log.total and ended is None:
        missing.append(f"it ends at step {log.last} of {log.total}")
    if not log.vals:
        missing.append("no validation is in it")
    elif log.vals[-1]["step"] < log.last:
        missing.append(f"its last validation is at step {log.vals[-1]['step']}, its last step is {log.last}")
    if log.train_time_ms is None:
        missing.append("its last step has no train_time")
    if any(row["val_loss"] is None or not math.isfinite(row["val_loss"]) for row in log.vals):
        missing.append("a validation loss is not finite")
    return missing


def step_times(log: Log) -> list[float]:
    """Milliseconds of each logged single step after the first WARMUP_STEPS."""
    timed = [row for row in log.steps if row["train_time_ms"] is not None]
    steps = [b["train_time_ms"] - a["train_time_ms"] for a, b in pairwise(timed) if b["step"] == a["step"] + 1]
    return steps[WARMUP_STEPS:]


def stage_times(log: Log, stages: int) -> list[list[float]]:
    """Milliseconds of a step in each of the equal stages of the log's schedule, in the order of its steps.

    Between two logged times that lie some steps apart it is the mean; one from two stages belongs to neither.
    """
    ends = {row["step"]: row["train_time_ms"] for row in (*log.vals, *log.steps) if row["train_time_ms"] is not None}
    times: list[list[float]] = [[] for _ in range(stages)]
    for before, after in pairwise(sorted(ends)):
        first, last = (step * stages // log.total for step in (before, after - 1))
        if first == last < stages:
            times[first].append((ends[after] - ends[before]) / (after - before))
    return times


def log_config(log: Log) -> LogConfig:
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", log.path.stem).strip("-.") or "log"
    return LogConfig(log.path.name, log.sha256, name, log.total or log.last, "kd" if log.kd else "ce")


def summary(log: Log) -> dict:
    """The row of summary.csv; what a log doesn't say is None."""
    config, times = log_config(log), sorted(step_times(log))
    losses = [row["val_loss"] for row in log.vals if row["step"] and math.isfinite(row["val_loss"] or math.nan)]
    whole = {
        key: int(log.facts[key].replace(",", "")) for key in ("params", "peak_mib", "reserved_mib") if key in log.facts
    }
    row = dict.fromkeys(SUMMARY_COLUMNS) | {"run_id": config.run_id, "arm": config.kind, "status": log.status}
    row |= {"device": log.facts.get("device", "not said"), "clock": config.clock, "steps": log.last}
    row |= {"train_time_ms": log.train_time_ms, "params_stored": whole.get("params")}
    row |= {"peak_alloc_gib": whole["peak_mib"] / 1024} if "peak_mib" in whole else {}
    row |= {"peak_reserved_gib": whole["reserved_mib"] / 1024} if "reserved_mib" in whole else {}
    row |= {"best_val": min(losses, default=None), "final_val": losses[-1] if losses else None}
    if times:
        row |= {"step_ms_median": statistics.median(times), "step_ms_p90": times[int(0.9 * (len(times) - 1))]}
    stopped = log.kd.get("kd_stop_step", "None")
    return row | {"kd_stop_step": None if stopped == "None" else int(stopped)}


def import_log(path: Path, out: Path) -> tuple[Path, Log]:
    """Make the run folder of a log under `out`/runs; one that is there already is of the same file, and made anew."""
    log = read_log(path)
    config = log_config(log)
    folder = out / "runs" / config.run_id
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    write_via(folder / "train.log", lambda temporary: temporary.write_bytes(log.path.read_bytes()))
    write_json(folder / "config.json", config.to_dict())
    write_csv(folder / "steps.csv", STEP_COLUMNS, log.steps)
    write_csv(folder / "val.csv", VAL_COLUMNS, log.vals)
    write_csv(folder / "summary.csv", SUMMARY_COLUMNS, [summary(log)])
    plot_run(folder, config.run_id, [row for row in log.steps if row["train_time_ms"] is not None], log.vals)
    reason = "; ".join(log.problems) or None
    publish(folder, {"status": log.status, "reason": reason, "log": log.path.name, "kd": log.kd})
    return folder, log


def describe(folder: Path, log: Log, fraction: float) -> str:
    """What was read, for the terminal: the run, its end, the budget that it gives, and what is missing."""
    row = summary(log)
    lines = [f"{log.path}: {log.status}: {folder}"]
    lines.append(
        f"  {len(log.vals)} validations, {len(log.steps)} steps, to step {log.last} of "
        f"{log.total or 'an unknown number'}{'; KD ' + log.kd['kd_mode'] if log.kd else ''}; device {row['device']}"
    )
    if row["final_val"] is not None:
        lines.append(f"  final val_loss {row['final_val']:.4f}, best {row['best_val']:.4f}")
    if log.train_time_ms is not None:
        budget = f"; as a CE baseline it gives a teacher {fraction * log.train_time_ms:.0f} ms ({fraction:.0%})"
        whole = budget if log.status == "imported" and not log.kd else ""
        lines.append(f"  train_time {log.train_time_ms:.0f} ms{whole}")
    return "\n".join([*lines, *(f"  missing: {problem}" for problem in log.problems)])
