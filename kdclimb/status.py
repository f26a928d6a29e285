"""How far a campaign is, for the terminal: stages, runs in flight, the best so far, the budget; once, or lasting."""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from kdclimb.analysis.budget import projection
from kdclimb.analysis.so_far import ended
from kdclimb.analysis.tables import RunFolder, show_ms
from kdclimb.campaign import read_decisions, results_data_id
from kdclimb.config import RunConfig
from kdclimb.expansion import Run
from kdclimb.jobs import FAILURES, INTERRUPTED, read_failures
from kdclimb.lease import ENDED, GONE, job_state
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
ASKED_EVERY = 60.0  # seconds between two questions to Slurm about the same job
NICENESS = 19  # of whoever watches: the runs that are watched are timed


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
        known = {run.run_id for run in self.planned.named}
        done, named = len(known.intersection(run.run_id for run in self.done)), len(known)
        later = len({run.run_id for run in self.planned.later})
        more = f"; at most {later} more follow, by what is decided" if later else ""
        return f"{done} of {named} runs known so far have ended, {len(self.flying)} in flight{more}."

    @property
    def over(self) -> bool:
        """Whether no run is left to wait for."""
        known = {run.run_id for run in self.planned.named}
        return not self.planned.later and known <= {run.run_id for run in self.done}


class Reader:
    """Reads where a campaign stands, again and again, and nothing twice that did not change. Changes nothing."""

    def __init__(self, campaign: Campaign, root: Path, results: Path):
        self.campaign, self.data = campaign, results_data_id(campaign, root, results)
        self.folder, self.runs = results / campaign.campaign, results / "runs"
        self._planned: tuple[dict, Planned] | None = None
        self._read: dict[str, tuple[int, RunFolder]] = {}  # by flag, with the time of the run's status

    def read(self) -> State:
        """Raises AnalysisError where a finished run can't be read."""
        decisions = read_decisions(self.folder)
        if self._planned is None or self._planned[0] != decisions:
            self._planned = decisions, what_runs(self.campaign, decisions, self.data)
        planned = self._planned[1]
        return State(
            self.campaign,
            planned,
            ended(self.campaign, planned.named, self.runs, self._run),
            list(in_flight(planned.named, self.runs)),
            _json(self.folder / "budget.json"),
            _json(self.folder / "teacher/selected.json"),
            read_failures(self.folder / FAILURES),
        )

    def _run(self, flag: str) -> RunFolder:
        written = (Path(flag.split("|")[2]) / "status.json").stat().st_mtime_ns
        if flag not in self._read or self._read[flag][0] != written:
            self._read[flag] = written, RunFolder.read(flag)
        return self._read[flag][1]


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
    if lease.get("held") and lease.get("job") and _lives(lease["job"], time.monotonic() // ASKED_EVERY):
        return True
    if not lock.is_file():
        return False
    with lock.open("r") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@lru_cache(1024)
def _lives(job: str, asked: float) -> bool:
    """Whether a Slurm job has not ended; `asked` is another number when Slurm is to be asked again."""
    try:
        return job_state(job) not in {*ENDED, GONE}
    except OSError:  # no Slurm here, or none that answers: then what the lease says
        return True


def watch(reader: Reader, console: Console, every: float) -> State:
    """Show it anew every so many seconds, until no run is left to wait for or Ctrl-C; returns what was seen last."""
    os.nice(NICENESS)
    found, hint = reader.read(), Text(f"read again every {every:g} s; Ctrl-C ends this, and nothing else", style="dim")
    with Live(console=console, auto_refresh=False, transient=True, vertical_overflow="visible") as live:
        try:
            while not found.over:
                live.update(Group(view(found), hint), refresh=True)
                time.sleep(every)
                found = reader.read()
        except KeyboardInterrupt:
            pass
    return found


def view(found: State) -> Group:
    title = Text(f"campaign {found.campaign.campaign}", style="bold")
    return Group(
        title, Text(found.words), _stages(found), *_flying(found), *_failed(found), *_best(found), _budget(found)
    )


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
        eta = "" if progress.left is None else show_left(progress.left)
        table.add_row(progress.run.run_id, f"{progress.step}/{progress.total}", bar, loss, eta)
    return [table]


def show_left(seconds: float) -> str:
    """HH:MM:SS, behind the days if there are any."""
    days = int(seconds // 86400)
    return (f"{days} d " if days else "") + time.strftime("%H:%M:%S", time.gmtime(seconds))


def _failed(found: State) -> list[Text]:
    styles = ["dim" if job["reason"].startswith(INTERRUPTED) else "red" for job in found.failed]
    told = [f"{job['rule']} left no {job['made']}: {job['reason']}" for job in found.failed]
    return [Text(line, style=style) for line, style in zip(told, styles, strict=True)]


def _best(found: State) -> list[Text]:
    """The lowest final losses of CE, KD and the teachers."""
    lines = []
    for name, arms in {"CE": ("ce",), "KD": ("kd", "screen"), "teacher": ("teacher", "imported")}.items():
        runs = [run for run in found.done if run.arm in arms and run.ok and run.summary["final_val"] is not None]
        if runs:
            best = min(runs, key=lambda run: run.summary["final_val"])
            what = f"{best.label}, {best.horizon} steps, seed {best.config.seed}"
            lines.append(Text(f"best {name} so far: {best.summary['final_val']:.4f} nats ({what})"))
    return lines


def _budget(found: State) -> Text | Table:
    """What the teacher took of its budget."""
    budget, teacher = found.budget.get("budget_ms"), found.selected.get("train_time_ms")
    if budget is None:
        return Text("budget: not set yet, it waits for the CE baseline")
    spent = "no teacher selected yet" if teacher is None else f"{show_ms(teacher)} spent, {teacher / budget:.0%}"
    table = Table.grid(padding=(0, 2, 0, 0))
    words = f"budget: {show_ms(budget)}{projection(found.budget.get('projected_from'))}; {spent}"
    table.add_row(words, ProgressBar(total=budget, completed=teacher or 0, width=20))
    return table
