"""Time: what CE takes, what the teacher may therefore take, and what KD adds to a step.

All times are `train_time_ms`: training steps and data loading, without compilation, validation and
checkpoints. A timing from a run that shared its device, or from another device, thread count or clock
than the budget's, is refused.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from kdclimb.analysis.tables import (
    RUN_COLUMNS,
    AnalysisError,
    RunFolder,
    read_csv,
    read_json,
    show_number,
    write_csv,
    write_json,
)
from kdclimb.config import ScheduleConfig
from kdclimb.imported import LOGGED
from kdclimb.logs import log_config, read_log, summary
from kdclimb.schedule import stage_starts

BUDGET_KEYS = (
    "anchor_ms budget_ms ce_train_time_ms clock code_hashes device fraction horizon projected_from threads".split()
)
ISOLATE_COLUMNS = (
    "label",
    "run_id",
    "status",
    "reason",
    "step_ms_median",
    "ratio_to_ce",
    "anchor_ms",
    "clock",
    "device",
    "threads",
    "shared_device",
)
PROFILE_COLUMNS = tuple(
    "label run_id part ms_median ms_p90 share_of_step step_ms_median shared_device device threads".split()
)
MIN_STEPS = 10  # of one kind, below which their mean says nothing
TIMED_ON = ("device", "threads", "clock")


def ce_baseline(runs: list[RunFolder], out: Path, log: str = "") -> None:
    """Collect the CE runs, one row each; or the one run that a training log tells of, if `log` names one.

    Raises AnalysisError, which stops the campaign, where one of them failed, where one of those that set the budget
    shared its device under the measured clock, and where a log does not hold a whole CE run.
    """
    if log:
        write_csv(out, RUN_COLUMNS, [_logged_row(Path(log).expanduser())])
        return
    if not runs:
        raise AnalysisError("no CE run was given")
    last = max(run.horizon for run in runs)
    problems = []
    for run in runs:
        if not run.ok:
            problems.append((run, f"{run.status} ({run.reason or 'no reason recorded'})"))
        elif run.horizon == last and is_shared(run.row()):
            problems.append((run, "ok, but it shared its device, so its time can't set the budget"))
    if problems:
        raise AnalysisError("the CE baseline is not complete:\n" + "\n".join(_remedy(*problem) for problem in problems))
    write_csv(out, RUN_COLUMNS, [run.row() for run in runs])


def _logged_row(path: Path) -> dict:
    try:
        log = read_log(path)
    except ValueError as error:
        raise AnalysisError(f"baseline.log: {error}") from error
    problems = [*log.problems, *(["it is a KD run's"] if log.kd else [])]
    if problems:
        raise AnalysisError(f"baseline.log: {path} can't set the budget: {'; '.join(problems)}")
    config = log_config(log)
    place = {"arm": "ce", "label": path.name, "horizon": config.horizon, "kind": config.kind}
    return summary(log) | place | dict.fromkeys(("reason", "slurm_job", "log_tail"), "")


def _remedy(run: RunFolder, what: str) -> str:
    log, retry = run.folder / "train.log", f"python -m kdclimb retry --run {run.run_id}"
    return f"  {run.label}, seed {run.config.seed}, run {run.run_id}: {what}\n    see {log}; to train it again: {retry}"


def is_shared(row: dict) -> bool:
    """Whether a measured time is unfit because another process used the device."""
    return row["clock"] == "measured" and bool(row["shared_device"])


def set_budget(timing: Path, fraction: float, out: Path, horizon: int = 0, runs: Sequence[RunFolder] = ()) -> None:
    """The teacher's budget (ms): `fraction` of the median CE training time at the longest horizon, each run's time at
    the speed of their median anchor (`anchor_ms`; None where none has one). With a longer `horizon` (steps; 0 for none)
    that of a run of so many steps, projected from the same CE runs, whose folders are among `runs`.

    Raises AnalysisError where these CE runs were timed on different devices, thread counts or clocks, and where the
    time can't be projected from one of them.
    """
    rows = read_csv(timing, RUN_COLUMNS)
    if not rows:
        raise AnalysisError(f"{timing}: holds no CE run")
    last = max(row["horizon"] for row in rows)
    rows = [row for row in rows if row["horizon"] == last]
    timed_on = {}
    for key in TIMED_ON:
        values = list(dict.fromkeys(row[key] for row in rows))
        if len(values) > 1:
            raise AnalysisError(f"{timing}: the CE runs at {last} steps differ in {key}: {', '.join(map(str, values))}")
        timed_on[key] = values[0]
    times = [row["train_time_ms"] for row in rows]
    if None in times:
        raise AnalysisError(f"{timing}: a CE run at {last} steps has no train_time_ms")
    projected = horizon not in (0, last)
    if projected:
        folders = {run.run_id: run for run in runs}
        if missing := [row["run_id"] for row in rows if row["run_id"] not in folders]:
            raise AnalysisError(f"{timing}: no folder was given of {', '.join(missing)}, to project its time from")
        times = [projected_ms(folders[row["run_id"]], horizon) for row in rows]
    anchor = _median_anchor(rows)
    ce_ms = float(statistics.median(ms * speed_of(row, anchor) for row, ms in zip(rows, times, strict=True)))
    decision = {
        "anchor_ms": anchor,
        "ce_train_time_ms": ce_ms,
        "ce_run_ids": [row["run_id"] for row in rows],
        "horizon": horizon or last,
        "projected_from": last if projected else None,
        "fraction": fraction,
        "budget_ms": ce_ms * fraction,
        "code_hashes": sorted({row["code_hash"] for row in rows if row["code_hash"]}),
    }
    write_json(out, decision | timed_on)


def projected_ms(run: RunFolder, horizon: int) -> float:
    """Milliseconds that the run would have taken over `horizon` steps: for each stage of the batch schedule its median
    step, times the steps that the stage has there.

    Raises AnalysisError where the run has no step of one of these stages.
    """
    schedule = run.config.schedule
    times = [0.0, *(row["train_time_ms"] for row in run.steps)]
    spent = {row["step"] - 1: after - before for row, (before, after) in zip(run.steps, pairwise(times), strict=True)}
    there = _stages(dataclasses.replace(schedule, horizon=horizon, stop_step=horizon))
    total = 0.0
    for name, steps in _stages(schedule).items():
        each = [spent[step] for step in steps if step in spent]
        if there[name] and not each:
            lacks = f"holds no step of {name}, so the time of {horizon} steps can't be projected"
            raise AnalysisError(f"{run.folder / 'steps.csv'}: {lacks}")
        total += len(there[name]) * statistics.median(each) if each else 0.0
    return total


def _stages(schedule: ScheduleConfig) -> dict[str, range]:
    """{stage in words: its steps, counted from 0}. An extension with windows of its own is one, as its steps take their
    own time.
    """
    starts = stage_starts(schedule)
    names = [f"stage {i} of {len(starts)}" for i in range(1, len(starts) + 1)]
    if schedule.extension_windows:
        starts, names = [*starts, schedule.scheduled], [*names, "the extension"]
    bounds = pairwise([*starts, schedule.horizon])
    return {name: range(start, end) for name, (start, end) in zip(names, bounds, strict=True)}


def projection(projected_from: float | None) -> str:
    """What the words of a budget end with: the horizon of the runs that it is projected from, if it is projected."""
    return "" if projected_from is None else f" (projected from {show_number(projected_from)}-step runs)"


def read_budget(path: Path) -> dict:
    return read_json(path, BUDGET_KEYS)


def refuse_timing(row: dict, reference: dict) -> str:
    """Why the time of `row` can't be held against that of `reference`; empty where it can.

    A log's time is taken as it stands: that it is another machine's is known, and forbids every claim.
    """
    if is_shared(row):
        return "timing refused: the run shared its device; train it again alone"
    if row.get("unsteady"):
        return f"timing refused: {row['unsteady']}"
    if reference["clock"] == LOGGED:
        return ""
    differ = [f"{key} {row[key]} against {reference[key]}" for key in TIMED_ON if row[key] != reference[key]]
    return f"timing refused: {', '.join(differ)}" if differ else ""


def anchor_of(row: dict) -> float | None:
    """Milliseconds of the anchor's step, the mean of before and after; None where one is missing."""
    both = row["anchor_before_ms"], row["anchor_after_ms"]
    return None if None in both else statistics.fmean(both)


def speed_of(row: dict, anchor: float | None) -> float:
    """Factor of a run's times, as they would have been on a machine whose anchor takes `anchor` ms a step; 1 where that
    or its own is not known.
    """
    own = anchor_of(row)
    return 1.0 if own is None or anchor is None else anchor / own


def _median_anchor(rows: Iterable[dict]) -> float | None:
    known = [ms for ms in map(anchor_of, rows) if ms is not None]
    return statistics.median(known) if known else None


def at_one_speed(runs: list[RunFolder], max_drift: float) -> list[RunFolder]:
    """The same runs, their times as they would have been at one speed of the machine.

    That speed is the median anchor of the CE runs at the longest horizon. A run without an anchor keeps its times, and
    has none to compare where others have one; nor has one during which the machine changed by more than `max_drift`:
    the anchor from before to after, or the mean of its steps of one kind from their median.
    """
    last = max((run.horizon for run in runs if run.arm == "ce"), default=0)
    anchor = _median_anchor(run.summary for run in runs if run.arm == "ce" and run.horizon == last)
    return runs if anchor is None else [_at_speed(run, anchor, max_drift) for run in runs]


def _at_speed(run: RunFolder, anchor: float, max_drift: float) -> RunFolder:
    if anchor_of(run.summary) is None:  # failed, or from elsewhere
        return dataclasses.replace(run, unsteady="no anchor beside the run" if run.ok and not run.imported else "")
    before, after = run.summary["anchor_before_ms"], run.summary["anchor_after_ms"]
    unsteady, stalled = "", _stalled(run)
    if abs(after / before - 1) > max_drift:
        unsteady = (
            f"the machine's anchor went from {before:.3g} to {after:.3g} ms a step during the run; train it again"
        )
    elif stalled > 1 + max_drift:
        unsteady = f"the run's steps took {stalled:.3g} times their median on average; train it again"
    return dataclasses.replace(run, speed=speed_of(run.summary, anchor), unsteady=unsteady)


def _stalled(run: RunFolder) -> float:
    """Largest mean time of the steps of one kind (batch size, with KD or not), over their median; 1 for too few."""
    kinds: dict[tuple, list[float]] = {}
    for row, ms in zip(run.steps[-len(each := run.durations()) :], each, strict=True):
        kinds.setdefault((row["batch_tokens"], row["kd_active"]), []).append(ms)
    ratios = [statistics.fmean(each) / statistics.median(each) for each in kinds.values() if len(each) >= MIN_STEPS]
    return max(ratios, default=1.0)


def _median_of(run: RunFolder, steps: set[int] | None) -> float | None:
    """Median ms of these of the run's steps, all for None, without the first ones; None if none is left."""
    each = run.durations()
    first = len(run.steps) - len(each)
    kept = [ms for i, ms in enumerate(each, first) if steps is None or i in steps]
    return statistics.median(kept) if kept else None


def kd_isolates(runs: list[RunFolder], out: Path) -> None:
    """Median ms of a step of each timing isolate, and its ratio to the one that trains with CE only.

    The steps are those that have KD in all isolates that have KD at all: it may end before they do, and batches grow
    after it. The ratio is left empty where the two can't be compared: one failed, or they were timed differently.
    """
    taught = [{i for i, row in enumerate(run.steps) if row["kd_active"]} for run in runs if run.ok and run.config.kd]
    steps = set.intersection(*taught) if taught else None
    rows = []
    for run in runs:
        row = run.row()
        rows.append(row | {"step_ms_median": _median_of(run, steps) if run.ok else None, "is_ce": not run.config.kd})
    ce = next((row for row in rows if row["is_ce"] and row["step_ms_median"] and not is_shared(row)), None)
    for row in rows:
        row["anchor_ms"] = anchor_of(row)
        fit = ce is not None and row["step_ms_median"] is not None and not refuse_timing(row, ce)
        row["ratio_to_ce"] = row["step_ms_median"] / ce["step_ms_median"] if fit else None
        if fit and row["anchor_ms"] and ce["anchor_ms"]:  # at one speed of the machine
            row["ratio_to_ce"] *= ce["anchor_ms"] / row["anchor_ms"]
    write_csv(out, ISOLATE_COLUMNS, rows)
