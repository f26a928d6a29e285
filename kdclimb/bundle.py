"""Finished small artifacts in one file, moved from one machine to another.

A bundle is a .zip or a .tar.gz of index.json and files, named by their paths under results/: the campaign's finished
runs (without weights, unless asked), its own files, and the manifest of its data (never the tokens, nor the teachers'
targets). An export refuses runs that are not as they were written: where they were made is often gone when a bundle is
read. An import checks everything before it writes anything, and refuses as a whole.

Snakemake has no record of what comes so, and goes by its age: runs keep their order in time, and count as done. The
campaign's files are made older than the runs, so that the next ./run makes them anew from these: without a record it
would not see that a changed config asks for other ones.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import json
import os
import re
import stat
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from kdclimb.analysis import selection
from kdclimb.analysis.tables import remedy
from kdclimb.artifacts import (
    ABSENT,
    LOG,
    MADE_AT_THE_END,
    Damaged,
    RunFolder,
    read_sealed,
    sha256,
    stand_in,
    write_text,
    write_via,
)
from kdclimb.campaign import read_decisions, results_data_id
from kdclimb.config import NGRAM_PREFIX, ConfigError, build
from kdclimb.expansion import expand, tables
from kdclimb.imported import PREFIX, read_config
from kdclimb.mirror import campaign_files, run_files
from kdclimb.provenance import git_commit, source_hash
from kdclimb.sections import Campaign

INDEX, FORMAT = "index.json", 1
WEIGHTS, MARK = (Path(name).name for name in (selection.WEIGHTS[0], selection.ELSEWHERE))
KINDS = {".zip": b"PK", ".tar.gz": b"\x1f\x8b"}  # how the names end, and how the files start
NAME = re.compile(r"[^./\\:\x00-\x1f][^/\\:\x00-\x1f]*")  # of a file or folder: not hidden, not .., nothing absolute
DAMAGE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    gzip.BadGzipFile,
    zlib.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
)
CHUNK = 1 << 20  # bytes


class BundleError(ValueError):
    """A bundle that can't be made or taken. The message names the file at fault."""


@dataclass(frozen=True)
class Entry:
    path: str  # from results/
    size: int  # bytes
    sha256: str
    mtime_ns: int


@dataclass(frozen=True)
class Index:
    format: int
    campaign: str
    kdclimb_commit: str
    files: tuple[Entry, ...]


# ---- export -------------------------------------------------------------------------------------


def export(campaign: Campaign, root: Path, results: Path, out: Path, weights: bool) -> str:
    """Write the bundle of a campaign to `out`; returns what to tell the user.

    Raises BundleError, and writes nothing, if a run is not whole and as it was written, or an import would refuse it.
    """
    kind = next((ending for ending in KINDS if out.name.endswith(ending)), None)
    if kind is None:
        raise BundleError(f"{out}: not a name for a bundle; allowed: one that ends in {' or '.join(KINDS)}")
    named, finished = _runs(campaign, root, results)
    if not finished:
        raise BundleError(f"{results}/runs: no finished run of campaign {campaign.campaign} to export")
    manifest = results / "data" / results_data_id(campaign, root, results) / "manifest.json"
    if not manifest.is_file():
        raise BundleError(f"{manifest}: missing; make it: ./run {manifest}")
    files, left = [manifest], {}
    for folder in (results / "runs" / run_id for run_id in finished):
        whole = weights and not (folder / "checkpoints" / MARK).is_file()
        left[folder] = {MARK} if whole else {MARK, WEIGHTS}
        files += [file for file in run_files(folder) if file.name not in left[folder]]
    files += campaign_files(results / campaign.campaign)
    entries = tuple(_entry(file, results) for file in _bar(files, "reading"))
    found = {entry.path: entry.sha256 for entry in entries}
    for folder in left:
        _check_run(folder, found, left[folder])
    index = Index(FORMAT, campaign.campaign, git_commit(), entries)

    def write(temporary: Path) -> None:
        _pack(temporary, kind, index, results)
        with _Archive(temporary) as archive:
            archive.file = out  # the name that its errors say
            _check_contents(archive, _check(archive))  # as an import does; and a file may have changed in between

    write_via(out, write)
    return (
        f"{out}: {len(finished)} finished runs of the {named} that campaign {campaign.campaign} names so far, "
        f"{'with' if weights else 'without'} weights; {len(entries)} files, {out.stat().st_size / 1e6:.1f} MB"
    )


def _runs(campaign: Campaign, root: Path, results: Path) -> tuple[int, list[str]]:
    """How many runs the decisions so far name, and those that are finished."""
    folder = results / campaign.campaign
    try:
        decisions = read_decisions(folder)
    except ValueError as error:
        raise BundleError(f"{folder}: a decision can't be read: {error}") from error
    data = results_data_id(campaign, root, results)
    runs = expand(campaign, decisions, data) + tables(campaign, data)
    imported = [*campaign.teacher.imported, *campaign.baseline.imports]
    run_ids = list(dict.fromkeys([*(run.run_id for run in runs), *imported]))
    return len(run_ids), [name for name in run_ids if (results / "runs" / name / "status.json").is_file()]


def _check_run(folder: Path, found: dict[str, str], left: set[str]) -> None:
    """Raise BundleError unless all that a run owes, but for files named in `left`, was `found` ({path from results/:
    sha256}) as the run wrote it.
    """
    try:
        files = read_sealed(folder / "status.json", remedy(folder), or_plain=True).get("files", {})
    except Damaged as error:
        raise BundleError(str(error)) from error
    for name in dict.fromkeys([*MADE_AT_THE_END, *files]):
        there = found.get(f"runs/{folder.name}/{name}")
        if Path(name).name in left:
            continue
        if there is None:
            raise BundleError(f"{folder / name}: missing; {remedy(folder)}")
        if there != files.get(name, there):
            raise BundleError(f"{folder / name}: damaged: not as it was written; {remedy(folder)}")


def _entry(file: Path, results: Path) -> Entry:
    found = file.stat()
    return Entry(file.relative_to(results).as_posix(), found.st_size, sha256(file), found.st_mtime_ns)


def _pack(path: Path, kind: str, index: Index, results: Path) -> None:
    text = (json.dumps(dataclasses.asdict(index), indent=1, sort_keys=True) + "\n").encode()
    if kind == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as archive:
            archive.writestr(INDEX, text)
            for entry in _bar(index.files, "packing"):
                archive.write(results / entry.path, entry.path)
        return
    with tarfile.open(path, "w:gz") as archive:
        _add(archive, INDEX, len(text), io.BytesIO(text))
        for entry in _bar(index.files, "packing"):
            with (results / entry.path).open("rb") as stream:
                _add(archive, entry.path, entry.size, stream)


def _add(archive: tarfile.TarFile, name: str, size: int, stream: BinaryIO) -> None:
    member = tarfile.TarInfo(name)  # no owner, no mode of this machine's
    member.size = size
    archive.addfile(member, stream)


# ---- import -------------------------------------------------------------------------------------


def import_(file: Path, results: Path, any_code: bool, keep: bool = False) -> str:
    """Take a bundle into `results`; returns what to tell the user.

    With `keep`, a run or a campaign's file that is here with another content stays, and the bundle's is left out.
    Raises BundleError, before anything is written, if a file is not as the index says or not where a result may lie, if
    a run is not the one that its folder's name stands for, if another result is in the way, or, without `any_code`, if
    it comes of other code than this checkout's.
    """
    with _Archive(file) as archive:
        index = _check(archive)
        runs, manifest = _check_contents(archive, index)
        if not any_code:
            _check_code(file, index, runs)
        missing, kept = _compared(index, results, manifest)
        if kept and not keep:
            raise BundleError(f"{next(iter(kept.values()))}, or let it stay with --keep")
        todo = [entry for entry in missing if _unit(entry) not in kept]
        times = _times(index)
        for entry in _bar(sorted(todo, key=partial(_rank, index)), "writing"):
            _write(archive, entry, results, times[entry.path])
    for run_id in runs:  # those with nothing new too: an import that was interrupted may have left them so
        if f"runs/{run_id}" not in kept:
            _settle(results / "runs" / run_id)
            if not run_id.startswith(PREFIX):  # which no rule makes, so that none deletes it
                _keep(index, results / "runs" / run_id)
    _stand_in(results, runs)
    for unit in (unit for unit in kept if unit.startswith("runs/")):
        _make_as_old(results / unit, times[f"{unit}/status.json"])
    for path in (entry.path for entry in index.files if entry.path.startswith("data/")):
        _date_back(results / path, times[path])
    return _told(index, results, runs, len(todo), kept)


def _times(index: Index) -> dict[str, int]:
    """{path: its mtime in ns}: as it was, but not in the future, and the campaign's files older than the runs.

    Not its lists of runs that shared a job: a list that is older than what its runs were made from is made again, by
    training.
    """
    late = max(0, *(entry.mtime_ns - time.time_ns() for entry in index.files))  # if that machine's clock is ahead
    times = {entry.path: entry.mtime_ns - late for entry in index.files}
    before = min(times.values()) - 10**9
    made_of_runs = {path for path in times if path.split("/")[0] == index.campaign and path.split("/")[1] != "batches"}
    return {path: before if path in made_of_runs else mtime for path, mtime in times.items()}


def _rank(index: Index, entry: Entry) -> int:
    """Data, runs, the campaign; stable, so that a run's status.json stays the last of its files."""
    return ("data", "runs", index.campaign).index(entry.path.split("/")[0])


def _write(archive: _Archive, entry: Entry, results: Path, mtime_ns: int) -> None:
    def write(temporary: Path) -> None:
        with temporary.open("wb") as stream:
            archive.copy(entry, stream.write)
        os.utime(temporary, ns=(mtime_ns, mtime_ns))

    write_via(results / entry.path, write)


def _settle(folder: Path) -> None:
    """checkpoints/, which every run owes: whether its weights are elsewhere, and as old as the run.

    Snakemake goes by the mtime of the folder. Without the mark the analysis would take the weights for lost.
    """
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    if (checkpoints / "model.json").is_file() and not (checkpoints / WEIGHTS).is_file():
        write_text(checkpoints / MARK, "bundle import brought this run without its weights\n")
    else:
        (checkpoints / MARK).unlink(missing_ok=True)
    mtime_ns = (folder / "status.json").stat().st_mtime_ns
    os.utime(checkpoints, ns=(mtime_ns, mtime_ns))


def _keep(index: Index, folder: Path) -> None:
    """What brings the run back when Snakemake deletes it, as for whatever it takes to be outdated."""
    top = f"runs/{folder.name}/"
    found = {entry.path.removeprefix(top): entry.sha256 for entry in index.files if entry.path.startswith(top)}
    RunFolder(folder).keep_imported({name: digest for name, digest in found.items() if name != LOG})


def _stand_in(results: Path, runs: Iterable[str]) -> None:
    """A folder for each cache of targets that isn't here: finished runs read it, so no job may make it again.

    As old as the first of these runs. A training from it refuses it by name.
    """
    readers: dict[str, list[int]] = {}
    for run_id in runs:
        config = results / "runs" / run_id / "config.json"
        if (cache := _cache_of(json.loads(config.read_text()))) is not None:
            readers.setdefault(cache, []).append(config.stat().st_mtime_ns)
    for cache, times in readers.items():
        folder = results / "caches" / cache
        if not folder.is_dir():
            stand_in(folder)
            os.utime(folder, ns=(min(times), min(times)))


def _cache_of(config: dict) -> str | None:
    """The cache of a teacher's targets that a run reads, by its config.json."""
    return (config.get("kd") or {}).get("cache")


def _make_as_old(folder: Path, mtime_ns: int) -> None:
    """A run that stays in place of the bundle's becomes as old as that, if it is younger: others were made from it."""
    late = (folder / "status.json").stat().st_mtime_ns - mtime_ns
    if late > 0:
        for path in {path.stat().st_ino: path for path in (*folder.rglob("*"), folder)}.values():  # some are links
            times = path.stat()
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns - late))


def _date_back(manifest: Path, mtime_ns: int) -> None:
    """Data prepared here is the same as the runs had, but newer than they are; Snakemake would make them again."""
    mtime_ns = min(mtime_ns, manifest.stat().st_mtime_ns)
    os.utime(manifest, ns=(mtime_ns, mtime_ns))


def _told(index: Index, results: Path, runs: dict[str, dict], written: int, kept: dict[str, str]) -> str:
    lines = [
        f"imported: {len(runs)} runs and campaign {index.campaign}; {written} of {len(index.files)} files were new"
    ]
    if kept:
        lines.append(f"here with another content, which stays: {', '.join(kept)}")
    bare = [name for name in runs if (results / f"runs/{name}/checkpoints" / MARK).is_file()]
    if bare:
        lines.append(f"{len(bare)} of the runs have no weights here: they count in every table, but can't teach")
    if gone := len(list(results.glob(f"caches/*/{ABSENT}"))):
        lines.append(f"caches of teachers' targets not here: {gone}; to train from one, delete its folder first")
    for manifest in (results / entry.path for entry in index.files if entry.path.startswith("data/")):
        if not _has_tokens(manifest):
            lines.append("no tokens are here; before a training make them, as old as the data of these runs (CONFIG:")
            lines.append("this campaign's files, none for config/config.yaml alone):")
            made = f"./run --force {manifest} --configfile CONFIG"
            lines.append(f"  {made} && touch -d @{int(manifest.stat().st_mtime)} {manifest}")
    return "\n".join(lines)


def _has_tokens(manifest: Path) -> bool:
    """Whether anything lies where the manifest says that its first shard does."""
    try:
        return (manifest.parent / json.loads(manifest.read_text())["train"][0]["file"]).is_file()
    except (TypeError, LookupError):
        return False


# ---- what is refused ----------------------------------------------------------------------------


def _check(archive: _Archive) -> Index:
    """The index, once every file is one that it names, at a place for results, of its size and sha256."""
    index = archive.index()
    names = [entry.path for entry in index.files]
    for name in names:
        if not _may_lie(name, index.campaign):
            raise BundleError(f"{archive.file}: {name!r}: not a path of a result")
    if len(set(names)) < len(names):
        raise BundleError(f"{archive.file}: {INDEX}: names a file twice")
    odd = sorted(archive.names() ^ {INDEX, *names})
    if odd:
        raise BundleError(f"{archive.file}: {odd[0]}: either in the bundle or in its index, but not in both")
    for entry in _bar(index.files, "verifying"):
        archive.copy(entry, lambda _: None)
    return index


def _may_lie(path: str, campaign: str) -> bool:
    parts = path.split("/")
    if not all(NAME.fullmatch(part) for part in parts):
        return False
    if parts[0] == "runs":
        return len(parts) == 3 or (len(parts) == 4 and parts[2] == "checkpoints")
    if parts[0] == "data":
        return len(parts) == 3 and parts[2] == "manifest.json"
    return parts[0] == campaign and len(parts) > 1


def _check_contents(archive: _Archive, index: Index) -> tuple[dict[str, dict], dict]:
    """({run id: its status.json}, the data's manifest), once each run is whole and the one that its name stands for."""
    entries = {entry.path: entry for entry in index.files}
    runs, manifest = {}, {}
    for path in entries:
        if path.startswith("data/"):
            manifest = archive.json(entries[path], "data_hash")
    for run_id in {path.split("/")[1]: None for path in entries if path.startswith("runs/")}:
        folder = f"runs/{run_id}"
        missing = [name for name in MADE_AT_THE_END if f"{folder}/{name}" not in entries]
        if missing:
            raise BundleError(f"{archive.file}: {folder}/{missing[0]}: missing")
        config = archive.json(entries[f"{folder}/config.json"])
        try:
            found = read_config(config).run_id
        except ConfigError as error:
            raise BundleError(f"{archive.file}: {folder}/config.json: {error}") from error
        if found != run_id:
            raise BundleError(f"{archive.file}: {folder}/config.json: the config of another run, {found}")
        cache = _cache_of(config)
        if cache is not None and not NAME.fullmatch(cache):
            raise BundleError(f"{archive.file}: {folder}/config.json: kd.cache: {cache!r}: not a name")
        owed = ("status",) if run_id.startswith(PREFIX) else ("status", "code_hash")  # none of our code trained a log
        runs[run_id] = archive.json(entries[f"{folder}/status.json"], *owed)
        _check_weights(archive, entries, folder, runs[run_id])
    return runs, manifest


def _check_weights(archive: _Archive, entries: dict[str, Entry], folder: str, status: dict) -> None:
    described, weights = (entries.get(f"{folder}/checkpoints/{name}") for name in ("model.json", WEIGHTS))
    if described is None:
        owed = "checkpoints/model.json" in status["files"] if "files" in status else status["status"] == "ok"
        if weights is not None or owed:
            raise BundleError(f"{archive.file}: {folder}/checkpoints/model.json: missing")
        return
    sha256 = archive.json(described, "weights_sha256")["weights_sha256"]
    if weights is not None and sha256 != weights.sha256:
        raise BundleError(f"{archive.file}: {weights.path}: not the weights that model.json describes")


def _check_code(file: Path, index: Index, runs: dict[str, dict]) -> None:
    trained, counted = (source_hash(f"workflow/scripts/{script}.py") for script in ("train", "ngram"))
    made_here = {run_id: status["code_hash"] for run_id, status in runs.items() if not run_id.startswith(PREFIX)}
    ours = {run_id: counted if run_id.startswith(NGRAM_PREFIX) else trained for run_id in made_here}
    other = [run_id for run_id, found in made_here.items() if found != ours[run_id]]
    if other:
        raise BundleError(
            f"{file}: runs/{other[0]}: trained by other code than this checkout's (commit {index.kdclimb_commit}); "
            "use that here, or take such runs all the same with --any-code"
        )


def _unit(entry: Entry) -> str:
    """What stays or is taken as a whole: a run, or a file of the campaign."""
    return "/".join(entry.path.split("/")[:2]) if entry.path.startswith("runs/") else entry.path


def _compared(index: Index, results: Path, manifest: dict) -> tuple[list[Entry], dict[str, str]]:
    """(the files that are not here, {run or file that is here with another content: what to say of it}).

    Raises BundleError where nothing may stay: data other than the runs', what is no finished run, what is no file.
    """
    missing, found = [], {}
    for entry in index.files:
        try:
            if not _is_here(entry, results, manifest):
                missing.append(entry)
        except BundleError as error:
            unit = _unit(entry)
            needed = (f"{unit}/{name}" for name in MADE_AT_THE_END) if entry.path.startswith("runs/") else (unit,)
            if entry.path.startswith("data/") or not all((results / path).is_file() for path in needed):
                raise
            found.setdefault(unit, str(error))
    return missing, found


def _is_here(entry: Entry, results: Path, manifest: dict) -> bool:
    """Whether the same file is there already. Raises BundleError if another one is."""
    target = results / entry.path
    if not os.path.lexists(target):
        return False
    if target.is_file() and target.stat().st_size == entry.size and sha256(target) == entry.sha256:
        return True
    if entry.path.startswith("data/"):  # where the shards lie may differ
        try:
            if json.loads(target.read_text())["data_hash"] == manifest["data_hash"]:
                return True
        except (OSError, ValueError, KeyError):
            pass
    folder = "/".join(entry.path.split("/")[: 2 if entry.path.startswith(("runs/", "data/")) else 1])
    raise BundleError(f"{target}: another result is there, and is not overwritten; move {results / folder} away first")


# ---- reading an archive -------------------------------------------------------------------------


class _Archive:
    """A zip or gzipped tar whose members are plain files, each name once."""

    def __init__(self, file: Path):
        self.file = file
        with file.open("rb") as stream:
            start = stream.read(2)
        if start not in KINDS.values():
            raise BundleError(f"{file}: not a bundle; allowed: {' or '.join(KINDS)}, as bundle export makes them")
        with self._reading(file.name):
            if start == KINDS[".zip"]:
                self.archive = zipfile.ZipFile(file)
                found = [(info.filename, info, _is_plain(info)) for info in self.archive.infolist()]
                self._open = self.archive.open
            else:
                self.archive = tarfile.open(file, "r:gz")  # noqa: SIM115, closed by __exit__
                found = [(member.name, member, member.isreg()) for member in self.archive]
                self._open = self.archive.extractfile
        self.members = {name: member for name, member, _ in found}
        for name, _, plain in found:
            if not plain:
                raise BundleError(f"{file}: {name!r}: not a plain file")
        if len(self.members) < len(found):
            raise BundleError(f"{file}: holds two files of one name")

    def __enter__(self) -> _Archive:
        return self

    def __exit__(self, *_) -> None:
        self.archive.close()

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        try:
            yield
        except DAMAGE as error:
            raise BundleError(f"{self.file}: {name}: damaged: {error}") from error

    def names(self) -> set[str]:
        return set(self.members)

    def index(self) -> Index:
        if INDEX not in self.members:
            raise BundleError(f"{self.file}: holds no {INDEX}; not a bundle")
        with self._reading(INDEX), self._open(self.members[INDEX]) as stream:
            text = stream.read()
        try:
            index = build(Index, json.loads(text))
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{self.file}: {INDEX}: {error}") from error
        if index.format != FORMAT:
            raise BundleError(f"{self.file}: {INDEX}: format {index.format}; this version reads {FORMAT}")
        if any(entry.size < 0 or not 0 <= entry.mtime_ns < 1 << 62 for entry in index.files):
            raise BundleError(f"{self.file}: {INDEX}: a size or time in it is out of range")
        if not NAME.fullmatch(index.campaign) or index.campaign in ("runs", "data", "caches"):
            raise BundleError(f"{self.file}: {INDEX}: {index.campaign!r} is no name of a campaign")
        return index

    def copy(self, entry: Entry, write: Callable[[bytes], object]) -> None:
        """`write` a member piece by piece. Raises BundleError unless it has the size and sha256 of its entry."""
        digest, left = hashlib.sha256(), entry.size
        with self._reading(entry.path), self._open(self.members[entry.path]) as stream:
            while left >= 0 and (piece := stream.read(CHUNK)):
                left -= len(piece)
                digest.update(piece)
                write(piece)
        if left or digest.hexdigest() != entry.sha256:
            raise BundleError(f"{self.file}: {entry.path}: not the {entry.size} bytes that {INDEX} describes")

    def json(self, entry: Entry, *keys: str) -> dict:
        pieces: list[bytes] = []
        self.copy(entry, pieces.append)
        try:
            value = json.loads(b"".join(pieces))
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{self.file}: {entry.path}: not JSON: {error}") from error
        missing = [key for key in keys if not isinstance(value, dict) or key not in value]
        if missing:
            raise BundleError(f"{self.file}: {entry.path}: lacks {', '.join(missing)}")
        return value


def _is_plain(info: zipfile.ZipInfo) -> bool:
    kind = stat.S_IFMT(info.external_attr >> 16)
    return not info.is_dir() and not info.flag_bits & 1 and kind in (0, stat.S_IFREG)  # 1: encrypted


def _bar(items, what: str):
    return tqdm(items, desc=what, unit="file", disable=not sys.stderr.isatty(), leave=False)
