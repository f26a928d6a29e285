"""Token shards in the speedrun's .bin format, checked on every way in.

256 little-endian int32 (20240520, 1, token count), then uint16 tokens. Every document starts with its end-of-text id.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from kdclimb.artifacts import read_sealed, write_via
from kdclimb.waiting import open_watched, waiting

MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256
HEADER_BYTES = 4 * HEADER_INTS
SHARD_TOKENS = 100_000_000  # most tokens of a shard that is written; FineWeb's have as many
BLOCK = 2**24  # tokens looked at in one go


def count_tokens(path: Path) -> int:
    """The tokens of a shard, from its header. Raises ValueError unless magic, version and length are right."""
    with waiting(path):
        if not path.is_file():
            raise ValueError(f"{path}: this token shard is missing")
        with path.open("rb") as file:
            header = file.read(HEADER_BYTES)
    magic, version, tokens = struct.unpack_from("<3i", header.ljust(12, b"\0"))
    if len(header) < HEADER_BYTES or magic != MAGIC or version != VERSION:
        raise ValueError(f"{path}: not a token shard (its header must start with {MAGIC}, {VERSION})")
    size, expected = path.stat().st_size, HEADER_BYTES + 2 * tokens
    if size != expected:
        raise ValueError(f"{path}: {size} bytes, but its header promises {expected}; it is cut or damaged")
    return tokens


def read_manifest(path: Path) -> dict:
    """manifest.json of prepared data. Raises Damaged unless it is as it was written."""
    return read_sealed(path, f"delete it and make it again: ./run {path}")


def read_shard(path: Path) -> np.ndarray:
    """(tokens,) uint16, memory-mapped. Raises ValueError unless magic, version and length are right."""
    if not count_tokens(path):
        return np.zeros(0, dtype="<u2")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES)


def document_lengths(path: Path, bos: int, vocab_size: int) -> np.ndarray:
    """(documents,) uint32, the tokens of each document that starts in the shard.

    Reads the whole shard, in blocks. Raises ValueError for an id that is not below `vocab_size`, and for a shard in
    which no document starts.
    """
    tokens, starts = count_tokens(path), [np.zeros(0, dtype=np.int64)]
    with open_watched(path) as file:
        file.seek(HEADER_BYTES)
        for begin in range(0, tokens, BLOCK):
            block = np.frombuffer(file.read(2 * BLOCK), dtype="<u2")
            if (largest := int(block.max())) >= vocab_size:
                raise ValueError(f"{path}: holds token id {largest}; data.vocab_size is {vocab_size}")
            starts.append(begin + np.flatnonzero(block == bos))
    starts = np.concatenate(starts)
    if not len(starts):
        raise ValueError(f"{path}: no document starts in it (token id {bos})")
    return np.diff(starts, append=tokens).astype(np.uint32)


def document_order(count: int, seed: int | None, epoch: int, shard: int) -> np.ndarray:
    """(count,) the order in which the documents of a shard are read in an epoch; None: as they lie."""
    order = np.arange(count)
    if seed is not None:
        np.random.default_rng((seed, epoch, shard)).shuffle(order)
    return order


def write_shard(path: Path, tokens: np.ndarray) -> None:
    write_via(path, lambda temporary: temporary.write_bytes(_header(len(tokens)) + tokens.astype("<u2").tobytes()))


def write_shards(folder: Path, part: str, documents: Iterable[np.ndarray], most: int = SHARD_TOKENS) -> list[Path]:
    """Write whole documents to `folder`/`part`_000000.bin and so on, at most `most` tokens each; the paths.

    A longer document has a shard to itself.
    """
    documents, paths = iter(documents), []
    waiting = next(documents, None)

    def fill(temporary: Path) -> None:
        nonlocal waiting
        count = 0
        with temporary.open("wb") as file:
            file.write(_header(0))
            while waiting is not None and (count == 0 or count + len(waiting) <= most):
                file.write(waiting.astype("<u2").tobytes())
                count += len(waiting)
                waiting = next(documents, None)
            file.seek(0)
            file.write(_header(count))

    while waiting is not None:
        paths.append(folder / f"{part}_{len(paths):06d}.bin")
        write_via(paths[-1], fill)
    return paths


def _header(tokens: int) -> bytes:
    return struct.pack("<3i", MAGIC, VERSION, tokens).ljust(HEADER_BYTES, b"\0")
