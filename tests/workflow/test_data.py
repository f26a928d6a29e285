"""Other data by one config change, through ./run: a folder of mixed text, ready shards, and wrong ones."""

import json
import lzma
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from checkouts import ROOT, TINY
from hub import REPO, Hub

from kdclimb.shards import write_shard

pytestmark = pytest.mark.slow

CANDIDATE = {"num_layers": 1, "num_heads": 2, "head_dim": 8, "steps": 26}
SHORT = {"train": {"horizons": [50], "seeds": [0]}, "teacher": {"candidates": [CANDIDATE]}}
TARGET = "results/tiny/teacher/probe.csv"  # made from one run of 5 steps


def overlay(checkout, **changes) -> list[str]:
    (checkout.path / "mine.yaml").write_text(yaml.safe_dump(changes))
    return ["--configfile", "tests/tiny.yaml", "mine.yaml"]


def mixed_folder(path) -> int:
    """Text of four kinds, and a file of none; how many documents."""
    with lzma.open(ROOT / "data/jargon.txt.xz", "rt", encoding="utf-8") as file:
        documents = file.read().split("\n\f\n")[:1200]
    (path / "below").mkdir(parents=True)
    (path / "a.txt").write_text("\n\f\n".join(documents[:400]))
    (path / "b.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents[400:800]))
    pq.write_table(pa.table({"text": documents[800:1150]}), path / "c.parquet")
    for i, document in enumerate(documents[1150:]):
        (path / f"below/{i}.md").write_text(document)
    (path / "photo.png").write_bytes(b"\x89PNG")
    return len(documents)


def tokens_of(checkout, part: str) -> tuple[int, int]:
    (manifest,) = checkout.path.glob("results/data/*/manifest.json")
    shards = json.loads(manifest.read_text())[part]
    return sum(s["tokens"] for s in shards), sum(s["documents"] for s in shards)


def test_a_mixed_folder_and_shards_made_from_it(checkout):
    """Shards of the folder's tokens are trained on to the same losses as the folder itself."""
    documents = mixed_folder(checkout.path / "texts")
    output = checkout.run(TARGET, *overlay(checkout, data={"text": {"files": ["texts"]}}, **SHORT))
    assert "left out 1 files of other kinds" in output and "photo.png" in output
    assert tokens_of(checkout, "train")[1] + tokens_of(checkout, "val")[1] == documents
    (made,) = checkout.path.glob("results/data/text-*")
    (checkout.path / "mine").mkdir()
    for part in ("train", "val"):
        (made / f"{part}_000000.bin").rename(checkout.path / f"mine/{part}_0.bin")
    shards = {"train": "mine/train_*.bin", "val": "mine/val_*.bin", "bos_id": 0}
    checkout.run(TARGET, *overlay(checkout, data={"source": "shards", "shards": shards}, **SHORT))
    first, second = (f.read_bytes() for f in sorted(checkout.path.glob("results/runs/*/val.csv")))
    assert first == second


WRONG = {
    "empty": "config: data.text.files[0]: 'wrong/empty' is not allowed; allowed: a folder with",
    "binary.txt": "data: {}/wrong/binary.txt: not UTF-8 text (byte 0x89 at offset 0)",
    "no_field.jsonl": "{}/wrong/no_field.jsonl:2: no field 'text' (data.text.field); there is body",
    "few.txt": "data.max_epochs: CE with 5 more steps needs 20,992 training tokens",
    "magic": "config: {}/wrong/magic.bin: not a token shard",
    "odd": "config: {}/wrong/odd.bin: 80025 bytes, but its header promises 80024; it is cut or damaged",
    "large_id": "data: {}/wrong/large_id.bin: holds token id 400; data.vocab_size is 384",
    "short": "config: data.max_epochs: CE with 5 more steps needs 20,992 training tokens",
    "missing": "data: data.shards.train: no file matches 'wrong/missing.bin'",
}


@pytest.fixture(scope="session")
def wrong(tmp_path_factory):
    """A checkout with one wrong input of each kind."""
    from checkouts import Checkout

    checkout = Checkout(tmp_path_factory.mktemp("wrong") / "kdclimb")
    folder = checkout.path / "wrong"
    (folder / "empty").mkdir(parents=True)
    (folder / "binary.txt").write_bytes(b"\x89PNG\r\n" + bytes(range(256)) * 1000)
    (folder / "no_field.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    (folder / "few.txt").write_text("only one\n\f\nor two")
    tokens = np.tile(np.arange(50, dtype=np.uint16), 790)
    write_shard(folder / "good.bin", tokens)
    good = (folder / "good.bin").read_bytes()
    (folder / "magic.bin").write_bytes(b"\0" + good[1:])
    (folder / "odd.bin").write_bytes(good + b"x")
    write_shard(folder / "large_id.bin", np.append(tokens, np.uint16(400)))
    write_shard(folder / "short.bin", tokens[:5000])
    return checkout


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_input_gives_one_clear_line_and_no_training(wrong, name):
    if "." in name or name == "empty":
        data = {"text": {"files": [f"wrong/{name}"]}}
    else:
        data = {"source": "shards", "shards": {"train": f"wrong/{name}.bin", "val": "wrong/good.bin", "bos_id": 0}}
    output = wrong.run(TARGET, *overlay(wrong, data=data, **SHORT), code=1)
    said = WRONG[name].format(wrong.path)
    assert any(said in line for line in output.splitlines()), output
    assert "Traceback" not in output and not (wrong.path / "results/runs").exists()


def test_fetched_shards_are_what_was_missing(checkout, tmp_path, monkeypatch):
    """Too few shards stop the campaign, but not the rule that gets the others."""
    shards = {}
    for i, name in enumerate(("t_1.bin", "t_2.bin", "v_0.bin")):
        write_shard(
            tmp_path / name,
            (np.tile(np.arange(50), 300) + 50 * i * (np.tile(np.arange(50), 300) > 0)).astype(np.uint16),
        )
        shards[name] = (tmp_path / name).read_bytes()
    section = {"train": "fw/t_*.bin", "val": "fw/v_*.bin", "bos_id": 0, "hub": {"repo": REPO, "train_shards": 2}}
    arguments = overlay(checkout, data={"source": "shards", "shards": section}, **SHORT)
    with Hub(shards) as hub:
        for name, value in hub.environment(tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        (checkout.path / "fw").mkdir()
        (checkout.path / "fw/t_1.bin").write_bytes(shards["t_1.bin"])
        assert "give at most 15,000; add shards (./run fetch_shards gets" in checkout.run("-n", *arguments, code=1)
        checkout.run("fetch_shards", *arguments)
        assert hub.downloads() == ["v_0.bin", "t_2.bin"]
    assert "data" in checkout.run("-n", *arguments)


def test_a_download_that_fails_ends_with_its_reason(checkout, tmp_path, monkeypatch):
    for name, value in {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}.items():
        monkeypatch.setenv(name, value)
    shards = {"train": "fw/t_*.bin", "val": "fw/v_*.bin", "bos_id": 0, "hub": {"repo": REPO}}
    output = checkout.run("fetch_shards", *overlay(checkout, data={"source": "shards", "shards": shards}), code=1)
    assert f"fetch_shards: data.shards.hub: {REPO} at main: " in output and "Traceback" not in output
    assert "kdclimb: stopped by an error (above)" in output and not any(checkout.path.glob("results/tiny/logs/*"))


def test_plan_tells_the_tokens(wrong):
    done = subprocess.run(
        [sys.executable, "-m", "kdclimb", "plan", *TINY], cwd=wrong.path, capture_output=True, text=True, check=True
    )
    assert (
        "Tokens needed and there: CE with 8 more steps 31,744 of not known yet in 1 pass (data.max_epochs)"
        in done.stdout
    )
