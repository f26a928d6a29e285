"""The fully resolved configuration of one run, and the id that names it.

A run is a pure function of its `RunConfig` (and of the code): the same config gives the same
`run_id`, and a folder `results/runs/<run_id>/` holds nothing else. No torch here: the Snakefile
imports this module each time it is parsed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import types
import typing
from dataclasses import dataclass

LONGEST_SHOWN = 300  # characters of a value in an error's line


class ConfigError(ValueError):
    """A config that can't be run. The message names the key, its value and what is allowed."""


def build(cls, values: dict, where: str = ""):
    """Make the frozen dataclass `cls` from a plain dict, recursively.

    Raises ConfigError for an unknown key, a missing one without a default, and a value of the wrong type, named by its
    dotted path. Ints are taken where floats are asked for; nothing else is converted.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where or cls.__name__}: {shown(values)} is not a mapping of keys to values")
    hints = typing.get_type_hints(cls)
    values = {f.name: f.default for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING} | values
    for key in values:
        if key not in hints:
            raise ConfigError(f"{_dotted(where, key)}: unknown key; allowed here: {', '.join(sorted(hints))}")
    for key in hints:
        if key not in values:
            raise ConfigError(f"{_dotted(where, key)}: this key is missing")
    return cls(**{key: _convert(hints[key], values[key], _dotted(where, key)) for key in hints})


def _dotted(where: str, key: str) -> str:
    return f"{where}.{key}" if where else str(key)


def _convert(hint, value, where: str):
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):  # X | None is the only union we use
        return None if value is None else _convert(args[0], value, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where}: {shown(value)} is not a list")
        return tuple(_convert(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else build(hint, value, where)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is float and number:
        try:
            found = float(value)
        except OverflowError:  # of an int
            found = math.inf
        if not math.isfinite(found):
            raise ConfigError(f"{where}: {shown(value)} is not a finite number")
        return found
    if hint is not float and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{where}: {shown(value)} is a {type(value).__name__}, not a {hint.__name__}")


def require(condition: bool, key: str, value, allowed: str) -> None:
    """Raise ConfigError in the one form that all config errors have, unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{key}: {shown(value)} is not allowed; allowed: {allowed}")


def shown(value) -> str:
    """A value in an error's line: its repr, cut where it is long."""
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


VALUE_GATES = ("hidden", "both")


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of a GPT; student and teacher are the same class at other shapes."""

    vocab_size: int
    num_layers: int
    num_heads: int
    head_dim: int
    bigram_vocab_size: int  # rows of the hashed bigram table; 0 for none
    untie_frac: float  # head tied to the embedding before this fraction of the horizon; 0 untied, 1 tied for good
    softcap: tuple[float, ...] | None  # (a, b, c) of a*sigmoid((z+b)/c)
    attention_scale: float  # softmax scale at head_dim 128, before YaRN; times sqrt(128 / head_dim)
    long_layers: tuple[int, ...]  # layers that look through the long window; the others look through the short one
    attention_free_layers: tuple[int, ...]  # layers that are an MLP alone
    paired_layers: tuple[int, ...]  # layers whose heads attend in pairs
    value_layers: tuple[int, ...]  # layers with a table of value embeddings
    value_gate: str  # hidden: gates see the hidden state, tables start at 0; both: the value too, small random tables
    skip: tuple[int, ...]  # (from, to): layer `to` is given the output of layer `from` through a gate; or ()
    backout: tuple[int, ...]  # (layer,), whose output is in part taken off the last one's; or ()
    x0: bool  # learned factors of the residual stream and of the first hidden state, in each layer
    attention_gate: bool  # a gate on the output of each head
    key_offset: bool  # in long layers, unless paired, non-rotating dimensions of the keys come from the token before
    smear: bool  # a gate to the embedding of the token before
    qkvo_factors: bool  # learned factors of the attention's weights
    yarn: bool  # stretch the rotary frequencies when the long window changes
    qk_norm: bool = True  # queries and keys are brought to a root mean square of 1
    half_rotary: bool = True  # half of a head's dimensions don't rotate; false: all do

    def __post_init__(self) -> None:
        require(self.num_layers >= 1, "num_layers", self.num_layers, "1 or more")
        require(self.num_heads >= 2 and self.num_heads % 2 == 0, "num_heads", self.num_heads, "an even number")
        require(self.head_dim >= 4 and self.head_dim % 4 == 0, "head_dim", self.head_dim, "a multiple of 4")
        rows = self.bigram_vocab_size
        require(rows == 0 or rows >= 2, "bigram_vocab_size", rows, "0 for none, or 2 or more")
        require(0.0 <= self.untie_frac <= 1.0, "untie_frac", self.untie_frac, "0 to 1")
        require(
            self.softcap is None or (len(self.softcap) == 3 and self.softcap[0] > 0 and self.softcap[2] > 0),
            "softcap",
            self.softcap,
            "null, or three numbers a, b, c with a > 0 and c > 0, for a*sigmoid((z+b)/c)",
        )
        for name in ("long_layers", "attention_free_layers", "paired_layers", "value_layers", "skip", "backout"):
            layers = getattr(self, name)
            known = all(0 <= i < self.num_layers for i in layers) and len(set(layers)) == len(layers)
            require(known, name, layers, f"different layers from 0 to {self.num_layers - 1}")
        require(self.value_gate in VALUE_GATES, "value_gate", self.value_gate, " or ".join(VALUE_GATES))
        free = set(self.attention_free_layers)
        for name in ("paired_layers", "value_layers"):
            layers = getattr(self, name)
            require(not free & set(layers), name, layers, f"none of attention_free_layers {self.attention_free_layers}")
        ordered = self.skip == () or (len(self.skip) == 2 and self.skip[0] < self.skip[1])
        require(ordered, "skip", self.skip, "[] or [from, to], from a layer to a later one")
        require(len(self.backout) <= 1, "backout", self.backout, "[] or one layer")
        fits = self.half_rotary or not self.key_offset
        require(fits, "key_offset", True, "false with half_rotary: false, under which no dimension is left for it")

    @property
    def dim(self) -> int:
        return self.num_heads * self.head_dim


ATTENTION_BACKENDS = ("auto", "flash_attn_4", "flash_attn_3", "flash_attn_2", "torch_varlen", "reference")


@dataclass(frozen=True)
class AttentionConfig:
    """Which kernels attention runs on; see docs/ATTENTION.md."""

    backend: str  # one of ATTENTION_BACKENDS
    require_flash_attn: bool  # refuse to run without one of the flash_attn_*

    def __post_init__(self) -> None:
        require(self.backend in ATTENTION_BACKENDS, "attention.backend", self.backend, ", ".join(ATTENTION_BACKENDS))
        fits = not self.require_flash_attn or self.backend == "auto" or self.backend.startswith("flash_attn")
        require(fits, "attention.require_flash_attn", True, f"false with attention.backend: {self.backend}")


@dataclass(frozen=True)
class MatrixMult:
    """A LR multiplier for the matrices of one name, in all blocks."""

    matrix: str
    mult: float


@dataclass(frozen=True)
class MuonConfig:
    lr: float
    lr_mults: tuple[MatrixMult, ...]
    orthogonalize: str  # polar_express or newton_schulz
    momentum: float  # Nesterov's, between its warm-up and its cooldown
    momentum_min: float  # where the warm-up starts and the cooldown ends
    momentum_warmup: int  # steps
    momentum_cooldown: int  # steps
    momentum_ramp_frac: float  # neither ramp is longer than this fraction of the horizon
    normuon: bool  # divide each row or column of the update by its running root mean square
    beta2: float  # of that root mean square
    weight_decay: float  # times the LR squared


IMPORTED_PREFIX = "imported-"  # of the run id of what was trained elsewhere; no rule trains anything of this name
NGRAM_PREFIX = "ngram-"  # of an n-gram teacher's run id; the rule that trains makes nothing of this name
ADAM_KINDS = ("embed", "head", "table", "scalar", "x0", "gate", "smear_gate", "skip_gate")


@dataclass(frozen=True)
class AdamGroup:
    """What the parameters of some kinds, as `GPT.kinds` names them, have to themselves."""

    kinds: tuple[str, ...]
    lr_mult: float
    beta1: float
    beta2: float
    decay_mult: float


@dataclass(frozen=True)
class AdamConfig:
    lr: float
    every: int  # steps; gradients are summed in between
    weight_decay: float  # times the LR squared
    groups: tuple[AdamGroup, ...]


@dataclass(frozen=True)
class OptimConfig:
    """Muon for the matrices of the blocks, Adam for the rest."""

    cautious_decay: bool  # decay only what the update shrinks too
    muon: MuonConfig
    adam: AdamConfig


@dataclass(frozen=True)
class BoostConfig:
    """The early LR boost: `mult` up to `hold_frac` of the horizon, then linearly to 1 at `drop_frac`."""

    mult: float
    hold_frac: float
    drop_frac: float


def _is_pair(windows: tuple[int, ...]) -> bool:
    return len(windows) == 2 and 1 <= windows[0] <= windows[1]


@dataclass(frozen=True)
class ScheduleConfig:
    """What happens at which step. The LR schedule is tied to `horizon`; `stop_step` may end a run early."""

    horizon: int  # steps
    stop_step: int  # steps really run: the horizon, or fewer for probes and timing isolates
    batch_tokens: tuple[int, ...]  # tokens a step, by equal stages of the horizon
    batch_lr: tuple[float, ...]  # LR multiplier of each stage
    micro_batch_tokens: int
    max_doc_tokens: int  # longer documents are cut
    cooldown_frac: float  # last part of the horizon, over which the LR falls linearly to lr_floor
    lr_floor: float  # fraction of the base LR
    lr_table: tuple[tuple[float, ...], ...]  # (from this fraction of the horizon on, LR multiplier), ...; () for none
    extension_frac: float  # very last part of the horizon, spent at lr_floor; stages and cooldown end before it
    windows: tuple[tuple[int, ...], ...]  # (short, long) in tokens for each stage; () for whole documents
    extension_windows: tuple[int, ...]  # the same for the extension; () for the last stage's
    final_windows: tuple[int, ...]  # the same for the last validation, and for a teacher at work; YaRN stays as it is
    mtp_weights: tuple[tuple[float, ...], ...]  # hard loss of the next tokens, at each stage's start; see schedule.py
    head_dtype: str  # of the logits' matrix products in training: same, or fp8
    lr_boost: BoostConfig | None

    def __post_init__(self) -> None:
        require(
            len(self.batch_lr) == len(self.batch_tokens),
            "train.batch_lr",
            self.batch_lr,
            "one multiplier for each stage in train.batch_tokens",
        )
        stages = len(self.batch_tokens)
        require(
            len(self.windows) in (0, stages) and all(map(_is_pair, self.windows)),
            "train.windows",
            self.windows,
            f"[], or for each of the {stages} stages in train.batch_tokens a pair [short, long] with short <= long",
        )
        for name in ("extension_windows", "final_windows"):
            pair = getattr(self, name)
            allowed = pair == () or (self.windows != () and _is_pair(pair))
            require(allowed, f"train.{name}", pair, "[], or with train.windows a pair [short, long] with short <= long")
        require(
            len(self.mtp_weights) in (1, stages) and len({len(row) for row in self.mtp_weights}) == 1,
            "train.mtp_weights",
            self.mtp_weights,
            f"one list, or {stages} of one length, one for each stage in train.batch_tokens",
        )
        starts = [row[0] for row in self.lr_table if len(row) == 2 and row[1] > 0]
        ordered = len(starts) == len(self.lr_table) and starts == sorted(set(starts))
        require(
            not self.lr_table or (ordered and starts[0] == 0.0 and starts[-1] < 1.0),
            "train.lr_table",
            self.lr_table,
            "[], or pairs [start, multiplier] from 0.0 on, ascending below 1, with multipliers above 0",
        )
        for row in self.mtp_weights:
            require(row and row[0] == 1.0 and min(row) >= 0.0, "train.mtp_weights", row, "1.0 first, none below 0")
        for tokens in self.batch_tokens:
            require(
                tokens % self.micro_batch_tokens == 0,
                "train.batch_tokens",
                tokens,
                f"multiples of train.micro_batch_tokens ({self.micro_batch_tokens})",
            )

    @property
    def scheduled(self) -> int:
        """Steps of the stages and the cooldown: the horizon less its extension."""
        return self.horizon - round(self.extension_frac * self.horizon)


@dataclass(frozen=True)
class ValidationConfig:
    every: int  # steps
    tokens: int
    slabs: bool  # the first tokens as they lie, in slabs of a micro-batch; or else documents, packed as in training
    stop_at: float | None  # nats: a run ends at the second of two validations in a row at or below this; None for never

    def cut(self, max_doc_tokens: int) -> int | None:
        """Tokens that a held-out document is cut to, as in training; None in slabs."""
        return None if self.slabs else max_doc_tokens


@dataclass(frozen=True)
class DataRef:
    """Which prepared data: the id names its folder under results/data/."""

    id: str
    vocab_size: int


@dataclass(frozen=True)
class NgramConfig:
    """Everything that decides an n-gram teacher: what is counted, what is kept of it, on what it is measured."""

    order: int  # 2: the next token given this one; 3: given this one and the one before
    entries: int  # tokens kept of each distribution; what they leave is the tail
    contexts: int  # pairs of tokens, the most frequent ones, that have a distribution of their own at order 3
    discount: float  # taken off each count, and given to the lower order
    tokens: int  # training tokens counted, from the first shard on
    data: DataRef
    validation: ValidationConfig
    micro_batch_tokens: int
    max_doc_tokens: int
    device: str
    clock: str
    modelled_tflops: float

    def __post_init__(self) -> None:
        require(self.order in (2, 3), "kd.ngram.orders", self.order, "2 and 3")
        require(0.0 < self.discount < 1.0, "kd.ngram.discount", self.discount, "above 0 and below 1")
        for name in ("entries", "contexts", "tokens"):
            require(getattr(self, name) >= 1, f"kd.ngram.{name}", getattr(self, name), "1 or more")

    # What the analysis asks of every run: it learned from no teacher, has no seed and no steps.
    kd = None
    seed = None
    horizon = 0

    @property
    def run_id(self) -> str:
        return f"{NGRAM_PREFIX}{self.order}-{short_hash(canonical_json(dataclasses.asdict(self)))}"


@dataclass(frozen=True)
class CacheConfig:
    """Everything that decides a cache of a teacher's targets: one pass over the micro-batches that a seed gives."""

    kind: str  # hidden, top_k or samples
    entries: int  # of a token: words of top_k, draws of samples; 0 for hidden
    temperature: float  # of top_k and samples; 1 for hidden, which fits any
    dtype: str  # of hidden's values: bf16 or fp8
    teacher: str  # run id
    teacher_dtype: str  # of the products in its layers: same, or fp8
    data: DataRef
    validation: ValidationConfig  # on which the teacher must score what it scored
    seed: int
    micro_batch_tokens: int
    max_doc_tokens: int
    attention: AttentionConfig  # as in the runs: another backend rounds otherwise
    micro_batches: int  # the first so many of a run
    device: str
    clock: str
    modelled_tflops: float

    def __post_init__(self) -> None:
        key, most = {"hidden": ("", 0), "top_k": ("kd.top_k", 2**16), "samples": ("kd.samples", 255)}[self.kind]
        allowed = f"1 to {most} with kd.cache: {self.kind}"
        require(self.kind == "hidden" or 1 <= self.entries <= most, key, self.entries, allowed)
        fits = self.kind == "hidden" or self.data.vocab_size <= 2**16
        require(fits, "kd.cache", self.kind, "hidden or none with more than 65,536 words")

    @property
    def cache_id(self) -> str:
        return f"{self.kind}-{short_hash(canonical_json(dataclasses.asdict(self)))}"


@dataclass(frozen=True)
class KDConfig:
    """Logits distillation of one run. total = (1 - alpha) * CE + alpha * norm * T^2 KL(teacher || student).

    What its fields mean together is in `kdclimb/distill.py`.
    """

    teacher: str  # run id of the teacher
    cache: str | None  # id of the cache of its targets; None for the teacher itself in each step
    random_teacher: bool  # control: the teacher's shape with fresh random weights
    infer_only: bool  # control: teacher forward only, no KD loss
    alpha: float
    alpha_schedule: str  # constant; linear: to 0 where KD's tokens end; lr: as the scheduled LR goes
    temperature: float
    dynamic_norm: bool  # scale the KL to the size of the CE
    norm_floor: float  # nats: KL below this is taken as this, so that the factor stays finite
    norm_max: float  # largest factor
    token_frac: float  # KD's part of the horizon's tokens, from the start
    every: int  # steps: KD in each so many
    micro_batches: int  # of a step, from its first, that have a teacher; 0 for all
    token_stride: int  # every so many tokens have a KD term
    token_gate: str  # which of these tokens: none (all), teacher_better or student_entropy; see sparsify.py
    token_gate_frac: float  # of the tokens, for student_entropy
    top_k: int  # a neural teacher's likeliest words alone; 0 for its whole distribution
    compile_teacher: bool  # on a GPU
    teacher_dtype: str  # of the products in the teacher's layers: same, or fp8
    logits_mib: int  # MiB for both sides' logits of a chunk; 0 for the loss's own choice
    tail: str  # of a sparse teacher: what its entries leave; see kernels/targets.py
    stop_mode: str  # val_margin, step or none
    stop_margin: float  # nats: KD stops when student val <= teacher val + margin
    stop_min_step: int  # steps
    stop_consecutive: int  # validations in a row within the margin
    stop_frac: float  # of the horizon, for the mode step
    teacher_val: float | None  # nats: what the margin is from; None for the teacher's own loss
    post_stop_lr: float  # LR multiplier after the KD stop
    post_stop_blend_steps: int  # steps from 1 down to post_stop_lr


@dataclass(frozen=True)
class PolicyConfig:
    """The LR of a KD run after its KD stop, for a run without KD. The boost is the schedule's, and ends with KD too."""

    run: str  # id of the KD run, whose stop step is taken
    post_stop_lr: float  # as in KDConfig
    post_stop_blend_steps: int


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides the outcome of one run."""

    model: ModelConfig
    data: DataRef
    optim: OptimConfig
    schedule: ScheduleConfig
    validation: ValidationConfig
    attention: AttentionConfig
    kd: KDConfig | None
    lr_policy: PolicyConfig | None  # of a KD run, where there is no teacher
    grown_from: str | None  # run id of the teacher whose weights the student starts with, as far as they fit
    label_smoothing: float  # weight of uniform labels in the hard loss, where there is no teacher
    seed: int
    device: str  # cpu or cuda
    clock: str  # measured or modelled
    modelled_tflops: float  # speed that the modelled clock charges; 0 under the measured clock
    anchor_steps: int  # of the anchor before and after the run; 0 for none, as under the modelled clock
    deterministic: bool = False  # on a GPU, where it takes time; a CPU's runs are in any case

    def to_dict(self) -> dict:
        return plain(self)

    def canonical(self) -> str:
        """The JSON text that the id is a hash of: sorted keys, no NaN, floats in repr form."""
        return canonical_json(self.to_dict())

    @property
    def run_id(self) -> str:
        """Readable slug plus 12 hex digits. The slug is decoration: nothing parses it."""
        model, schedule, kd = self.model, self.schedule, self.kd
        kind = "ce" if kd is None else "infer" if kd.infer_only else "rand" if kd.random_teacher else "kd"
        kind += "lr" if self.lr_policy else "grown" if self.grown_from else ""
        kind = f"{kind}ls{self.label_smoothing:g}" if self.label_smoothing else kind
        slug = f"{kind}-{model.num_layers}x{model.dim}-{schedule.horizon}"
        if schedule.stop_step != schedule.horizon:
            slug += f"p{schedule.stop_step}"
        if kd is not None and not kd.infer_only:
            slug += f"-t{kd.temperature:g}"
        if schedule.lr_boost is not None:
            slug += f"-b{schedule.lr_boost.mult:g}"
        return f"{slug}-s{self.seed}-{short_hash(self.canonical())}"

    @classmethod
    def from_dict(cls, values: dict) -> RunConfig:
        return build(cls, values)


def plain(value):
    """As `dataclasses.asdict`, without fields at their default: what was before such a field keeps its id."""
    if isinstance(value, tuple):
        return tuple(map(plain, value))
    if not dataclasses.is_dataclass(value):
        return value
    there = [(f, getattr(value, f.name)) for f in dataclasses.fields(value)]
    return {f.name: plain(found) for f, found in there if found != f.default}


def canonical_json(value) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
