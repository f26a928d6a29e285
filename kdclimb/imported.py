"""Runs that were trained elsewhere, teachers and logs: what their config.json holds, and their ids. No torch."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass

from kdclimb.config import IMPORTED_PREFIX as PREFIX
from kdclimb.config import (
    AttentionConfig,
    DataRef,
    ModelConfig,
    NgramConfig,
    RunConfig,
    build,
    canonical_json,
    plain,
    require,
    short_hash,
)

LOGGED = "logged"  # the clock of a run that is known by its log alone
COMMAND = "python -m kdclimb import-teacher FILE --layers L --heads H --windows-passed N --cost-ms MS"


@dataclass(frozen=True)
class Origin:
    """The file that it comes from, and what that file says of itself."""

    file: str  # name, without folders
    sha256: str
    step: int
    best_val_loss: float | None  # nats, on the data and with the windows of its own run


@dataclass(frozen=True)
class ImportedConfig:
    """Everything that decides an imported run: where it comes from, and on what its loss was measured."""

    imported_from: Origin
    name: str
    cost_ms: float  # training time, as whoever imported it declared it
    model: ModelConfig
    windows: tuple[int, ...]  # short and long, in tokens, that it runs with
    long_windows: tuple[int, ...]  # tokens: the long windows that it was trained through, in order
    data: DataRef
    val_tokens: int
    micro_batch_tokens: int
    max_doc_tokens: int | None  # None: validated in slabs
    device: str
    attention: AttentionConfig

    def __post_init__(self) -> None:
        require(0 < self.cost_ms < math.inf, "--cost-ms", self.cost_ms, "milliseconds of training, above 0")
        pattern = r"[A-Za-z0-9][A-Za-z0-9.-]*"
        require(bool(re.fullmatch(pattern, self.name)), "--name", self.name, "letters, digits, '.' and '-'")
        require(bool(self.long_windows) and min(self.long_windows) > 0, "--long-windows", self.long_windows, "tokens")
        ordered = len(self.windows) == 2 and 0 < self.windows[0] <= self.windows[1]
        require(ordered, "--windows", self.windows, "two numbers of tokens, short <= long")

    # What the analysis asks of every run: it learned from no teacher of ours, and nothing timed it here.
    kd = None
    seed = None
    clock = "declared"

    @property
    def run_id(self) -> str:
        return f"{PREFIX}{self.name}-{short_hash(canonical_json(plain(self)))}"

    @property
    def horizon(self) -> int:
        return self.imported_from.step

    def measured_on(self) -> dict:
        """What a run that learns from it must have in common with it, for its loss to mean the same."""
        return {
            "data": self.data.id,
            "device": self.device,  # its dtype differs, and with it the loss
            "validation.tokens": self.val_tokens,
            "train.micro_batch_tokens": self.micro_batch_tokens,
            "train.max_doc_tokens (null under validation.slabs)": self.max_doc_tokens,
        }


@dataclass(frozen=True)
class LogConfig:
    """A run of which there is a log and nothing else."""

    log: str  # the file's name
    sha256: str
    name: str
    horizon: int  # steps of its schedule
    kind: str  # ce or kd

    # What the analysis asks of every run: its teacher, if any, is not ours, and nothing here timed it.
    kd = None
    seed = None
    clock = LOGGED

    @property
    def run_id(self) -> str:
        return f"{PREFIX}log-{self.name}-{short_hash(canonical_json(self.to_dict()))}"

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


def read_config(values: dict) -> RunConfig | ImportedConfig | NgramConfig | LogConfig:
    """The config of a run folder: trained here, imported, counted, or of a log. Raises ConfigError as `build` does."""
    kinds = {"imported_from": ImportedConfig, "order": NgramConfig, "log": LogConfig}
    return build(next((kind for key, kind in kinds.items() if key in values), RunConfig), values)
