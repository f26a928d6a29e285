"""Debian's packages, for the tests that need a program from there: Slurm's, and the browser's."""

import fcntl
import os
import subprocess
from pathlib import Path

LOCK = Path("/tmp/kdclimb-tests-apt.lock")  # of all workers, each of which has a temporary folder of its own
WAIT = ("-o", "DPkg::Lock::Timeout=300")  # seconds, for an apt-get that is not ours


def install(*packages: str) -> None:
    """As root, with apt-get, one worker at a time, since two at once fail. AssertionError: what it said."""
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (("update",), ("install", "-y", "--no-install-recommends", *packages)):
            done = subprocess.run(["apt-get", *WAIT, *command], capture_output=True, text=True, env=environment)
            assert done.returncode == 0, f"apt-get {' '.join(command)}: {done.stdout}{done.stderr}"
