"""One Slurm for all tests of this folder."""

import pytest
from cluster import Cluster, install
from configs import prepare_tiny


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    install()
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.stop()


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A results folder with the tiny campaign's data."""
    results = tmp_path_factory.mktemp("prepared") / "results"
    prepare_tiny(results)
    return results
