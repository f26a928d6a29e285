"""What data are made from, as far as a config and the files' names, sizes and hashes tell: before any job.

The Snakefile asks at every parse, so nothing is read twice: what a large file's sha256 is, is kept with its size and
times under results/data/.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import hashlib
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from kdclimb.artifacts import sha256, write_json
from kdclimb.config import canonical_json, require
from kdclimb.shards import count_tokens, document_lengths
from kdclimb.text import kind, list_files, read_documents
from kdclimb.waiting import waiting

PREPARED = ".prepared.json"  # in the data's folder: what was prepared, of what, and by which code
HASHES = "results/data/.sha256.json"
KEPT_FROM = 2**26  # bytes in all; less is hashed faster than it is worth remembering
ANNOUNCED_FROM = 2**30  # bytes to hash
SETTLED = 2.0  # seconds: a file that changed this recently may change again within one tick of its clock
PARTS = ("train", "val")


def shard_files(shards, root: Path) -> dict[str, list[Path]]:
    """{part: files that match its glob}, sorted. `shards`: the config's section, or its dict."""
    globs = shards if isinstance(shards, dict) else vars(shards)
    with waiting(f"data.shards: {globs['train']}, {globs['val']}"):
        found = {part: sorted(Path(name) for name in glob.glob(str(root / globs[part]))) for part in PARTS}
    for part, paths in found.items():
        folder = any(path.is_dir() for path in paths)
        require(not folder, f"data.shards.{part}", globs[part], "a glob that matches files alone, such as shards/*.bin")
    return found


def data_spec(data, root: Path) -> dict:
    """What decides the prepared data: the used half of the config's section `data`, and a sha256 over its files.

    `fingerprint` is over names and contents; shards that are missing yet are no error here.
    """
    spec = {"source": data.source, "vocab_size": data.vocab_size}
    if data.source == "text":
        spec |= dataclasses.asdict(data.text) | {"tokenizer": _tokenizer_spec(data.tokenizer)}
    else:
        spec |= {part: getattr(data.shards, part) for part in PARTS} | {"bos_id": data.shards.bos_id}
    spec["fingerprint"] = fingerprint(source_files(spec, root), root)
    return json.loads(canonical_json(spec))


def _tokenizer_spec(tokenizer) -> dict:
    unused = {"bpe": "ranks", "gpt2": "train_bytes"}[tokenizer.kind]
    return {key: value for key, value in dataclasses.asdict(tokenizer).items() if key != unused}


def source_files(spec: dict, root: Path) -> list[Path]:
    """All files that a spec's data are made from, less GPT-2's ranks, of which only one content is taken."""
    if spec["source"] == "text":
        return list(list_files(spec["files"], root).paths)
    return [path for part in shard_files(spec, root).values() for path in part]


def most_tokens(spec: dict, root: Path) -> dict[str, int | None]:
    """{part: the most tokens that it can have}, without reading the files; None where their size doesn't say.

    Shards: the tokens in their headers, or None where none is there. Text: a token has a byte or more, and to each
    document its end-of-text token comes, for which a separator or the JSON around it stands; compressed files don't
    say. Raises ValueError for a file with a wrong header.
    """
    if spec["source"] == "shards":
        files = shard_files(spec, root)
        return {part: sum(map(count_tokens, paths)) if paths else None for part, paths in files.items()}
    paths = list_files(spec["files"], root).paths
    if any(kind(path) in (".txt.xz", ".parquet") for path in paths):
        return dict.fromkeys(PARTS)
    return dict.fromkeys(PARTS, sum(path.stat().st_size + 1 for path in paths))


def check_small(spec: dict, root: Path) -> None:
    """Read the files through, unless they are large. Raises the ValueError that `kdclimb.prepare` would raise."""
    paths = source_files(spec, root)
    if sum(path.stat().st_size for path in paths) >= KEPT_FROM:
        return
    for path in paths:
        if spec["source"] == "shards":
            document_lengths(path, spec["bos_id"], spec["vocab_size"])
        else:
            for _ in read_documents(path, spec["field"], spec["max_doc_chars"]):
                pass


# ---- hashes -------------------------------------------------------------------------------------


def fingerprint(paths: Iterable[Path], root: Path) -> str:
    """sha256 over the names (from `root`, where they lie below it) and the sha256 of all these files."""
    paths = list(paths)
    hashes = _hashes(paths, root / HASHES)
    names = (path.relative_to(root) if path.is_relative_to(root) else path for path in paths)
    lines = "".join(f"{found}  {name}\n" for found, name in zip(hashes, names))
    return hashlib.sha256(lines.encode(errors="surrogateescape")).hexdigest()


def _hashes(paths: list[Path], store: Path) -> list[str]:
    """The sha256 of each file: from the store for those whose size and times are as they were, else read anew."""
    states = {path: _state(path) for path in paths}
    if sum(state[0] for state in states.values()) < KEPT_FROM:
        return [sha256(path) for path in paths]
    known = _known(store)
    changed = [path for path in states if known.get(_name(path), [None])[:-1] != states[path]]
    for path in _watched(changed, states):
        known[_name(path)] = [*states[path], sha256(path)]
    found = [known[_name(path)][-1] for path in paths]
    if changed:
        newest = time.time_ns() - SETTLED * 1e9
        settled = {name: entry for name, entry in known.items() if max(entry[1:3]) < newest}
        with contextlib.suppress(OSError):  # kept for speed alone: a folder that can't be written to is no error here
            write_json(store, settled)
    return found


def _name(path: Path) -> str:
    return str(path.absolute())


def _state(path: Path) -> list[int]:
    """Size and times, in ns. The second time is the inode's, which no copy or touch sets back."""
    with waiting(path):
        found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _known(store: Path) -> dict[str, list]:
    try:
        return json.loads(store.read_text())
    except (OSError, ValueError):  # none yet
        return {}


def _watched(paths: list[Path], states: dict[Path, list[int]]) -> Iterable[Path]:
    """`paths`, with a bar or a line for who waits on them."""
    total = sum(states[path][0] for path in paths)
    terminal = sys.stderr.isatty()
    if total < ANNOUNCED_FROM:
        yield from paths
        return
    if not terminal:
        print(f"kdclimb: hashing {total / 1e9:.1f} GB of data, once", file=sys.stderr, flush=True)
    with tqdm(total=total, desc="hashing data, once", unit="B", unit_scale=True, disable=not terminal) as bar:
        for path in paths:
            yield path
            bar.update(states[path][0])
