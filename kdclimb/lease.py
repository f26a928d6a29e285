"""Which job holds a run: what a successor waits for, and how it learns that its predecessors were killed.

The file lock of a run's folder is enough on one machine. A lease says the same on file systems whose locks don't reach
other nodes, and outlives a job that was killed: a lease whose job is gone is void, and counts as a try that ended
without a word. No torch: the Snakefile imports this.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

from kdclimb.artifacts import Damaged, read_sealed, seal, write_json
from kdclimb.config import ConfigError

WAIT_SECONDS = 10  # between two looks at another's job
ENDED = "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED TIMEOUT".split()
BLAMELESS = ("CANCELLED", "NODE_FAIL", "PREEMPTED")  # endings that say nothing about the run
GONE = "gone from the queue"
# In the words of Slurm's log. Without cgroups the state of a job that its memory watch killed is FAILED.
OUT_OF_MEMORY = re.compile("OUT_OF_MEMORY|exceeded .*memory limit|oom.kill", re.IGNORECASE)
SLURMS_ERROR = re.compile(r"^slurmstepd[^:]*: error: (?!\*\*\*)(.+)$", re.MULTILINE)  # starred: that the job was ended


def slurm_job() -> str | None:
    """The id of the Slurm job that this process is a part of."""
    return os.environ.get("SLURM_JOB_ID")


def job_state(job: str) -> str:
    """Slurm's word for the state of a job, such as RUNNING; GONE for one that it no longer knows.

    Raises OSError where Slurm doesn't answer.
    """
    done = _squeue("--states=all", f"--jobs={job}", "--format=%T")
    if done.returncode and "Invalid job id" not in done.stderr:
        raise OSError(f"squeue does not answer: {done.stderr.strip()}")
    return done.stdout.strip() or GONE


def slurms_error(job: str) -> str:
    """The last error of Slurm itself in the log of a job; "" if there is none, or if Slurm no longer knows the job."""
    if shutil.which("scontrol") is None:
        return ""
    done = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True)
    log = re.search(r"^\s*StdOut=(.+)$", done.stdout, re.MULTILINE)
    if log is None or not Path(log[1]).is_file():
        return ""
    return last_error(Path(log[1]))


def last_error(log: Path) -> str:
    """The last error of Slurm itself in a job's log; "" if there is none."""
    found = SLURMS_ERROR.findall(log.read_text(errors="replace"))
    return found[-1] if found else ""


def status_of(killed: list[str]) -> str:
    """The status of a run whose tries were all ended from outside, by how they were."""
    return "oom" if any(OUT_OF_MEMORY.search(how) for how in killed) else "failed"


def queued_jobs(folder: Path, comment: str) -> list[str]:
    """Ids of the jobs with this comment that an earlier master submitted in `folder` and that have not ended."""
    return [job for job in _left_jobs(folder).get(comment, ()) if job_state(job) not in {*ENDED, GONE}]


@cache
def _left_jobs(folder: Path) -> dict[str, list[str]]:
    """{comment: ids} of what waited or ran when this process asked first; {} in a dry run where there is no Slurm."""
    jobs: dict[str, list[str]] = {}
    if shutil.which("squeue") is None:
        return jobs
    for line in _squeue(f"--user={os.getuid()}", "--format=%i|%Z|%k").stdout.splitlines():
        job, submitted_in, comment = line.split("|", 2)
        if Path(submitted_in) == folder:
            jobs.setdefault(comment, []).append(job)
    return jobs


def _squeue(*options: str) -> subprocess.CompletedProcess:
    return subprocess.run(["squeue", "--noheader", *options], capture_output=True, text=True)


class Lease:
    """The lease of one run, a file in its state folder, to be held under the folder's lock.

    `progress` is anything that differs once the run has come further. Entering waits for the Slurm job that holds the
    lease, if there is one; raises ConfigError if Slurm can't be asked about it.
    """

    def __init__(self, path: Path, progress: int | None):
        self.path, self.progress = path, progress
        self.killed: list[str] = []  # how the tries since the last progress were ended from outside

    def __enter__(self) -> Lease:
        left = self._left()
        if left is not None and left["progress"] == self.progress:
            self.killed = left["killed"]
        if left is not None and left["held"] and (left["job"] is None or left["job"] != slurm_job()):  # else: requeued
            self._note_end(left)
        self._write(held=True)
        return self

    def __exit__(self, *_) -> None:
        self._write(held=False)  # what is known of killed tries stays, in case the run didn't finish

    def _left(self) -> dict | None:
        """What the one before left; None if nothing, or nothing that can be read: then its end is not known."""
        try:
            return read_sealed(self.path, "taken for none") if self.path.is_file() else None
        except Damaged as error:
            print(error, file=sys.stderr)
            return None

    def _write(self, held: bool) -> None:
        holder = {"job": slurm_job(), "host": socket.gethostname(), "process": os.getpid(), "held": held}
        write_json(self.path, seal(holder | {"progress": self.progress, "killed": self.killed}))

    def _note_end(self, left: dict) -> None:
        if left["job"] is None:
            self.killed.append(f"process {left['process']} on {left['host']} was killed")
            return
        try:
            while (state := job_state(left["job"])) not in {*ENDED, GONE}:
                time.sleep(WAIT_SECONDS)
        except OSError as error:
            where = f"{self.path}: held by Slurm job {left['job']}"
            raise ConfigError(f"{where}, and {error}; delete that file if the job is gone") from error
        if state not in BLAMELESS:
            said = slurms_error(left["job"])
            self.killed.append(f"Slurm job {left['job']} was ended: {state}{f' ({said})' if said else ''}")
