"""A tiny campaign, its prepared data, and a trainer call, for the unit tests."""

import pytest
from configs import ROOT, merged

from kdclimb import campaign
from kdclimb.prepare import prepare
from kdclimb.run import run


@pytest.fixture(scope="session")
def tiny():
    return campaign.load(merged("tests/tiny.yaml"), ROOT)


@pytest.fixture(scope="session")
def manifest(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / campaign.data_id(tiny, ROOT)
    prepare(campaign.data_spec(tiny, ROOT), out, ROOT)
    return out / "manifest.json"


@pytest.fixture(scope="session")
def tiny_runs(tiny, manifest):
    """All runs of the tiny campaign, as if the first candidate were selected and T1 promoted."""
    name = tiny.teacher.candidates[0].name
    data = manifest.parent.name
    teacher = next(r for r in campaign.expand(tiny, {"projected": {"survivors": [name]}}, data) if r.arm == "teacher")
    point = campaign.grid_points(tiny.kd.grid)[0].name
    decisions = {
        "projected": {"survivors": [name]},
        "selected": {"run_id": teacher.run_id},
        "promoted": {"points": [point]},
    }
    return campaign.expand(tiny, decisions, data)


@pytest.fixture(scope="session")
def train(manifest):
    """train(config, folder, teacher=None) -> (exit code, the run's folder)."""

    def call(config, folder, teacher=None, **options):
        out = folder / config.run_id
        options = {"threads": 1, "any_code": False, "last_attempt": True} | options
        return run(config, out, manifest, teacher, **options), out

    return call


@pytest.fixture(scope="session")
def teacher_folder(tiny_runs, train, tmp_path_factory):
    """The trained tiny teacher's checkpoint."""
    config = next(r.config for r in tiny_runs if r.arm == "teacher")
    code, out = train(config, tmp_path_factory.mktemp("teacher"))
    assert code == 0
    return out / "checkpoints"
