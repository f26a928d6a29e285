"""The packed batches, and the prepared tiny data that they come from."""

import json

import numpy as np
import pytest
import torch
from configs import ROOT

from kdclimb import campaign
from kdclimb.attention import Documents
from kdclimb.data import Dataset, Packer
from kdclimb.prepare import prepare
from kdclimb.shards import read_shard, write_shard
from kdclimb.text import read_documents


def test_manifest_describes_the_shards_and_documents_start_with_bos(tiny, manifest):
    described = json.loads(manifest.read_text())
    assert described["vocab_size"] == tiny.data.vocab_size
    for part in ("train", "val"):
        (shard,) = described[part]
        tokens = read_shard(manifest.parent / shard["file"])
        assert len(tokens) == shard["tokens"] and tokens[0] == described["bos_id"]
        assert np.count_nonzero(tokens == described["bos_id"]) == shard["documents"]
        assert tokens.max() < tiny.data.vocab_size
    held_out = described["val"][0]["documents"] / sum(described[p][0]["documents"] for p in ("train", "val"))
    assert held_out == pytest.approx(tiny.data.text.val_fraction, abs=0.005)


def test_shard_header_is_the_speedruns(tmp_path):
    write_shard(tmp_path / "x.bin", np.arange(5, dtype=np.uint16))
    raw = (tmp_path / "x.bin").read_bytes()
    assert np.frombuffer(raw[:1024], dtype="<i4")[:4].tolist() == [20240520, 1, 5, 0]
    assert np.frombuffer(raw[1024:], dtype="<u2").tolist() == [0, 1, 2, 3, 4]


def test_tokens_decode_to_the_documents_they_came_from(tiny, manifest):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(manifest.parent / "tokenizer.json"))
    documents = {d for name in tiny.data.text.files for d in read_documents(ROOT / name, "text", 100_000)}
    tokens = read_shard(manifest.parent / "val_000000.bin")
    starts = np.flatnonzero(tokens == 0)
    first = tokenizer.decode(tokens[starts[0] + 1 : starts[1]].tolist())
    assert first in documents


def test_preparing_twice_gives_the_same_bytes(tiny, manifest, tmp_path):
    prepare(campaign.data_spec(tiny, ROOT), tmp_path, ROOT)
    for name in ("manifest.json", "tokenizer.json", "train_000000.bin", "val_000000.bin"):
        assert (tmp_path / name).read_bytes() == (manifest.parent / name).read_bytes(), name


def documents_of(batch):
    """The packed documents as lists of tokens, the label of the last token included."""
    bounds = batch.documents.cu_seqlens.tolist()
    stream = [*batch.inputs.tolist(), batch.labels[-1].item()]
    return [stream[a:b] for a, b in zip(bounds[:-1], bounds[1:], strict=True)]


def test_packer_fills_batches_with_cut_documents_from_their_start():
    shard = np.array([0, 1, 2, 3, 4, 5, 0, 6, 7, 0, 8, 9, 10], dtype=np.uint16)
    packer = Packer([shard], bos=0, max_doc_tokens=4, seed=None)
    batch = packer.next_batch(9, "cpu")
    assert documents_of(batch) == [[0, 1, 2, 3], [0, 6, 7], [0, 8]]
    assert batch.labels.tolist() == [1, 2, 3, 0, 6, 7, 0, 8, 9]  # the last document gave its cut third token as a label
    assert packer.epoch == 0
    packer.next_batch(3, "cpu")
    assert packer.epoch == 1


def test_seeds_order_documents_differently_and_skipping_is_reading():
    rng = np.random.default_rng(0)
    shards = [np.concatenate([[0, *rng.integers(1, 99, rng.integers(1, 30))] for _ in range(50)]) for _ in range(2)]

    def packer(seed):
        return Packer([s.astype(np.uint16) for s in shards], bos=0, max_doc_tokens=16, seed=seed)

    a, b, other = packer(1), packer(1), packer(2)
    for _ in range(30):  # past the end of both shards
        a.next_batch(64, "cpu")
        b.skip_batch(64)
    assert a.epoch >= 1
    assert a.next_batch(64, "cpu").inputs.tolist() == b.next_batch(64, "cpu").inputs.tolist()
    assert packer(1).next_batch(64, "cpu").inputs.tolist() != other.next_batch(64, "cpu").inputs.tolist()


def test_compiled_code_meets_one_shape_of_batches_whose_documents_are_now_more_now_fewer(monkeypatch):
    monkeypatch.setattr(Documents, "of", Documents.padded)
    rng = np.random.default_rng(0)
    shard = np.concatenate([[0, *rng.integers(1, 99, rng.integers(40, 86))] for _ in range(2000)]).astype(np.uint16)
    packer = Packer([shard], bos=0, max_doc_tokens=80, seed=1)
    batches = [packer.next_batch(8192, "cpu") for _ in range(12)]
    counts = [int(batch.documents.cu_seqlens.diff().count_nonzero()) for batch in batches]
    assert min(counts) < 128 < max(counts)  # a power of 2 lies between them
    assert {len(batch.documents.cu_seqlens) for batch in batches} == {257}


def test_a_later_shard_of_shorter_documents_fits_the_same_shape(monkeypatch):
    monkeypatch.setattr(Documents, "of", Documents.padded)
    rng = np.random.default_rng(0)
    shards = [
        np.concatenate([[0, *rng.integers(1, 99, length)] for _ in range(600)]).astype(np.uint16) for length in (70, 15)
    ]
    packer = Packer(shards, bos=0, max_doc_tokens=80, seed=1)
    batches = [packer.next_batch(8192, "cpu") for _ in range(6)]
    assert packer.cursor[1] == 1 and len({len(batch.documents.cu_seqlens) for batch in batches}) == 1


def test_slabs_leave_nothing_out_and_keep_documents_apart(manifest):
    dataset = Dataset(manifest)
    stream = np.concatenate(dataset.shards("val"))
    slabs = dataset.val_batches(500, 128, None, "cpu")
    assert torch.cat([slab.inputs for slab in slabs]).tolist() == stream[:500].tolist()
    assert torch.cat([slab.labels for slab in slabs]).tolist() == stream[1:501].tolist()
    for slab in slabs:
        begins = {0, *torch.nonzero(slab.inputs == dataset.bos).flatten().tolist(), len(slab.inputs)}
        assert slab.documents.cu_seqlens.tolist() == sorted(begins)


def test_validation_set_is_fixed_and_too_large_a_one_is_refused(manifest):
    dataset = Dataset(manifest)
    first, second = (dataset.val_batches(500, 128, 64, "cpu") for _ in range(2))
    assert [len(b.inputs) for b in first] == [128, 128, 128, 116]
    assert all(a.inputs.equal(b.inputs) for a, b in zip(first, second, strict=True))
    with pytest.raises(ValueError, match="validation.tokens: 10000000"):
        dataset.val_batches(10_000_000, 100_000, 64, "cpu")
