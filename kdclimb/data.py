"""Tokens: the data rule that makes shards, and the packed batches that training reads.

Shards are the speedrun's .bin format: 256 little-endian int32 (20240520, 1, token count), then
uint16 tokens; every document starts with its end-of-text id. `manifest.json` names them, with their
sha256, tokens and documents. Text files hold documents separated by lines of one form feed.
"""

from __future__ import annotations

import glob
import hashlib
import json
import lzma
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kdclimb.artifacts import write_json, write_via
from kdclimb.attention import Documents, to_device
from kdclimb.config import short_hash

MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256
END_OF_TEXT = "<|endoftext|>"


# ---- the data rule ------------------------------------------------------------------------------


def prepare(spec: dict, out: Path, root: Path) -> dict:
    """Make `out`/manifest.json (and, for text, tokenizer and shards) from a data spec; returns the manifest.

    `spec` is `kdclimb.campaign.data_spec`'s; paths in it start from `root`. Raises ValueError that
    names the file or key at fault.
    """
    out.mkdir(parents=True, exist_ok=True)
    parts = _prepare_text(spec, out, root) if spec["source"] == "text" else _list_shards(spec, root)
    hashes = [shard["sha256"] for part in ("train", "val") for shard in parts[part]]
    manifest = {"spec": spec, "vocab_size": spec["vocab_size"], **parts, "data_hash": short_hash("".join(hashes))}
    write_json(out / "manifest.json", manifest)
    return manifest


def _prepare_text(spec: dict, out: Path, root: Path) -> dict:
    documents = [doc for name in spec["files"] for doc in read_documents(root / name)]
    random.Random(spec["seed"]).shuffle(documents)
    num_val = max(1, round(len(documents) * spec["val_fraction"]))
    if num_val >= len(documents):
        raise ValueError(f"data.text.files: {len(documents)} documents are too few to split by data.text.val_fraction")
    val, train = documents[:num_val], documents[num_val:]
    tokenizer = train_tokenizer(train, spec["vocab_size"])
    write_via(out / "tokenizer.json", lambda path: tokenizer.save(str(path)))
    bos = tokenizer.token_to_id(END_OF_TEXT)
    parts = {}
    for name, docs in (("train", train), ("val", val)):
        tokens = [np.asarray([bos, *e.ids], dtype=np.uint16) for e in tokenizer.encode_batch(docs)]
        write_shard(out / f"{name}_000000.bin", np.concatenate(tokens))
        parts[name] = [_describe(out / f"{name}_000000.bin", f"{name}_000000.bin", bos, spec["vocab_size"])]
    return {"bos_id": bos, "tokenizer_sha256": _sha256(out / "tokenizer.json"), **parts}


def read_documents(path: Path) -> list[str]:
    """The documents of a .txt or .txt.xz file. Raises ValueError if it isn't UTF-8 text or holds none."""
    data = path.read_bytes()
    try:
        text = (lzma.decompress(data) if path.suffix == ".xz" else data).decode("utf-8")
    except (lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{path}: not a whole .xz file ({error})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from error
    documents = [doc.strip() for doc in text.split("\n\f\n")]
    documents = [doc for doc in documents if doc]
    if not documents:
        raise ValueError(f"{path}: no documents in it")
    return documents


def train_tokenizer(documents: list[str], vocab_size: int):
    """A byte-level BPE of exactly `vocab_size` entries, whose id 0 is the end-of-text token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"data.vocab_size: {vocab_size} is more than this text gives ({tokenizer.get_vocab_size()})")
    return tokenizer


def _list_shards(spec: dict, root: Path) -> dict:
    parts = {}
    for name in ("train", "val"):
        paths = sorted(glob.glob(str(root / spec[name])))
        if not paths:
            raise ValueError(
                f"data.shards.{name}: no file matches {spec[name]!r} under {root}. Put token shards in the speedrun's "
                ".bin format there (FineWeb-10B in GPT-2 tokens: kjj0/fineweb10B-gpt2 on the Hugging Face hub)"
            )
        parts[name] = [_describe(Path(path), path, spec["bos_id"], spec["vocab_size"]) for path in paths]
    return {"bos_id": spec["bos_id"], "tokenizer_sha256": None, **parts}


def _describe(path: Path, name: str, bos: int, vocab_size: int) -> dict:
    tokens = read_shard(path)
    largest = int(tokens.max()) if len(tokens) else 0
    if largest >= vocab_size:
        raise ValueError(f"{path}: holds token id {largest}; data.vocab_size is {vocab_size}")
    documents = int(np.count_nonzero(tokens == bos))
    if documents == 0:
        raise ValueError(f"{path}: no document starts in it (token id {bos})")
    return {"file": name, "sha256": _sha256(path), "tokens": len(tokens), "documents": documents}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_shard(path: Path, tokens: np.ndarray) -> None:
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    write_via(path, lambda temporary: temporary.write_bytes(header.tobytes() + tokens.astype("<u2").tobytes()))


def read_shard(path: Path) -> np.ndarray:
    """(tokens,) uint16, memory-mapped. Raises ValueError unless magic, version and length are right."""
    if not path.is_file():
        raise ValueError(f"{path}: this token shard is missing")
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    if len(header) < HEADER_INTS or header[0] != MAGIC or header[1] != VERSION:
        raise ValueError(f"{path}: not a token shard (its header must start with {MAGIC}, {VERSION})")
    expected = 4 * HEADER_INTS + 2 * int(header[2])
    if path.stat().st_size != expected:
        raise ValueError(
            f"{path}: {path.stat().st_size} bytes, but its header promises {expected}; it is cut or damaged"
        )
    return np.memmap(path, dtype="<u2", mode="r", offset=4 * HEADER_INTS)


# ---- what training reads --------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """T packed tokens: inputs and labels (T,) int64, the label of a token being the next one in the stream."""

    inputs: Tensor
    labels: Tensor
    documents: Documents


class Dataset:
    """The prepared shards of one manifest, checked against it."""

    def __init__(self, manifest_path: Path):
        self.manifest = json.loads(manifest_path.read_text())
        self.hash: str = self.manifest["data_hash"]
        self.bos: int = self.manifest["bos_id"]
        self.folder = manifest_path.parent

    def shards(self, part: str) -> list[np.ndarray]:
        arrays = []
        for shard in self.manifest[part]:
            tokens = read_shard(self.folder / shard["file"])
            if len(tokens) != shard["tokens"]:
                raise ValueError(f"{shard['file']}: {len(tokens)} tokens, but the manifest has {shard['tokens']}")
            arrays.append(tokens)
        return arrays

    def train_stream(self, seed: int, max_doc_tokens: int) -> Packer:
        return Packer(self.shards("train"), self.bos, max_doc_tokens, seed)

    def val_batches(self, tokens: int, batch_tokens: int, max_doc_tokens: int, device: str) -> list[Batch]:
        """The fixed validation set: `tokens` tokens of the held-out documents in their order, cut as in training."""
        packer = Packer(self.shards("val"), self.bos, max_doc_tokens, seed=None)
        sizes = [min(batch_tokens, tokens - start) for start in range(0, tokens, batch_tokens)]
        batches = [packer.next_batch(size, device) for size in sizes]
        if packer.epoch:
            raise ValueError(f"validation.tokens: {tokens} is more than the held-out documents give; lower it")
        return batches


class Packer:
    """Fills batches with whole documents, each from its start, cut to `max_doc_tokens` and to the room left.

    Shards are read in order, the documents of a shard in an order drawn from the seed (None: as
    they lie), for as many epochs as asked for. A pure function of its arguments, so a resumed run skips
    to where it was. BOS-aligned packing is the speedrun's (record 26).
    """

    def __init__(self, shards: list[np.ndarray], bos: int, max_doc_tokens: int, seed: int | None):
        self.shards, self.bos, self.max_doc_tokens, self.seed = shards, bos, max_doc_tokens, seed
        self.epoch = 0
        self._documents = self._walk()

    def _walk(self) -> Iterator[np.ndarray]:
        while True:
            for number, tokens in enumerate(self.shards):
                starts = np.flatnonzero(tokens == self.bos)
                ends = np.append(starts[1:], len(tokens))
                order = np.arange(len(starts))
                if self.seed is not None:
                    np.random.default_rng((self.seed, self.epoch, number)).shuffle(order)
                for i in order:
                    yield tokens[starts[i] : min(ends[i], starts[i] + self.max_doc_tokens)]
            self.epoch += 1

    def _fill(self, length: int) -> tuple[list[np.ndarray], list[int]]:
        pieces, starts, filled = [], [], 0
        while filled < length:
            piece = next(self._documents)[: length - filled]
            pieces.append(piece)
            starts.append(filled)
            filled += len(piece)
        return pieces, starts

    def skip_batch(self, tokens: int) -> None:
        self._fill(tokens + 1)

    def next_batch(self, tokens: int, device: str) -> Batch:
        pieces, starts = self._fill(tokens + 1)
        stream = to_device(torch.from_numpy(np.concatenate(pieces).astype(np.int64)), device)
        starts = [start for start in starts if start < tokens]
        return Batch(stream[:-1], stream[1:], Documents.of(starts, tokens, device, self.max_doc_tokens))
