"""Everything a run leaves in its folder, written atomically, and what lets it start again.

Declared artifacts: config.json, train.log, steps.csv, val.csv, summary.csv, val_loss.png, step_time.png,
checkpoints/, and status.json, which is written last. Beside them `.state/`, which Snakemake doesn't know
and so never deletes: the lock, the resume state, and hard links to the artifacts of a finished run,
from which they come back if a master was killed between the run's end and its own note of it.
"""

from __future__ import annotations

import csv
import errno
import fcntl
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from kdclimb.waiting import open_watched

MADE_AT_THE_END = ("config.json", "steps.csv", "val.csv", "summary.csv", "val_loss.png", "step_time.png", "status.json")
LOG = "train.log"  # which Snakemake empties before it starts a job again
FILES = (*MADE_AT_THE_END, LOG)
ARTIFACTS = ("checkpoints", *MADE_AT_THE_END)  # what Snakemake deletes before it starts a job again; status.json last
STEP_COLUMNS = (
    "step tokens train_time_ms lr_mult batch_tokens window_short window_long loss_hard loss_soft "
    "kd_norm kd_share kd_kept kd_active grad_norm"
).split()
TAIL_LINES = 5  # of its log, in the result of a run that did not end well
VAL_COLUMNS = "step tokens train_time_ms val_loss teacher_kl kd_active".split()
SUMMARY_COLUMNS = (
    "run_id arm seed status device threads shared_device steps tokens train_time_ms step_ms_median step_ms_p90 "
    "best_val final_val peak_alloc_gib peak_reserved_gib params_stored params_active flops_per_token "
    "teacher_flops_per_token mfu clock kd_stop_step kd_cache_ms code_hash data_hash broken "
    "anchor_before_ms anchor_after_ms"
).split()


WEIGHTS_ELSEWHERE = "model.safetensors.elsewhere"  # in checkpoints/: the weights are where the run was made
ABSENT = "elsewhere"  # in the folder of a cache of targets that isn't here
MADE_ON = ("torch", "device", "threads")  # of a run's key: what it is not asked for again once it is finished
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class DiskFull(OSError):
    """No room to write a file. That says nothing about a run, so it is never a run's result."""

    def __str__(self) -> str:
        return self.strerror


class Damaged(ValueError):
    """A file that is not as it was written. The message names it and what to do."""


@contextmanager
def needs_room(path: Path) -> Iterator[None]:
    """Turn the error of a full disk (safetensors has one of its own) into DiskFull, which names `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = error.errno in NO_ROOM if isinstance(error, OSError) else f"(os error {errno.ENOSPC})" in str(error)
        if isinstance(error, DiskFull) or not full:
            raise
        said = f"{path}: no room on its disk; what was there before is untouched: free space and start again"
        raise DiskFull(errno.ENOSPC, said) from error


def write_via(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary)`, flush it to the disk, and rename it to `path`: whole or not there, after power loss too.

    Raises DiskFull where there is no room for it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with needs_room(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def drop_unfinished(*folders: Path) -> None:
    """Delete what `write_via` was at when it was killed. Nobody else may be writing in these folders."""
    for folder in folders:
        for temporary in folder.glob(".*.tmp"):
            temporary.unlink()


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # from file systems that know no fsync of a folder
            raise
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    with open_watched(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- JSON that knows whether it is whole ----------------------------------------------------------


def seal(value: dict) -> dict:
    """`value` as JSON holds it, with the sha256 of all else in it under `sha256`."""
    value = json.loads(json.dumps(value, allow_nan=False))
    return value | {"sha256": _seal(value)}


def _seal(value: dict) -> str:
    text = json.dumps({key: value[key] for key in value if key != "sha256"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_sealed(path: Path, remedy: str, *, or_plain: bool = False) -> dict:
    """The JSON object in `path`, without its seal.

    Raises Damaged, which says `remedy`, unless it is whole and as it was sealed. `or_plain` takes one too that has
    neither seal nor `files`: a status.json of a version that sealed nothing, or of an import.
    """
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path}: damaged: not JSON ({error}); {remedy}") from error
    if isinstance(value, dict) and or_plain and not {"sha256", "files"} & value.keys():
        return value
    if not isinstance(value, dict) or value.get("sha256") != _seal(value):
        raise Damaged(f"{path}: damaged: not as it was written; {remedy}")
    return {key: value[key] for key in value if key != "sha256"}


# ---- tables, with their sha256 in a hidden file beside them ---------------------------------------


def write_noted(path: Path, write: Callable[[Path], object]) -> None:
    """`write(path)`, and note its sha256. A table without a note, such as one from a bundle, is read unverified."""
    note = _note(path)
    note.unlink(missing_ok=True)
    write(path)
    write_text(note, f"{sha256(path)}\n")


def read_noted(path: Path) -> str:
    """The text of a table. Raises Damaged unless it is as it was noted, OSError and UnicodeDecodeError."""
    path = Path(path)
    while True:
        noted, content = _noted(path), path.read_bytes()
        if _noted(path) == noted:  # else it is being written anew, as when a report is made while a campaign goes on
            break
    if noted not in (None, f"{hashlib.sha256(content).hexdigest()}\n".encode()):
        raise Damaged(f"{path}: damaged: not as it was written; delete it, and ./run makes it again")
    return content.decode()


def _note(path: Path) -> Path:
    return path.with_name(f".{path.name}.sha256")


def _noted(path: Path) -> bytes | None:
    with suppress(FileNotFoundError):
        return _note(path).read_bytes()
    return None


# ---- formats --------------------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    write_via(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def write_csv(path: Path, columns: list[str], rows: list[dict]) -> None:
    """Floats in repr form; None is an empty cell. A row with a key that is no column is an error."""

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    write_via(path, write)


def write_tables(folder: Path, run_id: str, steps: list[dict], vals: list[dict], summary: dict) -> None:
    """steps.csv, val.csv, summary.csv and their two plots."""
    write_csv(folder / "steps.csv", STEP_COLUMNS, steps)
    write_csv(folder / "val.csv", VAL_COLUMNS, vals)
    write_csv(folder / "summary.csv", SUMMARY_COLUMNS, [summary])
    plot_run(folder, run_id, steps, vals)


def last_lines(log: Path) -> str:
    """The end of a log, without empty lines and progress bars; "" where there is none."""
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    return "\n".join([line for line in lines if line.strip()][-TAIL_LINES:])


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold this folder, which is made if need be, by the file `lock` in it. Waits for the process that holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class RunFolder:
    """results/runs/<run_id>/, held by one process at a time."""

    def __init__(self, path: Path):
        self.path, self.state = path, path / ".state"
        self.resume_file = self.state / "resume.safetensors"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder. Waits for a run that is being stopped, for as long as it takes."""
        with locked(self.state):
            yield

    def drop_unfinished(self) -> None:
        """Delete the half files of tries that were killed, each as large as a state. To be called by who holds it."""
        drop_unfinished(self.path, self.path / "checkpoints", self.state)

    def progress(self) -> int | None:
        """When the resume state was written, in ns; None if there is none."""
        return self.resume_file.stat().st_mtime_ns if self.resume_file.is_file() else None

    def count_attempt(self) -> int:
        file = self.state / "attempts"
        found = file.read_text(errors="replace") if file.is_file() else ""
        attempts = 1 + (int(found) if found.isdecimal() else 0)  # damaged, it costs the count and nothing else
        write_text(file, str(attempts))
        return attempts

    def finish(self, status: dict, key: dict) -> None:
        """Publish status.json, with the sha256 of all other artifacts, which are there: the run is then finished.

        Before it appears, it and hard links to the others lie under .state/complete with the key of what they were
        made from, so that there is no moment at which a finished run could still be lost.
        """
        kept = self.state / "complete"
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir()
        write_json(kept / "status.json", seal(status | {"files": hashes(self.path)}))
        self._keep(ARTIFACTS[:-1], {"key": key})
        (self.path / "status.json").unlink(missing_ok=True)
        link(kept / "status.json", self.path / "status.json")
        sync(self.path)
        self.resume_file.unlink(missing_ok=True)

    def keep_imported(self, files: dict[str, str]) -> None:
        """Have under .state/complete what brings back a finished run that a bundle brought, `files` with their sha256.

        It has no key: whatever is changed here, it was made elsewhere. Nothing is done for a run that was made here.
        """
        kept = self.state / "complete"
        if (kept / "key.json").is_file() and self._imported() is None:
            return
        with self.lock():
            shutil.rmtree(kept, ignore_errors=True)
            kept.mkdir()
            self._keep(ARTIFACTS, {"imported": files})

    def restore_imported(self) -> bool:
        """Bring back a run that a bundle brought; False if none did. What was damaged is said, and counts as none."""
        files = self._imported()
        if files is None:
            return False
        with self.lock():
            try:
                for name, digest in files.items():
                    verify(self.state / "complete" / name, digest, "import its bundle again, or it is made here")
            except (Damaged, OSError) as error:
                print(f"{self.path.name}: {error}", file=sys.stderr)
                return False
            self._bring_back()
        again = f"to make it here: python -m kdclimb retry --run {self.path.name}"
        print(f"{self.path.name}: a bundle brought it; its artifacts are back ({again})", file=sys.stderr)
        return True

    def _imported(self) -> dict[str, str] | None:
        """{file: its sha256} of a run that a bundle brought; None of one that was made here, or that can't be told."""
        with suppress(Damaged, OSError):
            return read_sealed(self.state / "complete/key.json", "").get("imported")
        return None

    def _keep(self, names: Iterable[str], note: dict) -> None:
        """Link these artifacts, and last write `note` on them, under .state/complete."""
        kept = self.state / "complete"
        for name in names:
            link(self.path / name, kept / name)
        if (self.path / LOG).is_file():  # a copy: what empties the log must not empty this
            shutil.copyfile(self.path / LOG, kept / LOG)
        write_json(kept / "key.json", seal(note))

    def restore_complete(self, key: dict, *, any_code: bool, weights: bool = True) -> bool:
        """Bring back the artifacts of a finished run with the same key; False if there is none, or none with `weights`.

        But for what it ran on (MADE_ON), as a timing that was taken is not taken again, and but for the code with
        `any_code`. What was damaged since is said on stderr, and counts as none.
        """
        kept = self.state / "complete"
        if not (kept / "key.json").is_file():
            return False
        try:
            found = read_sealed(kept / "key.json", "the run is made again").get("key", {})
            ignored = {*MADE_ON, *(["code"] if any_code else [])}
            if _without(ignored, found) != _without(ignored, key):
                return False
            status = read_sealed(kept / "status.json", "the run is made again")
            files = status["files"]
            if weights and status["status"] == "ok" and not any(name.startswith("checkpoints/") for name in files):
                return False
            for name, digest in files.items():
                verify(kept / name, digest, "the run is made again")
        except (Damaged, OSError) as error:
            print(f"{self.path.name}: {error}", file=sys.stderr)
            return False
        self._bring_back()
        return True

    def _bring_back(self) -> None:
        kept = self.state / "complete"
        for name in ARTIFACTS:
            source, target = kept / name, self.path / name
            if not _is_linked(source, target):  # else what was made from it would look older than it is
                shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
                link(source, target)
        if (kept / LOG).is_file():
            write_via(self.path / LOG, lambda temporary: shutil.copyfile(kept / LOG, temporary))
        sync(self.path)


def stand_in(cache: Path) -> None:
    """Make the folder of a cache of targets that isn't here, which finished runs have read."""
    cache.mkdir(parents=True, exist_ok=True)
    write_text(cache / ABSENT, "a bundle brought runs that read this cache, and not the cache\n")


def publish(folder: Path, status: dict) -> None:
    """Write status.json, which makes the other artifacts in `folder` a finished run, with their sha256."""
    write_json(folder / "status.json", seal(status | {"files": hashes(folder)}))


def hashes(folder: Path) -> dict[str, str]:
    """{path from a run's folder: sha256} of all its artifacts but status.json, which holds this."""
    found = [folder / name for name in ARTIFACTS[1:-1]] + sorted((folder / "checkpoints").iterdir())
    return {file.relative_to(folder).as_posix(): sha256(file) for file in found}


def verify(path: Path, digest: str, remedy: str) -> None:
    """Raise Damaged, which says `remedy`, unless the file is there and has this sha256."""
    if not path.is_file():
        raise Damaged(f"{path}: missing; {remedy}")
    if sha256(path) != digest:
        raise Damaged(f"{path}: damaged: not as it was written; {remedy}")


def _without(names: set[str], key: dict) -> dict:
    return {name: value for name, value in key.items() if name not in names}


def link(source: Path, target: Path) -> None:
    """A hard link to a file, or a folder of hard links to the files in one."""
    if source.is_dir():
        target.mkdir()
        for child in source.iterdir():
            os.link(child, target / child.name)
        sync(target)
    else:
        os.link(source, target)


def _is_linked(source: Path, target: Path) -> bool:
    """Whether `link` made `target` of `source`, and nothing has replaced it since."""
    if source.is_dir() and target.is_dir():
        names = {child.name for child in (*source.iterdir(), *target.iterdir())}
        return all(_is_linked(source / name, target / name) for name in names)
    return source.exists() and target.exists() and source.samefile(target)


class DeviceLease:
    """Whether another kdclimb run used this machine's device at the same time.

    Each run holds a lock file of the device; one that finds it held makes a second file longer, so that both
    sides know, whatever the clock does. Programs other than kdclimb are not seen. `device`: its
    kdclimb.provenance.device_identity.
    """

    def __init__(self, device: str):
        name = "".join(c if c.isalnum() else "-" for c in device)
        self.path = Path(tempfile.gettempdir()) / f"kdclimb-{os.getuid()}-{name}.lock"
        self.contended = self.path.with_suffix(".contended")
        self.before = self._contentions()
        self.file = self.path.open("w")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.refused = False
        except BlockingIOError:
            self.refused = True
            with needs_room(self.contended), self.contended.open("ab") as file:
                file.write(b"x")

    def _contentions(self) -> int:
        return self.contended.stat().st_size if self.contended.is_file() else 0

    def __enter__(self) -> DeviceLease:
        return self

    def __exit__(self, *_) -> None:
        self.file.close()

    def shared(self) -> bool:
        return self.refused or self._contentions() != self.before


def plot_run(folder: Path, run_id: str, steps: list[dict], vals: list[dict]) -> None:
    """val_loss.png and step_time.png; "no data" where there is none."""
    times = [0.0, *(row["train_time_ms"] for row in steps)]
    step_ms = [after - before for before, after in zip(times[:-1], times[1:], strict=True)]
    val = ([row["step"] for row in vals], [row["val_loss"] for row in vals])
    _plot(folder / "val_loss.png", run_id, *val, "val_loss (nats a token)", marker="o")
    _plot(folder / "step_time.png", run_id, [row["step"] for row in steps], step_ms, "step time (ms)")


def rehearse_plots() -> None:
    """Load and use what draws, so that a run for which memory gets too small can still write its result."""
    _figure("", [], [], "").savefig(io.BytesIO(), format="png")


def _plot(path: Path, *what, **style) -> None:
    figure = _figure(*what, **style)
    write_via(path, lambda temporary: figure.savefig(temporary, dpi=100, format="png", metadata={"Software": None}))


def _figure(title: str, x: list, y: list, label: str, marker: str | None = None):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(title=title, xlabel="step", ylabel=label)
    axes.grid(alpha=0.3)
    if x:
        axes.plot(x, y, marker=marker, markersize=3)
    else:
        axes.text(0.5, 0.5, "no data", ha="center", transform=axes.transAxes)
    return figure
