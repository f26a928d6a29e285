"""Order of the tests, what fails fastest first; their cores; where Triton's kernels run: on the GPU under -m gpu, else
in its interpreter; and what several folders use: the finished tiny campaign, a disk that is full.
"""

import fcntl
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from checkouts import CORES, SMALL, TINY, Checkout, overlay

FOLDERS = ("unit", "faults", "workflow")  # then all others
WORKER = os.environ.get("PYTEST_XDIST_WORKER")  # gw0, gw1, ...; None where one process runs all tests


# Triton reads this once, when it is imported: by another conftest.py or by tests/gpu, and so before any hook is called.
if WORKER is None and "gpu" not in sys.argv:  # workers are told by the process that started them
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser):
    group = parser.getgroup("faults", "the long form of tests/faults")
    group.addoption("--faults", action="store_true", help="tests/faults alone, in its long form")
    group.addoption("--campaigns", type=int, default=20, help="campaigns that are killed and compared (default: 20)")
    group.addoption(
        "--first", type=int, default=0, help="their first seed, and that of fuzzing, to go on from (default: 0)"
    )
    group.addoption("--fuzz-seconds", type=float, help="CPU seconds of each fuzzing (default: 600 with --faults)")


def pytest_configure(config):
    """Workers side by side have their own cores, since threads of two trainings on one core wait for each other by
    spinning; and so each has a device of its own: the lock of kdclimb's DeviceLease is in the temporary folder.

    Slurm's comes on top, and its jobs use all cores. The shares are equal, as a campaign's tables tell its threads.
    """
    config.measured = []  # lines of what the tests of tests/faults did
    if config.option.faults:
        config.option.timeout = 0  # by the wall clock, while its tests go by CPU seconds
    if config.option.fuzz_seconds is None:
        config.option.fuzz_seconds = 600.0 if config.option.faults else 0.0
    if WORKER is None:
        return
    others = max(1, int(os.environ["PYTEST_XDIST_WORKER_COUNT"]) - 1)
    share, number = max(1, len(CORES) // others), int(WORKER.removeprefix("gw")) % others
    os.sched_setaffinity(0, CORES[number * share :][:share] or CORES)
    own = Path(config.option.basetemp).with_name(f"{WORKER}-tmp")
    own.mkdir()
    os.environ["TMPDIR"], tempfile.tempdir = str(own), None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """The first worker has Slurm's tests alone, since they wait more than they compute. Others are handed out by ones,
    so that no worker ends long before another.
    """
    from xdist.scheduler import LoadScopeScheduling  # which hands out the largest scope first

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return "slurm" if nodeid.startswith("tests/slurm/") else nodeid

        def schedule(self):
            self.assigned_work = dict(sorted(self.assigned_work.items(), key=lambda item: item[0].gateway.id))
            super().schedule()

        def _assign_work_unit(self, node):
            if node.gateway.id == "gw0" and len(self.nodes) > 1 and next(iter(self.workqueue)) != "slurm":
                node.shutdown()
            else:
                super()._assign_work_unit(node)

        def _reschedule(self, node):
            if not self.workqueue or self._pending_of(self.assigned_work[node]) < 2:  # the next one is asked for ahead
                super()._reschedule(node)

    return Scheduler(config, log)


def made_once(tmp_path_factory, name, make):
    """A checkout that all workers look at: the first to ask for it makes it, `make(checkout)` gives its output."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder if WORKER is None else folder.parent) / name
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        output = folder / "output"
        if not output.is_file():
            text = make(Checkout(folder / "kdclimb"))
            output.write_text(text)
    checkout = Checkout.of(folder / "kdclimb")
    checkout.output = output.read_text()
    return checkout


def pytest_terminal_summary(terminalreporter, config):
    for line in config.measured:
        terminalreporter.write_line(f"faults: {line}")


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The tiny campaign, run once from nothing to its report. Read only: copy it to change it."""
    return made_once(tmp_path_factory, "finished", lambda checkout: checkout.run(*TINY))


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """The tiny campaign with one seed and one candidate, run once. Read only."""
    return made_once(tmp_path_factory, "small", lambda checkout: checkout.run(*overlay(checkout, "small", **SMALL)))


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of 256 KiB; skipped where it can't be mounted."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small file system can only be mounted by root")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def pytest_collection_modifyitems(config, items):
    faults = config.getoption("--faults")
    items[:] = [item for item in items if (_folder(item) == "faults" or not faults)]
    items[:] = [item for item in items if faults or not item.get_closest_marker("faults")]
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        import torch

        reason = "no CUDA GPU here"
        if torch.cuda.is_available():
            reason = "without -m gpu the kernels are interpreted" if os.environ.get("TRITON_INTERPRET") == "1" else ""
        for item in gpu if reason else ():
            item.add_marker(pytest.mark.skip(reason=reason))
    awaited = next((item for item in items if WORKER is not None and "small" in item.fixturenames), None)
    items.sort(key=_place)  # stable: within a folder the order stays
    items.sort(key=lambda item: item is not awaited)  # makes what Slurm's tests compare with


def _folder(item):
    parts = item.path.relative_to(item.config.rootpath).parts
    return parts[1] if len(parts) > 2 else ""


def _place(item):
    folder = _folder(item)
    return bool(item.get_closest_marker("slow")), FOLDERS.index(folder) if folder in FOLDERS else len(FOLDERS)
