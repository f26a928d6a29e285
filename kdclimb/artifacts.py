"""Everything a run leaves in its folder, written atomically, and what lets it start again.

Declared artifacts: config.json, train.log, steps.csv, val.csv, summary.csv, val_loss.png, step_time.png,
checkpoints/, and status.json, which is written last. Beside them `.state/`, which Snakemake doesn't know
and so never deletes: the lock, the resume state, and hard links to the artifacts of a finished run,
from which they come back if a master was killed between the run's end and its own note of it.
"""

from __future__ import annotations

import csv
import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

MADE_AT_THE_END = ("config.json", "steps.csv", "val.csv", "summary.csv", "val_loss.png", "step_time.png", "status.json")
FILES = (*MADE_AT_THE_END, "train.log")
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


def write_via(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary)`, flush it to the disk, and rename it to `path`: whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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


class RunFolder:
    """results/runs/<run_id>/, held by one process at a time."""

    def __init__(self, path: Path):
        self.path, self.state = path, path / ".state"
        self.resume_file = self.state / "resume.safetensors"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder. Waits for a run that is being stopped, for as long as it takes."""
        self.state.mkdir(parents=True, exist_ok=True)
        with (self.state / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def progress(self) -> int | None:
        """When the resume state was written, in ns; None if there is none."""
        return self.resume_file.stat().st_mtime_ns if self.resume_file.is_file() else None

    def count_attempt(self) -> int:
        file = self.state / "attempts"
        attempts = 1 + (int(file.read_text()) if file.is_file() else 0)
        write_text(file, str(attempts))
        return attempts

    def finish(self, status: dict, key: dict) -> None:
        """Publish status.json, all other artifacts being there: the run is then finished.

        Before it appears, it and hard links to the others lie under .state/complete with the key of what they were
        made from, so that there is no moment at which a finished run could still be lost.
        """
        kept = self.state / "complete"
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir()
        write_json(kept / "status.json", status)
        for name in ARTIFACTS[:-1]:
            _link(self.path / name, kept / name)
        write_json(kept / "key.json", key)
        (self.path / "status.json").unlink(missing_ok=True)
        _link(kept / "status.json", self.path / "status.json")
        self.resume_file.unlink(missing_ok=True)

    def restore_complete(self, key: dict, *, any_code: bool) -> bool:
        """Bring back the artifacts of a finished run with the same key; False if there is none."""
        kept = self.state / "complete"
        if not (kept / "key.json").is_file():
            return False
        found = json.loads((kept / "key.json").read_text())
        ignored = {"code"} if any_code else set()
        if {k: v for k, v in found.items() if k not in ignored} != {k: v for k, v in key.items() if k not in ignored}:
            return False
        for name in ARTIFACTS:
            target = self.path / name
            shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
            _link(kept / name, target)
        return True


def _link(source: Path, target: Path) -> None:
    if source.is_dir():
        target.mkdir()
        for child in source.iterdir():
            os.link(child, target / child.name)
    else:
        os.link(source, target)


class DeviceLease:
    """Whether another kdclimb run used this machine's device at the same time.

    Each run holds a lock file of the device; one that finds it held marks it contended, so that both
    sides know. Programs other than kdclimb are not seen. `device`: its kdclimb.provenance.device_identity.
    """

    def __init__(self, device: str):
        name = "".join(c if c.isalnum() else "-" for c in device)
        self.path = Path(tempfile.gettempdir()) / f"kdclimb-{os.getuid()}-{name}.lock"
        self.contended = self.path.with_suffix(".contended")
        self.start = time.time_ns()
        self.file = self.path.open("w")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.refused = False
        except BlockingIOError:
            self.refused = True
            self.contended.touch()
            now = time.time_ns()  # a file system's own clock lags a few ms, and so could set a time before the start
            os.utime(self.contended, ns=(now, now))

    def __enter__(self) -> DeviceLease:
        return self

    def __exit__(self, *_) -> None:
        self.file.close()

    def shared(self) -> bool:
        return self.refused or (self.contended.exists() and self.contended.stat().st_mtime_ns >= self.start)


def plot_run(folder: Path, run_id: str, steps: list[dict], vals: list[dict]) -> None:
    """val_loss.png and step_time.png; "no data" where there is none."""
    times = [0.0, *(row["train_time_ms"] for row in steps)]
    step_ms = [after - before for before, after in zip(times[:-1], times[1:], strict=True)]
    val = ([row["step"] for row in vals], [row["val_loss"] for row in vals])
    _plot(folder / "val_loss.png", run_id, *val, "val_loss (nats a token)", marker="o")
    _plot(folder / "step_time.png", run_id, [row["step"] for row in steps], step_ms, "step time (ms)")


def _plot(path: Path, title: str, x: list, y: list, label: str, marker: str | None = None) -> None:
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
    write_via(path, lambda temporary: figure.savefig(temporary, dpi=100, format="png", metadata={"Software": None}))
