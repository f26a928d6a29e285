"""A campaign's validated config, and what it asks of its data and of what lies under results/.

`load` turns the merged YAML into a frozen `Campaign`; `kdclimb.expansion` names its runs. No torch and no I/O beyond
the config's own files and what kdclimb.sources looks up: the Snakefile calls this each time it is parsed.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
from pathlib import Path

import jsonschema
import yaml

from kdclimb import gpus, sources, supply
from kdclimb.artifacts import Damaged, read_noted
from kdclimb.config import (
    ADAM_KINDS,
    ConfigError,
    build,
    canonical_json,
    require,
    short_hash,
    shown,
)
from kdclimb.expansion import Expansion, contains, expand
from kdclimb.imported import COMMAND, read_config
from kdclimb.schedule import total_tokens
from kdclimb.sections import Campaign, DataSection
from kdclimb.text import list_files
from kdclimb.tokenizer import GPT2_VOCAB_SIZE

LOCKED_VALIDATION_EVERY = 25  # steps
LOCKED_BUDGET_FRACTION = 0.10
DECISIONS = ("projected", "selected", "promoted")  # what expand() needs to know, in the order it is decided


def schema_path() -> Path:
    return Path(__file__).resolve().parent.parent / "config" / "schema.yaml"


@functools.cache  # a tenth of a second
def schema() -> dict:
    return yaml.safe_load(schema_path().read_text())


def load(config: dict, root: Path) -> Campaign:
    """Validate the merged config against the schema, the dataclasses, the shapes and the locks.

    Raises ConfigError that names the key, the value and what is allowed. `root` is the project
    folder that paths in the config start from. `device: auto` is resolved here.
    """
    errors = jsonschema.Draft202012Validator(schema()).iter_errors(config)
    for error in sorted(errors, key=lambda e: (len(e.absolute_path), str(e.absolute_path))):
        raise ConfigError(_explain(error))
    campaign = build(Campaign, config)
    _check_locks(campaign)
    _check_shapes(campaign)
    _check_mirror(campaign, root)
    _check_baseline(campaign, root)
    _check_budget(campaign)
    _check_data(campaign.data, root)
    if campaign.device == "auto":
        campaign = dataclasses.replace(campaign, device="cuda" if gpus.usable() else "cpu")
    _check_fp8(campaign)
    return campaign


def _check_fp8(campaign: Campaign) -> None:
    """8-bit products before any run fails for them; what GPU it is, the run itself finds out."""
    on_gpu = campaign.device == "cuda"
    for key, value in {
        "kd.teacher_dtype": campaign.kd.teacher_dtype,
        "train.head_dtype": campaign.train.head_dtype,
    }.items():
        require(on_gpu or value == "same", key, value, f"same with device: {campaign.device}")


def _explain(error: jsonschema.ValidationError) -> str:
    key = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in error.absolute_path).lstrip(".")
    if error.validator == "additionalProperties":
        known = error.schema["properties"]
        unknown = sorted(str(name) for name in error.instance if name not in known)
        where = f"{key}.{unknown[0]}" if key else unknown[0]
        return f"{where}: unknown key; allowed here: {', '.join(sorted(known))}"
    if error.validator == "required":
        return f"{key}: {error.message}"
    if error.validator == "type" and isinstance(error.validator_value, list):
        types = " or ".join(error.validator_value)
        return f"{key}: {shown(error.instance)} is not allowed; allowed: a value of type {types}"
    allowed = {
        "type": "a value of type {}",
        "enum": "one of {}",
        "multipleOf": "a multiple of {}",
        "pattern": "text matching {}",
    }
    text = allowed.get(error.validator, error.validator + " {}").format(error.validator_value)
    return f"{key}: {shown(error.instance)} is not allowed; allowed: {text}"


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
    _check_candidates(campaign)
    for name, grid in (("kd.grid", kd.grid), ("controls.ce_grid", campaign.controls.ce_grid)):
        require(
            max(grid.hold_frac) < min(grid.drop_frac),
            f"{name}.drop_frac",
            list(grid.drop_frac),
            f"above every {name}.hold_frac ({list(grid.hold_frac)})",
        )
    _check_controls(campaign)
    words = campaign.data.vocab_size
    require(
        kd.top_k <= words and (kd.top_k > 0 or kd.cache != "top_k"),
        "kd.top_k",
        kd.top_k,
        f"0 for none (but with kd.cache: top_k), and up to the vocabulary's {words:,}",
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


def _check_candidates(campaign: Campaign) -> None:
    train = campaign.train
    for i, candidate in enumerate(campaign.teacher.candidates):
        require(
            candidate.steps > campaign.teacher.probe_steps,
            f"teacher.candidates[{i}].steps",
            candidate.steps,
            f"more than teacher.probe_steps ({campaign.teacher.probe_steps})",
        )
        for key in ("batch_tokens", "batch_lr"):
            given, stages = getattr(candidate, key), len(train.batch_tokens)
            require(
                len(given) in (0, stages),
                f"teacher.candidates[{i}].{key}",
                list(given),
                f"left out, or one entry for each of the {stages} stages in train.batch_tokens",
            )
        for tokens in candidate.batch_tokens:
            require(
                tokens % train.micro_batch_tokens == 0,
                f"teacher.candidates[{i}].batch_tokens",
                tokens,
                f"multiples of train.micro_batch_tokens ({train.micro_batch_tokens})",
            )


def _check_controls(campaign: Campaign) -> None:
    train, share = campaign.train, campaign.controls.smaller_batches
    micro = train.micro_batch_tokens
    require(
        all(share * tokens % micro == 0 for tokens in train.batch_tokens),
        "controls.smaller_batches",
        share,
        f"0, or a share that makes multiples of train.micro_batch_tokens ({micro:,}) of {list(train.batch_tokens)}",
    )
    each = campaign.controls.extra_steps_each
    require(
        not each or (campaign.controls.extra_steps and len(each) == len(train.seeds)),
        "controls.extra_steps_each",
        list(each),
        f"[], or under controls.extra_steps: true one number for each of the {len(train.seeds)} train.seeds",
    )
    make, growth = Expansion(campaign, "unprepared"), campaign.controls.growth
    for candidate in campaign.teacher.candidates if growth else ():
        student = make.student()
        require(
            contains(student, make.teacher(candidate)) and not campaign.teacher.imported,
            "controls.growth",
            growth,
            f"false, or all of teacher.candidates with the student's {student.num_heads} heads of {student.head_dim}, "
            f"at most its {student.num_layers} layers, of these none without attention, teacher.value_layers among "
            f"the student's, and none imported ({candidate.name} is none)",
        )


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


def _check_budget(campaign: Campaign) -> None:
    horizon, last = campaign.budget.horizon, campaign.train.horizons[-1]
    require(
        horizon is None or campaign.baseline.source != "log",
        "budget.horizon",
        horizon,
        "null under baseline.source: log, whose time is that of its own run",
    )
    require(
        horizon is None or horizon >= last,
        "budget.horizon",
        horizon,
        f"null, or at least the last of train.horizons ({last})",
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


def results_data_id(campaign: Campaign, root: Path, results: Path) -> str:
    """`data_id` for those who only read `results`.

    Where these are not the project's own, as a record's are not, or no shard is here, it is that of the one manifest
    there whose spec is the config's but for what is in the files. Raises ValueError for a manifest that can't be read.
    """
    spec, known = data_spec(campaign, root), []
    is_own = results.resolve() == (root / "results").resolve()
    if campaign.data.source == "shards" and (not is_own or not sources.source_files(spec, root)):
        for manifest in sorted((results / "data").glob("*/manifest.json")):
            try:
                made_from = json.loads(manifest.read_text())["spec"]
            except (ValueError, KeyError) as error:
                raise ValueError(f"{manifest}: not the manifest of prepared data ({error})") from error
            if made_from | {"fingerprint": spec["fingerprint"]} == spec:
                known.append(manifest.parent.name)
    return known[0] if len(known) == 1 else data_id(campaign, root)


def token_needs(campaign: Campaign) -> supply.Needs:
    """What the campaign asks of its data: the longest of CE, its two controls of more steps and the candidates."""
    train, longest = campaign.train, {}
    everyone = {"projected": {"survivors": [c.name for c in campaign.teacher.candidates]}}
    whole = {"train_time_ms": campaign.budget.fraction, "budget_ms": campaign.budget.fraction}  # a teacher's, at most
    make = Expansion(campaign, "unprepared")
    for run in expand(campaign, everyone) + make.smaller_batches() + make.extended(whole):
        schedule = run.config.schedule
        tokens = total_tokens(schedule, schedule.stop_step)
        what, key = (run.label, "train.horizons") if run.arm == "ce" else (f"teacher {run.label}", "teacher.candidates")
        if run.arm == "control_batch":
            what, key = f"CE in {run.label}", "train.horizons (controls.smaller_batches may round the last up)"
        if run.arm == "control_extra":
            what, key = f"CE with {run.label}", "train.horizons (controls.extra_steps adds to the last)"
        found = supply.Longest(what, key, run.config.seed, tokens)
        longest[found.seed] = max(longest.get(found.seed, found), found, key=lambda run: run.tokens)
    return supply.Needs(
        batch_tokens=train.micro_batch_tokens,
        max_doc_tokens=train.max_doc_tokens,
        max_epochs=campaign.data.max_epochs,
        val_tokens=campaign.validation.tokens,
        val_slabs=campaign.validation.slabs,
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
    """The decisions taken so far: {name: contents} of the JSON files under results/<campaign>/ that exist.

    Raises Damaged for one that is not as it was written.
    """
    return {name: _decision(file) for name, file in _decision_files(folder).items() if file.is_file()}


def decisions_stamp(folder: Path) -> tuple:
    """What differs once one of them was written anew, without reading it."""
    stats = [file.stat() if file.is_file() else None for file in _decision_files(folder).values()]
    return tuple(stat and (stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in stats)


def _decision_files(folder: Path) -> dict[str, Path]:
    files = {"projected": "teacher/projected.json", "selected": "teacher/selected.json", "promoted": "kd/promoted.json"}
    return {name: folder / files[name] for name in DECISIONS}


def _decision(path: Path) -> dict:
    """A decision as it was written. Run ids in it become folders and words of commands, so they may be nothing else."""
    try:
        found = json.loads(read_noted(path))
        run_id = found.get("run_id") or "none"
    except Damaged:
        raise
    except (ValueError, AttributeError, RecursionError) as error:
        raise Damaged(f"{path}: damaged: {error}; delete it, and ./run makes it again") from error
    if not isinstance(run_id, str) or not re.fullmatch(r"[A-Za-z0-9.-]+", run_id):
        raise Damaged(f"{path}: {run_id!r} is no run id; delete it, and ./run makes it again")
    return found


def check_imported(campaign: Campaign, data: str, results: Path) -> None:
    """Raise ConfigError unless each of teacher.imported lies under `results`/runs and was measured on `data` (a data
    id), and on the validation set and packing of this campaign.
    """
    asked = {
        "data": data,
        "device": campaign.device,
        "validation.tokens": campaign.validation.tokens,
        "train.micro_batch_tokens": campaign.train.micro_batch_tokens,
        "train.max_doc_tokens (null under validation.slabs)": campaign.validation.cut(campaign.train.max_doc_tokens),
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
