"""Text files as a stream of documents.

| kind | a document is |
| --- | --- |
| .txt, .txt.xz | what lies between lines of one form feed |
| .md | the file |
| .jsonl | the text field of a line |
| .parquet | the text column of a row |

Memory is bounded by the longest line of a .jsonl file, by a row group of a .parquet file, and by the length above which
documents are split.
"""

from __future__ import annotations

import codecs
import glob
import io
import json
import lzma
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from kdclimb.config import require
from kdclimb.waiting import open_watched, waiting

KINDS = (".txt", ".txt.xz", ".md", ".jsonl", ".parquet")
SEPARATOR = "\n\f\n"
BLOCK = 2**20  # bytes read at once
LONGEST_LINE = 2**28  # bytes of a line of JSON, which is read whole


# ---- which files --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Files:
    """The text files of a config in the order in which they are read, and what its folders hold of no such kind."""

    paths: tuple[Path, ...]
    ignored: tuple[Path, ...]


def kind(path: Path) -> str | None:
    """The one of KINDS that the file's name ends in, None if it ends otherwise."""
    return next((ending for ending in KINDS if path.name.lower().endswith(ending)), None)


def list_files(entries: Iterable[str], root: Path) -> Files:
    """What `data.text.files` names: files, globs, and folders with all below them, sorted, hidden names left out.

    Raises ConfigError for an entry that names nothing or nothing of KINDS, and for a file that is named twice.
    """
    seen, ignored = {}, []
    for i, entry in enumerate(entries):
        key = f"data.text.files[{i}]"
        with waiting(f"{key}: {entry}"):
            found, others = _find(key, entry, root / Path(entry).expanduser())
        for path in found:
            real = path.resolve()
            require(real not in seen, key, entry, f"each file once, and {path} is named before")
            seen[real] = path
        ignored += others
    return Files(tuple(seen.values()), tuple(ignored))


def _find(key: str, entry: str, path: Path) -> tuple[list[Path], list[Path]]:
    """(files of KINDS, other files) that one entry stands for."""
    if path.is_dir():
        below = sorted(_below(path))
        found = [file for file in below if kind(file)]
        others = [file for file in below if not kind(file)]
        if not found:
            kinds = ", ".join(sorted({file.suffix or file.name for file in others})[:5])
            held = f"only {kinds}" if others else "no file"
            require(False, key, entry, f"a folder with {_one_of(KINDS)} files below it; this one holds {held}")
        return found, others
    named = [path] if path.is_file() else sorted(Path(name) for name in glob.glob(str(path), recursive=True))
    named = [file for file in named if file.is_file()]
    require(
        bool(named),
        key,
        entry,
        "a file, a folder, or a glob that matches files; relative paths start from the project folder",
    )
    for file in named:
        require(kind(file) is not None, key, entry, f"{_one_of(KINDS)} files, and {file.name} is none")
    return named, []


def _below(folder: Path) -> Iterator[Path]:
    """All files below a folder, links followed, each folder once."""
    seen = set()
    for here, folders, names in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(here))
        folders[:] = [
            name for name in folders if name[0] != "." and os.path.realpath(os.path.join(here, name)) not in seen
        ]
        yield from (Path(here, name) for name in names if name[0] != ".")


def _one_of(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}"


# ---- their documents ----------------------------------------------------------------------------


def read_documents(path: Path, field: str, max_chars: int) -> Iterator[str]:
    """The documents of one file, stripped, empty ones left out, those above `max_chars` characters split.

    A split lies at the end of a paragraph, else of a line, else of a word in the second half of `max_chars`, else at
    `max_chars`. Raises ValueError that names the file and the byte, line or row at fault.
    """
    documents = {".jsonl": _jsonl, ".parquet": _parquet}.get(kind(path))
    texts = documents(path, field) if documents else _plain(path, max_chars)
    for text in texts:
        for piece in _split(text, max_chars):
            if piece := piece.strip():
                yield piece


def _split(text: str, limit: int) -> Iterator[str]:
    while len(text) > limit:
        head, text = _cut(text, limit)
        yield head
    yield text


def _cut(text: str, limit: int) -> tuple[str, str]:
    for mark in ("\n\n", "\n", " "):
        end = text.rfind(mark, limit // 2, limit)
        if end >= 0:
            return text[:end], text[end:]
    return text[:limit], text[limit:]


def _plain(path: Path, limit: int) -> Iterator[str]:
    """Documents of a .txt, .txt.xz or .md file. What is above `limit` may come in several pieces, where `_split` would
    have cut it.
    """
    separated = kind(path) != ".md"
    rest = ""
    for text in _decoded(path):
        rest += text
        if separated:
            *whole, rest = rest.split(SEPARATOR)
            yield from whole
        while len(rest) > limit + len(SEPARATOR):  # the last characters may be the start of a separator
            head, rest = _cut(rest, limit)
            yield head
    yield rest


def _decoded(path: Path) -> Iterator[str]:
    """The text of a file in blocks, with \\n for every line end, and without a byte order mark."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=True)
    offset, first = 0, True
    with open_watched(path) as raw, lzma.open(raw) if kind(path) == ".txt.xz" else raw as file:
        while True:
            block = _read_block(file, path)
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise _not_text(path, offset - pending + error.start, error) from error
            if b"\0" in block:
                raise ValueError(f"{path}: a zero byte at offset {offset + block.index(0)}; this is no UTF-8 text file")
            yield text.removeprefix("\ufeff") if first else text
            if not block:
                return
            offset, first = offset + len(block), False


def _read_block(file: BinaryIO, path: Path) -> bytes:
    try:
        return file.read(BLOCK)
    except (lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{path}: not a whole .xz file ({error})") from error


def _not_text(where, offset: int, error: UnicodeDecodeError) -> ValueError:
    return ValueError(
        f"{where}: not UTF-8 text (byte 0x{error.object[error.start]:02x} at offset {offset}); "
        "a binary file, or text in another encoding"
    )


def _jsonl(path: Path, field: str) -> Iterator[str]:
    offset, number = 0, 0
    with open_watched(path) as file:
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise ValueError(f"{path}:{number}: a line of more than {LONGEST_LINE:,} bytes; split it")
            text = _line_text(line, f"{path}:{number}", offset).strip()
            if text:
                yield _field(text, field, f"{path}:{number}")
            offset += len(line)


def _line_text(line: bytes, where: str, offset: int) -> str:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_text(where, offset + error.start, error) from error
    return text if offset else text.removeprefix("\ufeff")


def _field(line: str, field: str, where: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: a {type(value).__name__}, not an object with a field {field!r}")
    if field not in value:
        raise ValueError(f"{where}: no field {field!r} (data.text.field); there {_are(value)}")
    return _checked(value[field], f"{where}: field {field!r}")


def _are(names: Iterable[str]) -> str:
    names = [str(name) for name in names]
    if not names:
        return "is none"
    return f"{'is' if len(names) == 1 else 'are'} {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"


def _checked(text, what: str) -> str:
    """`text`, if it is text that UTF-8 can hold: JSON may write half of a surrogate pair."""
    if not isinstance(text, str):
        raise ValueError(f"{what} holds {'nothing' if text is None else 'a ' + type(text).__name__}, not text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} holds half of a surrogate pair at character {error.start}") from error
    return text


def _parquet(path: Path, field: str) -> Iterator[str]:
    import pyarrow.parquet

    row = 0
    try:
        with open_watched(path) as raw, pyarrow.parquet.ParquetFile(raw) as file:
            columns = file.schema_arrow.names
            if field not in columns:
                raise ValueError(f"{path}: no column {field!r} (data.text.field); there {_are(columns)}")
            for batch in file.iter_batches(batch_size=256, columns=[field]):
                for value in batch.column(0).to_pylist():
                    yield _checked(value, f"{path}: row {row}, column {field!r}")
                    row += 1
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: column {field!r} is not UTF-8 text, in or soon after row {row}") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a whole .parquet file ({' '.join(str(error).split())})") from error
