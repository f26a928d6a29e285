"""One Slurm for all tests of this folder."""

import pytest
from cluster import Cluster, install


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    install()
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.stop()
