"""A teacher's targets for a run's exact tokens, read from the disk: KD without the teacher's trunk.

Micro-batches follow from the data, the seed and the packing alone, so runs that differ in anything else share a cache.
`kdclimb/write_cache.py` makes one. Symbols: M micro-batches of T tokens, d_t the teacher's width, k entries a token.
"""

from __future__ import annotations

import math
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kdclimb.artifacts import Damaged, read_sealed
from kdclimb.config import CacheConfig, RunConfig, build
from kdclimb.kernels import DenseTeacher, SparseTeacher, fp8
from kdclimb.model import GPT
from kdclimb.waiting import waiting

STEPS_A_NAT = 2048  # of log-probabilities, kept as 16-bit fixed point: fp16 would be eight times as coarse at 8 nats
DESCRIPTION = "cache.json"  # written last: without it a cache is not whole


def layout(config: CacheConfig, width: int) -> dict[str, tuple[str, int]]:
    """{file: (its numpy dtype, values a token)}. bf16 and e4m3 values are kept as integers of their bits."""
    eight = {"hidden": ("|i1", width), "scale": ("<f4", 1)}
    return {
        "hidden": {"hidden": ("<i2", width)} if config.dtype == "bf16" else eight,
        "top_k": {"ids": ("<u2", config.entries), "log_probs": ("<u2", config.entries)},
        "samples": {"ids": ("<u2", config.entries), "counts": ("|u1", config.entries), "entropy": ("<f4", 1)},
    }[config.kind]


class TargetCache:
    """The cache in a folder, checked against the run that asks for it. Reads one micro-batch ahead, in a thread."""

    def __init__(self, folder: Path, run: RunConfig, teacher: GPT, expected: dict):
        """`expected`: what its description must hold, such as the hash of the teacher's weights.

        Raises ValueError for a cache that is not whole, or is not of this teacher, data, seed and packing.
        """
        if not (folder / DESCRIPTION).is_file():
            raise ValueError(f"{folder}: no whole cache there; delete the folder, and ./run makes it again")
        self.folder, self.teacher = folder, teacher
        self.description = read_sealed(folder / DESCRIPTION, "delete the folder, and ./run makes it again")
        self.config = config = build(CacheConfig, self.description["config"])
        asked = {
            "id": (config.cache_id, run.kd.cache),
            "teacher": (config.teacher, run.kd.teacher),
            "seed": (config.seed, run.seed),
            "micro_batch_tokens": (config.micro_batch_tokens, run.schedule.micro_batch_tokens),
            "max_doc_tokens": (config.max_doc_tokens, run.schedule.max_doc_tokens),
            "teacher_dtype": (config.teacher_dtype, run.kd.teacher_dtype),
        }
        if config.kind != "hidden":
            asked["temperature"] = (config.temperature, run.kd.temperature)
        asked |= {name: (self.description[name], value) for name, value in expected.items()}
        for name, (found, wanted) in asked.items():
            if found != wanted:
                raise ValueError(f"{folder}: stale: {name} is {found!r}, but this run needs {wanted!r}; make it again")
        self.files = {name: self._map(name, *form) for name, form in layout(config, teacher.config.dim).items()}
        self.pool, self.ahead = ThreadPoolExecutor(1), (-1, Future())

    @property
    def cost_ms(self) -> float:
        return self.description["cost_ms"]

    def _map(self, name: str, dtype: str, values: int) -> np.ndarray:
        path, shape = self.folder / f"{name}.bin", (self.config.micro_batches, self.config.micro_batch_tokens, values)
        size, expected = path.stat().st_size if path.is_file() else 0, np.dtype(dtype).itemsize * math.prod(shape)
        if size != expected:
            raise ValueError(f"{path}: {size:,} bytes, but {expected:,} are promised; it is truncated: make it again")
        return np.memmap(path, dtype=dtype, mode="r", shape=shape)

    def target(self, place: int, device: str) -> DenseTeacher | SparseTeacher:
        """The teacher's side for the micro-batch at this place of the run's stream. Nothing waits for the device."""
        if place >= self.config.micro_batches:
            raise ValueError(f"{self.folder}: holds {self.config.micro_batches} micro-batches; number {place} is asked")
        found = self.ahead[1] if self.ahead[0] == place else self.read_ahead(place, device)
        values = {name: tensor.to(device, non_blocking=True) for name, tensor in found.result().items()}
        if place + 1 < self.config.micro_batches:
            self.read_ahead(place + 1, device)
        if self.config.kind == "samples":
            values["entropy"] = values["entropy"][:, 0]
        if self.config.kind != "hidden":
            return SparseTeacher(**values)
        hidden, dtype = values["hidden"], self.teacher.compute_dtype
        if self.config.dtype == "fp8":
            hidden = fp8.Rows8(hidden.view(torch.float8_e4m3fn), values["scale"]).to(dtype)
        else:
            hidden = hidden.view(torch.bfloat16).to(dtype)
        return DenseTeacher(hidden, self.teacher.head_weight, self.teacher.softcap)

    def read_ahead(self, place: int, device: str) -> Future:
        """Begin to read this micro-batch, for when it is asked for."""
        self.ahead = place, self.pool.submit(self._read, place, device)
        return self.ahead[1]

    def _read(self, place: int, device: str) -> dict[str, Tensor]:
        """One micro-batch in host memory. Raises ValueError unless it is what was written."""
        values = {}
        for name, file in self.files.items():
            with waiting(f"{self.folder}/{name}.bin"):
                array = np.array(file[place])
            if zlib.crc32(array) != self.description["checksums"][name][place]:
                raise Damaged(f"{self.folder}/{name}.bin: micro-batch {place} is damaged; make the cache again")
            if name == "log_probs":
                array = array.astype(np.float32) / -STEPS_A_NAT
            tensor = torch.from_numpy(array.astype(np.int32) if name == "ids" else array)
            values[name] = tensor.pin_memory() if device == "cuda" else tensor
        return values

    def flops_per_token(self) -> float:
        """Of the teacher's side of the loss: its head, with cached hidden states."""
        config = self.teacher.config
        return 2.0 * config.dim * config.vocab_size if self.config.kind == "hidden" else 0.0
