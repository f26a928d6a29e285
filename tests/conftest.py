"""Order of the tests, what fails fastest first; where Triton's kernels run: on the GPU under -m gpu, else in its
interpreter; and the finished tiny campaign that several folders look at.
"""

import os
import sys

import pytest
from checkouts import TINY, Checkout

FOLDERS = ("unit", "faults", "workflow")  # then all others


# Triton reads this once, when it is imported: by another conftest.py or by tests/gpu, and so before any hook is called.
if "gpu" not in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser):
    group = parser.getgroup("faults", "the long form of tests/faults")
    group.addoption("--faults", action="store_true", help="tests/faults alone, in its long form")
    group.addoption("--campaigns", type=int, default=20, help="campaigns that are killed and compared (default: 20)")
    group.addoption("--first", type=int, default=0, help="seed of the first of them, to go on from (default: 0)")
    group.addoption("--fuzz-seconds", type=float, help="CPU seconds of each fuzzing (default: 600 with --faults)")


def pytest_configure(config):
    config.measured = []  # lines of what the tests of tests/faults did
    if config.option.fuzz_seconds is None:
        config.option.fuzz_seconds = 600.0 if config.option.faults else 0.0


def pytest_terminal_summary(terminalreporter, config):
    for line in config.measured:
        terminalreporter.write_line(f"faults: {line}")


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The tiny campaign, run once from nothing to its report. Read only: copy it to change it."""
    checkout = Checkout(tmp_path_factory.mktemp("finished") / "kdclimb")
    checkout.output = checkout.run(*TINY)
    return checkout


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
    items.sort(key=_place)  # stable: within a folder the order stays


def _folder(item):
    parts = item.path.relative_to(item.config.rootpath).parts
    return parts[1] if len(parts) > 2 else ""


def _place(item):
    folder = _folder(item)
    return bool(item.get_closest_marker("slow")), FOLDERS.index(folder) if folder in FOLDERS else len(FOLDERS)
