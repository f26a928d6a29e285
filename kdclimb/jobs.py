"""Jobs that left no result, as the master heard of them; and the result of a run that Slurm would not take.

No torch and no snakemake: the master's Snakefile imports this.
"""

from __future__ import annotations

import csv
import json
import logging
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from kdclimb.artifacts import (
    RunFolder,
    last_lines,
    publish,
    write_csv,
    write_json,
    write_tables,
    write_text,
)
from kdclimb.config import RunConfig
from kdclimb.lease import Lease, last_error, status_of
from kdclimb.provenance import source_hash
from kdclimb.stop import EXIT_INTERRUPTED

SBATCH_SAID = re.compile(r"SLURM sbatch failed\. The error message was '(.*?)'\.\n", re.DOTALL)
ENDED = re.compile(r"SLURM-job '(\w+)' failed.*SLURM status is: '(\w+)'", re.DOTALL)
# What sbatch says of a request that no waiting helps. All else, such as a controller that does not answer, a limit on
# the number of jobs or a wrong account, says nothing about the run: it gets no result, and the next start tries again.
OF_THE_REQUEST = (
    "Requested node configuration is not available",
    "Memory specification can not be satisfied",
    "Requested time limit is invalid",
    "Invalid generic resource (gres) specification",
    "CPU count per node can not be satisfied",
    "More processors requested than permitted",
)
JOB_ERROR = "job_error"  # of Snakemake's LogEvent
STOPPED = f"returned non-zero exit status {EXIT_INTERRUPTED}."  # behind the command, in an error before that of the job
INTERRUPTED = "interrupted"  # how the reason begins
FAILURES = "logs/failed_jobs.csv"  # in a campaign's folder; not copied, as all logs
JOB_COLUMNS = ("rule", "made", "run_ids", "attempts", "reason", "slurm_job", "log_tail")


@dataclass(frozen=True)
class Failure:
    """The last failed attempt at a job: its rule, the file or folder that it was to make, and what became of it."""

    rule: str
    made: str
    attempts: int  # of this start of the workflow
    reason: str
    slurm_job: str
    log_tail: str
    refusal: str  # sbatch's words, if it refused the request as such
    at_once: bool  # whether it did so from the first attempt on, which asks for the least

    def row(self, run_ids: Iterable[str]) -> dict:
        """The cells of JOB_COLUMNS; `run_ids` are the runs that the job was to train."""
        return {name: getattr(self, name, None) for name in JOB_COLUMNS} | {"run_ids": " ".join(run_ids)}


class JobErrors(logging.Handler):
    """Listens to Snakemake's log: `failed` is {what was to be made: its Failure}."""

    def __init__(self):
        super().__init__()
        self.failed: dict[str, Failure] = {}
        self._stopped: list[str] = []  # errors of commands that were interrupted, until their jobs are heard of

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(getattr(record, "event", None), "value", None) != JOB_ERROR:
            self._stopped += [str(record.msg)] * (STOPPED in str(record.msg))
            return
        outputs = [str(output) for output in record.output]
        if not outputs:  # fetch_shards, which nothing waits for: Snakemake tells of it, and no file is missing
            return
        made = next((output for output in outputs if output.endswith("/status.json")), outputs[0])
        before = self.failed.get(made)
        logs = [Path(log) for log in record.log]
        reason, job, refusal = _reason(record.rule_msg or "", logs)
        others = [said for said in self._stopped if made not in said]
        if len(others) < len(self._stopped):
            self._stopped, reason = others, f"{INTERRUPTED}; the next start goes on from what it did"
        tail = next((tail for log in logs if (tail := last_lines(log))), "")
        attempts = 1 + (before.attempts if before else 0)
        at_once = bool(refusal) and (before is None or before.at_once)
        self.failed[made] = Failure(record.rule_name, made, attempts, reason, job, tail, refusal, at_once)


def _reason(said: str, logs: list[Path]) -> tuple[str, str, str]:
    """Why a job failed, its Slurm id if it has one, and what sbatch said of its request if it refused that."""
    if refused := SBATCH_SAID.search(said):
        words = " ".join(refused[1].split())
        if any(known in words for known in OF_THE_REQUEST):
            return f"refused by Slurm: {words}", "", words
        return f"sbatch failed: {words}", "", ""
    if ended := ENDED.search(said):
        errors = [error for log in logs if log.is_file() and (error := last_error(log))]
        return f"Slurm job {ended[1]} was ended: {ended[2]}" + "".join(f" ({e})" for e in errors[-1:]), ended[1], ""
    return " ".join(said.split()) or "its command failed", "", ""


def write_failures(path: Path, rows: list[dict], asked: Callable[[str], bool] = lambda made: True) -> list[dict]:
    """Keep the table of jobs that left no result, and return it: `rows`, of this start, and those of earlier ones whose
    files are still missing, and still `asked` for: another config may need others. There is no such file when there is
    no such job. Where it can't be written that is said, and no error: the master has more to do at its end.
    """
    known = {row["made"] for row in rows}
    earlier = [row for row in read_failures(path) if row["made"] not in known and asked(row["made"])]
    rows = earlier + list(filter(_is_missing, rows))
    try:
        if rows:
            write_csv(path, list(JOB_COLUMNS), rows)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        print(
            f"kdclimb: {path}: status and report won't know of the jobs that left no result: {error}", file=sys.stderr
        )
    return rows


def read_failures(path: Path) -> list[dict]:
    """The rows of that table, as text, whose files are still missing; none where there is no table."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(filter(_is_missing, csv.DictReader(file)))


def _is_missing(row: dict) -> bool:
    return not Path(row["made"]).exists()


def write_batch(out: Path, folders: Iterable[Path]) -> None:
    """The runs that one job was to train, all of which have results, and how each ended."""
    rows = [{"run_id": f.name, "status": json.loads((f / "status.json").read_text())["status"]} for f in folders]
    write_csv(out, ["run_id", "status"], rows)


def write_refused(config: RunConfig, out: Path, said: str, at_once: bool) -> bool:
    """Write the result of a run that was refused on its last attempt; False if it has one, or gets none.

    It is `refused`, or of the status of the tries before it, whose reasons it gives too: with each attempt a job asks
    for more, and so the third may be refused after two that were killed. One that only ran out of time before (not
    `at_once`) gets no result, since the next start asks for less and goes on from its state.
    """
    folder = RunFolder(out)
    if (out / "status.json").is_file() or folder.restore_imported():
        return False
    with folder.lock(), Lease(folder.state / "lease.json", folder.progress()) as held:
        if not at_once and not held.killed:
            return False
        log, now = out / "train.log", datetime.now(UTC).isoformat(timespec="seconds")
        status, tail = status_of(held.killed) if held.killed else "refused", last_lines(log)
        if not tail:
            write_text(log, f"never started: {said}\n")
        code = source_hash("workflow/scripts/train.py")
        row = {"run_id": config.run_id, "arm": "ce" if config.kd is None else "kd", "seed": config.seed}
        row |= {"status": status, "clock": config.clock, "code_hash": code, "device": None}
        write_json(out / "config.json", config.to_dict())
        (out / "checkpoints").mkdir(exist_ok=True)
        write_tables(out, config.run_id, [], [], row)
        result = {"status": status, "reason": "; ".join([*held.killed, f"refused by Slurm: {said}"])}
        result |= {"started": now, "ended": now, "attempts": None, "device": None, "code_hash": code}
        publish(out, result | {"slurm_job": None, "log_tail": tail or said})
    return True
