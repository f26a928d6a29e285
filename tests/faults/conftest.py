"""A run of the tiny campaign to damage, and a mount that hangs."""

import pytest
from configs import prepare_tiny
from hanging import HangingMount
from training import train

from kdclimb import expansion


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """(results, manifest, config) of the tiny campaign's data and first CE run. Read only: copy it to change it."""
    results = tmp_path_factory.mktemp("made") / "results"
    tiny, manifest = prepare_tiny(results)
    config = expansion.expand(tiny, {}, manifest.parent.name)[0].config
    assert train(config, results / "runs" / config.run_id, manifest) == 0
    return results, manifest, config


@pytest.fixture
def hanging(tmp_path):
    """hanging(name, content): a file on a mount that can be told not to answer; skipped where FUSE can't be mounted."""
    mounts = []

    def mount(name: str, content: bytes) -> HangingMount:
        folder = tmp_path / "mount"
        folder.mkdir()
        try:
            mounts.append(HangingMount(folder, name, content))
        except OSError as error:
            pytest.skip(str(error))
        return mounts[-1]

    yield mount
    for found in mounts:
        found.close()
