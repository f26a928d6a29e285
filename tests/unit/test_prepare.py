"""The data rule: the order, the split, the tokenizers, and shards that are checked."""

import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from configs import ROOT, merged

from kdclimb import artifacts, campaign, prepare, shards, sources, tokenizer
from kdclimb.data import Dataset
from kdclimb.shards import document_lengths, read_shard, write_shard, write_shards

DEFAULT_HASH = "9a9d78c91bb5"  # of the embedded text as it was cut, shuffled and tokenized before there were buckets


def spec_of(root: Path, **data) -> dict:
    return campaign.data_spec(campaign.load(merged("tests/tiny.yaml", {"data": data}), root), root)


def shard_spec(root: Path, **values) -> dict:
    spec = {"source": "shards", "vocab_size": 384, "train": "train.bin", "val": "val.bin", "bos_id": 0} | values
    return spec | {"fingerprint": sources.fingerprint(sources.source_files(spec, root), root)}


@pytest.fixture
def texts(tmp_path):
    """A root with 300 documents in two files."""
    documents = [f"document {i}: " + "some words of it " * (i % 7) for i in range(300)]
    (tmp_path / "a.txt").write_text("\n\f\n".join(documents[:200]))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents[200:]))
    return tmp_path, [document.strip() for document in documents]


# ---- text ---------------------------------------------------------------------------------------


def test_the_embedded_text_gives_the_tokens_that_it_always_gave(tmp_path):
    config = campaign.load(merged({"device": "cpu"}), ROOT)
    assert prepare.prepare(campaign.data_spec(config, ROOT), tmp_path, ROOT)["data_hash"] == DEFAULT_HASH


@pytest.mark.parametrize("bucket_bytes", [2**27, 500])
def test_the_order_is_that_of_a_shuffle_in_memory_whatever_the_number_of_buckets(tmp_path, monkeypatch, bucket_bytes):
    monkeypatch.setattr(prepare, "BUCKET_BYTES", bucket_bytes)
    documents = [f"{i} é" for i in range(1000)]
    shuffled = prepare.Shuffled(lambda: iter(documents), 7, tmp_path)
    assert len(shuffled.buckets) == (1 if bucket_bytes > 10_000 else 1 + shuffled.bytes // 500)
    random.Random(7).shuffle(documents)
    assert list(shuffled) == documents and list(shuffled) == documents


def test_many_buckets_and_shards_hold_the_same_documents(texts, tmp_path, monkeypatch):
    root, documents = texts
    one = prepare.prepare(spec_of(root, vocab_size=300, text={"files": ["a.txt", "b.jsonl"]}), tmp_path / "one", root)
    monkeypatch.setattr(prepare, "BUCKET_BYTES", 1000)
    monkeypatch.setattr(prepare, "BATCH_CHARS", 100)
    monkeypatch.setattr(prepare, "write_shards", lambda *arguments: write_shards(*arguments, most=2000))
    spec = spec_of(root, vocab_size=300, text={"files": ["a.txt", "b.jsonl"]})
    many = prepare.prepare(spec, tmp_path / "many", root)
    assert len(one["train"]) == 1 and len(many["train"]) == 3
    assert all(shard["tokens"] <= 2000 for shard in many["train"])
    tokens = [np.concatenate(Dataset(tmp_path / name / "manifest.json").shards("train")) for name in ("one", "many")]
    assert np.array_equal(*tokens)
    assert sum(s["documents"] for part in ("train", "val") for s in many[part]) == len(documents)
    assert not (tmp_path / "many/.shuffle").exists()


def test_what_was_made_is_taken_again_unless_something_changed(texts, tmp_path, monkeypatch):
    root, _ = texts
    spec, out = spec_of(root, vocab_size=300, text={"files": ["a.txt"]}), tmp_path / "out"
    first = prepare.prepare(spec, out, root, "code")
    (out / "manifest.json").unlink()
    made = []
    make = prepare._make
    monkeypatch.setattr(prepare, "_make", lambda *arguments: made.append(1) or make(*arguments))
    assert prepare.prepare(spec, out, root, "code") == first and not made
    assert prepare.prepare(spec, out, root, "other") == first and len(made) == 1
    (out / "train_000000.bin").write_bytes((out / "train_000000.bin").read_bytes()[:-2])
    assert prepare.prepare(spec, out, root, "other") == first and len(made) == 2


def test_text_that_changed_on_the_way_is_refused(texts, tmp_path):
    root, _ = texts
    spec = spec_of(root, vocab_size=300, text={"files": ["a.txt"]})
    (root / "a.txt").write_text("other")
    with pytest.raises(ValueError, match=r"data\.text: its files are not those that this started with"):
        prepare.prepare(spec, tmp_path / "out", root)


@pytest.mark.parametrize(
    ("content", "said"),
    [("  \n\f\n ", "data.text.files: no documents in them"), ("", "no documents"), ("one", "too few")],
)
def test_text_without_documents_is_refused(tmp_path, content, said):
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(ValueError, match=said):
        prepare.prepare(spec_of(tmp_path, text={"files": ["a.txt"]}), tmp_path / "out", tmp_path)


def test_too_large_a_vocabulary_is_refused(tiny, tmp_path):
    spec = campaign.data_spec(tiny, ROOT) | {"vocab_size": 60000}
    with pytest.raises(ValueError, match=r"data\.vocab_size: 60000 is more than this text gives"):
        prepare.prepare(spec, tmp_path, ROOT)


def test_the_bpe_is_trained_on_the_first_bytes_alone(texts, tmp_path):
    root, _ = texts
    hashes = set()
    for train_bytes in (4000, 10**8):
        spec = spec_of(root, vocab_size=300, text={"files": ["a.txt"]}, tokenizer={"train_bytes": train_bytes})
        hashes.add(prepare.prepare(spec, tmp_path / f"{train_bytes}", root)["tokenizer_sha256"])
    assert len(hashes) == 2


def test_text_that_looks_like_the_end_of_text_token_starts_no_document(texts, tmp_path):
    root, documents = texts
    with (root / "b.jsonl").open("a") as file:
        file.write(json.dumps({"text": "before <|endoftext|> after"}) + "\n")
    spec = spec_of(root, vocab_size=300, text={"files": ["a.txt", "b.jsonl"]})
    manifest = prepare.prepare(spec, tmp_path / "out", root)
    assert sum(s["documents"] for part in ("train", "val") for s in manifest[part]) == len(documents) + 1


# ---- GPT-2's BPE --------------------------------------------------------------------------------


@pytest.fixture
def ranks(monkeypatch):
    """A small BPE that stands for GPT-2's: the bytes in GPT-2's order, and nothing merged but 'he' and 'the'."""
    order = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    found = {bytes([b]): rank for rank, b in enumerate(order + [b for b in range(256) if b not in order])}
    found |= {b"he": 256, b"the": 257}
    text = tokenizer._ranks_text(found)
    monkeypatch.setattr(tokenizer, "GPT2_SHA256", hashlib.sha256(text).hexdigest())
    return text


def as_json(text: bytes) -> str:
    """The form of npm's tiktoken, in two lines."""
    tokens = [line.split()[0].decode() for line in text.splitlines()]
    return json.dumps({"bpe_ranks": f"! 0 {' '.join(tokens[:100])}\n! 100 {' '.join(tokens[100:])}"})


@pytest.mark.parametrize("form", ["tiktoken", "json"])
def test_gpt2_takes_ranks_from_a_local_file(texts, tmp_path, ranks, form):
    root, documents = texts
    (root / f"gpt2.{form}").write_text(ranks.decode() if form == "tiktoken" else as_json(ranks))
    gpt2 = {"kind": "gpt2", "ranks": f"gpt2.{form}"}
    spec = spec_of(root, vocab_size=50304, text={"files": ["a.txt"]}, tokenizer=gpt2)
    manifest = prepare.prepare(spec, tmp_path / "out", root)
    assert manifest["bos_id"] == 50256
    assert (tmp_path / "out/gpt2.tiktoken").read_bytes() == ranks
    tokens = read_shard(tmp_path / "out/val_000000.bin")
    vocabulary = {rank: token for token, rank in tokenizer.read_ranks(root / f"gpt2.{form}").items()}
    parts = np.split(tokens, np.flatnonzero(tokens == 50256)[1:])
    found = [b"".join(vocabulary[i] for i in part[1:].tolist()).decode() for part in parts]
    assert set(found) <= set(documents) and len(found) == 10


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("IQ== 0\n", "gpt2.tiktoken: holds 1 ranks, which are not GPT-2's"),
        ("no ranks", "gpt2.tiktoken: neither a .tiktoken file nor the JSON"),
        ("{}", "gpt2.tiktoken: neither"),
        ("[1]", "gpt2.tiktoken: neither"),
        ("é", "gpt2.tiktoken: neither"),
    ],
)
def test_other_ranks_are_refused(tmp_path, content, said):
    (tmp_path / "gpt2.tiktoken").write_text(content)
    with pytest.raises(ValueError, match=r"^data\.tokenizer\.ranks: ") as error:
        tokenizer.GPT2(tmp_path / "gpt2.tiktoken", tmp_path / "out")
    assert said in str(error.value)


def test_without_a_network_gpt2_asks_for_a_local_file(tmp_path, monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"^data\.tokenizer\.ranks: null lets tiktoken download .* name a local file"):
        tokenizer.GPT2(None, tmp_path / "out")


def test_gpt2_needs_room_for_its_ids_and_a_file_that_is_there(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    text = {"files": ["a.txt"]}
    with pytest.raises(ValueError, match=r"^data\.vocab_size: 50256 is not allowed; allowed: at least 50257"):
        spec_of(tmp_path, vocab_size=50256, text=text, tokenizer={"kind": "gpt2"})
    with pytest.raises(
        ValueError, match=r"^data\.tokenizer\.ranks: 'nope' is not allowed; allowed: a file that exists"
    ):
        spec_of(tmp_path, vocab_size=50304, text=text, tokenizer={"kind": "gpt2", "ranks": "nope"})


# ---- shards -------------------------------------------------------------------------------------


def shard_bytes(magic=20240520, version=1, count=3, tokens=(0, 1, 2)):
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, count
    return header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes()


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (shard_bytes(magic=1), "not a token shard"),
        (shard_bytes(version=2), "not a token shard"),
        (shard_bytes(count=4), "cut or damaged"),
        (shard_bytes(count=2), "cut or damaged"),
        (shard_bytes()[:-1], "cut or damaged"),
        (b"short", "not a token shard"),
        (b"", "not a token shard"),
        (shard_bytes(tokens=(0, 1, 400)), "holds token id 400; data.vocab_size is 384"),
        (shard_bytes(tokens=(1, 1, 1)), "no document starts"),
        (shard_bytes(count=0, tokens=()), "no document starts"),
    ],
)
def test_bad_shards_are_refused_by_name(tmp_path, raw, said):
    for name in ("train", "val"):
        (tmp_path / f"{name}.bin").write_bytes(raw)
    with pytest.raises(ValueError, match=said) as error:
        prepare.prepare(shard_spec(tmp_path), tmp_path / "out", tmp_path)
    assert "train.bin" in str(error.value) and "\n" not in str(error.value)


def test_shards_are_looked_at_in_blocks(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    tokens = np.concatenate([[0, *rng.integers(1, 384, rng.integers(0, 9))] for _ in range(50)]).astype(np.uint16)
    write_shard(tmp_path / "a.bin", np.append(np.uint16([5, 5]), tokens))  # as FineWeb's, which start in a document
    whole = document_lengths(tmp_path / "a.bin", 0, 384)
    assert whole.sum() == len(tokens) and len(whole) == 50
    monkeypatch.setattr(shards, "BLOCK", 7)
    assert document_lengths(tmp_path / "a.bin", 0, 384).tolist() == whole.tolist()


def test_missing_shards_say_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"data\.shards\.train: no file matches 'fineweb/\*\.bin'.*fetch_shards"):
        prepare.prepare(shard_spec(tmp_path, train="fineweb/*.bin"), tmp_path / "out", tmp_path)
    assert not (tmp_path / "out/manifest.json").exists()


def lay_shards(root: Path) -> dict:
    """Ready shards in root/mine; their spec."""
    (root / "mine").mkdir(parents=True)
    for i, name in enumerate(("train", "val")):
        write_shard(root / f"mine/{name}.bin", np.append(np.arange(9), i).astype(np.uint16))
    return shard_spec(root, train="mine/train.bin", val="mine/val.bin")


def test_a_project_that_is_moved_or_copied_reads_its_own_shards(tmp_path):
    old, new, copy = (tmp_path / name for name in ("old", "new", "copy"))
    spec, data = lay_shards(old), "results/data/x"
    manifest = prepare.prepare(spec, old / data, old)
    assert manifest["train"][0]["file"] == "../../../mine/train.bin"
    elsewhere = prepare.prepare(spec, tmp_path / "elsewhere", old)  # which is not in the project
    assert elsewhere["train"][0]["file"] == str(old / "mine/train.bin")
    assert {k: v for k, v in elsewhere.items() if k not in ("train", "val")} == {
        k: v for k, v in manifest.items() if k not in ("train", "val")
    }
    shutil.copytree(old, copy)
    old.rename(new)
    (new / "mine/val.bin").unlink()
    assert shard_spec(copy, train=spec["train"], val=spec["val"]) == spec
    assert Dataset(copy / data / "manifest.json").shards("val")[0].tolist() == [*range(9), 1]
    found = Dataset(new / data / "manifest.json")
    assert found.shards("train")[0].tolist() == [*range(9), 0]
    remedy = f"put it back or, if the project's folder was moved, .*: ./run --force {new / data}/manifest.json, with"
    with pytest.raises(ValueError, match=f"^{new}/mine/val.bin: this token shard is missing; {remedy}"):
        found.shards("val")
    with pytest.raises(ValueError, match=f"^{old}/mine/train.bin: this token shard is missing; put it back or, if "):
        Dataset(tmp_path / "elsewhere/manifest.json").shards("train")


def test_shards_are_found_from_results_that_are_linked_to(tmp_path):
    """From there no path leads back to the project."""
    spec, results = lay_shards(tmp_path / "project"), tmp_path / "on/another/disk"
    results.mkdir(parents=True)
    (tmp_path / "project/results").symlink_to(results)
    prepare.prepare(spec, tmp_path / "project/results/data/x", tmp_path / "project")
    for folder in (tmp_path / "project/results", results):
        assert Dataset(folder / "data/x/manifest.json").shards("val")[0].tolist() == [*range(9), 1]


def test_a_shard_of_prepared_text_that_is_missing_says_how_to_make_it_again(texts):
    root, _ = texts
    prepare.prepare(spec_of(root, vocab_size=300, text={"files": ["a.txt"]}), root / "results/data/x", root)
    (root / "results/data/x/val_000000.bin").unlink()
    with pytest.raises(ValueError, match=f"missing; delete {root}/results/data/x and make it again: ./run {root}/"):
        Dataset(root / "results/data/x/manifest.json").shards("val")


def test_a_replaced_shard_is_other_data(tmp_path):
    for name in ("train", "val"):
        write_shard(tmp_path / f"{name}.bin", np.arange(9, dtype=np.uint16))
    first = shard_spec(tmp_path)
    assert shard_spec(tmp_path) == first
    write_shard(tmp_path / "train.bin", np.append(np.arange(8), 1).astype(np.uint16))
    assert shard_spec(tmp_path)["fingerprint"] != first["fingerprint"]


# ---- hashes -------------------------------------------------------------------------------------


def test_large_files_are_hashed_once_until_they_change(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(sources, "KEPT_FROM", 1)
    monkeypatch.setattr(sources, "SETTLED", 0.0)
    monkeypatch.setattr(sources, "sha256", lambda path: read.append(path.name) or artifacts.sha256(path))
    paths = [tmp_path / name for name in ("a.txt", "b.txt")]
    for path in paths:
        path.write_text("one")
    first = sources.fingerprint(paths, tmp_path)
    assert sources.fingerprint(paths, tmp_path) == first and read == ["a.txt", "b.txt"]
    before = paths[1].stat()
    paths[1].write_text("two")  # as long, and with the times of before
    os.utime(paths[1], ns=(before.st_atime_ns, before.st_mtime_ns))
    assert sources.fingerprint(paths, tmp_path) != first and read == ["a.txt", "b.txt", "b.txt"]


def test_a_file_that_changed_just_now_is_not_remembered(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "KEPT_FROM", 1)
    (tmp_path / "a.txt").write_text("one")
    sources.fingerprint([tmp_path / "a.txt"], tmp_path)
    assert json.loads((tmp_path / sources.HASHES).read_text()) == {}
