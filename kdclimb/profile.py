"""Where the time of a step goes: the timing isolates once more, with their parts timed, apart from the timed runs.

The parts are those of `Trainer.train_step`. On a GPU they lie between CUDA events, which are read once the step is
over, so nothing inside it waits; on a CPU between readings of the host's clock. What is between the parts is "other".
The loss makes its gradients in its forward pass (docs/KERNELS.md), so "backward" is that of the student's layers alone.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from kdclimb import schedule
from kdclimb.artifacts import DeviceLease, write_csv
from kdclimb.attention import choose_backend
from kdclimb.config import RunConfig, require
from kdclimb.data import Dataset
from kdclimb.provenance import device_kind
from kdclimb.train import Trainer, fix_order

PARTS = ("data", "teacher", "student", "loss", "backward", "optimiser", "other")
COLUMNS = (
    "label run_id part ms_median ms_p90 share_of_step step_ms_median steps peak_alloc_gib peak_reserved_gib "
    "shared_device device threads"
).split()


class Regions:
    """A trainer's `region`: the milliseconds of each part, added up over a step."""

    def __init__(self, device: str):
        self.on_gpu = device == "cuda"
        self.marks: list[tuple] = []

    @contextmanager
    def __call__(self, name: str):
        start = self._now()
        yield
        self.marks.append((name, start, self._now()))

    def _now(self):
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def collect(self) -> dict[str, float]:
        """What was marked since the last time. On a GPU all of it must be over."""
        parts = dict.fromkeys(PARTS, 0.0)
        for name, start, end in self.marks:
            parts[name] += start.elapsed_time(end) if self.on_gpu else 1e3 * (end - start)
        self.marks.clear()
        return parts


def profile(config: RunConfig, dataset: Dataset, teacher: Path | None, cache: Path | None) -> tuple[dict, dict]:
    """({part: ms of each step}, with "step" for the whole; peak memory in GiB on a GPU) of a run's steps.

    The warm-up is the run's own. KD stops where it would in the run; validations are left out.
    """
    backend = choose_backend(config.attention, config.device, config.deterministic)
    trainer = Trainer(config, dataset, teacher, backend, cache)
    trainer.warm_up()
    regions = trainer.region = Regions(config.device)
    times, peaks = defaultdict(list), {}
    whole = "other"  # its own region holds all the others, which are taken off again
    if config.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    while trainer.step < config.schedule.stop_step:
        if trainer.kd is not None:
            trainer.kd.advance(trainer.step, trainer.tokens)
        with regions(whole):
            trainer.train_step()
        if config.device == "cuda":
            torch.cuda.synchronize()
        parts = regions.collect()
        step, parts[whole] = parts[whole], 0.0
        parts[whole] = step - sum(parts.values())
        for name, ms in (parts | {"step": step}).items():
            times[name].append(ms)
    if config.device == "cuda":
        peaks["peak_alloc_gib"] = torch.cuda.max_memory_allocated() / 2**30
        peaks["peak_reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
    return times, peaks


def compared_steps(configs: list[RunConfig]) -> list[int]:
    """The steps that have KD in all of these runs that have KD at all, without the first two.

    Raises ConfigError where there is none.
    """
    stop = min(config.schedule.stop_step for config in configs)
    taught = [set(_taught(config)) for config in configs if config.kd]
    steps = sorted(set(range(2, stop)).intersection(*taught))
    require(steps, "kd.isolate_steps", stop, "so many that one after the second has KD in each isolate")
    return steps


def _taught(config: RunConfig) -> Iterator[int]:
    """The run's steps that have a teacher, unless a validation ends KD."""
    sched, kd, tokens = config.schedule, config.kd, 0
    for step in range(sched.stop_step):
        if not kd.infer_only and schedule.kd_ends(sched, kd, step, tokens):
            return
        if step % kd.every == 0:
            yield step
        tokens += schedule.batch_tokens(sched, step)


def write(runs: list[tuple[str, RunConfig, Path | None, Path | None]], manifest: Path, out: Path, threads: int) -> None:
    """Profile (label, config, teacher's checkpoint, cache) one after another into the table `out`.

    Its rows hold a part each, over the steps of `compared_steps`. Runs on one device, warmed up each like the timed
    isolates.
    """
    torch.set_num_threads(threads)
    steps = compared_steps([config for _, config, *_ in runs])
    dataset, rows = Dataset(manifest), []
    for label, config, teacher, cache in runs:
        fix_order(config)  # as the timed run
        device = device_kind(config.device)
        with DeviceLease(device) as lease:
            times, peaks = profile(config, dataset, teacher, cache)
            shared = int(lease.shared())
        gc.collect()
        if config.device == "cuda":
            torch.cuda.empty_cache()
        kept = {name: sorted(ms[i] for i in steps) for name, ms in times.items()}
        step = statistics.median(kept["step"])
        for part in PARTS:
            ms = statistics.median(kept[part])
            row = {"label": label, "run_id": config.run_id, "part": part, "ms_median": ms, "share_of_step": ms / step}
            row |= {"ms_p90": kept[part][math.ceil(0.9 * len(kept[part])) - 1], "step_ms_median": step}
            row |= {"steps": len(kept[part]), "shared_device": shared, "device": device, "threads": threads}
            rows.append(row | peaks)
    write_csv(out, COLUMNS, rows)
