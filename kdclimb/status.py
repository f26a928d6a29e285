"""How far a campaign is, for the terminal: stages, runs in flight, the best so far, the budget."""

from __future__ import annotations

import fcntl
import json
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, Group
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from kdclimb.analysis.so_far import ended
from kdclimb.analysis.tables import RunFolder, show_ms
from kdclimb.campaign import data_id, read_decisions
from kdclimb.config import RunConfig
from kdclimb.expansion import Run
from kdclimb.jobs import FAILURES, read_failures
from kdclimb.plan import CONTROL_NAMES, Planned, what_runs
from kdclimb.sections import Campaign

STAGES = {  # arms that are one stage to who waits for them
    "CE baseline": ("ce",),
    "CE screen": ("ce_screen",),
    "teacher probes": ("probe",),
    "teachers": ("teacher",),
    "timing isolates": ("isolate",),
    "KD screen": ("screen",),
    "KD at all horizons": ("kd", "ngram"),
    "controls": tuple(CONTROL_NAMES),
}
VALIDATION = re.compile(r"^step (\d+)/(\d+) val_loss ([\d.]+)", re.MULTILINE)
ATTEMPT = re.compile(r"^attempt \d+", re.MULTILINE)


@dataclass(frozen=True)
class Progress:
    """A run in flight: the last validation in its log, and how long that took since its latest start (seconds)."""

    run: Run
    step: int
    total: int
    val_loss: float | None
    since: float | None

    @property
    def left(self) -> float | None:
        """Seconds to its end at the speed since its start, validations included; None before its second validation."""
        return None if not self.since or not self.step else self.since * (self.total - self.step) / self.step


@dataclass(frozen=True)
class State:
    """Where a campaign stands: the runs that are known and may follow, those that ended, and those in flight."""

    campaign: Campaign
    planned: Planned
    done: list[RunFolder]
    flying: list[Progress]
    budget: dict
    selected: dict
    failed: list[dict]  # jobs that left no result, as kdclimb.jobs keeps them

    @property
    def words(self) -> str:
        """One line for the page and the terminal."""
        done, named = len({run.run_id for run in self.done}), len({run.run_id for run in self.planned.named})
        later = len({run.run_id for run in self.planned.later})
        more = f"; at most {later} more follow, by what is decided" if later else ""
        return f"{done} of {named} runs known so far have ended, {len(self.flying)} in flight{more}."


def state(campaign: Campaign, root: Path, results: Path) -> State:
    """Read where the campaign stands; changes nothing. Raises AnalysisError where a finished run can't be read."""
    folder, runs = results / campaign.campaign, results / "runs"
    planned = what_runs(campaign, read_decisions(folder), data_id(campaign, root))
    return State(
        campaign,
        planned,
        ended(campaign, planned.named, runs),
        list(in_flight(planned.named, runs)),
        _json(folder / "budget.json"),
        _json(folder / "teacher/selected.json"),
        read_failures(folder / FAILURES),
    )


def _json(path: Path) -> dict:
    return json.loads(path.read_text()) if path.is_file() else {}


def in_flight(named: Iterable[Run], runs: Path) -> Iterable[Progress]:
    """Runs whose folder is held by a process, here or in a Slurm job, and how far their logs say they are."""
    for run in {run.run_id: run for run in named}.values():
        folder = runs / run.run_id
        if (
            not isinstance(run.config, RunConfig)
            or (folder / "status.json").is_file()
            or not is_held(folder / ".state")
        ):
            continue
        log = folder / "train.log"
        text = log.read_text(errors="replace") if log.is_file() else ""
        seen = VALIDATION.findall(text)
        step, loss = (int(seen[-1][0]), float(seen[-1][2])) if seen else (0, None)
        yield Progress(run, step, run.config.schedule.stop_step, loss, _since(folder, text) if len(seen) > 1 else None)


def _since(folder: Path, log: str) -> float | None:
    """Seconds from its start to the last line of its log; None where it was resumed, as the steps are not of one go."""
    lease = folder / ".state/lease.json"
    if not lease.is_file() or len(ATTEMPT.findall(log)) != 1:
        return None
    return (folder / "train.log").stat().st_mtime - lease.stat().st_mtime


def is_held(state_folder: Path) -> bool:
    """Whether a process holds the run's lock, or by its lease a job on another node does."""
    lock, lease = state_folder / "lock", _json(state_folder / "lease.json")
    if lease.get("held") and lease.get("job"):
        return True
    if not lock.is_file():
        return False
    with lock.open("r") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def show(found: State, console: Console) -> None:
    """Print it."""
    title = Text(f"campaign {found.campaign.campaign}", style="bold")
    console.print(Group(title, Text(found.words), _stages(found), *_flying(found), *_failed(found), *_best(found)))


def _stages(found: State) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for heading in ("stage", "ended", "", "in flight", "not ok"):
        table.add_column(heading, justify="left" if heading in ("stage", "") else "right")
    for stage, arms in STAGES.items():
        named = {run.run_id for run in found.planned.named if run.arm in arms}
        later = {run.run_id for run in found.planned.later if run.arm in arms}
        done = {run.run_id: run for run in found.done if run.arm in arms}
        flying = sum(progress.run.run_id in named for progress in found.flying)
        total = len(named) or len(later)
        count = f"{len(done)} of {'' if named else 'at most '}{total}"
        bar = ProgressBar(total=max(total, 1), completed=len(done), width=20)
        failed = [run for run in done.values() if not run.ok]
        table.add_row(stage, count, bar, str(flying or ""), Text(str(len(failed) or ""), style="red"))
    return table


def _flying(found: State) -> list:
    if not found.flying:
        return [Text("no run is in flight", style="dim")]
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for heading in ("in flight", "step", "", "val loss", "ETA"):
        table.add_column(heading, overflow="fold")
    for progress in found.flying:
        bar = ProgressBar(total=progress.total, completed=progress.step, width=20)
        loss = "" if progress.val_loss is None else f"{progress.val_loss:.4f}"
        eta = "" if progress.left is None else time.strftime("%H:%M:%S", time.gmtime(progress.left))
        table.add_row(progress.run.run_id, f"{progress.step}/{progress.total}", bar, loss, eta)
    return [table]


def _failed(found: State) -> list[Text]:
    return [Text(f"{job['rule']} left no {job['made']}: {job['reason']}", style="red") for job in found.failed]


def _best(found: State) -> list[Text]:
    """The lowest final losses of CE and KD, and what the teacher took of its budget."""
    lines = []
    for name, arms in {"CE": ("ce",), "KD": ("kd", "screen"), "teacher": ("teacher", "imported")}.items():
        runs = [run for run in found.done if run.arm in arms and run.ok and run.summary["final_val"] is not None]
        if runs:
            best = min(runs, key=lambda run: run.summary["final_val"])
            what = f"{best.label}, {best.horizon} steps, seed {best.config.seed}"
            lines.append(Text(f"best {name} so far: {best.summary['final_val']:.4f} nats ({what})"))
    budget, teacher = found.budget.get("budget_ms"), found.selected.get("train_time_ms")
    if budget is None:
        return [*lines, Text("budget: not set yet, it waits for the CE baseline")]
    spent = "no teacher selected yet" if teacher is None else f"{show_ms(teacher)} spent, {teacher / budget:.0%}"
    return [*lines, Text(f"budget: {show_ms(budget)}; {spent}")]
