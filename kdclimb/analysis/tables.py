"""The file formats: reading run folders and tables, writing tables, and the flags of the scripts.

A row is a plain dict. Cells are typed by their column: the columns in TEXT stay text, all others are
numbers, and an empty cell is None. What is written depends on the input alone: no time stamps, no
order that varies, floats in repr form.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from kdclimb import artifacts
from kdclimb.artifacts import SUMMARY_COLUMNS, VAL_COLUMNS, Damaged
from kdclimb.config import ConfigError, NgramConfig, RunConfig
from kdclimb.imported import PREFIX, ImportedConfig, LogConfig, read_config

STEP_COLUMNS = ("step", "tokens", "train_time_ms", "batch_tokens", "kd_share", "kd_active")  # those that are read here
# A run in a campaign's table. The trainer's own `arm` (ce, kd, ...) is called kind here, since arm is the stage.
# The last two where it did not end well: the Slurm job that wrote its result, and the end of its log.
RUN_COLUMNS = ("arm", "label", "horizon", "kind", *(c for c in SUMMARY_COLUMNS if c != "arm"), "reason")
RUN_COLUMNS += ("slurm_job", "log_tail")
TEXT = frozenset(
    "arm label kind part run_id probe_run_id candidate status reason device clock code_hash data_hash miss_reason "
    "time_note verdict missing_artifacts measure target against cost note outcome "
    "slurm_job log_tail chosen edge condition met evidence promoted check_budget check_budget_by check_falling "
    "check_falling_by check_no_oom check_no_oom_by check_artifacts check_artifacts_by".split()
)
WARMUP_STEPS = 2  # the first steps are slower on every device, and a probe is too short to dilute them
INTEGER = re.compile(r"-?\d+")


class AnalysisError(ValueError):
    """An input that is missing, malformed or not fit for use. The message names the file or the run."""


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[dict]) -> None:
    """Write the named columns of `rows`; each row must have them all, and may have more."""
    cells = [{column: row[column] for column in columns} for row in rows]
    artifacts.write_noted(path, lambda path: artifacts.write_csv(path, list(columns), cells))


def write_json(path: Path, value) -> None:
    artifacts.write_noted(path, lambda path: artifacts.write_json(path, value))


def read_text(path: Path) -> str:
    """The text of a file; AnalysisError names the file where it can't be read, or is not as it was written."""
    try:
        return artifacts.read_noted(path)
    except Damaged as error:
        raise AnalysisError(str(error)) from error
    except (OSError, UnicodeDecodeError) as error:
        raise AnalysisError(f"{path}: can't be read: {getattr(error, 'strerror', None) or error}") from error


def read_json(path: Path, keys: Iterable[str] = ()) -> dict:
    """The JSON object in `path`; AnalysisError where it is malformed or lacks one of `keys`."""
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise AnalysisError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise AnalysisError(f"{path}: not a JSON object")
    missing = [key for key in keys if key not in value]
    if missing:
        raise AnalysisError(f"{path}: lacks {', '.join(missing)}")
    return value


def read_csv(path: Path, columns: Sequence[str], text: Iterable[str] = TEXT) -> list[dict]:
    """The named columns of a CSV, typed; AnalysisError names the file, and the line and column of a bad cell."""
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    missing = [column for column in columns if column not in (reader.fieldnames or ())]
    if missing:
        raise AnalysisError(f"{path}: lacks the columns {', '.join(missing)}")
    rows, text = [], frozenset(text)
    for record in reader:
        if None in record or None in record.values():
            raise AnalysisError(f"{path}: line {reader.line_num} has not as many cells as the header")
        where = f"{path}: line {reader.line_num}, column "
        rows.append({c: record[c] if c in text else _number(record[c], where + c) for c in columns})
    return rows


def _number(cell: str, where: str) -> int | float | None:
    if cell == "":
        return None
    if INTEGER.fullmatch(cell):
        return int(cell)
    try:
        return float(cell)
    except ValueError:
        raise AnalysisError(f"{where}: {cell!r} is not a number") from None


@dataclass(frozen=True)
class RunFolder:
    """A run and its place in the campaign, read from `results/runs/<run_id>/`."""

    arm: str
    label: str
    folder: Path
    config: RunConfig | ImportedConfig | NgramConfig | LogConfig
    status: str
    reason: str
    summary: dict
    slurm_job: str = ""
    log_tail: str = ""
    teacher_sha256: str = ""  # of the weights that taught it
    wall_s: float = 0.0  # of its last try, from set-up to artifacts; 0 where status.json doesn't say
    speed: float = 1.0  # factor that all its times are read with: the machine's anchor was so much faster or slower
    unsteady: str = ""  # why its time can be compared with no other's
    files: dict[str, str] = field(default_factory=dict)  # {artifact: sha256}; without, nothing is verified

    @classmethod
    def read(cls, flag: str) -> RunFolder:
        """Read the folder named by a flag 'ARM|LABEL|FOLDER'.

        Raises AnalysisError where a file is missing, malformed or not as the run left it, and where the folder's name
        is not the run id of the config inside: such a folder holds another run than the one asked for.
        """
        parts = flag.split("|")
        if len(parts) != 3 or not all(parts):
            raise AnalysisError(f"--run {flag!r}: not of the form 'ARM|LABEL|FOLDER'")
        arm, label, folder = parts[0], parts[1], Path(parts[2])
        try:
            status = artifacts.read_sealed(folder / "status.json", remedy(folder), or_plain=True)
        except OSError as error:
            place = folder / "status.json"
            raise AnalysisError(f"{place}: can't be read: {error.strerror}; {remedy(folder)}") from error
        except Damaged as error:
            raise AnalysisError(str(error)) from error
        missing = [key for key in ("status", "reason") if key not in status]
        if missing:
            raise AnalysisError(f"{folder / 'status.json'}: lacks {', '.join(missing)}")
        files = status.get("files", {})
        try:
            config = read_config(read_json(verified(folder, "config.json", files)))
        except ConfigError as error:
            raise AnalysisError(f"{folder / 'config.json'}: {error}") from error
        if config.run_id != folder.name:
            raise AnalysisError(f"{folder / 'config.json'}: this is the config of run {config.run_id}")
        rows = read_csv(verified(folder, "summary.csv", files), SUMMARY_COLUMNS)
        if len(rows) != 1 or rows[0]["run_id"] != folder.name:
            raise AnalysisError(f"{folder / 'summary.csv'}: not the one row of run {folder.name}")
        ended = (status["status"], status["reason"] or "")
        more = {key: status.get(key) or "" for key in ("slurm_job", "log_tail", "teacher_sha256")}  # not all have them
        more["wall_s"] = math.fsum(status.get("wall_s", {}).values())
        return cls(arm, label, folder, config, *ended, rows[0], **more, files=files)

    @property
    def run_id(self) -> str:
        return self.folder.name

    @property
    def imported(self) -> bool:
        """Whether it was trained elsewhere: a teacher, of declared time and one validation; or known by its log."""
        return isinstance(self.config, ImportedConfig | LogConfig)

    @property
    def logged(self) -> bool:
        return isinstance(self.config, LogConfig)

    @property
    def horizon(self) -> int:
        return self.config.schedule.horizon if isinstance(self.config, RunConfig) else self.config.horizon

    @property
    def ok(self) -> bool:
        """Whether it ended as it should. A log that is whole tells of such a run; one that is provisional doesn't."""
        return self.status in ("ok", "imported")

    @cached_property
    def val(self) -> list[dict]:
        """The validations, step 0 first. val_loss in nats, train_time_ms without validation itself."""
        return self._ascending("val.csv", VAL_COLUMNS)

    @cached_property
    def steps(self) -> list[dict]:
        """The training steps, counted from 1, with cumulative tokens and train_time_ms."""
        return self._ascending("steps.csv", STEP_COLUMNS)

    def _ascending(self, name: str, columns: Sequence[str]) -> list[dict]:
        rows = read_csv(verified(self.folder, name, self.files), columns)
        owed = [column for column in ("step", "tokens", "train_time_ms", "val_loss") if column in columns]
        if self.imported:
            owed.remove("tokens")
        if self.logged:
            owed.remove("train_time_ms")  # the oldest logs have none
        for i, row in enumerate(rows):
            if None in (row[column] for column in owed):
                raise AnalysisError(f"{self.folder / name}: row {i + 1} lacks one of {', '.join(owed)}")
            if i and row["step"] <= rows[i - 1]["step"]:
                raise AnalysisError(f"{self.folder / name}: row {i + 1}: the steps do not ascend")
        timed = [row for row in rows if row["train_time_ms"] is not None and self.speed != 1.0]
        for row in timed:
            row["train_time_ms"] *= self.speed
        return rows

    def row(self) -> dict:
        """The run as a row of RUN_COLUMNS. `broken` and `shared_device` are of measured time, else empty."""
        row = self.summary | {
            "arm": self.arm,
            "label": self.label,
            "horizon": self.horizon,
            "kind": self.summary["arm"],
        }
        if self.config.clock != "measured":
            row |= {"broken": None, "shared_device": None}
        row |= {"run_id": self.run_id, "status": self.status, "reason": self.reason, "unsteady": self.unsteady}
        return row | {"slurm_job": "" if self.ok else self.slurm_job, "log_tail": "" if self.ok else self.log_tail}

    def durations(self, per_token: bool = False) -> list[float]:
        """Milliseconds of each step (or of each token of it), without the first WARMUP_STEPS steps.

        A run of no more steps than that keeps its last one. Raises AnalysisError where there is no step.
        """
        if not self.steps:
            raise AnalysisError(f"{self.folder / 'steps.csv'}: holds no step")
        times = [0.0] + [row["train_time_ms"] for row in self.steps]
        if per_token and not all(row["batch_tokens"] for row in self.steps):
            raise AnalysisError(f"{self.folder / 'steps.csv'}: a step lacks its batch_tokens")
        sizes = [row["batch_tokens"] if per_token else 1 for row in self.steps]
        each = [(b - a) / size for a, b, size in zip(times, times[1:], sizes, strict=False)]
        return each[min(WARMUP_STEPS, len(each) - 1) :]

    def step_ms(self) -> float:
        """Median milliseconds of a step; see `durations`."""
        return statistics.median(self.durations())

    def why_not_ok(self) -> str:
        return f"{self.status}: {self.reason or 'no reason recorded'}"


def verified(folder: Path, name: str, files: dict[str, str]) -> Path:
    """The path of a run's artifact; AnalysisError unless it has the sha256 that `files`, if any, has of it."""
    if files:
        try:
            artifacts.verify(folder / name, files.get(name, "of no such file"), remedy(folder))
        except Damaged as error:
            raise AnalysisError(str(error)) from error
    return folder / name


def remedy(folder: Path) -> str:
    """What makes a damaged run again."""
    if folder.name.startswith(PREFIX):
        return "delete the folder and import it again"
    return f"make the run again: python -m kdclimb retry --run {folder.name}, then ./run"


def show_ms(value: float) -> str:
    """A time in words, three significant digits or so: 61.4 ms, 6.14 s, 1,234 s."""
    if abs(value) < 999.5:
        return f"{value:.3g} ms"
    seconds = value / 1000
    return f"{seconds:,.{2 if abs(seconds) < 10 else 1 if abs(seconds) < 100 else 0}f} s"


def show_number(value: float, digits: int = 1) -> str:
    """A number with thousands separated and no trailing zeros."""
    text = f"{value:,.{digits}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def run_script(doc: str, function: Callable, *files: str, runs: bool = False, **options: type) -> int:
    """The whole of a script: parse its flags, call `function` with them, and return the exit code.

    Each of `files` is a required path flag. With `runs`, --run 'ARM|LABEL|FOLDER' may be given any number
    of times. `options` are further required flags by type, where bool makes a switch. Names with `_` are
    flags with `-`. An AnalysisError, or an error of
    the file system, is printed and gives 1.
    """
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False)
    if runs:
        parser.add_argument("--run", dest="runs", action="append", default=[], metavar="ARM|LABEL|FOLDER")
    for name in files:
        parser.add_argument(f"--{name.replace('_', '-')}", type=Path, required=True, metavar="PATH")
    for name, kind in options.items():
        how = {"action": "store_true"} if kind is bool else {"type": kind, "required": True}
        parser.add_argument(f"--{name.replace('_', '-')}", **how)
    values = vars(parser.parse_args())
    try:
        if runs:
            values["runs"] = [RunFolder.read(flag) for flag in values["runs"]]
        function(**values)
    except (AnalysisError, OSError) as error:
        print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        return 1
    return 0
