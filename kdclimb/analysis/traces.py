"""What the report shows of each run beside the comparison: its steps, thinned; its config; and the horizon curve."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from itertools import pairwise

from scipy.optimize import isotonic_regression
from scipy.stats import t as student_t

from kdclimb.analysis.compare import teacher_cost_ms
from kdclimb.analysis.paired import MIN_PAIRS
from kdclimb.analysis.tables import WARMUP_STEPS, RunFolder, read_csv, read_json, read_text
from kdclimb.config import RunConfig
from kdclimb.schedule import mtp_weights

BLOCKS = 60  # rows of a run's trace at most, so that a report of hundreds of runs stays small enough to send
SPIKE = 2.0  # a block with a step of more than this many of the run's median steps has a spike
STEP_COLUMNS = "step tokens train_time_ms lr_mult batch_tokens loss_hard kd_norm kd_share kd_active grad_norm".split()
TRACE_COLUMNS = (
    "run_id step tokens train_time_ms time_with_teacher_ms train_loss lr_mult step_ms step_ms_max spike phase kd_share "
    "kd_norm grad_norm"
).split()
HORIZON_COLUMNS = "arm label horizon seed final_val fitted low high n_seeds".split()
PAGE_COLUMNS = "run_id base_run_id command artifact_dir files".split()
CONFIG_COLUMNS = ("run_id", "key", "value")


def distinct(runs: Iterable[RunFolder]) -> list[RunFolder]:
    """Each folder once, under the first arm that asks for it."""
    return list({run.run_id: run for run in reversed(list(runs))}.values())[::-1]


# ---- steps


def trace_rows(run: RunFolder, teacher: dict) -> list[dict]:
    """The run's steps as at most BLOCKS rows of TRACE_COLUMNS, each a block of steps, named by its last.

    train_loss (nats a token) is the block's mean hard loss over the sum of the step's multi-token weights, so that it
    can be set beside a loss of one token ahead; step_ms is the median, step_ms_max the longest step; spike says whether
    that is above SPIKE medians of the run. The first steps, which are slower on every device, count for no time.
    phase is A while KD is on, B while the LR blends after its stop, C after that, and empty without KD.
    """
    steps = read_csv(run.folder / "steps.csv", STEP_COLUMNS)
    steps = [row for row in steps if row["step"] is not None]
    if not steps:
        return []
    cost, durations = teacher_cost_ms(run, teacher), _durations(steps)
    known = [ms for ms in durations[WARMUP_STEPS:] if ms is not None]
    usual = statistics.median(known) if known else None
    size = math.ceil(len(steps) / BLOCKS)
    return [
        _block(run, steps[start : start + size], durations[start : start + size], start, usual, cost)
        for start in range(0, len(steps), size)
    ]


def _durations(steps: list[dict]) -> list[float | None]:
    """Milliseconds of each step; a log has times of some steps only."""
    times = [0.0, *(row["train_time_ms"] for row in steps)]
    return [None if None in (before, after) else after - before for before, after in pairwise(times)]


def _block(run: RunFolder, steps: list[dict], durations: list, start: int, usual: float | None, cost: float) -> dict:
    last = steps[-1]
    timed = [ms for i, ms in enumerate(durations, start) if ms is not None and i >= WARMUP_STEPS]
    losses = [loss for row in steps if (loss := _normalised(run, row)) is not None]
    shares = [row["kd_share"] for row in steps if row["kd_share"] is not None and math.isfinite(row["kd_share"])]
    time = last["train_time_ms"]
    return {
        "run_id": run.run_id,
        **{key: last[key] for key in ("step", "tokens", "train_time_ms", "lr_mult", "kd_norm", "grad_norm")},
        "time_with_teacher_ms": None if time is None else time + cost,
        "train_loss": statistics.fmean(losses) if losses else None,
        "step_ms": statistics.median(timed) if timed else None,
        "step_ms_max": max(timed, default=None),
        "spike": int(max(timed) > SPIKE * usual) if timed else None,
        "phase": _phase(run, last["step"]),
        "kd_share": shares[-1] if shares else None,
    }


def _normalised(run: RunFolder, row: dict) -> float | None:
    """The step's hard loss over the sum of its multi-token weights (nats a token); None where it is not finite."""
    loss = row["loss_hard"]
    if loss is None or not math.isfinite(loss):
        return None
    if not isinstance(run.config, RunConfig):
        return loss
    return loss / math.fsum(mtp_weights(run.config.schedule, row["step"] - 1))


def _phase(run: RunFolder, step: int) -> str:
    kd = run.config.kd
    if kd is None:
        return ""
    stop = run.summary["kd_stop_step"]
    if stop is None or step <= stop:
        return "A"
    return "B" if step <= stop + (getattr(kd, "post_stop_blend_steps", None) or 0) else "C"


# ---- the horizon curve


def horizon_rows(runs: Sequence[RunFolder], confidence: float) -> list[dict]:
    """Where runs of CE and of each KD point end by their horizon: rows of HORIZON_COLUMNS, by seed, and without one
    over all.

    `fitted` (nats) is the monotone fit that the shortest complete horizon is read from; over the seeds it fits their
    means, and low and high are Student's interval of the mean at `confidence`, from three seeds on.
    """
    series: dict[tuple, list[RunFolder]] = {}
    for run in runs:
        if run.arm in ("ce", "kd") and run.ok and run.summary["final_val"] is not None:
            series.setdefault((run.arm, "CE" if run.arm == "ce" else run.label), []).append(run)
    return [row for place, members in series.items() for row in _curve_of(place, members, confidence)]


def _curve_of(place: tuple, runs: list[RunFolder], confidence: float) -> list[dict]:
    by_seed: dict[int, dict[int, float]] = {}
    for run in runs:
        by_seed.setdefault(run.config.seed, {})[run.horizon] = run.summary["final_val"]
    whole = max(len(ends) for ends in by_seed.values())
    by_seed = {seed: ends for seed, ends in by_seed.items() if len(ends) == whole}  # the screen's seed has one horizon
    rows = []
    for seed, ends in by_seed.items():
        rows += [row | {"seed": seed, "low": None, "high": None, "n_seeds": None} for row in _fit(place, ends)]
    ends = {h: [found[h] for found in by_seed.values() if h in found] for h in sorted(set().union(*by_seed.values()))}
    for row in _fit(place, {h: statistics.fmean(values) for h, values in ends.items()}):
        rows.append(row | {"seed": None} | _interval(ends[row["horizon"]], confidence))
    return rows


def _fit(place: tuple, ends: dict[int, float]) -> list[dict]:
    horizons = sorted(ends)
    fitted = isotonic_regression([ends[h] for h in horizons], increasing=False).x
    return [
        {"arm": place[0], "label": place[1], "horizon": h, "final_val": ends[h], "fitted": float(value)}
        for h, value in zip(horizons, fitted, strict=True)
    ]


def _interval(values: list[float], confidence: float) -> dict:
    n = len(values)
    if n < MIN_PAIRS:
        return {"low": None, "high": None, "n_seeds": n}
    half = student_t.ppf((1 + confidence) / 2, n - 1) * statistics.stdev(values) / math.sqrt(n)
    mean = statistics.fmean(values)
    return {"low": mean - half, "high": mean + half, "n_seeds": n}


# ---- what a run is


def page_rows(runs: Sequence[RunFolder]) -> list[dict]:
    """Rows of PAGE_COLUMNS: the run that each is held against, the command that repeats it, what lies in its folder.

    A student's base is the CE run of its horizon and seed; of a teacher, a CE run or an isolate the first of its arm.
    """
    ce, first = {}, {}
    for run in runs:
        first.setdefault(run.arm, run.run_id)
        if run.arm == "ce":
            ce[run.horizon, run.config.seed] = run.run_id
    rows = []
    for run in runs:
        own = run.arm in ("ce", "probe", "teacher", "imported", "ngram_teacher", "isolate")
        base = first[run.arm] if own else ce.get((run.horizon, run.config.seed), first.get("ce"))
        log = run.folder / "train.log"
        command = read_text(log).split("\n", 1)[0] if log.is_file() and not run.logged else ""
        files = sorted(path.name for path in run.folder.iterdir() if not path.name.startswith("."))
        row = {"run_id": run.run_id, "base_run_id": base, "command": command, "artifact_dir": run.folder}
        rows.append(row | {"files": " ".join(files)})
    return rows


def config_rows(runs: Sequence[RunFolder]) -> list[dict]:
    """Rows of CONFIG_COLUMNS: every key of each run's config.json, dotted, and its value as JSON writes it."""
    return [
        {"run_id": run.run_id, "key": key, "value": value}
        for run in runs
        for key, value in flatten(read_json(run.folder / "config.json"))
    ]


def flatten(value, key: str = "") -> list[tuple[str, str]]:
    """[(dotted key, value as text)]; lists stay whole, and None is `none`."""
    if isinstance(value, dict) and value:
        return [pair for name, part in value.items() for pair in flatten(part, f"{key}.{name}" if key else name)]
    return [(key, "none" if value is None else str(value))]
