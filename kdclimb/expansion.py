"""The pure expansion of a campaign into runs, teachers' caches and n-gram tables.

`expand(campaign, decisions)` lists every run that can be named so far, where `decisions` are the JSON files that the
checkpoints wrote. No torch and no I/O: the Snakefile calls this each time it is parsed.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from functools import cached_property

from kdclimb.config import (
    BoostConfig,
    CacheConfig,
    ConfigError,
    DataRef,
    KDConfig,
    ModelConfig,
    NgramConfig,
    OptimConfig,
    PolicyConfig,
    RunConfig,
    ScheduleConfig,
    short_hash,
)
from kdclimb.schedule import kd_tokens, total_tokens
from kdclimb.sections import Campaign, Candidate, CEGridSection, GridSection, KDSection

MOST_RUNS = 24  # of a job: their configs are one argument of its command, which Linux ends at 128 KiB
UNKEPT = {  # arms whose runs leave no weights, by `weights`; under `teachers` all but theirs
    "all": (),
    "full": ("probe", "isolate", "screen", "ce_screen", "control_random"),
}
LAYER_LISTS = ("long_layers", "attention_free_layers", "paired_layers", "value_layers", "skip", "backout")


@dataclass(frozen=True)
class Run:
    """One run and its place in the campaign: `arm` is the stage that asks for it, `label` what sets it apart there."""

    arm: str
    label: str
    config: RunConfig | NgramConfig

    @cached_property  # a wide campaign asks for it tens of thousands of times
    def run_id(self) -> str:
        return self.config.run_id


def expand(campaign: Campaign, decisions: dict, data: str = "unprepared") -> list[Run]:
    """Every run that the campaign names, given the decisions taken so far. Pure.

    Arms, in order: ce, ce_screen, ngram, probe; teacher (needs `projected`); isolate, screen (need `selected`); kd,
    control_boost, control_random, control_tuned, control_smooth, control_batch, control_extra, control_growth (need
    `promoted`). A decision that speaks of something the config no longer holds expands to nothing. Runs that several
    arms share appear once for each. Teachers that no training makes are not among them: `teacher.imported` and `tables`
    name them.
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
    runs = Expansion(campaign, data)
    arms = runs.ce() + runs.ce_screen() + runs.from_ngrams() + runs.teachers("probe", campaign.teacher.candidates)
    surviving = set(decisions.get("projected", {}).get("survivors", ()))
    arms += runs.teachers("teacher", [c for c in campaign.teacher.candidates if c.name in surviving])
    teacher = decisions.get("selected", {}).get("run_id")
    if teacher not in {*campaign.teacher.imported, *(run.run_id for run in arms if run.arm == "teacher")}:
        return _Expanded(arms, runs.caches)
    arms += runs.isolates(teacher) + runs.screen(teacher)
    promoted = set(decisions.get("promoted", {}).get("points", ()))
    if promoted.intersection(point.name for point in grid_points(campaign.kd.grid)):
        arms += runs.promoted(teacher, promoted) + runs.tuned(decisions["promoted"].get("ce_point")) + runs.smoothed()
        arms += runs.smaller_batches() + runs.extended(decisions["selected"]) + runs.grown(teacher)
    return _Expanded(arms, runs.caches)


def without_weights(campaign: Campaign, runs: list[Run]) -> set[str]:
    """Ids of those whose weights nobody wants: no arm that keeps them asks for the run. Pure."""
    arms = UNKEPT.get(campaign.weights, {run.arm for run in runs} - {"teacher"})
    return {run.run_id for run in runs} - {run.run_id for run in runs if run.arm not in arms}


def tables(campaign: Campaign, data: str = "unprepared") -> list[Run]:
    """The n-gram teachers of the arm `ngram`, which are counted, not trained. Pure."""
    return Expansion(campaign, data).tables()


def shared_jobs(campaign: Campaign, runs: list[Run]) -> dict[str, list[Run]]:
    """{STAGE-NofM-HASH: runs} of the jobs that train several of `runs`, one after the other. Pure.

    The hash is of their ids: a job of other runs is another job, and not one that Snakemake takes for made.

    The runs of a stage are dealt out in turn, so that its jobs take about as long. A run of several arms is in the
    job of the first; one in no job has its own. So have teachers: others train from their weights, and Snakemake knows
    what a file was made from only where a job of its own made it.
    """
    stages: dict[str, list[Run]] = {}
    seen: set[str] = set()
    for run in runs:
        if run.run_id not in seen and run.arm != "teacher":
            stages.setdefault(_stage(run.arm), []).append(run)
            seen.add(run.run_id)
    jobs = {}
    for stage, members in stages.items():
        short, count = _short(campaign, stage, members)
        for i in range(count):
            dealt = short[i::count]
            jobs[f"{stage}-{i + 1}of{count}-{short_hash(' '.join(run.run_id for run in dealt))}"] = dealt
    return jobs


def _stage(arm: str) -> str:
    """The arms that share jobs with this one. CE with KD's LR policy waits for the KD runs; other controls don't."""
    return "controls" if arm.startswith("control_") and arm != "control_boost" else arm


def _short(campaign: Campaign, stage: str, runs: list[Run]) -> tuple[list[Run], int]:
    """Those of a stage's runs that share jobs, and how many jobs."""
    points, most = campaign.cluster.points_per_job, campaign.cluster.tokens_per_job
    if stage == "screen" and points > 1:
        return runs, math.ceil(len(runs) / points)
    tokens = {run.run_id: total_tokens(run.config.schedule, run.config.schedule.stop_step) for run in runs}
    short = [run for run in runs if tokens[run.run_id] <= most]
    if len(short) < 2:
        return [], 0
    whole = sum(tokens[run.run_id] for run in short)
    return short, max(math.ceil(whole / most), math.ceil(len(short) / MOST_RUNS))


@dataclass(frozen=True)
class Point:
    """One point of the KD grid. Without a boost, hold and drop mean nothing and are left out."""

    temperature: float
    alpha: float | None  # None: the section's
    token_frac: float | None
    lr_boost: BoostConfig | None

    @property
    def name(self) -> str:
        alpha = "" if self.alpha is None else f"-a{self.alpha:g}"
        first = "" if self.token_frac is None else f"-first{self.token_frac:g}"
        return f"T{self.temperature:g}{alpha}{first}{_named(self.lr_boost)}"


def grid_points(grid: GridSection) -> list[Point]:
    """In the order of the grid's keys."""
    values = grid.temperature, grid.alpha or (None,), grid.token_frac or (None,), _boosts(grid)
    return list(dict.fromkeys(Point(*each) for each in itertools.product(*values)))


@dataclass(frozen=True)
class CEPoint:
    """One point of the CE grid."""

    lr_mult: float  # of all learning rates, throughout
    lr_boost: BoostConfig | None

    @property
    def name(self) -> str:
        return f"LR{self.lr_mult:g}{_named(self.lr_boost)}"

    @property
    def is_ce(self) -> bool:
        """Whether this is the CE arm itself."""
        return self.lr_mult == 1.0 and self.lr_boost is None

    def scaled(self, optim: OptimConfig) -> OptimConfig:
        muon, adam = (dataclasses.replace(part, lr=self.lr_mult * part.lr) for part in (optim.muon, optim.adam))
        return dataclasses.replace(optim, muon=muon, adam=adam)


def ce_points(grid: CEGridSection) -> list[CEPoint]:
    return list(dict.fromkeys(CEPoint(*pair) for pair in itertools.product(grid.lr_mult, _boosts(grid))))


def _boosts(grid: GridSection | CEGridSection) -> list[BoostConfig | None]:
    shapes = itertools.product(grid.lr_boost, grid.hold_frac, grid.drop_frac)
    return [None if mult == 1.0 else BoostConfig(mult, hold, drop) for mult, hold, drop in shapes]


def _named(boost: BoostConfig | None) -> str:
    return "" if boost is None else f"-boost{boost.mult:g}-hold{boost.hold_frac:g}-drop{boost.drop_frac:g}"


def _from_start(layers: tuple[int, ...], num_layers: int) -> tuple[int, ...]:
    """Layers counted from the start, where -1 is the last one."""
    return tuple(i + num_layers if i < 0 else i for i in layers)


def contains(student: ModelConfig, teacher: ModelConfig) -> bool:
    """Whether each of the teacher's layers has its like in the student, so that this can start from its weights."""
    layers = range(teacher.num_layers)
    return (
        teacher.num_layers <= student.num_layers
        and (teacher.num_heads, teacher.head_dim) == (student.num_heads, student.head_dim)
        and {*teacher.value_layers} <= {*student.value_layers}
        and not {*student.attention_free_layers}.intersection(layers)
    )


class Expansion:
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
        return self._model("student", dataclasses.asdict(student) | counted)

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
        return self._model("teacher", dataclasses.asdict(student) | counted | changes | shapes)

    def _model(self, section: str, values: dict) -> ModelConfig:
        """Of a section of the config, which its error names."""
        try:
            return ModelConfig(vocab_size=self.data.vocab_size, **values)
        except ConfigError as error:
            raise ConfigError(f"{section}.{error}") from error

    def run(
        self, arm, label, *, horizon, seed, model=None, stop_step=None, boost=None, kd=None, cached=False,
        optim=None, lr_policy=None, grown_from=None, label_smoothing=0.0, batch_tokens=(), batch_lr=(),
    ) -> Run:  # fmt: skip
        campaign, train = self.campaign, self.campaign.train
        schedule = ScheduleConfig(
            horizon=horizon,
            stop_step=horizon if stop_step is None else stop_step,
            batch_tokens=batch_tokens or train.batch_tokens,
            batch_lr=batch_lr or train.batch_lr,
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
            optim=optim or campaign.optim,
            schedule=schedule,
            attention=campaign.attention,
            kd=kd,
            lr_policy=lr_policy,
            grown_from=grown_from,
            label_smoothing=label_smoothing,
            seed=seed,
            anchor_steps=campaign.anchor.steps if campaign.budget.clock == "measured" else 0,
            deterministic=train.deterministic and campaign.device == "cuda",
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
            dtype=section.cache_dtype if kind == "hidden" else "bf16",
            teacher=kd.teacher,
            teacher_dtype=kd.teacher_dtype,
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

    def kd_at(self, teacher: str, point: Point, *, random_teacher: bool = False) -> KDConfig:
        """KD as a point of the grid has it."""
        chosen = {name: getattr(point, name) for name in ("alpha", "token_frac") if getattr(point, name) is not None}
        return dataclasses.replace(self.kd(teacher, point.temperature, random_teacher=random_teacher), **chosen)

    def ce(self) -> list[Run]:
        """At every horizon with every seed, and once for the screen to be held against."""
        train = self.campaign.train
        pairs = [*itertools.product(train.horizons, train.seeds), (self.first, self.campaign.kd.screen_seed)]
        return [self.run("ce", f"CE {horizon}", horizon=horizon, seed=seed) for horizon, seed in pairs]

    def ce_screen(self) -> list[Run]:
        """What KD's screen is to KD."""
        options = {"horizon": self.first, "seed": self.campaign.kd.screen_seed}
        optim = self.campaign.optim
        return [
            self.run("ce_screen", p.name, optim=p.scaled(optim), boost=p.lr_boost, **options)
            for p in ce_points(self.campaign.controls.ce_grid)
        ]

    def tuned(self, name: str | None) -> list[Run]:
        """CE at the point of its grid that its screen ranked first; nothing if that is the CE arm itself."""
        found = [p for p in ce_points(self.campaign.controls.ce_grid) if p.name == name and not p.is_ce]
        return [
            self.run("control_tuned", p.name, horizon=self.last, seed=seed, optim=p.scaled(self.campaign.optim),
                     boost=p.lr_boost)
            for p, seed in itertools.product(found, self.campaign.train.seeds)
        ]  # fmt: skip

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
            kd = dataclasses.replace(
                self.kd(table.run_id, 1.0), token_frac=share, post_stop_lr=1.0, top_k=0, teacher_dtype="same"
            )
            label = f"{table.label}-first{share:g}"
            runs += [self.run("ngram", label, horizon=self.last, seed=seed, kd=kd) for seed in seeds]
        return runs

    @property
    def teacher_seed(self) -> int:
        seed = self.campaign.teacher.seed
        return self.campaign.train.seeds[0] if seed is None else seed

    def teachers(self, arm: str, candidates) -> list[Run]:
        section, seed = self.campaign.teacher, self.teacher_seed
        runs = []
        for c in candidates:
            model = self.teacher(c)
            stop = section.probe_steps if arm == "probe" else None
            batch = {"batch_tokens": c.batch_tokens, "batch_lr": c.batch_lr}
            runs.append(self.run(arm, c.name, horizon=c.steps, seed=seed, model=model, stop_step=stop, **batch))
        return runs

    def isolates(self, teacher: str) -> list[Run]:
        temperature = self.campaign.kd.grid.temperature[0]
        kd = self.kd(teacher, temperature)
        modes = {
            "CE only": (None, False),
            "CE + teacher inference": (self.kd(teacher, temperature, infer_only=True), False),
            "CE + KD loss": (kd, True),  # its targets from the cache
            "CE + KD": (kd, False),
        }
        if self.campaign.kd.cache == "none":
            del modes["CE + KD loss"]
        seed, stop = self.teacher_seed, self.campaign.kd.isolate_steps
        return [
            self.run("isolate", label, horizon=self.first, seed=seed, stop_step=stop, kd=kd, cached=cached)
            for label, (kd, cached) in modes.items()
        ]

    def screen(self, teacher: str) -> list[Run]:
        options = {"horizon": self.first, "seed": self.campaign.kd.screen_seed, "cached": True}
        return [
            self.run("screen", p.name, boost=p.lr_boost, kd=self.kd_at(teacher, p), **options)
            for p in grid_points(self.campaign.kd.grid)
        ]

    def promoted(self, teacher: str, names: set[str]) -> list[Run]:
        seeds, controls = self.campaign.train.seeds, self.campaign.controls
        kd, policies, random = [], [], []
        for p in grid_points(self.campaign.kd.grid):
            if p.name not in names:
                continue
            config = self.kd_at(teacher, p)
            kd += [
                self.run("kd", p.name, horizon=horizon, seed=s, boost=p.lr_boost, kd=config, cached=True)
                for horizon, s in itertools.product(reversed(self.campaign.train.horizons), seeds)
            ]
            if controls.lr_policy and (p.lr_boost is not None or config.post_stop_lr != 1.0):
                policies += [
                    self.with_policy(run)
                    for run in kd
                    if (run.label, run.config.schedule.horizon) == (p.name, self.last)
                ]
            if controls.random_teacher:
                where = {"horizon": self.first, "seed": self.campaign.kd.screen_seed, "boost": p.lr_boost}
                config = self.kd_at(teacher, p, random_teacher=True)
                random.append(self.run("control_random", p.name, kd=config, **where))
        return kd + policies + random

    def with_policy(self, taught: Run) -> Run:
        """CE with the whole LR policy of a KD run: its boost, and its tail from where KD stopped there."""
        schedule, kd = taught.config.schedule, taught.config.kd
        policy = PolicyConfig(taught.run_id, kd.post_stop_lr, kd.post_stop_blend_steps)
        where = {"horizon": schedule.horizon, "seed": taught.config.seed}
        return self.run("control_boost", taught.label, boost=schedule.lr_boost, lr_policy=policy, **where)

    def smoothed(self) -> list[Run]:
        weight = self.campaign.controls.label_smoothing
        runs = [
            self.run("control_smooth", f"smoothing {weight:g}", horizon=self.last, seed=seed, label_smoothing=weight)
            for seed in self.campaign.train.seeds
        ]
        return runs if weight else []

    def smaller_batches(self) -> list[Run]:
        """CE in smaller batches, with as many more steps as the same tokens take.

        LRs go by the square root of the batch (Malladi et al. 2022, arXiv 2205.10287).
        """
        share, train = self.campaign.controls.smaller_batches, self.campaign.train
        if not share:
            return []
        options = {
            "horizon": round(self.last / share),
            "batch_tokens": tuple(round(share * tokens) for tokens in train.batch_tokens),
            "batch_lr": tuple(math.sqrt(share) * mult for mult in train.batch_lr),
        }
        return [self.run("control_batch", f"batches x {share:g}", seed=seed, **options) for seed in train.seeds]

    def grown(self, teacher: str) -> list[Run]:
        """CE whose student starts with the teacher's weights: a competitor of KD."""
        if not self.campaign.controls.growth:
            return []
        options = {"horizon": self.last, "grown_from": teacher}
        return [self.run("control_growth", "grown", seed=seed, **options) for seed in self.campaign.train.seeds]

    def extended(self, selected: dict) -> list[Run]:
        """CE with as many more steps as it makes in the teacher's time; `selected` is the decision for that teacher."""
        controls, seeds = self.campaign.controls, self.campaign.train.seeds
        if not controls.extra_steps:
            return []
        ce_ms = selected["budget_ms"] / self.campaign.budget.fraction
        ce_steps = self.campaign.budget.horizon or self.last  # that take so long
        extra = controls.extra_steps_each or (round(ce_steps * selected["train_time_ms"] / ce_ms),) * len(seeds)
        label = " to ".join(str(steps) for steps in sorted({min(extra), max(extra)})) + " more steps"
        return [
            self.run("control_extra", label, horizon=self.last + steps, seed=seed)
            for seed, steps in zip(seeds, extra, strict=True)
        ]
