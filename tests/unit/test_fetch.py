"""Shards from the hub: a small hub of our own, on loopback."""

import json
import subprocess
import sys

import numpy as np
import pytest
from configs import ROOT
from hub import REPO, Hub

from kdclimb.shards import write_shard

NAMES = [f"fineweb_train_{i:06d}.bin" for i in (1, 2, 3)] + ["fineweb_val_000000.bin"]


def shard(folder, start: int, tokens: int = 100_000) -> bytes:
    write_shard(folder / "made.bin", np.append(50256, start + np.arange(tokens) % 999).astype(np.uint16))
    return (folder / "made.bin").read_bytes()


@pytest.fixture
def hub(tmp_path):
    files = {name: shard(tmp_path, 1000 * i) for i, name in enumerate(NAMES)}
    with Hub(files | {"README.md": b"shards"}) as hub:
        yield hub


@pytest.fixture
def fetch(tmp_path, hub):
    """fetch(**changes of data.shards) -> (exit code, stdout, stderr)."""

    def call(hub_section=None, vocab_size=50304, environment=None, **changes):
        section = {"repo": REPO, "revision": "main", "train_shards": 2} | (hub_section or {})
        globs = {"train": "data/fw/fineweb_train_*.bin", "val": "data/fw/fineweb_val_*.bin"}
        shards = globs | {"bos_id": 50256, "hub": section} | changes
        command = [sys.executable, str(ROOT / "workflow/scripts/fetch_shards.py"), "--shards", json.dumps(shards)]
        done = subprocess.run(
            [*command, "--vocab-size", str(vocab_size), "--log", "fetch.log"],
            cwd=tmp_path,
            env=hub.environment(tmp_path / "home") | {"PYTHONPATH": str(ROOT)} | (environment or {}),
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout, done.stderr

    return call


def test_the_asked_shards_come_once_and_are_checked(tmp_path, hub, fetch):
    code, out, err = fetch()
    assert code == 0, err
    folder = tmp_path / "data/fw"
    assert sorted(f.name for f in folder.glob("*.bin")) == [*NAMES[:2], NAMES[3]]
    assert all((folder / name).read_bytes() == hub.files[name] for name in (*NAMES[:2], NAMES[3]))
    assert out.count("100,001 tokens") == 3 and (tmp_path / "fetch.log").read_text() == out
    before = hub.downloads()
    assert sorted(before) == sorted([*NAMES[:2], NAMES[3]])
    assert fetch({"train_shards": 3})[0] == 0
    assert hub.downloads() == [*before, NAMES[2]]


def test_a_download_that_was_cut_off_goes_on(tmp_path, hub, fetch):
    hub.files[NAMES[0]] = shard(tmp_path, 0, 12_000_000)  # half of it is more than huggingface_hub writes at once
    hub.cut.add(NAMES[0])
    for _ in range(2):  # huggingface_hub itself may try again, or leave it to the next call
        code, _, err = fetch()
        if code == 0:
            break
    assert code == 0, err
    assert (tmp_path / "data/fw" / NAMES[0]).read_bytes() == hub.files[NAMES[0]]
    ranges = [asked for method, path, asked in hub.requests if method == "GET" and NAMES[0] in path]
    assert len(ranges) == 2 and not ranges[0] and int(ranges[1].removeprefix("bytes=").split("-")[0]) > 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hub_section": {"repo": "no/such"}}, "fetch_shards: data.shards.hub: no/such at main: "),
        ({"hub_section": {"train_shards": 4}}, "data.shards.train: someone/shards is to hold files like"),
        (
            {"val": "data/fw/other_*.bin"},
            "data.shards.val: someone/shards is to hold files like 'other_*.bin', but has none",
        ),
        ({"train": "data/*/x_*.bin"}, "data.shards.train: 'data/*/x_*.bin' names no one folder to download to"),
        ({"vocab_size": 1500}, "holds token id 50256; data.vocab_size is 1500; delete it to have it downloaded again"),
        ({"environment": {"HF_HUB_OFFLINE": "1"}}, "fetch_shards: data.shards.hub: someone/shards at main: "),
    ],
)
def test_what_can_not_be_had_is_told_in_one_line(tmp_path, fetch, changes, said):
    code, _, err = fetch(**changes)
    assert code == 1 and said in err.splitlines()[-1] and "Traceback" not in err
    assert (tmp_path / "fetch.log").read_text().splitlines()[-1] == err.splitlines()[-1]
