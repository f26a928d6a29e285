"""A campaign: its validated config, and the pure expansion of it into runs.

`load` turns the merged YAML into a frozen `Campaign`; `expand(campaign, decisions)` lists every run
that can be named so far, where `decisions` are the JSON files that the checkpoints wrote. No torch
and no I/O beyond the config's own files and what kdclimb.sources looks up: the Snakefile calls this
each time it is parsed.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import jsonschema
import yaml

from kdclimb import sources, supply
from kdclimb.config import (
    ADAM_KINDS,
    AttentionConfig,
    BoostConfig,
    CacheConfig,
    ConfigError,
    DataRef,
    KDConfig,
    ModelConfig,
    NgramConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    ValidationConfig,
    build,
    canonical_json,
    require,
    short_hash,
)
from kdclimb.imported import COMMAND, read_config
from kdclimb.schedule import kd_tokens, total_tokens
from kdclimb.text import list_files
from kdclimb.tokenizer import GPT2_VOCAB_SIZE

LOCKED_VALIDATION_EVERY = 25  # steps
LOCKED_BUDGET_FRACTION = 0.10
LAYER_LISTS = ("long_layers", "attention_free_layers", "paired_layers", "value_layers", "skip", "backout")
DECISIONS = ("projected", "selected", "promoted")  # what expand() needs to know, in the order it is decided


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
    softcap: tuple[float, ...]
    attention_scale: float
    long_layers: tuple[int, ...]
    attention_free_layers: tuple[int, ...]
    paired_layers: tuple[int, ...]
    value_layers: tuple[int, ...]
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


@dataclass(frozen=True)
class BaselineSection:
    source: str
    log: str | None
    imports: tuple[str, ...]  # run ids


@dataclass(frozen=True)
class BudgetSection:
    fraction: float
    clock: str
    modelled_tflops: float


@dataclass(frozen=True)
class Candidate:
    num_layers: int
    num_heads: int
    head_dim: int
    steps: int

    @property
    def name(self) -> str:
        return f"L{self.num_layers}-H{self.num_heads}-D{self.head_dim}-{self.steps}"


@dataclass(frozen=True)
class TeacherSection:
    exploratory: bool
    bigram_vocab_size: int
    value_layers: tuple[int, ...]
    probe_steps: int
    candidates: tuple[Candidate, ...]
    imported: tuple[str, ...]  # run ids


@dataclass(frozen=True)
class GridSection:
    temperature: tuple[float, ...]
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
class ControlsSection:
    lr_policy: bool
    label_smoothing: float
    extra_steps: bool
    random_teacher: bool


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
    verdict: VerdictSection

    @property
    def exploratory(self) -> bool:
        return self.kd.exploratory or self.teacher.exploratory

    @property
    def results(self) -> str:
        return f"results/{self.campaign}"


@dataclass(frozen=True)
class Run:
    """One run and its place in the campaign: `arm` is the stage that asks for it, `label` what sets it apart there."""

    arm: str
    label: str
    config: RunConfig | NgramConfig

    @property
    def run_id(self) -> str:
        return self.config.run_id


def schema_path() -> Path:
    return Path(__file__).resolve().parent.parent / "config" / "schema.yaml"


def load(config: dict, root: Path) -> Campaign:
    """Validate the merged config against the schema, the dataclasses, the shapes and the locks.

    Raises ConfigError that names the key, the value and what is allowed. `root` is the project
    folder that paths in the config start from. `device: auto` is resolved here.
    """
    schema = yaml.safe_load(schema_path().read_text())
    errors = jsonschema.Draft202012Validator(schema).iter_errors(config)
    for error in sorted(errors, key=lambda e: (len(e.absolute_path), str(e.absolute_path))):
        raise ConfigError(_explain(error))
    campaign = build(Campaign, config)
    _check_locks(campaign)
    _check_shapes(campaign)
    _check_mirror(campaign, root)
    _check_baseline(campaign, root)
    _check_data(campaign.data, root)
    if campaign.device == "auto":
        campaign = dataclasses.replace(campaign, device=detect_device())
    return campaign


def _explain(error: jsonschema.ValidationError) -> str:
    key = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in error.absolute_path).lstrip(".")
    if error.validator == "additionalProperties":
        known = error.schema["properties"]
        unknown = sorted(set(error.instance) - set(known))
        where = f"{key}.{unknown[0]}" if key else unknown[0]
        return f"{where}: unknown key; allowed here: {', '.join(sorted(known))}"
    if error.validator == "required":
        return f"{key}: {error.message}"
    if error.validator == "type" and isinstance(error.validator_value, list):
        return (
            f"{key}: {error.instance!r} is not allowed; allowed: a value of type {' or '.join(error.validator_value)}"
        )
    allowed = {
        "type": "a value of type {}",
        "enum": "one of {}",
        "multipleOf": "a multiple of {}",
        "pattern": "text matching {}",
    }
    text = allowed.get(error.validator, error.validator + " {}").format(error.validator_value)
    return f"{key}: {error.instance!r} is not allowed; allowed: {text}"


def detect_device() -> str:
    """cuda where nvidia-smi lists a GPU, else cpu. Without torch, since the Snakefile asks at every parse."""
    if shutil.which("nvidia-smi") is None:
        return "cpu"
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return "cuda" if listed.returncode == 0 and listed.stdout.startswith("GPU") else "cpu"


def _check_data(data: DataSection, root: Path) -> None:
    if data.source != "text":
        return
    list_files(data.text.files, root)
    if data.tokenizer.kind == "gpt2":
        least = f"at least {GPT2_VOCAB_SIZE}, above every id of GPT-2's, under data.tokenizer.kind: gpt2"
        require(data.vocab_size >= GPT2_VOCAB_SIZE, "data.vocab_size", data.vocab_size, least)
        ranks = data.tokenizer.ranks
        is_there = ranks is None or (root / Path(ranks).expanduser()).is_file()
        require(is_there, "data.tokenizer.ranks", ranks, "a file that exists, or null")


def _check_shapes(campaign: Campaign) -> None:
    train, kd = campaign.train, campaign.kd
    require(list(train.horizons) == sorted(train.horizons), "train.horizons", list(train.horizons), "ascending steps")
    require(
        train.horizons[0] >= 2 * campaign.validation.every,
        "train.horizons",
        list(train.horizons),
        f"at least {2 * campaign.validation.every} steps, two validations, so that a target can be confirmed",
    )
    require(
        train.max_doc_tokens <= train.micro_batch_tokens,
        "train.max_doc_tokens",
        train.max_doc_tokens,
        f"at most train.micro_batch_tokens ({train.micro_batch_tokens})",
    )
    kinds = [kind for group in campaign.optim.adam.groups for kind in group.kinds]
    require(
        sorted(kinds) == sorted(ADAM_KINDS),
        "optim.adam.groups",
        kinds,
        f"each kind in one group, and all of {', '.join(ADAM_KINDS)}",
    )
    for i, candidate in enumerate(campaign.teacher.candidates):
        require(
            candidate.steps > campaign.teacher.probe_steps,
            f"teacher.candidates[{i}].steps",
            candidate.steps,
            f"more than teacher.probe_steps ({campaign.teacher.probe_steps})",
        )
    require(
        max(kd.grid.hold_frac) < min(kd.grid.drop_frac),
        "kd.grid.drop_frac",
        list(kd.grid.drop_frac),
        f"above every kd.grid.hold_frac ({list(kd.grid.hold_frac)})",
    )
    require(
        kd.screen_seed not in train.seeds,
        "kd.screen_seed",
        kd.screen_seed,
        f"none of train.seeds {list(train.seeds)}, which judge what the screen chose",
    )
    require(
        kd.isolate_steps <= train.horizons[0],
        "kd.isolate_steps",
        kd.isolate_steps,
        f"at most the first horizon ({train.horizons[0]})",
    )
    expand(campaign, {})  # constructs, and so checks, every shape


def mirror_root(campaign: Campaign, root: Path) -> Path | None:
    """The folder that `paths.mirror` names, in which results/ is copied; None if it names none."""
    mirror = campaign.paths.mirror
    return None if mirror is None else root / os.path.expanduser(mirror)


def _check_mirror(campaign: Campaign, root: Path) -> None:
    mirror = mirror_root(campaign, root)
    if mirror is None:
        return
    results, copy = (root / "results").resolve(), (mirror / "results").resolve()
    require(
        not copy.is_relative_to(results) and (os.path.isdir(mirror) or not os.path.exists(mirror)),
        "paths.mirror",
        campaign.paths.mirror,
        f"null, or a folder outside {results} whose own results/ is another",
    )


def _check_baseline(campaign: Campaign, root: Path) -> None:
    baseline = campaign.baseline
    if baseline.source != "log":
        return
    is_there = baseline.log is not None and (root / Path(baseline.log).expanduser()).is_file()
    require(is_there, "baseline.log", baseline.log, "a training log that exists, under baseline.source: log")
    require(
        not campaign.controls.extra_steps,
        "controls.extra_steps",
        True,
        "false under baseline.source: log, whose time of a step is another machine's",
    )


def check_logs(campaign: Campaign, results: Path) -> None:
    """Raise ConfigError unless each of baseline.imports lies under `results`/runs."""
    for run_id in campaign.baseline.imports:
        folder = results / "runs" / run_id
        if not (folder / "status.json").is_file():
            raise ConfigError(
                f"baseline.imports: {folder} holds no import; it is made by: python -m kdclimb import LOG"
            )


def _check_locks(campaign: Campaign) -> None:
    lock = "locked, so that campaigns compare; {} lifts it, and nothing is then a claim"
    require(
        campaign.validation.every == LOCKED_VALIDATION_EVERY
        or (campaign.kd.exploratory and campaign.teacher.exploratory),
        "validation.every",
        campaign.validation.every,
        f"{LOCKED_VALIDATION_EVERY} ({lock.format('exploratory: true in both kd and teacher')})",
    )
    require(
        campaign.validation.stop_at is None or (campaign.kd.exploratory and campaign.teacher.exploratory),
        "validation.stop_at",
        campaign.validation.stop_at,
        f"null ({lock.format('exploratory: true in both kd and teacher')})",
    )
    require(
        campaign.budget.fraction <= LOCKED_BUDGET_FRACTION or campaign.teacher.exploratory,
        "budget.fraction",
        campaign.budget.fraction,
        f"at most {LOCKED_BUDGET_FRACTION} ({lock.format('teacher.exploratory: true')})",
    )
    require(
        campaign.kd.dynamic_norm or campaign.kd.exploratory,
        "kd.dynamic_norm",
        campaign.kd.dynamic_norm,
        f"true ({lock.format('kd.exploratory: true')})",
    )


def data_spec(campaign: Campaign, root: Path) -> dict:
    return sources.data_spec(campaign.data, root)


def data_id(campaign: Campaign, root: Path) -> str:
    return f"{campaign.data.source}-{campaign.data.vocab_size}-{short_hash(canonical_json(data_spec(campaign, root)))}"


def token_needs(campaign: Campaign) -> supply.Needs:
    """What the campaign asks of its data: no run is longer than CE, CE with extra steps and the candidates in full."""
    train, longest = campaign.train, {}
    everyone = {"projected": {"survivors": [c.name for c in campaign.teacher.candidates]}}
    whole = {"train_time_ms": campaign.budget.fraction, "budget_ms": campaign.budget.fraction}  # a teacher's, at most
    for run in expand(campaign, everyone) + _Expansion(campaign, "unprepared").extended(whole):
        schedule = run.config.schedule
        tokens = total_tokens(schedule, schedule.stop_step)
        what, key = (run.label, "train.horizons") if run.arm == "ce" else (f"teacher {run.label}", "teacher.candidates")
        if run.arm == "control_extra":
            what, key = f"CE with {run.label}", "train.horizons (controls.extra_steps adds to the last)"
        found = supply.Longest(what, key, run.config.seed, tokens)
        longest[found.seed] = max(longest.get(found.seed, found), found, key=lambda run: run.tokens)
    return supply.Needs(
        batch_tokens=train.micro_batch_tokens,
        max_doc_tokens=train.max_doc_tokens,
        max_epochs=campaign.data.max_epochs,
        val_tokens=campaign.validation.tokens,
        runs=tuple(longest.values()),
    )


def token_supply(campaign: Campaign, root: Path, results: Path) -> supply.Supply:
    """The tokens that there are: exactly, once the data are prepared under `results`; before, or where a bundle brought
    their manifest alone, at most.

    Raises ValueError for a shard with a wrong header.
    """
    spec, needs = data_spec(campaign, root), token_needs(campaign)
    folder = results / "data" / data_id(campaign, root)
    if (folder / "manifest.json").is_file() and all(
        (folder / supply.LENGTHS.format(p)).is_file() for p in sources.PARTS
    ):
        return supply.prepared(needs, folder)
    return supply.at_most(needs, sources.most_tokens(spec, root))


def check_tokens(campaign: Campaign, root: Path, results: Path) -> None:
    """Raise ValueError, in one line that names the keys to change, if there are fewer tokens than are needed.

    Where few data are short because something is wrong with a file, the line is about that.
    """
    try:
        supply.check(token_needs(campaign), token_supply(campaign, root, results), campaign.data.source)
    except ValueError:
        sources.check_small(data_spec(campaign, root), root)
        raise


def read_decisions(folder: Path) -> dict:
    """The decisions taken so far: {name: contents} of the JSON files under results/<campaign>/ that exist."""
    files = {"projected": "teacher/projected.json", "selected": "teacher/selected.json", "promoted": "kd/promoted.json"}
    return {
        name: json.loads((folder / files[name]).read_text()) for name in DECISIONS if (folder / files[name]).is_file()
    }


def check_imported(campaign: Campaign, data: str, results: Path) -> None:
    """Raise ConfigError unless each of teacher.imported lies under `results`/runs and was measured on `data` (a data
    id), and on the validation set and packing of this campaign.
    """
    asked = {
        "data": data,
        "device": campaign.device,
        "validation.tokens": campaign.validation.tokens,
        "train.micro_batch_tokens": campaign.train.micro_batch_tokens,
        "train.max_doc_tokens": campaign.train.max_doc_tokens,
    }
    for run_id in campaign.teacher.imported:
        folder = results / "runs" / run_id
        if not (folder / "status.json").is_file():
            raise ConfigError(f"teacher.imported: {folder} holds no finished import; it is made by: {COMMAND}")
        found = read_config(json.loads((folder / "config.json").read_text())).measured_on()
        for key, value in asked.items():
            if found[key] != value:
                raise ConfigError(
                    f"teacher.imported: {run_id} was measured with {key} {found[key]}, but this campaign has {value}; "
                    "import it again with this campaign's --configfile"
                )


def expand(campaign: Campaign, decisions: dict, data: str = "unprepared") -> list[Run]:
    """Every run that the campaign names, given the decisions taken so far. Pure.

    Arms, in order: ce, ngram, probe; teacher (needs `projected`); isolate, screen (need `selected`); kd, control_boost,
    control_random, control_smooth, control_extra (need `promoted`). A decision that speaks of something the config
    no longer holds expands to nothing. Runs that several arms share appear once for each. Teachers that no training
    makes are not among them: `teacher.imported` and `tables` name them.
    """
    return _expand(campaign, decisions, data).runs


def caches(campaign: Campaign, decisions: dict, data: str = "unprepared") -> dict[str, CacheConfig]:
    """{id: the cache of teacher targets} of all that the runs of `expand` read. Pure."""
    return _expand(campaign, decisions, data).caches


@dataclass(frozen=True)
class _Expanded:
    runs: list[Run]
    caches: dict[str, CacheConfig]


def _expand(campaign: Campaign, decisions: dict, data: str) -> _Expanded:
    runs = _Expansion(campaign, data)
    arms = runs.ce() + runs.from_ngrams() + runs.teachers("probe", campaign.teacher.candidates)
    surviving = set(decisions.get("projected", {}).get("survivors", ()))
    arms += runs.teachers("teacher", [c for c in campaign.teacher.candidates if c.name in surviving])
    teacher = decisions.get("selected", {}).get("run_id")
    if teacher not in {*campaign.teacher.imported, *(run.run_id for run in arms if run.arm == "teacher")}:
        return _Expanded(arms, runs.caches)
    arms += runs.isolates(teacher) + runs.screen(teacher)
    promoted = set(decisions.get("promoted", {}).get("points", ()))
    if promoted.intersection(point.name for point in grid_points(campaign.kd.grid)):
        arms += runs.promoted(teacher, promoted) + runs.smoothed()
        arms += runs.extended(decisions["selected"])
    return _Expanded(arms, runs.caches)


def tables(campaign: Campaign, data: str = "unprepared") -> list[Run]:
    """The n-gram teachers of the arm `ngram`, which are counted, not trained. Pure."""
    return _Expansion(campaign, data).tables()


@dataclass(frozen=True)
class Point:
    """One point of the KD grid. Without a boost, hold and drop mean nothing and are left out."""

    temperature: float
    lr_boost: BoostConfig | None

    @property
    def name(self) -> str:
        boost = self.lr_boost
        tail = "" if boost is None else f"-boost{boost.mult:g}-hold{boost.hold_frac:g}-drop{boost.drop_frac:g}"
        return f"T{self.temperature:g}{tail}"


def grid_points(grid: GridSection) -> list[Point]:
    points = []
    for temperature, mult, hold, drop in itertools.product(
        grid.temperature, grid.lr_boost, grid.hold_frac, grid.drop_frac
    ):
        point = Point(temperature, None if mult == 1.0 else BoostConfig(mult, hold, drop))
        if point not in points:
            points.append(point)
    return points


def _from_start(layers: tuple[int, ...], num_layers: int) -> tuple[int, ...]:
    """Layers counted from the start, where -1 is the last one."""
    return tuple(i + num_layers if i < 0 else i for i in layers)


class _Expansion:
    """Builds run configs that differ only in what their arm is about."""

    def __init__(self, campaign: Campaign, data: str):
        self.campaign = campaign
        train = campaign.train
        self.first, self.last = train.horizons[0], train.horizons[-1]
        self.data = DataRef(data, campaign.data.vocab_size)
        self.caches: dict[str, CacheConfig] = {}  # of the runs made so far

    def student(self) -> ModelConfig:
        student, layers = self.campaign.student, self.campaign.student.num_layers
        counted = {name: _from_start(getattr(student, name), layers) for name in LAYER_LISTS}
        return ModelConfig(vocab_size=self.data.vocab_size, **dataclasses.asdict(student) | counted)

    def teacher(self, shape: Candidate) -> ModelConfig:
        """The student's parts at the candidate's shape, as far as it has such layers; tables are the teacher's own.

        Attention-free layers, skip and backout fit one depth and are left out: a teacher costs what its shape says.
        """
        student, section, layers = self.campaign.student, self.campaign.teacher, shape.num_layers
        lists = {name: getattr(student, name) for name in ("long_layers", "paired_layers")}
        lists["value_layers"] = section.value_layers
        counted = {
            name: tuple(dict.fromkeys(i for i in _from_start(values, layers) if 0 <= i < layers))
            for name, values in lists.items()
        }
        changes = {
            "attention_free_layers": (),
            "skip": (),
            "backout": (),
            "bigram_vocab_size": section.bigram_vocab_size,
        }
        shapes = {"num_layers": layers, "num_heads": shape.num_heads, "head_dim": shape.head_dim}
        return ModelConfig(vocab_size=self.data.vocab_size, **dataclasses.asdict(student) | counted | changes | shapes)

    def run(
        self, arm, label, *, horizon, seed, model=None, stop_step=None, boost=None, kd=None, cached=False,
        label_smoothing=0.0,
    ) -> Run:  # fmt: skip
        campaign, train = self.campaign, self.campaign.train
        schedule = ScheduleConfig(
            horizon=horizon,
            stop_step=horizon if stop_step is None else stop_step,
            batch_tokens=train.batch_tokens,
            batch_lr=train.batch_lr,
            micro_batch_tokens=train.micro_batch_tokens,
            max_doc_tokens=train.max_doc_tokens,
            cooldown_frac=train.cooldown_frac,
            lr_floor=train.lr_floor,
            lr_table=train.lr_table,
            extension_frac=train.extension_frac,
            windows=train.windows,
            extension_windows=train.extension_windows,
            final_windows=train.final_windows,
            mtp_weights=train.mtp_weights,
            head_dtype=train.head_dtype,
            lr_boost=boost,
        )
        if cached and campaign.kd.cache != "none":
            kd = self.from_cache(kd, schedule, seed)
        config = RunConfig(
            model=model or self.student(),
            optim=campaign.optim,
            schedule=schedule,
            attention=campaign.attention,
            kd=kd,
            label_smoothing=label_smoothing,
            seed=seed,
            **self.shared(),
        )
        return Run(arm, label, config)

    def from_cache(self, kd: KDConfig, schedule: ScheduleConfig, seed: int) -> KDConfig:
        """The same KD with its teacher's targets from a cache."""
        section = self.campaign.kd
        kind, sparse = section.cache, section.cache != "hidden"
        cache = CacheConfig(
            kind=kind,
            entries={"hidden": 0, "top_k": kd.top_k, "samples": section.samples}[kind],
            temperature=kd.temperature if sparse else 1.0,
            teacher=kd.teacher,
            seed=seed,
            micro_batch_tokens=schedule.micro_batch_tokens,
            max_doc_tokens=schedule.max_doc_tokens,
            attention=self.campaign.attention,
            micro_batches=kd_tokens(schedule, kd) // schedule.micro_batch_tokens,
            **self.shared(),
        )
        if not cache.micro_batches:
            return kd
        self.caches[cache.cache_id] = cache
        return dataclasses.replace(kd, cache=cache.cache_id)

    def shared(self) -> dict:
        """What every config has, a counted teacher's too."""
        campaign, budget = self.campaign, self.campaign.budget
        return {
            "data": self.data,
            "validation": campaign.validation,
            "device": campaign.device,
            "clock": budget.clock,
            "modelled_tflops": budget.modelled_tflops if budget.clock == "modelled" else 0.0,
        }

    def kd(self, teacher: str, temperature: float, *, random_teacher=False, infer_only=False) -> KDConfig:
        shared = {f.name for f in dataclasses.fields(KDConfig)} & {f.name for f in dataclasses.fields(KDSection)}
        shared.remove("cache")  # an id in the one, a kind in the other
        values = {name: getattr(self.campaign.kd, name) for name in shared}
        values |= {"teacher": teacher, "cache": None, "temperature": temperature}
        return KDConfig(random_teacher=random_teacher, infer_only=infer_only, **values)

    def ce(self) -> list[Run]:
        """At every horizon with every seed, and once for the screen to be held against."""
        train = self.campaign.train
        pairs = [*itertools.product(train.horizons, train.seeds), (self.first, self.campaign.kd.screen_seed)]
        return [self.run("ce", f"CE {horizon}", horizon=horizon, seed=seed) for horizon, seed in pairs]

    def tables(self) -> list[Run]:
        section, train = self.campaign.kd.ngram, self.campaign.train
        counted = {name: getattr(section, name) for name in ("entries", "contexts", "discount", "tokens")}
        packing = {name: getattr(train, name) for name in ("micro_batch_tokens", "max_doc_tokens")}
        return [
            Run("ngram_teacher", f"{order}-gram", NgramConfig(order=order, **counted, **packing, **self.shared()))
            for order in section.orders
        ]

    def from_ngrams(self) -> list[Run]:
        """KD from n-gram teachers at the last horizon, for its first tokens only and with the LR of CE throughout."""
        runs, seeds = [], self.campaign.train.seeds
        for table, share in itertools.product(self.tables(), self.campaign.kd.ngram.token_frac):
            kd = dataclasses.replace(self.kd(table.run_id, 1.0), token_frac=share, post_stop_lr=1.0, top_k=0)
            label = f"{table.label}-first{share:g}"
            runs += [self.run("ngram", label, horizon=self.last, seed=seed, kd=kd) for seed in seeds]
        return runs

    def teachers(self, arm: str, candidates) -> list[Run]:
        section, seed = self.campaign.teacher, self.campaign.train.seeds[0]
        runs = []
        for c in candidates:
            model = self.teacher(c)
            stop = section.probe_steps if arm == "probe" else None
            runs.append(self.run(arm, c.name, horizon=c.steps, seed=seed, model=model, stop_step=stop))
        return runs

    def isolates(self, teacher: str) -> list[Run]:
        temperature = self.campaign.kd.grid.temperature[0]
        modes = {
            "CE only": None,
            "CE + teacher inference": self.kd(teacher, temperature, infer_only=True),
            "CE + KD": self.kd(teacher, temperature),
        }
        seed, stop = self.campaign.train.seeds[0], self.campaign.kd.isolate_steps
        return [
            self.run("isolate", label, horizon=self.first, seed=seed, stop_step=stop, kd=kd, cached=label == "CE + KD")
            for label, kd in modes.items()
        ]

    def screen(self, teacher: str) -> list[Run]:
        options = {"horizon": self.first, "seed": self.campaign.kd.screen_seed, "cached": True}
        return [
            self.run("screen", p.name, boost=p.lr_boost, kd=self.kd(teacher, p.temperature), **options)
            for p in grid_points(self.campaign.kd.grid)
        ]

    def promoted(self, teacher: str, names: set[str]) -> list[Run]:
        seeds, controls = self.campaign.train.seeds, self.campaign.controls
        kd, boosted, random = [], [], []
        for p in grid_points(self.campaign.kd.grid):
            if p.name not in names:
                continue
            config = self.kd(teacher, p.temperature)
            kd += [
                self.run("kd", p.name, horizon=horizon, seed=s, boost=p.lr_boost, kd=config, cached=True)
                for horizon, s in itertools.product(reversed(self.campaign.train.horizons), seeds)
            ]
            if p.lr_boost is not None and controls.lr_policy:
                boosted += [
                    self.run("control_boost", p.name, horizon=self.last, seed=s, boost=p.lr_boost) for s in seeds
                ]
            if controls.random_teacher:
                where = {"horizon": self.first, "seed": self.campaign.kd.screen_seed, "boost": p.lr_boost}
                config = self.kd(teacher, p.temperature, random_teacher=True)
                random.append(self.run("control_random", p.name, kd=config, **where))
        return kd + boosted + random

    def smoothed(self) -> list[Run]:
        weight = self.campaign.controls.label_smoothing
        runs = [
            self.run("control_smooth", f"smoothing {weight:g}", horizon=self.last, seed=seed, label_smoothing=weight)
            for seed in self.campaign.train.seeds
        ]
        return runs if weight else []

    def extended(self, selected: dict) -> list[Run]:
        """CE whose horizon is longer by as many steps as CE makes in the time that the teacher took."""
        if not self.campaign.controls.extra_steps:
            return []
        ce_ms = selected["budget_ms"] / self.campaign.budget.fraction  # at the last horizon
        extra = round(self.last * selected["train_time_ms"] / ce_ms)
        return [
            self.run("control_extra", f"{extra} more steps", horizon=self.last + extra, seed=seed)
            for seed in self.campaign.train.seeds
        ]
