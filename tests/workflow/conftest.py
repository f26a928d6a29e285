"""Checkouts to change."""

import pytest
from checkouts import Checkout


@pytest.fixture
def checkout(tmp_path):
    """A fresh checkout."""
    return Checkout(tmp_path / "kdclimb")


@pytest.fixture
def changed(tmp_path, finished):
    """A checkout with the finished tiny campaign, free to change."""
    return Checkout(tmp_path / "kdclimb", finished)
