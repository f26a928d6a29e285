"""Copies of the project to run campaigns in, with ./run and the .venv that ./test made."""

import contextlib
import fcntl
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
PARTS = "Snakefile config data envs kdclimb requirements.txt requirements-dev.txt rules run slurm tests".split()
PARTS += ["workflow"]
TINY = ["--configfile", "tests/tiny.yaml"]
CANDIDATES = yaml.safe_load((ROOT / "tests/tiny.yaml").read_text())["teacher"]["candidates"]
SMALL = {  # what the tiny campaign can lose without a stage being lost
    "train": {"seeds": [0]},
    "teacher": {"candidates": CANDIDATES[:1]},
    "controls": {"label_smoothing": 0.0, "extra_steps": False},
}
CORES = sorted(os.sched_getaffinity(0))  # read before conftest.py gives each worker its own


class Checkout:
    """A copy of the project in `path`. `results`: another checkout whose finished work to take over."""

    command = ("./run",)  # what starts a campaign here, before its arguments

    def __init__(self, path: Path, results: "Checkout | None" = None):
        self.path = path
        path.mkdir(parents=True)
        for name in PARTS:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
            copy(ROOT / name, path / name)
        if not (ROOT / ".venv").is_dir():
            pytest.fail("these tests use the project's .venv: start them with ./test")
        (path / ".venv").symlink_to(ROOT / ".venv")
        if results is not None:
            self.take(results)

    @classmethod
    def of(cls, path: Path) -> "Checkout":
        """The checkout that another process made in `path`."""
        checkout = cls.__new__(cls)
        checkout.path = path
        return checkout

    def take(self, results: "Checkout") -> None:
        for name in ("results", ".snakemake"):
            subprocess.run(["cp", "-a", results.path / name, self.path / name], check=True)

    def environment(self) -> dict[str, str]:
        return {k: v for k, v in os.environ.items() if not k.startswith(("KDCLIMB", "SNAKEMAKE"))}

    def start(self, *arguments, stdout=subprocess.PIPE) -> subprocess.Popen:
        return subprocess.Popen(
            [*self.command, *arguments],
            cwd=self.path,
            env=self.environment(),
            stdout=stdout,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments, code: int | None = 0, timeout: float = 400) -> str:
        """The command with these arguments to its end; its output. `code`: the exit code it must have (None: not 0)."""
        process = self.start(*arguments)
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            pytest.fail(f"{self.command} {arguments} took more than {timeout} s:\n{output}")
        assert process.returncode == code or (code is None and process.returncode != 0), output
        return output

    def kdclimb(self, *arguments) -> str:
        """python -m kdclimb with these arguments; what it prints."""
        command = [".venv/bin/python", "-m", "kdclimb", *map(str, arguments)]
        done = subprocess.run(command, cwd=self.path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def run_and_kill(self, seconds: float, *arguments) -> bool:
        """SIGKILL the command (not its children) after `seconds`; False if it had ended before."""
        process = self.start(*arguments)
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            self._wait_for_its_lock()
            return True
        return False

    def _wait_for_its_lock(self) -> None:
        """Killed while it sets up, ./run leaves a child that ends by itself; a start before that is refused."""
        with (self.path / ".snakemake/kdclimb.lock").open("a") as file:
            until = time.monotonic() + 60
            while time.monotonic() < until:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return
                time.sleep(0.2)

    def edit(self, name: str, old: str, new: str) -> None:
        text = (self.path / name).read_text()
        assert text.count(old) == 1, f"{name}: {old!r} stands there {text.count(old)} times"
        time.sleep(0.01)
        (self.path / name).write_text(text.replace(old, new))

    def attempts(self) -> dict[str, int]:
        """How often each run has been started."""
        return {f.parent.parent.name: int(f.read_text()) for f in self.path.glob("results/runs/*/.state/attempts")}

    def tables(self, campaign: str = "tiny") -> dict[str, bytes]:
        """Every CSV and JSON of the campaign, by its path, but for what says which runs shared a job."""
        folder = self.path / "results" / campaign
        files = [f for f in folder.rglob("*") if f.suffix in (".csv", ".json") and f.parent.name != "batches"]
        return {str(f.relative_to(folder)): f.read_bytes() for f in files}


def jobs(output: str) -> list[str]:
    """The rules of the jobs that were run, in order."""
    return re.findall(r"^(?:local)?(?:rule|checkpoint) (\w+):$", output, flags=re.MULTILINE)


def trains(output: str) -> bool:
    """Whether a job of these was a training run's, or that of several."""
    return not {"train", "train_batch"}.isdisjoint(jobs(output))


def overlay(checkout: Checkout, name: str, **changes) -> list[str]:
    """Write a config that changes the tiny one; the arguments that use it."""
    (checkout.path / f"{name}.yaml").write_text(yaml.safe_dump(changes))
    return ["--configfile", "tests/tiny.yaml", f"{name}.yaml"]
