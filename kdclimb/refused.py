"""The result of a run that Slurm would not take. No torch and no snakemake: the master's Snakefile imports this."""

from __future__ import annotations

import logging
import re
from datetime import UTC, datetime
from pathlib import Path

from kdclimb.artifacts import RunFolder, last_lines, publish, write_json, write_tables, write_text
from kdclimb.config import RunConfig
from kdclimb.lease import Lease, status_of
from kdclimb.provenance import source_hash

SBATCH_SAID = re.compile(r"SLURM sbatch failed\. The error message was '(.*?)'\.\n", re.DOTALL)
RUN = re.compile(r"results/runs/([^/\s]+)/status\.json")
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


class Refusals(logging.Handler):
    """Listens to Snakemake's log: `said` is {run id: sbatch's words} of the runs whose request was refused as such."""

    def __init__(self):
        super().__init__()
        self.said: dict[str, str] = {}

    def emit(self, record: logging.LogRecord) -> None:
        words = SBATCH_SAID.search(getattr(record, "rule_msg", None) or "")
        run = RUN.search(" ".join(map(str, getattr(record, "output", None) or ())))
        if run is None:
            return
        self.said.pop(run[1], None)  # the last attempt counts
        if words and any(known in words[1] for known in OF_THE_REQUEST):
            self.said[run[1]] = " ".join(words[1].split())


def write_refused(config: RunConfig, out: Path, said: str) -> bool:
    """Write the result of a run that was refused on its last attempt; False if it has one.

    It is `refused`, or of the status of the tries before it, whose reasons it gives too: with each attempt a job asks
    for more, and so the third may be refused after two that were killed.
    """
    if (out / "status.json").is_file():
        return False
    folder = RunFolder(out)
    with folder.lock(), Lease(folder.state / "lease.json", folder.progress()) as held:
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
