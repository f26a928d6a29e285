"""What training reads: the packed batches of a manifest's token shards."""

from __future__ import annotations

import functools
import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kdclimb.artifacts import Damaged, verify
from kdclimb.attention import Documents, to_device
from kdclimb.shards import document_order, read_manifest, read_shard
from kdclimb.waiting import waiting

ROOM = 1.5  # times as many documents as there are in a batch on average have room in it


@dataclass(frozen=True)
class Batch:
    """T packed tokens: inputs and labels (T,) int64, the label of a token being the next one in the stream."""

    inputs: Tensor
    labels: Tensor
    documents: Documents


class Dataset:
    """The prepared shards of one manifest, checked against it."""

    def __init__(self, manifest_path: Path):
        self.manifest = read_manifest(manifest_path)
        self.hash: str = self.manifest["data_hash"]
        self.bos: int = self.manifest["bos_id"]
        self.folder = manifest_path.parent
        self.verified: set[str] = set()

    def shards(self, part: str) -> list[np.ndarray]:
        """The tokens of each shard, memory-mapped; read whole and held against the manifest the first time.

        Raises ValueError for a shard that is missing, or not the one that was prepared.
        """
        arrays, manifest = [], self.folder / "manifest.json"
        for shard in self.manifest[part]:
            path = self.folder / shard["file"]
            remedy = missing = f"delete {self.folder} and make it again: ./run {manifest}"
            if path.name != shard["file"]:  # a ready one
                path = Path(os.path.normpath(path))  # less the way from the folder up to the project
                remedy = "it is not the file that the data were made from: put that back"
                missing = (
                    "put it back or, if the project's folder was moved, have the shards looked up again: ./run --force "
                    f"{manifest}, with this campaign's --configfile after it"
                )
            with waiting(path):
                is_there = path.is_file()
            if not is_there:
                raise ValueError(f"{path}: this token shard is missing; {missing}")
            tokens = read_shard(path)
            if len(tokens) != shard["tokens"]:
                raise Damaged(f"{path}: {len(tokens)} tokens, but the manifest has {shard['tokens']}; {remedy}")
            if shard["file"] not in self.verified:
                verify(path, shard["sha256"], remedy)
                self.verified.add(shard["file"])
            arrays.append(tokens)
        return arrays

    def train_stream(self, seed: int, max_doc_tokens: int) -> Packer:
        return Packer(self.shards("train"), self.bos, max_doc_tokens, seed)

    def val_batches(self, tokens: int, batch_tokens: int, max_doc_tokens: int | None, device: str) -> list[Batch]:
        """The fixed validation set: `tokens` tokens of the held-out documents in their order, cut as in training.

        With max_doc_tokens None nothing is cut but at a batch's end, after which a document goes on as one of its own:
        the speedrun's slabs.
        """
        if max_doc_tokens is None:
            return self._slabs(tokens, batch_tokens, device)
        packer = Packer(self.shards("val"), self.bos, max_doc_tokens, seed=None)
        sizes = [min(batch_tokens, tokens - start) for start in range(0, tokens, batch_tokens)]
        batches = [packer.next_batch(size, device) for size in sizes]
        if packer.epoch:
            raise ValueError(f"validation.tokens: {tokens} is more than the held-out documents give; lower it")
        return batches

    def _slabs(self, tokens: int, batch_tokens: int, device: str) -> list[Batch]:
        stream = np.concatenate(self.shards("val"))
        if tokens >= len(stream):  # the last token's label lies behind it
            raise ValueError(f"validation.tokens: {tokens} is more than the held-out documents give; lower it")
        stream = stream[: tokens + 1].astype(np.int64)
        slabs = [stream[i : i + batch_tokens + 1] for i in range(0, tokens, batch_tokens)]
        starts = [sorted({0, *np.flatnonzero(slab[:-1] == self.bos).tolist()}) for slab in slabs]
        longest = max(np.diff([*at, len(slab) - 1]).max() for at, slab in zip(starts, slabs, strict=True)).item()
        return [_batch(slab, at, device, longest) for at, slab in zip(starts, slabs, strict=True)]


def _batch(stream: np.ndarray, starts: list[int], device: str, longest: int, room: int = 0) -> Batch:
    on_device = to_device(torch.from_numpy(stream), device)
    return Batch(on_device[:-1], on_device[1:], Documents.of(starts, len(stream) - 1, device, longest, room))


def _mapped(tokens: np.ndarray) -> Tensor:
    """A shard's tokens, (tokens,) uint16, as int16 in the same memory, which is only read."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(tokens.view(np.int16))


class Packer:
    """Fills batches with whole documents, each from its start, cut to `max_doc_tokens` and to the room left.

    Shards are read in order, the documents of a shard in an order drawn from the seed (None: as
    they lie), for as many epochs as asked for. A pure function of its arguments, so a resumed run skips
    to where it was. BOS-aligned packing is the speedrun's (record 26).
    """

    def __init__(self, shards: list[np.ndarray], bos: int, max_doc_tokens: int, seed: int | None):
        self.shards, self.bos, self.max_doc_tokens, self.seed = shards, bos, max_doc_tokens, seed
        self.epoch = 0
        self.cursor = (0, 0, 0)  # epoch, shard, and place in its order, of the last document taken
        self._documents = self._walk()

    def _walk(self) -> Iterator[Tensor]:
        """The documents, as views of their shards."""
        while True:
            for number, tokens in enumerate(self.shards):
                starts = np.flatnonzero(tokens == self.bos)
                ends = np.append(starts[1:], len(tokens))
                tokens = _mapped(tokens)
                for place, i in enumerate(document_order(len(starts), self.seed, self.epoch, number)):
                    self.cursor = self.epoch, number, place
                    yield tokens[starts[i] : min(ends[i], starts[i] + self.max_doc_tokens)]
            self.epoch += 1

    @functools.cached_property
    def mean_document(self) -> float:
        """Tokens of a document, cut as they are here, in the shard where they are shortest."""
        starts = [np.flatnonzero(tokens == self.bos) for tokens in self.shards]
        lengths = (np.diff(at, append=len(tokens)) for at, tokens in zip(starts, self.shards, strict=True))
        return min(each.clip(max=self.max_doc_tokens).mean().item() for each in lengths)

    def _fill(self, length: int) -> tuple[list[Tensor], list[int]]:
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
        with waiting("the token shards"):  # whose pages may have left the memory since they were verified
            pieces, starts = self._fill(tokens + 1)
            # Without the GIL, unlike numpy's where pieces are short, so that a wait can be said.
            stream = torch.cat(pieces)
        starts = [start for start in starts if start < tokens]
        room = math.ceil(ROOM * tokens / self.mean_document)
        return _batch(stream.numpy().view(np.uint16).astype(np.int64), starts, device, self.max_doc_tokens, room)
