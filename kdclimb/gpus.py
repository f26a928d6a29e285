"""The GPUs of one machine: which of them a workflow uses, and which of these a job takes for itself.

No torch: the Snakefile imports this, and a job's choice has to come before CUDA looks.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from kdclimb.lease import slurm_job

VISIBLE = "CUDA_VISIBLE_DEVICES"
GPU = re.compile(r"\d|GPU-|MIG-")  # how a GPU's name in it begins; any other word, such as -1, hides those behind it
_taken = []  # lock files, which are held until the process ends


def listed() -> list[tuple[str, str]]:
    """(UUID, kind) of each GPU of this machine, as its driver names them; none without one."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=uuid,name", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    rows = [tuple(line.split(", ", 1)) for line in done.stdout.splitlines() if line.startswith("GPU-")]
    return [] if done.returncode else rows


def usable() -> list[str]:
    """Names, as CUDA_VISIBLE_DEVICES has them, of the GPUs that the workflow's jobs may use; none without a driver.

    They are those that the variable names, as CUDA reads it; without it, all of the first one's kind, since times on
    another don't compare.
    """
    if not (there := listed()):
        return []
    if (given := os.environ.get(VISIBLE)) is not None:
        names = (name.strip() for name in given.split(",") if name.strip())
        return [*itertools.takewhile(GPU.match, names)]
    return [uuid for uuid, kind in there if kind == there[0][1]]


def take_one(device: str) -> None:
    """Leave one GPU to this process until it ends: the first that no other job holds.

    Does nothing for a `device` other than cuda, where there is one GPU alone, and where Slurm chooses. If all are held,
    which jobs of one workflow never see, it is the first, and both runs are marked as sharing it.
    """
    if device != "cuda" or slurm_job() is not None or len(names := usable()) < 2:
        return
    for name in names:
        plain = "".join(c if c.isalnum() else "-" for c in name)
        file = (Path(tempfile.gettempdir()) / f"kdclimb-{os.getuid()}-{plain}.taken").open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            continue
        _taken.append(file)
        os.environ[VISIBLE] = name
        return
    os.environ[VISIBLE] = names[0]
