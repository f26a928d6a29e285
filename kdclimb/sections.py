"""The sections of a campaign's config, one frozen dataclass for each; `config/schema.yaml` says what they may hold."""

from __future__ import annotations

from dataclasses import dataclass

from kdclimb.config import AttentionConfig, OptimConfig, ValidationConfig


@dataclass(frozen=True)
class TextSection:
    files: tuple[str, ...]
    field: str
    max_doc_chars: int
    val_fraction: float
    seed: int


@dataclass(frozen=True)
class TokenizerSection:
    kind: str
    train_bytes: int
    ranks: str | None


@dataclass(frozen=True)
class HubSection:
    repo: str
    revision: str
    train_shards: int


@dataclass(frozen=True)
class ShardsSection:
    train: str
    val: str
    bos_id: int
    hub: HubSection


@dataclass(frozen=True)
class PathsSection:
    mirror: str | None


@dataclass(frozen=True)
class ClusterSection:
    points_per_job: int
    tokens_per_job: int
    compile_cache: str | None


@dataclass(frozen=True)
class DataSection:
    source: str
    vocab_size: int
    max_epochs: int
    text: TextSection
    tokenizer: TokenizerSection
    shards: ShardsSection


@dataclass(frozen=True)
class StudentSection:
    num_layers: int
    num_heads: int
    head_dim: int
    bigram_vocab_size: int
    untie_frac: float
    softcap: tuple[float, ...] | None
    attention_scale: float
    qk_norm: bool
    half_rotary: bool
    long_layers: tuple[int, ...]
    attention_free_layers: tuple[int, ...]
    paired_layers: tuple[int, ...]
    value_layers: tuple[int, ...]
    value_gate: str
    skip: tuple[int, ...]
    backout: tuple[int, ...]
    x0: bool
    attention_gate: bool
    key_offset: bool
    smear: bool
    qkvo_factors: bool
    yarn: bool


@dataclass(frozen=True)
class TrainSection:
    horizons: tuple[int, ...]
    seeds: tuple[int, ...]
    batch_tokens: tuple[int, ...]
    batch_lr: tuple[float, ...]
    micro_batch_tokens: int
    max_doc_tokens: int
    cooldown_frac: float
    lr_floor: float
    lr_table: tuple[tuple[float, ...], ...]
    extension_frac: float
    windows: tuple[tuple[int, ...], ...]
    extension_windows: tuple[int, ...]
    final_windows: tuple[int, ...]
    mtp_weights: tuple[tuple[float, ...], ...]
    head_dtype: str
    deterministic: bool


@dataclass(frozen=True)
class BaselineSection:
    source: str
    log: str | None
    imports: tuple[str, ...]  # run ids


@dataclass(frozen=True)
class BudgetSection:
    fraction: float
    horizon: int | None
    clock: str
    modelled_tflops: float


@dataclass(frozen=True)
class Candidate:
    num_layers: int
    num_heads: int
    head_dim: int
    steps: int
    batch_tokens: tuple[int, ...] = ()  # by stages, as in train; () for the student's
    batch_lr: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        name = f"L{self.num_layers}-H{self.num_heads}-D{self.head_dim}-{self.steps}"
        for letters, stages in (("B", self.batch_tokens), ("LR", self.batch_lr)):
            told = stages[:1] if len(set(stages)) == 1 else stages
            name += f"-{letters}{'.'.join(map(str, told))}" if stages else ""
        return name


@dataclass(frozen=True)
class TeacherSection:
    exploratory: bool
    bigram_vocab_size: int
    value_layers: tuple[int, ...]
    seed: int | None
    probe_steps: int
    candidates: tuple[Candidate, ...]
    imported: tuple[str, ...]  # run ids


@dataclass(frozen=True)
class GridSection:
    temperature: tuple[float, ...]
    alpha: tuple[float, ...]
    token_frac: tuple[float, ...]
    lr_boost: tuple[float, ...]
    hold_frac: tuple[float, ...]
    drop_frac: tuple[float, ...]


@dataclass(frozen=True)
class NgramSection:
    orders: tuple[int, ...]
    token_frac: tuple[float, ...]
    entries: int
    contexts: int
    discount: float
    tokens: int


@dataclass(frozen=True)
class KDSection:
    exploratory: bool
    cache: str
    cache_dtype: str
    samples: int
    alpha: float
    alpha_schedule: str
    dynamic_norm: bool
    norm_floor: float
    norm_max: float
    token_frac: float
    every: int
    micro_batches: int
    token_stride: int
    token_gate: str
    token_gate_frac: float
    top_k: int
    compile_teacher: bool
    teacher_dtype: str
    logits_mib: int
    tail: str
    stop_mode: str
    stop_margin: float
    stop_min_step: int
    stop_consecutive: int
    stop_frac: float
    teacher_val: float | None
    post_stop_lr: float
    post_stop_blend_steps: int
    isolate_steps: int
    screen_seed: int
    promote: int
    ngram: NgramSection
    grid: GridSection


@dataclass(frozen=True)
class CEGridSection:
    lr_mult: tuple[float, ...]
    lr_boost: tuple[float, ...]
    hold_frac: tuple[float, ...]
    drop_frac: tuple[float, ...]


@dataclass(frozen=True)
class ControlsSection:
    ce_grid: CEGridSection
    lr_policy: bool
    growth: bool
    label_smoothing: float
    smaller_batches: float
    extra_steps: bool
    extra_steps_each: tuple[int, ...]
    random_teacher: bool


@dataclass(frozen=True)
class AnchorSection:
    steps: int
    max_drift: float


@dataclass(frozen=True)
class VerdictSection:
    targets: tuple[float, ...]
    confidence: float
    p_value: float
    power: float
    amortize: int


@dataclass(frozen=True)
class Campaign:
    """The whole config of a campaign; one attribute for each top-level key of the YAML."""

    campaign: str
    device: str
    code: str
    weights: str
    paths: PathsSection
    cluster: ClusterSection
    data: DataSection
    student: StudentSection
    train: TrainSection
    optim: OptimConfig
    attention: AttentionConfig
    validation: ValidationConfig
    baseline: BaselineSection
    budget: BudgetSection
    teacher: TeacherSection
    kd: KDSection
    controls: ControlsSection
    anchor: AnchorSection
    verdict: VerdictSection

    @property
    def exploratory(self) -> bool:
        return self.kd.exploratory or self.teacher.exploratory

    @property
    def results(self) -> str:
        return f"results/{self.campaign}"
