"""Debian's packages, for the tests that need a program from there: Slurm's, and the browser's."""

import fcntl
import os
import subprocess
import time
from pathlib import Path

LOCK = Path("/tmp/kdclimb-tests-apt.lock")  # of all workers, each of which has a temporary folder of its own
PATIENCE = 300  # seconds, for an apt-get that is not ours


def install(*packages: str) -> None:
    """As root, with apt-get, one worker at a time, since two at once fail. AssertionError: what it said."""
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        end = time.monotonic() + PATIENCE
        for command in (("update",), ("install", "-y", "--no-install-recommends", *packages)):
            while (done := _apt_get(*command)).returncode and _is_locked(done) and time.monotonic() < end:
                time.sleep(1)
            assert done.returncode == 0, f"apt-get {' '.join(command)}: {done.stdout}{done.stderr}"


def _apt_get(*command: str) -> subprocess.CompletedProcess:
    environment = {"DEBIAN_FRONTEND": "noninteractive", "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}  # dpkg's tools
    return subprocess.run(["apt-get", *command], capture_output=True, text=True, env=os.environ | environment)


def _is_locked(done: subprocess.CompletedProcess) -> bool:
    """Its option to wait knows dpkg's lock alone, not that of the lists."""
    return "Could not get lock" in done.stderr
