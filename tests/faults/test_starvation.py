"""No room on the disk, and numbers that are none: said at once, and nothing half written."""

import dataclasses
import errno
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from configs import ROOT, merged
from training import train

from kdclimb import artifacts, campaign, unpickle
from kdclimb.artifacts import DeviceLease, DiskFull, RunFolder, write_csv, write_via
from kdclimb.data import Dataset
from kdclimb.prepare import prepare
from kdclimb.shards import write_shards
from kdclimb.train import Trainer


def writers(folder):
    """{what: a call that writes more than the small disk has to `folder`}."""
    rows = [{"a": 0.1}] * 100_000
    tokens = [np.zeros(400_000, np.uint16)]
    many = {"a": torch.zeros(200_000)}
    from safetensors.torch import save_file

    return {
        "csv": lambda: write_csv(folder / "steps.csv", ["a"], rows),
        "checkpoint": lambda: write_via(folder / "model.safetensors", lambda path: save_file(many, path)),
        "shards": lambda: write_shards(folder, "train", tokens),
        "json": lambda: artifacts.write_json(folder / "status.json", list(range(100_000))),
    }


@pytest.mark.parametrize("kind", ["csv", "checkpoint", "shards", "json"])
def test_a_full_disk_is_said_and_leaves_what_was_there(kind, small_disk):
    names = {"csv": "steps.csv", "checkpoint": "model.safetensors", "shards": "train_000000.bin", "json": "status.json"}
    (small_disk / names[kind]).write_bytes(b"before")
    with pytest.raises(DiskFull, match=f"{names[kind]}: no room on its disk"):
        writers(small_disk)[kind]()
    assert [file.name for file in small_disk.iterdir()] == [names[kind]]
    assert (small_disk / names[kind]).read_bytes() == b"before"


def test_a_disk_that_is_full_while_a_teacher_is_imported_is_named(small_disk, tmp_path):
    facts = {"step": 1, "code": "", "best_val_loss": 4.5, "kd_enabled": False, "kd_stop_step": None}
    torch.save({"model": {"a": torch.zeros(200_000)}} | facts, tmp_path / "state.pt")
    with pytest.raises(DiskFull, match=f"{small_disk}/model.safetensors: no room on its disk"):
        unpickle.main(tmp_path / "state.pt", small_disk / "model.safetensors")


@pytest.mark.parametrize("kib", [100, 1500])
def test_a_disk_that_is_full_while_text_is_prepared_is_named(kib, small_disk, tmp_path):
    """At the bucket files, of which the text needs as much as it has; with little text at what is made of it."""
    text = "\n\f\n".join(f"document {number} " + "word " * 60 for number in range(kib * 1024 // 314))
    (tmp_path / "text.txt").write_text(text)
    config = merged("tests/tiny.yaml", {"data": {"text": {"files": [str(tmp_path / "text.txt")]}}})
    spec = campaign.data_spec(campaign.load(config, ROOT), ROOT)
    (small_disk / "another's").write_bytes(bytes(150 * 1024 if kib == 100 else 1))
    with pytest.raises(DiskFull, match=f"{small_disk}/data/.*: no room on its disk"):
        prepare(spec, small_disk / "data", ROOT)
    assert not (small_disk / "data/manifest.json").exists()


@pytest.mark.parametrize(
    ("fails_at", "number"),
    [("resume.safetensors", errno.ENOSPC), ("steps.csv", errno.EDQUOT), ("status.json", errno.ENOSPC)],
)
def test_a_full_disk_is_no_result_of_a_run(fails_at, number, made, tmp_path, monkeypatch):
    """Not `failed`, which would reject a candidate: the run goes on once there is room, and ends as if nothing was."""
    results, manifest, config = made
    out, sync = tmp_path / config.run_id, artifacts.sync

    def no_room(path):
        if fails_at in path.name:
            raise OSError(number, os.strerror(number))
        sync(path)

    monkeypatch.setattr(artifacts, "sync", no_room)
    with pytest.raises(DiskFull, match=f"{fails_at}: no room"):
        train(config, out, manifest)
    assert not (out / "status.json").exists()
    assert not [file for file in out.rglob("*.tmp")]
    monkeypatch.undo()
    assert train(config, out, manifest) == 0
    for name in ("steps.csv", "val.csv"):
        assert (out / name).read_bytes() == (results / "runs" / config.run_id / name).read_bytes()


LIMITED = """
import json, re, resource, sys
from pathlib import Path
from kdclimb.config import RunConfig
from kdclimb.run import run
size = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + 2**28, -1))
options = {"threads": 1, "any_code": False, "last_attempt": True}
sys.exit(run(RunConfig.from_dict(json.loads(sys.argv[1])), Path(sys.argv[2]), Path(sys.argv[3]), None, **options))
"""


def test_a_run_that_the_host_has_no_memory_for_is_a_result_that_names_the_key(made, tmp_path):
    """By a limit of the process, which once left no room to draw the result in; the kernel gives no chance to."""
    _, manifest, config = made
    batch = 2**17
    schedule = dataclasses.replace(config.schedule, micro_batch_tokens=batch, batch_tokens=(batch, batch))
    config = dataclasses.replace(config, schedule=schedule)
    out = tmp_path / config.run_id
    command = [sys.executable, "-c", LIMITED, json.dumps(config.to_dict()), out, manifest]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    status = json.loads((out / "status.json").read_text())
    assert status["status"] == "oom" and "train.micro_batch_tokens" in status["reason"], status["reason"]
    assert not list((out / "checkpoints").iterdir())


def test_a_rename_is_on_the_disk_before_anything_follows(tmp_path, monkeypatch):
    """After power loss a name may otherwise lead to an empty file, or an old one."""
    order = []
    sync, replace = artifacts.sync, os.replace
    monkeypatch.setattr(artifacts, "sync", lambda path: order.append(path.name) or sync(path))
    monkeypatch.setattr(os, "replace", lambda a, b: order.append("renamed") or replace(a, b))
    write_via(tmp_path / "x", lambda path: path.write_text("whole"))
    assert order == [f".x.{os.getpid()}.tmp", "renamed", tmp_path.name]


@pytest.mark.parametrize(("name", "value"), [("loss_hard", float("nan")), ("grad_norm", float("inf"))])
def test_what_is_no_number_diverges_at_once_and_names_its_batch(name, value, made, tmp_path, monkeypatch):
    _, manifest, config = made
    step, batches = Trainer.train_step, {}

    def poisoned(self, **options):
        stream = self.stream
        row = step(self, **options)
        if self.step == 7:
            row[name] = value
        batches[self.step] = stream.cursor
        return row

    monkeypatch.setattr(Trainer, "train_step", poisoned)
    out = tmp_path / config.run_id
    assert train(config, out, manifest) == 0
    status = json.loads((out / "status.json").read_text())
    said = f"{name} is {value} at step 7, on micro-batches 12 to 13 of seed {config.seed}'s stream, from document "
    assert status["status"] == "diverged" and status["reason"].startswith(said)
    again = Dataset(manifest).train_stream(config.seed, config.schedule.max_doc_tokens)
    for _ in range(12):
        again.skip_batch(config.schedule.micro_batch_tokens)
    place = again.cursor[2]
    assert f"from document {place} in the order of epoch 0 of train_000000.bin" in status["reason"]


def test_a_clock_that_jumps_hides_no_second_run_and_invents_none(tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts.tempfile, "gettempdir", lambda: str(tmp_path))
    with DeviceLease("cpu") as first, DeviceLease("cpu"):
        os.utime(first.contended, (0, 0))  # as if the clock had gone back decades in between
        assert first.shared()
    os.utime(first.contended, (2**32, 2**32))  # and here forward
    with DeviceLease("cpu") as alone:
        assert not alone.shared()


def test_times_come_from_a_clock_that_cannot_jump(made, tmp_path, monkeypatch):
    _, manifest, config = made
    jumping = iter(range(10**9, 0, -3600))
    monkeypatch.setattr("time.time", lambda: float(next(jumping)))
    config = dataclasses.replace(config, clock="measured", modelled_tflops=0.0)
    out = tmp_path / config.run_id
    assert train(config, out, manifest) == 0
    lines = (out / "steps.csv").read_text().splitlines()[1:]
    times = [float(line.split(",")[2]) for line in lines]
    assert all(0 < b - a < 60_000 for a, b in zip([0.0, *times], times, strict=False))
    assert RunFolder(out).progress() is None
