"""The anchor: the same short CE training before and after each run, which says how fast the machine was then.

It depends on the kind of device alone, on no campaign: an embedding, some layers, a head and cross-entropy in plain
PyTorch, so that nothing is compiled and an edit of the trainer leaves it as it is.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn
from torch.nn import functional

SHAPES = {"cpu": (2, 128, 2048, 512), "cuda": (4, 1024, 16384, 8192)}  # layers, width, vocabulary, tokens a step
WARMUP_STEPS = 3


def anchor_ms(device: str, steps: int) -> float:
    """Median milliseconds of a step, over `steps` steps; cpu or cuda. The caller's random state stays as it is."""
    layers, dim, words, tokens = SHAPES[device]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if device == "cuda" else []):
        torch.manual_seed(0)
        parts = [nn.Embedding(words, dim)]
        for _ in range(layers):
            parts += [nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)]
        model = nn.Sequential(*parts, nn.Linear(dim, words, bias=False)).to(device, dtype)
        ids = torch.randint(words, (tokens + 1,)).to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        times = [_step(model, optimizer, ids) for _ in range(WARMUP_STEPS + steps)]
    return 1e3 * statistics.median(times[WARMUP_STEPS:])


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> float:
    """Seconds of one step."""
    started = time.perf_counter()
    functional.cross_entropy(model(ids[:-1]), ids[1:]).backward()
    optimizer.step()
    optimizer.zero_grad()
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started
