"""Checkpoints that describe themselves: weights as safetensors, the rest as JSON, never a pickle."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kdclimb.artifacts import read_sealed, seal, sha256, verify, write_json, write_via
from kdclimb.config import IMPORTED_PREFIX, ModelConfig, RunConfig, build, require
from kdclimb.data import Batch, Dataset
from kdclimb.evaluate import validate
from kdclimb.kernels import fp8
from kdclimb.model import GPT
from kdclimb.ngram import NgramTable

PER_LAYER = ("residual_lambdas", "x0_lambdas", "bigram_lambdas")  # weights of which each layer has one number
RESCORE_TOLERANCE = 1e-3  # nats; covers bf16 kernels that sum in another order, not other weights


def checkpoint_facts(config: RunConfig, dataset: Dataset) -> dict:
    """What a teacher and its student must have in common for its validation loss to mean the same."""
    validation, sched = config.validation, config.schedule
    return data_facts(dataset, validation.tokens, sched.micro_batch_tokens, validation.cut(sched.max_doc_tokens))


def data_facts(dataset: Dataset, val_tokens: int, micro_batch_tokens: int, max_doc_tokens: int | None) -> dict:
    """The data that a teacher is measured on, and how they are packed."""
    return {
        "data_hash": dataset.hash,
        "tokenizer_sha256": dataset.manifest["tokenizer_sha256"],
        "val_tokens": val_tokens,
        "micro_batch_tokens": micro_batch_tokens,
        "max_doc_tokens": max_doc_tokens,
    }


def save_checkpoint(folder: Path, model: GPT, facts: dict) -> None:
    """Write model.safetensors and model.json (architecture, windows, `facts`, sha256 of the weights) into `folder`."""
    windows, long_windows = model.windows
    description = {"model": dataclasses.asdict(model.config), "windows": windows, "long_windows": long_windows}
    _save(folder, model.state_dict(), description | facts)


def save_table(folder: Path, table: NgramTable, facts: dict) -> None:
    """The same of an n-gram teacher; its model.json holds `ngram` instead of an architecture."""
    _save(folder, table.tensors(), {"ngram": {"rows_and_entries": list(table.ids.shape)}} | facts)


def _save(folder: Path, tensors: dict[str, Tensor], description: dict) -> None:
    tensors = {name: value.detach().contiguous() for name, value in tensors.items()}
    write_via(folder / "model.safetensors", lambda path: save_file(tensors, path))
    weights = {"weights_sha256": sha256(folder / "model.safetensors")}
    write_json(folder / "model.json", seal(description | weights))


def read_description(folder: Path) -> dict:
    """model.json of a checkpoint. Raises ValueError if it or the weights aren't there, or aren't the ones it names."""
    run = folder.parent
    remedy = f"make it again: python -m kdclimb retry --run {run.name}, then ./run"
    if run.name.startswith(IMPORTED_PREFIX):
        remedy = f"import it again: python -m kdclimb import-teacher, as in the first line of {run / 'train.log'}"
    if not (folder / "model.json").is_file():
        raise ValueError(
            f"{folder}: no checkpoint there; either its run did not end well (see its train.log), or `weights` kept "
            f"none of it: {remedy}"
        )
    description = read_sealed(folder / "model.json", remedy)
    if not (folder / "model.safetensors").is_file():
        raise ValueError(
            f"{folder}: described, but without its weights; import a bundle that was exported with --weights, "
            f"or {remedy}"
        )
    verify(folder / "model.safetensors", description["weights_sha256"], remedy)
    return description


def load_teacher(
    folder: Path, val_batches: list[Batch], expected: dict, *, matrix_dtype: str = "same", **model_options
) -> tuple[GPT | NgramTable, float]:
    """(teacher, its val_loss), frozen. `expected` are facts that model.json must hold, such as the data hash.

    The teacher is validated again: raises ValueError unless it scores what it scored when saved. Only then are its
    layers' products rounded to `matrix_dtype` ("same" or "fp8").
    """
    description = read_description(folder)
    for name, value in expected.items():
        if description[name] != value:
            raise ValueError(f"{folder}/model.json: {name} is {description[name]!r}, but this run needs {value!r}")
    tensors = load_file(folder / "model.safetensors", device=model_options["device"])
    if "ngram" in description:
        model = NgramTable(**tensors)
        val_loss = model.score(val_batches)
    else:
        model = build_frozen(description, **model_options)
        model.load_state_dict(tensors, strict=True)
        val_loss, _ = validate(model, val_batches)
    if abs(val_loss - description["final_val"]) > RESCORE_TOLERANCE:
        raise ValueError(
            f"{folder}: scores {val_loss:.6f}, but scored {description['final_val']:.6f} when it was saved"
        )
    return in_dtype(model, matrix_dtype), val_loss


def in_dtype(teacher: GPT | NgramTable, dtype: str) -> GPT | NgramTable:
    """The teacher, with its layers' products in 8 bits for "fp8". Raises ConfigError where it can't have them."""
    if dtype == "fp8":
        reason = "an n-gram teacher has no layers"
        if isinstance(teacher, GPT):
            reason = fp8.why_not(teacher.embed.device, teacher.config.dim)
        require(reason is None, "kd.teacher_dtype", dtype, f"same; this one: {reason}")
        teacher.round_matrices()
    return teacher


def build_frozen(description: dict, *, device: str, **model_options) -> GPT:
    """The described architecture with fresh weights, its head tied or not and its windows as saved, no gradients."""
    with torch.device(device):
        model = GPT(build(ModelConfig, description["model"]), **model_options)
    if description["untied"] and model.head is None:
        model.untie()
    windows = description["windows"]
    model.set_windows(None if windows is None else tuple(windows), tuple(description["long_windows"]))
    return model.requires_grad_(False)


def grow(model: GPT, folder: Path) -> None:
    """Start `model` with the weights of the checkpoint in `folder`; its further layers add nothing at first.

    Of the layers, and of the factors that each layer has one of, those that both have, from the first on; of the rest,
    what has the same name and shape. A head that the teacher untied is the student's from the start. Raises ValueError
    where it would not start as the teacher: whose embedding or whose layers don't fit.
    """
    if read_description(folder)["untied"] and model.head is None:
        model.untie()
    tensors, own = load_file(folder / "model.safetensors", device=model.embed.device.type), model.state_dict()
    places = {
        name: own[name][: len(t)] if name in PER_LAYER else own[name] for name, t in tensors.items() if name in own
    }
    fits = {name: t for name, t in tensors.items() if name in places and places[name].shape == t.shape}
    missing = sorted(name for name in tensors.keys() - fits.keys() if name == "embed" or name.startswith("blocks."))
    if missing:
        raise ValueError(
            f"controls.growth: the student can't start from {folder}: it has no {missing[0]} of that shape"
        )
    with torch.no_grad():
        for name, tensor in fits.items():
            places[name].copy_(tensor)
        for i, block in enumerate(model.blocks):
            if block.attends and f"blocks.{i}.o" not in fits:
                block.o.zero_()  # as the MLP's output is


def random_teacher(
    folder: Path, seed: int, val_batches: list[Batch], *, matrix_dtype: str = "same", **model_options
) -> tuple[GPT, float]:
    """A control: the shape of the checkpoint in `folder` with fresh random weights, and its val_loss."""
    torch.manual_seed(seed)
    description = read_description(folder)
    if "ngram" in description:
        raise ValueError(f"kd.random_teacher: {folder} holds an n-gram teacher, which has no weights to be random")
    model = build_frozen(description, **model_options)
    if model.head is not None:  # an untied head starts as a copy of the embedding, or at zero: neither is random
        torch.nn.init.normal_(model.head)
    for block in model.blocks:
        torch.nn.init.normal_(block.down, std=0.02)
    torch.nn.init.normal_(model.embed)
    val_loss, _ = validate(model, val_batches)
    return in_dtype(model, matrix_dtype), val_loss
