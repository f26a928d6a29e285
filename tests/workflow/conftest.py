"""A finished tiny campaign, and checkouts to change."""

import pytest
from checkouts import TINY, Checkout


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The tiny campaign, run once from nothing to its report. Read only: copy it to change it."""
    checkout = Checkout(tmp_path_factory.mktemp("finished") / "kdclimb")
    checkout.output = checkout.run(*TINY)
    return checkout


@pytest.fixture
def checkout(tmp_path):
    """A fresh checkout."""
    return Checkout(tmp_path / "kdclimb")


@pytest.fixture
def changed(tmp_path, finished):
    """A checkout with the finished tiny campaign, free to change."""
    return Checkout(tmp_path / "kdclimb", finished)
