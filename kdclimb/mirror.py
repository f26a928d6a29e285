"""Copies of finished artifacts at a second root (`paths.mirror`), file by file, each whole or not there.

Only what has changed is copied, by size and mtime, which a copy keeps. No torch: the Snakefile imports this.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from kdclimb.artifacts import ARTIFACTS, write_via

LAST = "status.json"  # of a run: where it is, the rest of the run is
RUN_FILES = ("train.log", *ARTIFACTS)
NOT_COPIED = "logs"  # of a campaign


def mirror(results: Path, campaign: Path | None, run_ids: Iterable[str], root: Path) -> int:
    """Copy the finished ones of these runs, and the files of the folder `campaign`, from `results` to `root`/results/.

    Returns the number of files copied. In a run's folder there, files that the run no longer has are deleted; nothing
    else is. Raises OSError where the mirror can't be written; what is there then is whole, file by file.
    """
    target = root / "results"
    finished = [run_id for run_id in run_ids if (results / "runs" / run_id / LAST).is_file()]
    copied = sum(_mirror_run(results / "runs" / run_id, target / "runs" / run_id) for run_id in finished)
    files = [] if campaign is None else campaign_files(campaign)
    return copied + sum(_copy(file, target / file.relative_to(results)) for file in files)


def not_mirrored(error: OSError, root: Path) -> str:
    """The line that says so."""
    where = error.filename2 or error.filename or root
    return f"kdclimb: paths.mirror: no copy at {where}: {error.strerror}; what is in results/ is not touched by that"


def run_files(folder: Path) -> list[Path]:
    """The artifacts of a finished run's folder, status.json last."""
    found = [folder / name for name in RUN_FILES]
    weights = sorted((folder / "checkpoints").iterdir()) if (folder / "checkpoints").is_dir() else []
    return [file for file in (*weights, *found) if file.is_file() and _is_artifact(file.relative_to(folder))]


def campaign_files(folder: Path) -> list[Path]:
    """All files of results/<campaign>/ but its logs and what is being written."""
    return [file for file in sorted(folder.rglob("*")) if file.is_file() and _is_artifact(file.relative_to(folder))]


def _is_artifact(path: Path) -> bool:
    return path.parts[0] != NOT_COPIED and not any(part.startswith(".") for part in path.parts)


def _mirror_run(folder: Path, target: Path) -> int:
    files = [file.relative_to(folder) for file in run_files(folder)]
    (target / "checkpoints").mkdir(parents=True, exist_ok=True)  # empty if the run failed
    gone = [file for file in run_files(target) if file.relative_to(target) not in files]
    if gone or not all(_is_copied(folder / name, target / name) for name in files):
        (target / LAST).unlink(missing_ok=True)  # until the rest is there
    for file in gone:
        file.unlink()
    return sum(_copy(folder / name, target / name) for name in files)


def _is_copied(source: Path, target: Path) -> bool:
    if not target.is_file():
        return False
    here, there = source.stat(), target.stat()
    return (here.st_size, here.st_mtime_ns) == (there.st_size, there.st_mtime_ns)


def _copy(source: Path, target: Path) -> bool:
    """Whether there was anything to copy."""
    if _is_copied(source, target):
        return False
    write_via(target, lambda temporary: _copy_with_mtime(source, temporary))
    return True


def _copy_with_mtime(source: Path, target: Path) -> None:
    """Not shutil.copy2, since some file systems that one mirrors to have no modes to set."""
    stat = source.stat()
    shutil.copyfile(source, target)
    os.utime(target, ns=(stat.st_mtime_ns, stat.st_mtime_ns))
