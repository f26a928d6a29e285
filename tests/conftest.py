"""Order of the tests, what fails fastest first; where Triton's kernels run: on the GPU under -m gpu, else in its
interpreter; and the finished tiny campaign that several folders look at.
"""

import os
import sys

import pytest
from checkouts import TINY, Checkout

FOLDERS = ("unit", "workflow")  # then all others


# Triton reads this once, when it is imported: by another conftest.py or by tests/gpu, and so before any hook is called.
if "gpu" not in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The tiny campaign, run once from nothing to its report. Read only: copy it to change it."""
    checkout = Checkout(tmp_path_factory.mktemp("finished") / "kdclimb")
    checkout.output = checkout.run(*TINY)
    return checkout


def pytest_collection_modifyitems(items):
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        import torch

        reason = "no CUDA GPU here"
        if torch.cuda.is_available():
            reason = "without -m gpu the kernels are interpreted" if os.environ.get("TRITON_INTERPRET") == "1" else ""
        for item in gpu if reason else ():
            item.add_marker(pytest.mark.skip(reason=reason))
    items.sort(key=_place)  # stable: within a folder the order stays


def _place(item):
    parts = item.path.relative_to(item.config.rootpath).parts
    folder = parts[1] if len(parts) > 2 else ""
    return bool(item.get_closest_marker("slow")), FOLDERS.index(folder) if folder in FOLDERS else len(FOLDERS)
