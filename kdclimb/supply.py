"""Whether the data have the tokens that a campaign needs: known before the first job, exactly once they are prepared.

A pass over the data gives fewer tokens than they have: documents are cut to train.max_doc_tokens and to the room left
in a batch. How many, the lengths of the documents tell.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kdclimb.artifacts import verify
from kdclimb.config import build
from kdclimb.shards import document_order, read_manifest

LENGTHS = "{}.lengths"  # of a part: the lengths of its documents, uint32, shard by shard


@dataclass(frozen=True)
class Longest:
    """The run that reads most tokens with its seed."""

    what: str
    key: str  # what makes it shorter
    seed: int
    tokens: int


@dataclass(frozen=True)
class Needs:
    """What a campaign asks of its data; `runs` has the longest for each seed."""

    batch_tokens: int  # of a micro-batch, which is packed by itself
    max_doc_tokens: int
    max_epochs: int
    val_tokens: int
    val_slabs: bool  # see validation.slabs
    runs: tuple[Longest, ...]

    @classmethod
    def from_json(cls, text: str) -> Needs:
        return build(cls, json.loads(text))


@dataclass(frozen=True)
class Supply:
    """Tokens there, None where that isn't known yet. `run` is the one of the longest runs that is left with least."""

    run: Longest
    train: int | None  # in all passes
    val: int | None
    whole: int | None = None  # in all passes, had nothing been cut; None where the others are not exact

    @property
    def at_most(self) -> str:
        return "at most " if self.whole is None else ""


# ---- how many there are -------------------------------------------------------------------------


def at_most(needs: Needs, most: dict[str, int | None]) -> Supply:
    """What the data can have at most, from `kdclimb.sources.most_tokens`."""
    run = max(needs.runs, key=lambda run: run.tokens)
    train = None if most["train"] is None else most["train"] * needs.max_epochs
    return Supply(run, train, most["val"])


def prepared(needs: Needs, folder: Path) -> Supply:
    """What the prepared data in `folder` give, batch by batch as `kdclimb.data.Packer` fills them."""
    manifest = read_manifest(folder / "manifest.json")
    train, val = (list(read_lengths(folder, part, manifest)) for part in ("train", "val"))
    size, longest = needs.batch_tokens, needs.max_doc_tokens
    given = {}
    for run in needs.runs:
        batches, _ = count_batches(train, size, longest, run.seed, needs.max_epochs)
        given[run] = batches * size
    run = min(given, key=lambda run: given[run] - run.tokens)
    if needs.val_slabs:
        held_out = sum(int(lengths.sum(dtype=np.int64)) for lengths in val) - 1
    else:
        batches, rest = count_batches(val, size, longest, None, 1)
        held_out = batches * size + max(0, rest - 1)
    whole = needs.max_epochs * sum(int(lengths.sum(dtype=np.int64)) for lengths in train)
    return Supply(run, given[run], held_out, whole)


def count_batches(
    lengths: list[np.ndarray], size: int, max_doc_tokens: int, seed: int | None, epochs: int
) -> tuple[int, int]:
    """(batches of `size` tokens and the label of the last, tokens of the one begun then) in so many passes.

    `lengths`: those of the documents of each shard. A document that fills a batch loses its rest.
    """
    batches, begun = 0, 0
    for epoch in range(epochs):
        for shard, unordered in enumerate(lengths):
            order = document_order(len(unordered), seed, epoch, shard)
            ends = np.cumsum(np.minimum(unordered, max_doc_tokens)[order], dtype=np.int64)
            start = 0
            while (last := int(np.searchsorted(ends, start + size + 1 - begun))) < len(ends):
                batches, begun, start = batches + 1, 0, int(ends[last])
            begun += int(ends[-1]) - start
    return batches, begun


def write_lengths(path: Path, shards: Iterable[np.ndarray]) -> None:
    with path.open("wb") as file:
        for lengths in shards:
            file.write(lengths.astype("<u4").tobytes())


def read_lengths(folder: Path, part: str, manifest: dict) -> Iterator[np.ndarray]:
    """(documents,) uint32 of each shard, memory-mapped. Raises Damaged unless the file is as it was written."""
    path, start = folder / LENGTHS.format(part), 0
    verify(path, manifest.get("lengths_sha256", {}).get(part), f"delete {folder}, and ./run makes it again")
    lengths = np.memmap(path, dtype="<u4", mode="r")
    for shard in manifest[part]:
        yield lengths[start : start + shard["documents"]]
        start += shard["documents"]


# ---- whether they are enough --------------------------------------------------------------------


def check(needs: Needs, supply: Supply, source: str) -> None:
    """Raise ValueError, in one line that names the keys to change, unless there are enough to train and to validate."""
    run = supply.run
    if supply.train is not None and supply.train < run.tokens:
        raise ValueError(_too_few(needs, supply, source))
    if supply.val is not None and supply.val < needs.val_tokens:
        more = "raise data.text.val_fraction or add text" if source == "text" else "add shards to data.shards.val"
        cut = "" if needs.val_slabs else f", {_cut(needs)}"
        raise ValueError(
            f"validation.tokens: {needs.val_tokens:,} are needed, but the held-out documents{cut}, give "
            f"{supply.at_most}{supply.val:,}; lower it, or {more}"
        )


def _too_few(needs: Needs, supply: Supply, source: str) -> str:
    run = supply.run
    passes = f"{needs.max_epochs} pass{'es' if needs.max_epochs > 1 else ''}"
    enough = math.ceil(run.tokens * needs.max_epochs / supply.train) if supply.train else None
    raised = f"raise data.max_epochs{f' (to {enough} or more)' if enough else ''}"
    more = (
        "add text" if source == "text" else "add shards (./run fetch_shards gets data.shards.hub.train_shards of them)"
    )
    if source == "text" and supply.whole is not None and 2 * supply.train < supply.whole:
        more += ", or lower data.text.max_doc_chars, which splits long documents"
    return (
        f"data.max_epochs: {run.what} needs {run.tokens:,} training tokens, but {passes} over the documents, "
        f"{_cut(needs)}, give {supply.at_most}{supply.train:,}; {more}; {raised}; or lower {run.key}"
    )


def _cut(needs: Needs) -> str:
    return f"cut to train.max_doc_tokens ({needs.max_doc_tokens:,}) and packed"


def describe(needs: Needs, supply: Supply) -> str:
    """The line that `python -m kdclimb plan` prints."""

    def there(number: int | None) -> str:
        return "not known yet" if number is None else f"{supply.at_most}{number:,}"

    return (
        f"Tokens needed and there: {supply.run.what} {supply.run.tokens:,} of {there(supply.train)} in "
        f"{needs.max_epochs} pass{'es' if needs.max_epochs > 1 else ''} (data.max_epochs); "
        f"validation {needs.val_tokens:,} of {there(supply.val)}."
    )
