"""One pass of a teacher over a run's exact tokens, written to the disk (`kdclimb/cache.py` reads it)."""

from __future__ import annotations

import dataclasses
import shutil
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kdclimb.artifacts import DeviceLease, needs_room, seal, sync, write_json
from kdclimb.attention import choose_backend
from kdclimb.cache import DESCRIPTION, STEPS_A_NAT, layout
from kdclimb.config import CacheConfig, ConfigError, require
from kdclimb.data import Dataset
from kdclimb.evaluate import teacher_target
from kdclimb.kernels import DenseTeacher, fp8
from kdclimb.model import GPT
from kdclimb.provenance import device_identity, device_kind, versions
from kdclimb.sparsify import sample, top_k
from kdclimb.teacher import data_facts, load_teacher, read_description

SPARE = 2**30  # bytes of the disk that a cache leaves free


def write(config: CacheConfig, out: Path, manifest: Path, teacher_folder: Path, threads: int) -> None:
    """Fill the folder `out`, its description last; its size is announced first.

    Raises ConfigError if the disk has no room for it, and ValueError if teacher or data don't fit.
    """
    if out.name != config.cache_id:
        raise ConfigError(f"{out}: the folder of this cache is called {config.cache_id}")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda is asked for, but torch finds no CUDA GPU here; allowed: auto, cpu")
    torch.set_num_threads(threads)
    dataset = Dataset(manifest)
    packing = config.micro_batch_tokens, config.validation.cut(config.max_doc_tokens)
    on_gpu = config.device == "cuda"
    teacher, _ = load_teacher(
        teacher_folder,
        dataset.val_batches(config.validation.tokens, *packing, config.device),
        data_facts(dataset, config.validation.tokens, *packing),
        device=config.device,
        backend=choose_backend(config.attention, config.device),
        compute_dtype=torch.bfloat16 if on_gpu else torch.float32,
        compiled=on_gpu,
        matrix_dtype=config.teacher_dtype,
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / DESCRIPTION).unlink(missing_ok=True)
    announce(config, teacher.config.dim, out)
    with DeviceLease(device_identity(config.device)) as lease:
        checksums, cost_ms = _fill(config, out, dataset, teacher)
        shared = lease.shared()
    description = {
        "config": dataclasses.asdict(config),
        "teacher_sha256": read_description(teacher_folder)["weights_sha256"],
        "data_hash": dataset.hash,
        "checksums": checksums,
        "cost_ms": cost_ms,
        "shared_device": shared,
        "device": device_kind(config.device),
        "versions": versions(),
    }
    write_json(out / DESCRIPTION, seal(description))


def announce(config: CacheConfig, width: int, out: Path) -> None:
    """Print the cache's size and the room there is. Raises ConfigError if that is too little."""
    a_token = sum(np.dtype(dtype).itemsize * values for dtype, values in layout(config, width).values())
    size, free = a_token * config.micro_batches * config.micro_batch_tokens, shutil.disk_usage(out).free
    a_file = f"{size / 1e9:.3f} GB at {a_token:,} bytes a token"
    print(f"{config.cache_id}: {a_file}; {free / 1e9:.1f} GB are free", flush=True)
    if size + SPARE > free:
        raise ConfigError(
            f"kd.cache: {config.kind} takes {size / 1e9:.1f} GB, but {out} has {free / 1e9:.1f} GB free, of which "
            f"{SPARE / 1e9:.1f} GB are left alone; take another kind, lower kd.token_frac, or set none"
        )


def _fill(config: CacheConfig, out: Path, dataset: Dataset, teacher: GPT) -> tuple[dict[str, list[int]], float]:
    """(checksums of each file by micro-batch, ms on the config's clock)."""
    size, forms = config.micro_batch_tokens, layout(config, teacher.config.dim)
    generator = torch.Generator(config.device).manual_seed(config.seed)
    first = dataset.train_stream(config.seed, config.max_doc_tokens).next_batch(size, config.device)
    teacher_target(teacher, first)  # compiles outside the clock
    stream = dataset.train_stream(config.seed, config.max_doc_tokens)
    files = {name: (out / f"{name}.bin").open("wb") for name in forms}
    checksums = {name: [] for name in forms}
    begun = time.perf_counter()
    for place in range(config.micro_batches):
        target = teacher_target(teacher, stream.next_batch(size, config.device))
        for name, tensor in _values(config, target, generator).items():
            array = np.ascontiguousarray(tensor.cpu().numpy().astype(forms[name][0], copy=False))
            checksums[name].append(zlib.crc32(array))
            with needs_room(out / f"{name}.bin"):
                files[name].write(array.data)
                if place == config.micro_batches - 1:
                    files[name].close()
                    sync(out / f"{name}.bin")
    cost_ms = 1e3 * (time.perf_counter() - begun)
    if config.clock == "modelled":
        flops = teacher.flops_per_token(config.max_doc_tokens / 2, backward=False)
        cost_ms = config.micro_batches * size * flops / (config.modelled_tflops * 1e9)
    return checksums, cost_ms


def _values(config: CacheConfig, target: DenseTeacher, generator: torch.Generator) -> dict[str, Tensor]:
    if config.kind == "hidden":
        if config.dtype == "bf16":
            return {"hidden": target.hidden.bfloat16().view(torch.int16)}
        rows = fp8.by_rows(target.hidden)
        return {"hidden": rows.values.view(torch.int8), "scale": rows.scale}
    if config.kind == "samples":
        sparse = sample(target, config.entries, config.temperature, generator)
        return {"ids": sparse.ids, "counts": sparse.counts}
    require(
        config.entries <= len(target.head), "kd.top_k", config.entries, f"at most the vocabulary, {len(target.head)}"
    )
    sparse = top_k(target, config.entries, config.temperature, "ghost")
    steps = (sparse.log_probs * -STEPS_A_NAT).round().clamp(0, 2**16 - 1).int()
    return {"ids": sparse.ids, "log_probs": steps}
