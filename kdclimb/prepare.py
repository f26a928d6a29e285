"""The data rule: text or ready shards to checked token shards and manifest.json, at bounded memory.

The documents' order is random.Random(seed).shuffle's, whatever their number. They are counted, then scattered over
bucket files by their place in that order, then read back bucket by bucket; nothing holds them all, and the order costs
8 bytes a document. On the disk it takes the size of the text once more, until the shards are written.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import struct
import sys
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from tqdm import tqdm

from kdclimb.artifacts import Damaged, drop_unfinished, needs_room, read_sealed, seal, sha256, write_json, write_via
from kdclimb.config import short_hash
from kdclimb.shards import count_tokens, document_lengths, write_shards
from kdclimb.sources import PARTS, PREPARED, fingerprint, shard_files, source_files
from kdclimb.supply import LENGTHS, write_lengths
from kdclimb.text import list_files, read_documents
from kdclimb.tokenizer import GPT2, TrainedBPE

BUCKET_BYTES = 2**27
MOST_BUCKETS = 500  # files open at once
BATCH_CHARS = 2**21  # characters tokenized in one call
RECORD = struct.Struct("<II")  # of a bucket file: a document's place in the order, and its bytes, which follow
LINE_SECONDS = 30.0  # between two lines of progress where there is no terminal


def prepare(spec: dict, out: Path, root: Path, code: str = "") -> dict:
    """Make `out`/manifest.json, and for text the tokenizer and the shards, from a data spec; returns the manifest.

    `spec` is `kdclimb.sources.data_spec`'s; paths in it start from `root`. What an earlier call made from the same spec
    with the same `code` is taken as it is: Snakemake deletes the manifest of a job whose end it didn't see. Raises
    ValueError that names the file or key at fault.
    """
    out.mkdir(parents=True, exist_ok=True)
    made_by = {"spec": spec, "code": code}
    manifest = _prepared(out, made_by)
    if manifest is None:
        manifest = _make(spec, out, root)
        write_json(out / PREPARED, seal(made_by | {"manifest": manifest}))
    write_json(out / "manifest.json", seal(manifest))
    return manifest


def _prepared(out: Path, made_by: dict) -> dict | None:
    """The manifest of an earlier call, None unless it was made by the same and its files are whole."""
    file = out / PREPARED
    try:
        found = read_sealed(file, "made again") if file.is_file() else {}
        if {key: found.get(key) for key in made_by} != made_by:
            return None
        shards = [shard for part in PARTS for shard in found["manifest"][part]]
        whole = all(sha256(out / s["file"]) == s["sha256"] for s in shards)
    except (Damaged, OSError):
        return None
    return found["manifest"] if whole and all((out / LENGTHS.format(part)).is_file() for part in PARTS) else None


def _make(spec: dict, out: Path, root: Path) -> dict:
    for old in (*out.glob("*.bin"), *out.glob(LENGTHS.format("*")), out / PREPARED):
        old.unlink(missing_ok=True)
    drop_unfinished(out)
    if fingerprint(source_files(spec, root), root) != spec["fingerprint"]:
        raise ValueError(f"data.{spec['source']}: its files are not those that this started with; start it again")
    parts = _prepare_text(spec, out, root) if spec["source"] == "text" else _list_shards(spec, out, root)
    hashes = [shard["sha256"] for part in PARTS for shard in parts[part]]
    lengths = {part: sha256(out / LENGTHS.format(part)) for part in PARTS}
    facts = {"vocab_size": spec["vocab_size"], "lengths_sha256": lengths, "data_hash": short_hash("".join(hashes))}
    return {"spec": spec, **parts, **facts}


# ---- text ---------------------------------------------------------------------------------------


def _prepare_text(spec: dict, out: Path, root: Path) -> dict:
    files = list_files(spec["files"], root)
    if files.ignored:
        print(f"data: left out {len(files.ignored):,} files of other kinds, such as {files.ignored[0]}")
    temporary = out / ".shuffle"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        documents = Shuffled(lambda: _read(files.paths, spec), spec["seed"], temporary)
        return _tokenize(documents, spec, out, root)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _read(paths: Iterable[Path], spec: dict) -> Iterator[str]:
    for path in paths:
        yield from read_documents(path, spec["field"], spec["max_doc_chars"])


def _tokenize(documents: Shuffled, spec: dict, out: Path, root: Path) -> dict:
    num_val = max(1, round(documents.count * spec["val_fraction"]))
    if num_val >= documents.count:
        raise ValueError(
            f"data.text.files: {documents.count} documents are too few to hold some out (data.text.val_fraction)"
        )
    tokenizer = _tokenizer(itertools.islice(documents, num_val, None), spec, out, root)
    tokens = _encoded(progress("tokenizing", documents, documents.bytes), tokenizer)
    parts = {}
    for part, number in (("val", num_val), ("train", None)):
        paths = write_shards(out, part, itertools.islice(tokens, number))
        parts[part] = _describe(part, paths, tokenizer.bos, spec["vocab_size"], out, root)
    return {"bos_id": tokenizer.bos, "tokenizer_sha256": sha256(tokenizer.path), **parts}


def _tokenizer(documents: Iterator[str], spec: dict, out: Path, root: Path) -> TrainedBPE | GPT2:
    asked = spec["tokenizer"]
    if asked["kind"] == "gpt2":
        ranks = None if asked["ranks"] is None else root / Path(asked["ranks"]).expanduser()
        return GPT2(ranks, out / "gpt2.tiktoken")
    sample = progress("reading for the BPE", _up_to(documents, asked["train_bytes"]), asked["train_bytes"])
    return TrainedBPE(sample, spec["vocab_size"], out / "tokenizer.json")


def _up_to(documents: Iterator[str], most: int) -> Iterator[str]:
    taken = 0
    for document in documents:
        yield document
        taken += _bytes(document)
        if taken >= most:
            return


def _encoded(documents: Iterator[str], tokenizer: TrainedBPE | GPT2) -> Iterator[np.ndarray]:
    for batch in _batches(documents):
        for ids in tokenizer.encode(batch):
            yield np.asarray([tokenizer.bos, *ids], dtype=np.uint16)


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch, chars = [], 0
    for document in documents:
        batch.append(document)
        chars += len(document)
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


class Shuffled:
    """Documents in the order of random.Random(seed).shuffle, to be read as often as asked for.

    `read()` gives them in their own order, the same each time; it is called twice. Bucket files lie in `folder`.
    """

    def __init__(self, read: Callable[[], Iterator[str]], seed: int, folder: Path):
        self.count, self.bytes = 0, 0
        for document in progress("reading", read()):
            self.count += 1
            self.bytes += _bytes(document)
        if not self.count:
            raise ValueError("data.text.files: no documents in them")
        number = min(MOST_BUCKETS, 1 + self.bytes // BUCKET_BYTES)
        self.buckets = [folder / f"{i:03d}" for i in range(number)]
        self._scatter(progress("shuffling", read(), self.bytes), _places(self.count, seed))

    def _scatter(self, documents: Iterator[str], places: np.ndarray) -> None:
        with needs_room(self.buckets[0].parent), ExitStack() as opened:
            files = [opened.enter_context(path.open("wb")) for path in self.buckets]
            for document, place in zip(documents, map(int, places), strict=True):
                text = document.encode()
                files[place * len(files) // self.count].write(RECORD.pack(place, len(text)) + text)

    def __iter__(self) -> Iterator[str]:
        for path in self.buckets:
            data, found, start = path.read_bytes(), [], 0
            while start < len(data):
                place, length = RECORD.unpack_from(data, start)
                found.append((place, start + RECORD.size, length))
                start += RECORD.size + length
            for _, begin, length in sorted(found):
                yield data[begin : begin + length].decode()


def _places(count: int, seed: int) -> np.ndarray:
    """(count,) uint32: where the shuffle puts each document."""
    order = array("I", range(count))
    random.Random(seed).shuffle(order)
    places = np.empty(count, dtype=np.uint32)
    places[np.frombuffer(order, dtype=np.uint32)] = np.arange(count, dtype=np.uint32)
    return places


# ---- shards -------------------------------------------------------------------------------------


def _list_shards(spec: dict, out: Path, root: Path) -> dict:
    files = shard_files(spec, root)
    for part, paths in files.items():
        if not paths:
            raise ValueError(
                f"data.shards.{part}: no file matches {spec[part]!r} under {root}; ./run fetch_shards, with the same "
                "--configfile after it, downloads them (data.shards.hub), or put token shards in the speedrun's .bin "
                "format there"
            )
    bos, vocab_size = spec["bos_id"], spec["vocab_size"]
    parts = {part: _describe(part, paths, bos, vocab_size, out, root) for part, paths in files.items()}
    return {"bos_id": spec["bos_id"], "tokenizer_sha256": None, **parts}


def _describe(part: str, paths: list[Path], bos: int, vocab_size: int, out: Path, root: Path) -> list[dict]:
    """The manifest's entries of these shards, each read whole and checked; and `out`/`part`.lengths."""
    described, lengths = [], []
    total = sum(path.stat().st_size for path in paths)
    for path in progress(f"checking {part} shards", paths, total, lambda path: path.stat().st_size):
        lengths.append(document_lengths(path, bos, vocab_size))
        facts = {"sha256": sha256(path), "tokens": count_tokens(path), "documents": len(lengths[-1])}
        described.append({"file": _from(out, path, root), **facts})
    write_via(out / LENGTHS.format(part), lambda temporary: write_lengths(temporary, lengths))
    return described


def _from(out: Path, path: Path, root: Path) -> str:
    """How the manifest in `out` names a shard: from there, if both lie in the project, which then can be moved whole.

    Where results/ is a link to elsewhere, no such path leads back to the project.
    """
    if path.parent == out:
        return path.name
    is_linked = out.resolve() != root.resolve() / os.path.relpath(out, root)
    return str(path) if is_linked or not path.is_relative_to(root) else os.path.relpath(path, out)


# ---- progress -----------------------------------------------------------------------------------


def _bytes(document: str) -> int:
    return len(document.encode())


def progress(what: str, items: Iterable, total: int | None = None, size: Callable = _bytes) -> Iterator:
    """`items`, and for who waits on them a bar in bytes, or a line now and then where there is no terminal."""
    terminal, done, said = sys.stderr.isatty(), 0, time.monotonic()
    with tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=not terminal, leave=False) as bar:
        for item in items:
            yield item
            done += size(item)
            bar.update(size(item))
            if not terminal and time.monotonic() - said > LINE_SECONDS:
                said = time.monotonic()
                share = f", {min(1.0, done / total):.0%}" if total else ""
                print(f"data: {what}: {done / 1e6:,.0f} MB{share}", file=sys.stderr, flush=True)
