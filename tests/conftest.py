"""Order of the tests: what fails fastest comes first."""

import pytest

FOLDERS = ("unit", "workflow")  # then all others


def pytest_collection_modifyitems(items):
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        import torch

        if not torch.cuda.is_available():
            for item in gpu:
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU here"))
    items.sort(key=_place)  # stable: within a folder the order stays


def _place(item):
    parts = item.path.relative_to(item.config.rootpath).parts
    folder = parts[1] if len(parts) > 2 else ""
    return bool(item.get_closest_marker("slow")), FOLDERS.index(folder) if folder in FOLDERS else len(FOLDERS)
