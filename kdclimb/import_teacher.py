"""A teacher from a checkpoint that the seed's trainer left: check it, map it to our model, measure it, write its run.

The format has no architecture, windows or rotary state; whoever imports names them, and every key and shape must then
be right. Symbols: L layers, H heads, D head_dim, d = H * D, V vocabulary, B bigram rows.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from kdclimb.artifacts import (
    Damaged,
    RunFolder,
    publish,
    read_sealed,
    sha256,
    verify,
    write_json,
    write_tables,
    write_text,
)
from kdclimb.attention import choose_backend
from kdclimb.campaign import data_id
from kdclimb.config import ConfigError, DataRef, ModelConfig, plain, require
from kdclimb.data import Dataset
from kdclimb.evaluate import validate
from kdclimb.imported import ImportedConfig, Origin
from kdclimb.model import GPT
from kdclimb.provenance import device_kind, source_hash, versions
from kdclimb.sections import Campaign
from kdclimb.teacher import data_facts, save_checkpoint

ENTRY = "kdclimb/import_teacher.py"
PREFIX = "_orig_mod."  # of all keys, where the model was compiled
WINDOW_BLOCK = 128  # tokens
LONG_WINDOWS = (384, 896, 1408, 1664)  # tokens: of the seed's three stages and of its extension
GATE_INPUTS = 12
VALUE_TABLES = 5
NO_ATTENTION = 6  # the layer without it, at any depth
PAIRED = (0, 2, 5, 9)
SOFTCAP = (23.0, 5.0, 7.5)
ATTENTION_SCALE = 0.1  # at any head_dim, before YaRN
MAX_PADDING = 7  # of the scalars, to a multiple of up to 8 processes
AGAIN = "it is imported again"


@dataclass(frozen=True)
class Shape:
    """The architecture as the command names it."""

    layers: int
    heads: int
    head_dim: int
    vocab_size: int
    bigram_vocab_size: int

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim

    @property
    def attention_layers(self) -> list[int]:
        return [layer for layer in range(self.layers) if layer != NO_ATTENTION]

    @property
    def long_layers(self) -> tuple[int, ...]:
        return (3, 10) if self.layers == 11 else (min(3, self.layers - 1),)

    @property
    def value_tables(self) -> dict[int, int]:
        """{layer: its value-embedding table}: 0 and 1 for the first two layers, the others for the last up to three."""
        tail = min(3, max(0, self.layers - 2))
        layers = [*range(min(2, self.layers)), *range(self.layers - tail, self.layers)]
        return {layer: table for table, layer in enumerate(layers) if layer != NO_ATTENTION}

    def keys(self) -> dict[str, list[tuple[int, ...]]]:
        """{key of the state dict: the shapes that it may have}."""
        num_attention, d, gates = len(self.attention_layers), self.dim, (self.heads, GATE_INPUTS)
        # The format's description has 10 rows at any depth; the parameter counts in the seed's logs fit one a layer.
        gate_rows = sorted({num_attention, max(10, num_attention)})
        return {
            "embed.weight": [(self.vocab_size, d)],
            "lm_head.weight": [(d, self.vocab_size)],
            "bigram_embed.weight": [(self.bigram_vocab_size, d)],
            **{f"value_embeds.{i}.weight": [(self.vocab_size, d)] for i in range(VALUE_TABLES)},
            "attn_bank": [(num_attention, 4 * d, d)],
            "mlp_bank": [(self.layers + 1, 2, 4 * d, d)],
            "attn_gate_bank": [(rows, *gates) for rows in gate_rows],
            "ve_gate_bank": [(VALUE_TABLES, *gates)],
            "smear_gate.weight": [(1, GATE_INPUTS)],
            "skip_gate.weight": [(1, GATE_INPUTS)],
            "x0_lambdas": [(self.layers,)],
            "scalars": [(4 * self.layers + 3 + padding,) for padding in range(MAX_PADDING + 1)],
        }

    def model(self) -> ModelConfig:
        """Our config of the same architecture. Raises ConfigError for a shape that can't be."""
        whole = self.layers == 11
        return ModelConfig(
            vocab_size=self.vocab_size,
            num_layers=self.layers,
            num_heads=self.heads,
            head_dim=self.head_dim,
            bigram_vocab_size=self.bigram_vocab_size,
            untie_frac=0.0,
            softcap=SOFTCAP,
            attention_scale=ATTENTION_SCALE * math.sqrt(self.head_dim / 128),
            long_layers=self.long_layers,
            attention_free_layers=(NO_ATTENTION,) if self.layers > NO_ATTENTION else (),
            paired_layers=tuple(layer for layer in PAIRED if layer < self.layers),
            value_layers=tuple(sorted(self.value_tables)),
            value_gate="hidden",
            skip=(3, 6) if whole else (),
            backout=(7,) if whole else (),
            x0=True,
            attention_gate=True,
            key_offset=True,
            smear=True,
            qkvo_factors=True,
            yarn=True,
        )


def choose_windows(
    passed: int | None, long_windows: list[int] | None, windows: list[int] | None
) -> tuple[tuple[int, ...], tuple[int, int]]:
    """(long windows trained through, (short, long) to run with) in tokens, from the flags."""
    trained = LONG_WINDOWS[:passed] if long_windows is None else tuple(long_windows)
    short = trained[-1] // WINDOW_BLOCK // 2 * WINDOW_BLOCK  # the seed's rule
    used = (short, trained[-1]) if windows is None else tuple(windows)
    require(used[0] > 0, "--windows", used, "two numbers of tokens, short <= long; for short long windows name both")
    return trained, used


def slug(path: Path) -> str:
    """A file's name as it may stand in a run id."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", path.stem).strip("-.") or "teacher"


# ---- reading --------------------------------------------------------------------------------------


def read(path: Path, shape: Shape, scratch: Path) -> tuple[dict[str, Tensor], dict]:
    """(state dict without its prefix, facts) of a checkpoint; `scratch` is a folder for a copy of its size.

    Raises ValueError that names the file, and what in it is not as it should be.
    """
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    with tempfile.TemporaryDirectory(prefix=".import-", dir=scratch) as folder:
        copy = Path(folder).resolve() / "model.safetensors"
        command = [sys.executable, "-W", "ignore", "-m", "kdclimb.unpickle", path.resolve(), copy]
        done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
        if done.returncode != 0:
            said = done.stderr.strip().splitlines()
            raise ValueError(said[-1] if said else f"{path}: the process that reads it ended with {done.returncode}")
        with safe_open(copy, framework="pt") as file:
            facts = json.loads(file.metadata()["facts"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    tensors = without_prefix(tensors, path)
    check(tensors, shape, path)
    return tensors, facts


def without_prefix(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    prefixed = [name for name in tensors if name.startswith(PREFIX)]
    if prefixed and len(prefixed) < len(tensors):
        plain = next(name for name in tensors if not name.startswith(PREFIX))
        raise ValueError(f"{path}: key {prefixed[0]} starts with {PREFIX}, but {plain} doesn't; all do or none")
    return {name.removeprefix(PREFIX): value for name, value in tensors.items()}


def check(tensors: dict[str, Tensor], shape: Shape, path: Path) -> None:
    """Raise ValueError that names each missing, unknown and mis-shaped key, with what is expected."""
    expected, problems = shape.keys(), []
    for name, shapes in expected.items():
        allowed = " or ".join(map(str, shapes)) if len(shapes) <= 2 else f"{shapes[0]} to {shapes[-1]}"
        if name not in tensors:
            problems.append(f"missing key {name}, expected {allowed}")
        elif tuple(tensors[name].shape) not in shapes:
            problems.append(f"{name} has shape {tuple(tensors[name].shape)}, expected {allowed}")
    problems += [f"unknown key {name}" for name in tensors if name not in expected]
    if problems:
        flags = f"--layers {shape.layers} --heads {shape.heads} --head-dim {shape.head_dim}"
        flags += f" --vocab-size {shape.vocab_size} --bigram-vocab-size {shape.bigram_vocab_size}"
        raise ValueError(f"{path}: not a checkpoint of {flags}: {'; '.join(problems)}")


# ---- mapping --------------------------------------------------------------------------------------


def convert(tensors: dict[str, Tensor], shape: Shape) -> tuple[dict[str, Tensor], list[str]]:
    """(our state dict in fp32, what of the seed's is left out since nothing uses it)."""
    given = {name: value.float() for name, value in tensors.items()}
    layers, scalars, factors = shape.layers, given["scalars"], given["scalars"][shape.layers : 3 * shape.layers]
    smear, backout, skip = scalars[4 * layers : 4 * layers + 3]
    ours = {
        "embed": given["embed.weight"],
        "head": given["lm_head.weight"].T,
        "bigram": given["bigram_embed.weight"],
        "bigram_lambdas": scalars[3 * layers : 4 * layers],
        "residual_lambdas": scalars[:layers],
        "x0_lambdas": given["x0_lambdas"],
        "smear_gate": given["smear_gate.weight"],
        "smear_lambda": smear,
    }
    if layers == 11:
        ours |= {"skip_gate": given["skip_gate.weight"], "skip_lambda": skip, "backout_lambda": backout}
    for layer, table in shape.value_tables.items():
        ours[f"value_embeds.{layer}"] = given[f"value_embeds.{table}.weight"]
        ours[f"blocks.{layer}.value_gate"] = given["ve_gate_bank"][table]
    order = rotary_order(shape.heads, shape.head_dim)
    for row, layer in enumerate(shape.attention_layers):
        q, k, v, o = given["attn_bank"][row].chunk(4)
        matrices = {"q": q[order], "k": k[order], "v": v, "o": o, "attention_gate": given["attn_gate_bank"][row]}
        matrices["factors"] = factors.view(-1, 2)[layer]
        ours |= {f"blocks.{layer}.{name}": value for name, value in matrices.items()}
    for layer in range(layers):
        up, down = given["mlp_bank"][layer]
        ours |= {f"blocks.{layer}.up": up, f"blocks.{layer}.down": down.T}
    return {name: value.contiguous() for name, value in ours.items()}, left_out(tensors, shape)


def rotary_order(heads: int, head_dim: int) -> Tensor:
    """(d,) rows of a q or k matrix in our order: the seed rotates neighbours, we rotate dims that lie D / 2 apart.

    Attention scores don't depend on the order of a head's dims, as long as q and k share it.
    """
    quarter, half = head_dim // 4, head_dim // 2
    pairs, fixed = torch.arange(0, half, 2), torch.arange(half, head_dim)
    head = torch.cat([pairs, fixed[:quarter], pairs + 1, fixed[quarter:]])
    return (torch.arange(heads)[:, None] * head_dim + head).flatten()


def left_out(tensors: dict[str, Tensor], shape: Shape) -> list[str]:
    layers, num_attention = shape.layers, len(shape.attention_layers)
    unused = sorted(set(range(VALUE_TABLES)) - set(shape.value_tables.values()))
    found = [f"mlp_bank[{layers}]"]
    found += [name for i in unused for name in (f"value_embeds.{i}.weight", f"ve_gate_bank[{i}]")]
    if len(tensors["attn_gate_bank"]) > num_attention:
        found.append(f"attn_gate_bank[{num_attention}:]")
    if layers > NO_ATTENTION:
        start = layers + 2 * NO_ATTENTION
        found.append(f"scalars[{start}:{start + 2}]")
    if layers != 11:
        found += ["skip_gate.weight", f"scalars[{4 * layers + 1}:{4 * layers + 3}]"]
    if len(tensors["scalars"]) > 4 * layers + 3:
        found.append(f"scalars[{4 * layers + 3}:]")
    return found


# ---- measuring and writing --------------------------------------------------------------------------


def import_teacher(
    path: Path,
    shape: Shape,
    campaign: Campaign,
    root: Path,
    results: Path,
    *,
    name: str,
    cost_ms: float,
    long_windows: tuple[int, ...],
    windows: tuple[int, int],
    command: str,
    configfiles: str,
    report: Callable[[str], None],
) -> Path:
    """Import the checkpoint at `path` as a finished run under `results`/runs; returns its folder.

    `cost_ms` is its training time as declared. `windows` are (short, long) that it runs with and `long_windows` those
    that it was trained through, in tokens. `command` is what repeats this, `configfiles` the campaign's overlays.
    One that is there, whole and measured on this data, stays as it is.
    Raises ValueError that names the file, key or flag at fault.
    """
    if campaign.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda is asked for, but torch finds no CUDA GPU here; allowed: auto, cpu")
    require(shape.dim >= GATE_INPUTS, "--heads, --head-dim", shape.dim, f"a width of {GATE_INPUTS} or more")
    vocab = campaign.data.vocab_size
    require(shape.vocab_size == vocab, "--vocab-size", shape.vocab_size, f"{vocab}, the data.vocab_size of this config")
    model_config, data = shape.model(), data_id(campaign, root)
    manifest = results / "data" / data / "manifest.json"
    if not manifest.is_file():
        make = f"./run results/data/{data}/manifest.json{f' --configfile {configfiles}' if configfiles else ''}"
        raise ValueError(f"{manifest}: the data to measure it on is not prepared; make it with: {make}")
    dataset = Dataset(manifest)
    config = ImportedConfig(  # before the file is read, which takes longest
        imported_from=Origin(path.name, "", 0, None),
        name=name,
        cost_ms=cost_ms,
        model=model_config,
        windows=windows,
        long_windows=long_windows,
        data=DataRef(data, vocab),
        val_tokens=campaign.validation.tokens,
        micro_batch_tokens=campaign.train.micro_batch_tokens,
        max_doc_tokens=campaign.validation.cut(campaign.train.max_doc_tokens),
        device=campaign.device,
        attention=campaign.attention,
    )
    report(f"reading {path}")
    tensors, facts = read(path, shape, results)
    origin = Origin(path.name, sha256(path), facts["step"], facts["best_val_loss"])
    config = dataclasses.replace(config, imported_from=origin)
    folder = RunFolder(results / "runs" / config.run_id)
    with folder.lock():
        if _is_whole(folder.path, report) and _described(folder.path)["data_hash"] == dataset.hash:
            report("already imported, and measured on this data")
            return folder.path
        before = _weights(folder.path)
        _Import(config, facts, dataset, folder.path, report).write(tensors, shape, command)
        if before and before[0] == _weights(folder.path)[0]:  # else all runs that they taught would be made again
            for path in (folder.path / "checkpoints/model.json", folder.path / "checkpoints"):
                os.utime(path, ns=(before[1], before[1]))
    return folder.path


def _is_whole(folder: Path, report: Callable[[str], None]) -> bool:
    """Whether a finished import lies there, each file of it as it was written; `report` says which is not."""
    if not (folder / "status.json").is_file():
        return False
    try:
        for name, digest in read_sealed(folder / "status.json", AGAIN)["files"].items():
            verify(folder / name, digest, AGAIN)
    except Damaged as error:
        report(str(error))
        return False
    return True


def _described(folder: Path) -> dict:
    return read_sealed(folder / "checkpoints/model.json", AGAIN)


def _weights(folder: Path) -> tuple[str, int] | None:
    """(sha256 of an import's weights, here or not, when they were described in ns); None where nothing says so."""
    try:
        return _described(folder)["weights_sha256"], (folder / "checkpoints/model.json").stat().st_mtime_ns
    except (Damaged, FileNotFoundError):
        return None


class _Import:
    """One import: builds the model, measures it, and writes its run folder, status.json last."""

    def __init__(self, config: ImportedConfig, facts: dict, dataset: Dataset, out: Path, report: Callable[[str], None]):
        self.config, self.facts, self.dataset, self.out = config, facts, dataset, out
        self.started, self.lines = datetime.now(UTC), []
        self.tell = report

    def report(self, text: str) -> None:
        self.lines.append(text)
        self.tell(text)

    def write(self, tensors: dict[str, Tensor], shape: Shape, command: str) -> None:
        self.lines.append(command)
        (self.out / "status.json").unlink(missing_ok=True)  # measured on other data, or not whole
        state, unused = convert(tensors, shape)
        self.report(f"left out, since nothing uses them: {', '.join(unused)}")
        with torch.device(self.config.device):
            model = GPT(self.config.model, **self.options)
        model.load_state_dict(state, strict=True)
        model.set_windows(self.config.windows, self.config.long_windows)
        val_loss = self.measure(model.requires_grad_(False))
        self.write_run(model, val_loss)

    @property
    def options(self) -> dict:
        """As in the runs that will learn from it, where it must score the same."""
        on_gpu = self.config.device == "cuda"
        backend = choose_backend(self.config.attention, self.config.device)
        return {"backend": backend, "compute_dtype": torch.bfloat16 if on_gpu else torch.float32, "compiled": on_gpu}

    def measure(self, model: GPT) -> float:
        config = self.config
        batches = self.dataset.val_batches(
            config.val_tokens, config.micro_batch_tokens, config.max_doc_tokens, config.device
        )
        bar = tqdm(batches, desc="validating", unit="batch", leave=False, disable=not sys.stderr.isatty())
        val_loss, _ = validate(model, bar)
        if not math.isfinite(val_loss):
            raise ValueError(f"{config.imported_from.file}: its validation loss is {val_loss}")
        theirs = config.imported_from.best_val_loss
        self.report(f"val_loss {val_loss:.4f} on {config.val_tokens:,} tokens of {config.data.id}")
        self.report(
            f"best_val_loss {'unknown' if theirs is None else f'{theirs:.4f}'} says its file, at step "
            f"{config.imported_from.step}; data, packing and windows there may be others"
        )
        return val_loss

    def write_run(self, model: GPT, val_loss: float) -> None:
        config, out = self.config, self.out
        times = {"step": config.horizon, "train_time_ms": config.cost_ms}
        vals = [times | {"val_loss": val_loss}]  # tokens stay empty: the file doesn't know them
        write_json(out / "config.json", plain(config))
        write_tables(out, config.run_id, [], vals, self.summary(model, val_loss))
        packing = config.val_tokens, config.micro_batch_tokens, config.max_doc_tokens
        facts = data_facts(self.dataset, *packing) | {
            "run_id": config.run_id,
            "step": config.horizon,
            "final_val": val_loss,
            "untied": True,
            "imported": True,
            "imported_from": dataclasses.asdict(config.imported_from),
            "cost_ms": config.cost_ms,
        }
        shutil.rmtree(out / "checkpoints", ignore_errors=True)  # a mark that its weights are elsewhere, too
        save_checkpoint(out / "checkpoints", model, facts)
        write_text(out / "train.log", "\n".join(self.lines) + "\n")
        status = {
            "status": "ok",
            "reason": f"imported from {config.imported_from.file}; its cost is declared, not measured",
            "started": self.started.isoformat(timespec="seconds"),
            "ended": datetime.now(UTC).isoformat(timespec="seconds"),
            "attention": model.backend,
            "device": device_kind(config.device),
            "threads": torch.get_num_threads(),
            "code_hash": source_hash(ENTRY),
            "versions": versions(),
            "seed_checkpoint": self.facts,
        }
        publish(out, status)

    def summary(self, model: GPT, val_loss: float) -> dict:
        """Its row; empty where only training here would know. code_hash too: none of our code trained it."""
        config = self.config
        return {
            "run_id": config.run_id,
            "arm": "imported",
            "status": "ok",
            "steps": config.horizon,
            "train_time_ms": config.cost_ms,
            "best_val": val_loss,
            "final_val": val_loss,
            "params_stored": model.params_stored(),
            "params_active": model.params_active(),
            "flops_per_token": model.flops_per_token(config.max_doc_tokens / 2, backward=True),
            "clock": config.clock,
            "data_hash": self.dataset.hash,
        }
