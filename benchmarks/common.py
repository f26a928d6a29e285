"""What the benchmarks share: interleaved timing, peak memory, and the one form of their CSVs (docs/DESIGN.md)."""

from __future__ import annotations

import csv
import statistics
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch

COLUMNS = "benchmark arm case metric value unit device software commit date".split()
UNITS = {"ms": "ms", "extra_gib": "GiB", "peak_gib": "GiB", "tokens_per_s": "tokens/s", "compile_s": "s"}  # else 1


class Rows:
    """Rows of one benchmark's CSV, printed as they come."""

    def __init__(self, benchmark: str, commit: str | None):
        self.rows: list[dict] = []
        self.fixed = {
            "benchmark": benchmark,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "software": f"torch {torch.__version__}; triton {_triton_version()}",
            "commit": commit or _commit(),
            "date": datetime.now(UTC).date().isoformat(),
        }

    def add(self, arm: str, case: dict, **metrics: float) -> None:
        text = ";".join(f"{key}={case[key]}" for key in sorted(case))
        for metric, value in metrics.items():
            row = {
                "arm": arm,
                "case": text,
                "metric": metric,
                "value": repr(float(value)),
                "unit": UNITS.get(metric, "1"),
            }
            self.rows.append(self.fixed | row)
        print(f"{arm:<24} {text:<70} " + "  ".join(f"{k} {v:.4g}" for k, v in metrics.items()), flush=True)

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)


def read_rows(path: Path) -> list[dict]:
    """Rows of a CSV, all cells text; none where there is no such file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return triton.__version__


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


HEAD_START = 20_000_000  # GPU cycles of idling before each timing, so that the host's start is not in it


def interleaved(calls: dict[str, Callable[[], None]], rounds: int, inner: int = 2) -> dict[str, float]:
    """Median milliseconds of each call on the GPU, warmed up by the caller.

    Each round times all of them once, `inner` calls in a row each, so that a drifting clock meets all alike.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(HEAD_START)
            start.record()
            for _ in range(inner):
                call()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) / inner)
    return {name: statistics.median(values) for name, values in times.items()}


def extra_gib(call: Callable[[], None]) -> float:
    """Peak memory of one call above what is allocated before it, in GiB. The caller drops what an earlier call left."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30
