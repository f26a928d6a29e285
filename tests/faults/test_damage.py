"""Every kind of file, damaged in every way: noticed, named with what to do, and never read as whole."""

import dataclasses
import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file
from training import train

from kdclimb.__main__ import main
from kdclimb.analysis.tables import AnalysisError, RunFolder, read_csv, read_json, write_csv, write_json
from kdclimb.artifacts import Damaged, seal
from kdclimb.artifacts import RunFolder as Folder
from kdclimb.campaign import read_decisions
from kdclimb.config import PolicyConfig
from kdclimb.data import Dataset
from kdclimb.run import policy_stop_step
from kdclimb.shards import read_manifest
from kdclimb.supply import read_lengths
from kdclimb.teacher import read_description
from kdclimb.train import read_state


def flip(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]


DAMAGE = {
    "truncated": lambda data, rng: data[: rng.randrange(len(data))],
    "flipped": flip,
    "emptied": lambda data, rng: b"",
    "zeroed": lambda data, rng: bytes(len(data)),
    "longer": lambda data, rng: data + data[:7],
    "another's": lambda data, rng: data[::-1],
}
WAYS = [(way, seed) for way in DAMAGE for seed in range(4)]


@pytest.fixture
def copied(made, tmp_path):
    """The made results, free to damage, and a campaign's tables beside them."""
    shutil.copytree(made[0], tmp_path / "results")
    write_csv(tmp_path / "results/tiny/ce/timing.csv", ["run_id", "step_ms"], [{"run_id": "a", "step_ms": 1.25}])
    write_json(tmp_path / "results/tiny/teacher/selected.json", {"run_id": "teacher-1", "train_time_ms": 2.5})
    return tmp_path / "results"


def readers(results, made):
    """(file, what reads it)."""
    run = results / "runs" / made[2].run_id
    data = results / "data" / made[1].parent.name

    def read_run():
        found = RunFolder.read(f"ce|ce|{run}")
        return found.val, found.steps

    following = dataclasses.replace(made[2], lr_policy=PolicyConfig(made[2].run_id, 0.7, 10))
    tables = results / "tiny"
    found = {
        **{run / name: read_run for name in ("config.json", "status.json", "summary.csv", "val.csv", "steps.csv")},
        run / "checkpoints/model.json": lambda: read_description(run / "checkpoints"),
        run / "checkpoints/model.safetensors": lambda: read_description(run / "checkpoints"),
        data / "manifest.json": lambda: Dataset(data / "manifest.json"),
        data / "train_000000.bin": lambda: Dataset(data / "manifest.json").shards("train"),
        data / "val_000000.bin": lambda: Dataset(data / "manifest.json").shards("val"),
        data / "train.lengths": lambda: list(read_lengths(data, "train", read_manifest(data / "manifest.json"))),
        tables / "ce/timing.csv": lambda: read_csv(tables / "ce/timing.csv", ["run_id", "step_ms"]),
        tables / "teacher/selected.json": lambda: (
            read_json(tables / "teacher/selected.json"),
            read_decisions(tables),
        ),
    }
    return [*found.items(), (run / "summary.csv", lambda: policy_stop_step(following, run / "summary.csv"))]


@pytest.mark.parametrize(("way", "seed"), WAYS)
def test_damage_is_noticed_and_named_with_what_to_do(way, seed, copied, made):
    rng = random.Random(f"{way}{seed}")
    for file, read in readers(copied, made):
        read()
        whole = file.read_bytes()
        damaged = DAMAGE[way](whole, rng)
        file.write_bytes(damaged)
        with pytest.raises((AnalysisError, Damaged, ValueError)) as error:
            read()
        assert type(error.value) in (AnalysisError, Damaged, ValueError), file
        assert file.name in str(error.value), (file, str(error.value))
        file.write_bytes(whole)


def test_what_is_said_names_a_remedy(copied, made):
    for file, read in readers(copied, made):
        whole = file.read_bytes()
        file.write_bytes(flip(whole, random.Random(1)))
        with pytest.raises(ValueError) as error:
            read()
        assert any(word in str(error.value) for word in ("retry --run", "delete", "make it again")), str(error.value)
        file.write_bytes(whole)


@pytest.mark.parametrize(("way", "seed"), [(way, 0) for way in DAMAGE])
def test_a_damaged_resume_state_is_said_and_costs_no_result(way, seed, made, tmp_path, monkeypatch):
    """The run that was interrupted starts again from step 0, and ends with the same tables."""
    results, manifest, config = made
    out = tmp_path / config.run_id
    stopping = iter([False] * 30 + [True] * 100)
    monkeypatch.setattr("kdclimb.run.StopRequests.asked", lambda self: next(stopping))
    assert train(config, out, manifest) == 75
    monkeypatch.undo()
    file = Folder(out).resume_file
    facts, _ = read_state(file)
    assert facts["step"] == 31
    file.write_bytes(DAMAGE[way](file.read_bytes(), random.Random(seed)))
    with pytest.raises(Damaged, match="starts from step 0"):
        read_state(file)
    assert train(config, out, manifest) == 0
    assert "damaged" in (out / "train.log").read_text()
    whole = results / "runs" / config.run_id
    for name in ("steps.csv", "val.csv"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_a_damaged_finished_run_is_not_brought_back(copied, made, capsys):
    run = copied / "runs" / made[2].run_id
    weights = load_file(run / "checkpoints/model.safetensors")
    kept = run / ".state/complete/checkpoints/model.safetensors"
    kept.write_bytes(flip(kept.read_bytes(), random.Random(2)))
    assert train(made[2], run, made[1]) == 0
    assert "damaged" in capsys.readouterr().err
    again = load_file(run / "checkpoints/model.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights)


@pytest.mark.parametrize("name", ["attempts", "lease.json", "complete/key.json", "complete/status.json"])
@pytest.mark.parametrize("way", DAMAGE)
def test_damaged_notes_of_a_run_stop_nothing(way, name, copied, made):
    run = Folder(copied / "runs" / made[2].run_id)
    file = run.state / name
    file.write_bytes(DAMAGE[way](file.read_bytes(), random.Random(3)))
    if name == "attempts":
        assert run.count_attempt() >= 1
    elif name == "lease.json":
        from kdclimb.lease import Lease

        with Lease(file, None) as held:
            assert held.killed == []
    else:
        assert run.restore_complete({"config": "another"}, any_code=False) is False


def test_a_run_that_is_brought_back_has_its_log(copied, made):
    run = copied / "runs" / made[2].run_id
    log = (run / "train.log").read_text()
    (run / "train.log").write_text("")  # as Snakemake does before it starts a job
    (run / "status.json").unlink()
    assert train(made[2], run, made[1]) == 0
    assert log.startswith("PYTHONPATH") and (run / "train.log").read_text() == log


def test_a_run_of_another_folder_is_refused(copied, made):
    run = copied / "runs" / made[2].run_id
    run.rename(run.with_name("ce-another"))
    with pytest.raises(AnalysisError, match="this is the config of run"):
        RunFolder.read(f"ce|ce|{run.with_name('ce-another')}")


def test_a_damaged_run_can_still_be_forgotten(copied, made, capsys):
    run = copied / "runs" / made[2].run_id
    (run / "status.json").write_bytes(b"{")
    assert main(["retry", "--status", "ok", "--results", str(copied)]) == 1
    assert f"{run}/status.json: damaged" in capsys.readouterr().err and run.is_dir()
    assert main(["retry", "--run", run.name, "--results", str(copied)]) == 0
    assert not run.exists()


def test_a_seal_covers_every_bit(tmp_path):
    """All single flipped bits of a sealed file, one by one; what still reads holds the same."""
    value, file = {"data_hash": "0123", "bos_id": 0}, tmp_path / "manifest.json"
    text, noticed = json.dumps(seal(value)).encode(), 0
    for bit in range(8 * len(text)):
        flipped = bytearray(text)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        try:
            assert read_manifest(file) == value
        except Damaged:
            noticed += 1
    assert noticed > 7.5 * len(text)
