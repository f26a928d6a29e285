"""What a campaign would run, before anything runs: runs, tokens, and the training time where results tell it.

Runs that the decisions taken so far name are counted as they are; of the rest, the largest number that the config
allows. No torch and no snakemake.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kdclimb import gpus, supply
from kdclimb.analysis.budget import is_shared
from kdclimb.analysis.tables import AnalysisError, RunFolder, read_csv, show_ms
from kdclimb.campaign import check_tokens, read_decisions, results_data_id, token_needs, token_supply
from kdclimb.config import RunConfig
from kdclimb.expansion import Run, ce_points, expand, grid_points, shared_jobs
from kdclimb.provenance import device_kind
from kdclimb.schedule import total_tokens
from kdclimb.sections import Campaign

HEADER = ("stage", "steps", "runs", "finished", "tokens a run", "tokens", "time", "time from")
FINISHED, PROBE, CE_SPEED = "finished runs", "probes", "CE speed"
SAME_SPEED = ("model", "device", "clock", "modelled_tflops")  # of a run's config
HOUR_MS = 3_600_000
CONTROL_NAMES = {
    "control_boost": "KD's LR without KD",
    "control_random": "random teacher",
    "control_tuned": "CE at its best point",
    "control_smooth": "label smoothing",
    "control_batch": "smaller batches",
    "control_extra": "extra steps",
    "control_growth": "grown from the teacher",
}
CLUSTER_HEADER = ("stage", "runs", "jobs", "device hours", "wall hours")
STAGES = (  # each waits for the last
    ("ce", "ce_screen", "probe"),
    ("teacher",),
    ("isolate", "screen"),
    ("kd", "ngram", *CONTROL_NAMES),
)


@dataclass(frozen=True)
class Estimate:
    """Training time of one run in ms, and where it is from."""

    ms: float
    source: str


@dataclass(frozen=True)
class Planned:
    """The runs that are `named` so far, and those that may follow, at most (`later`)."""

    named: list[Run]
    later: list[Run]
    undecided: tuple[str, ...]  # of: teacher, kd


def plan(campaign: Campaign, root: Path, results: Path) -> str:
    """The text that `python -m kdclimb plan` prints.

    `root` is the project folder, `results` the folder that holds runs/ and <campaign>/. Raises AnalysisError where a
    decision or probe.csv can't be read; run folders that can't be read are left out, and the text says so.
    """
    data = results_data_id(campaign, root, results)
    decisions = _read_decisions(results / campaign.campaign)
    planned = what_runs(campaign, decisions, data)
    finished, unreadable = finished_runs(results)
    timing = Timing(campaign, planned, finished, results)
    lines = [
        f"campaign {campaign.campaign}{' (exploratory)' if campaign.exploratory else ''}: device {campaign.device}, "
        f"clock {_clock(campaign)}, data {data}"
    ]
    lines += ["", "Named so far:", *timing.table(planned.named)]
    if planned.later:
        lines += ["", "After that, at most:", *timing.table(planned.later)]
    lines += ["", "All together" + (", at most: " if planned.later else ": ") + timing.total(planned)]
    lines += [_undecided(campaign, planned), _tokens_there(campaign, root, results), *timing.notes()]
    if unreadable:
        lines.append(f"Run folders left out, since unreadable: {len(unreadable)}; the first: {unreadable[0]}")
    return "\n".join(lines)


def _clock(campaign: Campaign) -> str:
    budget = campaign.budget
    return f"modelled at {budget.modelled_tflops:g} TFLOP/s" if budget.clock == "modelled" else budget.clock


def _read_decisions(folder: Path) -> dict:
    try:
        decisions = read_decisions(folder)
    except (OSError, ValueError) as error:
        raise AnalysisError(f"{folder}: a decision can't be read: {error}") from error
    for name, decision in decisions.items():
        if not isinstance(decision, dict):
            raise AnalysisError(f"{folder}: the decision {name} is not a JSON object")
        for key, kind in (("survivors", list), ("rejected", dict), ("points", list)):
            if not isinstance(decision.get(key, kind()), kind):
                raise AnalysisError(f"{folder}: the decision {name} has no {kind.__name__} of {key}")
    return decisions


def on_cluster(campaign: Campaign, root: Path, results: Path, width: int) -> str:
    """What is left to train, as jobs of which `width` run at a time; raises AnalysisError as `plan` does.

    A stage's wall time is that of its longest job, or of all its jobs shared out evenly, whichever is longer.
    """
    data = results_data_id(campaign, root, results)
    planned = what_runs(campaign, _read_decisions(results / campaign.campaign), data)
    finished, _ = finished_runs(results)
    timing = Timing(campaign, planned, finished, results)
    later = {run.run_id for run in planned.later}
    rows, total = [CLUSTER_HEADER], 0.0
    for arms in STAGES:
        open_ = _distinct(r for r in [*planned.named, *planned.later] if r.arm in arms and r.run_id not in finished)
        if not open_:
            continue
        jobs = _jobs(campaign, open_)
        hours = [timing.hours(ids) for ids in jobs]
        name = ", ".join(dict.fromkeys(run.arm for run in open_.values())) + (" (at most)" if later & {*open_} else "")
        if None in hours:
            total, spent, wall = math.nan, "-", "-"
        else:
            wall_hours = max(max(hours), sum(hours) / width)
            total, spent, wall = total + wall_hours, f"{sum(hours):,.2f}", f"{wall_hours:,.2f}"
        rows.append((name, f"{len(open_):,}", f"{len(jobs):,}", spent, wall))
    if len(rows) == 1:
        return "kdclimb: nothing is left to train"
    widths = [max(len(row[i]) for row in rows) for i in range(len(CLUSTER_HEADER))]
    lines = [f"kdclimb: to train, with {width} jobs at a time and no time in the queue:"]
    lines += [_line(row, widths, words=(0,)) for row in rows]
    unknown = f"  Times need {PROBE} or a finished CE run."
    return "\n".join([*lines, unknown if math.isnan(total) else f"  All together: {total:,.2f} h."])


def _jobs(campaign: Campaign, runs: dict[str, Run]) -> list[list[str]]:
    """The runs' ids, job by job."""
    shared = [[run.run_id for run in job] for job in shared_jobs(campaign, [*runs.values()]).values()]
    alone = runs.keys() - {run_id for job in shared for run_id in job}
    return shared + [[run_id] for run_id in alone]


# ---- what runs ----------------------------------------------------------------------------------


def what_runs(campaign: Campaign, decisions: dict, data: str) -> Planned:
    """Split the campaign's runs by what has been decided. A decision about something else than the config counts as
    not taken, since it will be taken again. Pure.
    """
    taken = _taken(campaign, decisions, data)
    named = expand(campaign, taken, data)
    largest = _largest(campaign, taken, data)
    known = {(run.arm, run.run_id) for run in named}
    later = [run for run in expand(campaign, largest, data) if (run.arm, run.run_id) not in known]
    undecided = [] if "projected" in taken else ["teacher"]
    if _kd_may_follow(largest) and "promoted" not in taken:
        undecided.append("kd")
    return Planned(named, later, tuple(undecided))


def _taken(campaign: Campaign, decisions: dict, data: str) -> dict:
    """The decisions that speak of what the config holds, up to the first that doesn't."""
    taken, projected = {}, decisions.get("projected")
    if projected is None or _spoken_of(projected) != {c.name for c in campaign.teacher.candidates}:
        return taken
    taken["projected"] = projected
    if "selected" not in decisions:
        return taken
    teachers = {run.run_id for run in expand(campaign, taken, data) if run.arm == "teacher"}
    if decisions["selected"].get("run_id") not in teachers | {*campaign.teacher.imported, None}:
        return taken
    taken["selected"] = decisions["selected"]
    points, promoted = {point.name for point in grid_points(campaign.kd.grid)}, decisions.get("promoted", {})
    chosen = promoted.get("points")
    if chosen is not None and points.issuperset(chosen) and len(chosen) <= campaign.kd.promote:
        taken["promoted"] = promoted
    return taken


def _spoken_of(projected: dict) -> set[str]:
    return {*projected.get("survivors", ()), *projected.get("rejected", ())}


def _largest(campaign: Campaign, taken: dict, data: str) -> dict:
    """`taken`, and for what is open the decisions that lead to the most runs. Which teacher is chosen changes none of
    their numbers.
    """
    decisions = {"projected": {"survivors": [c.name for c in campaign.teacher.candidates]}} | taken
    teachers = [run.run_id for run in expand(campaign, decisions, data) if run.arm == "teacher"]
    teachers += campaign.teacher.imported
    # A teacher takes its whole budget at most, and CE no more steps than that is worth.
    whole = {"train_time_ms": campaign.budget.fraction, "budget_ms": campaign.budget.fraction}
    decisions = {"selected": {"run_id": teachers[0] if teachers else None} | whole} | decisions
    tuned = next((p.name for p in ce_points(campaign.controls.ce_grid) if not p.is_ce), None)
    return {"promoted": {"points": _costliest_points(campaign), "ce_point": tuned}} | decisions


def _costliest_points(campaign: Campaign) -> list[str]:
    """As many points as may be promoted, those first that boost the LR: they always have a control of it."""
    points = sorted(grid_points(campaign.kd.grid), key=lambda point: point.lr_boost is None)
    return [point.name for point in points[: campaign.kd.promote]]


def _kd_may_follow(largest: dict) -> bool:
    return largest["selected"].get("run_id") is not None


def _undecided(campaign: Campaign, planned: Planned) -> str:
    """The line that says what is still open, with the largest numbers."""
    later = {}
    for run in planned.later:
        later.setdefault(run.arm, set()).add(run.run_id)
    count = {arm: len(ids) for arm, ids in later.items()}
    parts = []
    if "teacher" in planned.undecided:
        parts.append(f"teachers, after the filter: at most {count['teacher']}, if all candidates survive it")
    if "kd" in planned.undecided:
        screen = f"{count['screen']} grid points, " if "screen" in count else ""
        after = "the selection" if screen else "the screening"
        horizons, seeds = len(campaign.train.horizons), len(campaign.train.seeds)
        controls = ", ".join(f"{count[arm]} {name}" for arm, name in CONTROL_NAMES.items() if arm in count)
        parts.append(
            f"KD, after {after}: at most {screen}{count['kd'] // (horizons * seeds)} promoted x {horizons} horizons x "
            f"{seeds} seeds = {count['kd']} full runs; controls: {controls or 'none'}"
        )
    return f"Not decided yet: {'; '.join(parts)}." if parts else "All is decided."


# ---- tokens and time ----------------------------------------------------------------------------


def _tokens_there(campaign: Campaign, root: Path, results: Path) -> str:
    """The line on tokens needed and there, or that with which ./run would refuse them."""
    try:
        check_tokens(campaign, root, results)
        return supply.describe(token_needs(campaign), token_supply(campaign, root, results))
    except ValueError as error:
        return f"Not to be run so: {error}"


def run_tokens(config: RunConfig) -> int:
    """Training tokens of a run."""
    return total_tokens(config.schedule, config.schedule.stop_step)


def finished_runs(results: Path) -> tuple[dict[str, RunFolder], list[str]]:
    """{run id: run} of all runs that ended here, however, and one message for each folder that can't be read."""
    runs, unreadable = {}, []
    for status in sorted(results.glob("runs/*/status.json")):
        try:
            run = RunFolder.read(f"any|any|{status.parent}")
        except AnalysisError as error:
            unreadable.append(str(error))
        else:
            if isinstance(run.config, RunConfig):
                runs[run.run_id] = run
    return runs, unreadable


def _distinct(runs: Iterable[Run]) -> dict[str, Run]:
    return {run.run_id: run for run in runs}


def this_device_kind(device: str) -> str | None:
    """The name that runs on this machine are recorded under; None where it has no such device."""
    if device == "cpu":
        return device_kind(device)
    there = gpus.listed()  # torch would name it too, after seconds
    return there[0][1] if there else None


class Timing:
    """Estimates from finished runs, and the tables that show them."""

    def __init__(self, campaign: Campaign, planned: Planned, finished: dict[str, RunFolder], results: Path):
        self.finished = finished
        self.modelled = campaign.budget.clock == "modelled"
        self.kind = None if self.modelled else this_device_kind(campaign.device)
        self.projected = _projected(results / campaign.campaign / "teacher/probe.csv", planned.named)
        self.student = next(run.config for run in planned.named if run.arm == "ce")
        alike = _ce_runs(self.student, finished.values(), self.kind)
        self.ms_per_token, self.wall = _ms_per_token(alike), None if self.modelled else _wall_over_training(alike)
        runs = _distinct([*planned.named, *planned.later])
        arms = {run_id: run.arm for run_id, run in runs.items()}
        self.estimates = {run_id: self._estimate(arms[run_id], run) for run_id, run in runs.items()}
        self.tokens = {run_id: run_tokens(run.config) for run_id, run in runs.items()}

    def _estimate(self, arm: str, run: Run) -> Estimate | None:
        if run.run_id in self.finished:
            return Estimate(self.finished[run.run_id].summary["train_time_ms"] or 0.0, FINISHED)
        if arm == "teacher" and run.label in self.projected:
            return Estimate(self.projected[run.label], PROBE)
        if run.config.model != self.student.model or self.ms_per_token is None:
            return None
        return Estimate(self.ms_per_token * run_tokens(run.config), CE_SPEED)

    def table(self, runs: list[Run]) -> list[str]:
        """One line for each stage and number of steps. A time needs all of its runs' times."""
        groups: dict = {}
        for run in runs:
            shape = (run.arm, run.config.schedule.stop_step, self.tokens[run.run_id])
            groups.setdefault(shape, {})[run.run_id] = run
        rows = [HEADER]
        for (arm, steps, tokens), group in groups.items():
            time, source = self._time(group)
            done = sum(run_id in self.finished for run_id in group)
            numbers = (steps, len(group), done, tokens, tokens * len(group))
            rows.append((arm, *(f"{number:,}" for number in numbers), time, source))
        widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
        return [_line(row, widths) for row in rows]

    def _time(self, ids: Iterable[str]) -> tuple[str, str]:
        estimates = [self.estimates[run_id] for run_id in ids]
        if None in estimates:
            return "-", ""
        sources = ", ".join(dict.fromkeys(estimate.source for estimate in estimates))
        return show_time(math.fsum(estimate.ms for estimate in estimates)), sources

    def hours(self, ids: Iterable[str]) -> float | None:
        """Of these runs one after the other; None where one's time isn't known."""
        estimates = [self.estimates[run_id] for run_id in ids]
        return None if None in estimates else math.fsum(estimate.ms for estimate in estimates) / HOUR_MS

    def total(self, planned: Planned) -> str:
        """Runs, tokens and time of everything; a run that several stages ask for counts once."""
        asked = [*planned.named, *planned.later]
        ids = _distinct(asked)
        known = [self.estimates[run_id].ms for run_id in ids if self.estimates[run_id] is not None]
        done = sum(run_id in self.finished for run_id in ids)
        text = f"{len(ids):,} runs ({done:,} finished), {sum(self.tokens[run_id] for run_id in ids):,} tokens, time "
        text += show_time(math.fsum(known)) if known else "-"  # sum() rounds otherwise from Python 3.12 on
        if known and len(known) < len(ids):
            text += f" for {len(known):,} of them"
        if len(ids) < len(asked):
            text += f"; {len(asked) - len(ids):,} asked for by two stages, trained once"
        return text + "."

    def notes(self) -> list[str]:
        what = "charged by FLOPs" if self.modelled else "without compilation, validation and checkpoints"
        lines = [f"Time is train_time_ms: training alone, {what}."]
        if self.wall is not None:
            lines.append(f"From its set-up to its last artifact a CE run took {self.wall:.2f} times that on the wall.")
        if self.ms_per_token is not None:
            on = f" on {self.kind}" if self.kind else ""
            speed = f"{self.ms_per_token * 1000:.3g} ms per 1,000 tokens{on}"
            lines.append(f"{CE_SPEED}: {speed}; while KD is active, a run takes longer than that.")
        return lines


def _line(row: tuple[str, ...], widths: list[int], words: tuple[int, ...] = (0, len(HEADER) - 1)) -> str:
    cells = [f"{c:{w}}" if i in words else f"{c:>{w}}" for i, (c, w) in enumerate(zip(row, widths, strict=True))]
    return "  ".join(["", *cells]).rstrip()


def _projected(probe: Path, named: list[Run]) -> dict[str, float]:
    """{candidate: projected ms}, from the probes of exactly these candidates."""
    if not probe.is_file():
        return {}
    from kdclimb.analysis.selection import PROBE_COLUMNS  # here: it imports scipy, and each parse this module

    probes = {run.run_id for run in named if run.arm == "probe"}
    rows = [row for row in read_csv(probe, PROBE_COLUMNS) if row["run_id"] in probes]
    return {row["candidate"]: row["projected_ms"] for row in rows if row["projected_ms"] is not None}


def _ce_runs(student: RunConfig, runs: Iterable[RunFolder], kind: str | None) -> list[RunFolder]:
    """All finished CE runs that trained this student under this clock on this kind of device, and have a time.

    Without a `kind` (a modelled clock, or a plan for a GPU that is not here), any device counts.
    """
    found = []
    for run in runs:
        config, row = run.config, run.summary
        same = all(getattr(config, key) == getattr(student, key) for key in SAME_SPEED)
        timed = run.ok and config.kd is None and row["tokens"] and row["train_time_ms"]
        if same and timed and not is_shared(row) and (kind is None or row["device"] == kind):
            found.append(run)
    return found


def _ms_per_token(runs: list[RunFolder]) -> float | None:
    tokens = sum(run.summary["tokens"] for run in runs)
    return math.fsum(run.summary["train_time_ms"] for run in runs) / tokens if tokens else None


def _wall_over_training(runs: list[RunFolder]) -> float | None:
    """Of runs in one try: the wall time of a broken one's earlier tries is not known."""
    whole = [run for run in runs if run.wall_s and not run.summary["broken"]]
    training = math.fsum(run.summary["train_time_ms"] for run in whole)
    return 1e3 * math.fsum(run.wall_s for run in whole) / training if whole else None


def show_time(ms: float) -> str:
    """A time in words, in hours from two hours on."""
    return f"{ms / HOUR_MS:,.1f} h" if ms >= 2 * HOUR_MS else show_ms(ms)
