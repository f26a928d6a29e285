"""Time of a training step by stage of the batch schedule, on one GPU, on synthetic tokens of documents' lengths.

python benchmarks/train_step.py --configfile config/seed155.yaml --out results/bench

The student, schedule and optimisers are the config's. `compile_s` is all of the warm-up: every graph that the clock
will see, from an empty cache unless TORCHINDUCTOR_CACHE_DIR holds one. Steps take the learning rate, windows and labels
of their stage's start.

With --peer-dir another trainer is timed beside ours, in processes of its own between our rounds: DIR/bench.py, a script
in the speedrun's form, which takes RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT and DATA_PATH (DIR, unless it
is set) from the environment and prints lines of `step:N/M` and `train_time:Tms`. Stages are equal parts of its own M
steps. `drift` is our last block of rounds over our first. With --deterministic steps under train.deterministic take
turns with the others, both with cuBLAS's workspace of the former.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import Rows
from kdclimb import campaign, expansion, schedule, sections
from kdclimb.artifacts import last_lines, seal, sha256, write_json
from kdclimb.attention import choose_backend
from kdclimb.config import ATTENTION_BACKENDS, AttentionConfig, RunConfig, ScheduleConfig
from kdclimb.configfiles import read_config
from kdclimb.data import Dataset
from kdclimb.logs import read_log, stage_times
from kdclimb.run import PEAK_TFLOPS
from kdclimb.shards import write_shard
from kdclimb.train import SHARE_EVERY, Trainer, compiled_graphs, fix_order

ROOT = Path(__file__).resolve().parent.parent
MEAN_DOCUMENT = 1500  # tokens; lengths are drawn from an exponential distribution


def synthetic(folder: Path, tokens: int, bos: int) -> Dataset:
    """A data set of random tokens."""
    rng = np.random.default_rng(0)
    stream = rng.integers(0, bos, tokens, dtype=np.uint16)
    stream[0] = bos
    stream[np.cumsum(rng.exponential(MEAN_DOCUMENT, tokens // MEAN_DOCUMENT).astype(int) + 1) % tokens] = bos
    write_shard(folder / "synthetic.bin", stream)
    shard = {"file": "synthetic.bin", "tokens": tokens, "sha256": sha256(folder / "synthetic.bin")}
    facts = {"data_hash": "synthetic", "bos_id": bos, "tokenizer_sha256": None, "train": [shard], "val": [shard]}
    write_json(folder / "manifest.json", seal(facts))
    return Dataset(folder / "manifest.json")


def student(files: list[Path], horizon: int | None, device: str = "cuda") -> tuple[RunConfig, sections.Campaign]:
    """(the config of the campaign's first CE run, with a small validation set; the campaign)."""
    values = read_config(files)
    values["data"]["source"] = "text"  # whose files are there; only the shapes count
    values["device"] = device
    loaded = campaign.load(values, ROOT)
    runs = [run.config for run in expansion.expand(loaded, {}) if run.arm == "ce"]
    config = next(run for run in runs if horizon in (None, run.schedule.horizon))
    one_batch = dataclasses.replace(config.validation, tokens=config.schedule.micro_batch_tokens)
    return dataclasses.replace(config, validation=one_batch), loaded


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def first_step(sched: ScheduleConfig, stage: int) -> int:
    """The first even step of a stage from which two can be taken without measuring kd_share, which takes longer."""
    first = schedule.stage_starts(sched)[stage]
    first += first % 2
    return first if first % SHARE_EVERY else first + 2


def measure(
    trainer: Trainer, first: int, arms: dict[str, Callable[[], None]], rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    """(median milliseconds, peak memory in GiB on a GPU) of `rounds` steps of each arm, an even number.

    An arm is what makes the trainer's next step its own. Arms take turns of three steps, the first of them untimed: in
    training a step follows one of its own kind, and the first of a stage meets its windows anew. The timed ones are
    `first` + 1 and `first`: Adam steps in every second one, as in training.
    """
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    peaks: dict[str, float] = {}
    on_gpu = torch.cuda.is_available()
    for _ in range(rounds // 2):
        for arm, enter in arms.items():
            for i in range(3):
                enter()
                trainer.step = first + i % 2
                synchronize()
                if on_gpu:
                    torch.cuda.reset_peak_memory_stats()
                start = time.perf_counter()
                trainer.train_step()
                synchronize()
                if i:
                    times[arm].append(1e3 * (time.perf_counter() - start))
                if i and on_gpu:
                    peaks[arm] = max(peaks.get(arm, 0.0), torch.cuda.max_memory_allocated() / 2**30)
    return {arm: typical(ms) for arm, ms in times.items()}, peaks


def even(text: str) -> int:
    """An argument of `measure`, as argparse asks for it."""
    if not text.isdecimal() or int(text) < 2 or int(text) % 2:
        raise argparse.ArgumentTypeError(f"an even number is needed, not {text!r}")
    return int(text)


def typical(times: list[float]) -> float:
    """The mean of the medians of every second step and of the others, as Adam steps in the former alone."""
    return statistics.fmean([statistics.median(part) for part in (times[0::2], times[1::2]) if part])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configfile", type=Path, nargs="+", default=[ROOT / "config/seed155.yaml"])
    parser.add_argument("--horizon", type=int, help="of the config's; default: the first")
    parser.add_argument("--rounds", type=even, default=10, help="timed steps of each stage; an even number")
    parser.add_argument("--head-dtype", choices=("same", "fp8"), help="instead of the config's")
    parser.add_argument("--attention", choices=ATTENTION_BACKENDS, default="auto")
    parser.add_argument("--micro-batch", type=int, help="tokens, instead of the config's")
    parser.add_argument("--peer-dir", type=Path, metavar="DIR", help="a trainer to run beside: DIR/bench.py")
    parser.add_argument("--peer-runs", type=int, default=1, help="of it, each between two blocks of our rounds")
    parser.add_argument("--deterministic", action="store_true", help="also what train.deterministic costs")
    parser.add_argument("--commit", help="for the CSV, where there is no git")
    parser.add_argument("--out", type=Path, default=Path("results/bench"), help="folder of train_step.csv")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("an NVIDIA GPU is needed: on a CPU these times mean nothing")
    if args.peer_dir and not (args.peer_dir / "bench.py").is_file():
        parser.error(f"--peer-dir {args.peer_dir}: there is no bench.py in it")
    config, _ = student(args.configfile, args.horizon)
    if args.head_dtype:
        config = dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, head_dtype=args.head_dtype))
    if args.micro_batch:
        sched = dataclasses.replace(config.schedule, micro_batch_tokens=args.micro_batch)
        config = dataclasses.replace(config, schedule=sched)
    with tempfile.TemporaryDirectory() as folder:
        run(config, synthetic(Path(folder), 60_000_000, config.data.vocab_size - 48), args)


def run(config: RunConfig, dataset: Dataset, args: argparse.Namespace) -> None:
    arms = {"ce": config}
    if args.deterministic:
        arms["deterministic"] = dataclasses.replace(config, deterministic=True)
    backend = choose_backend(AttentionConfig(args.attention, False), config.device, args.deterministic)
    rows = Rows("train_step", args.commit)
    trainer = Trainer(config, dataset, None, backend)
    case = {"attention": trainer.backend, "head": {"same": "bf16"}.get(config.schedule.head_dtype, "fp8")}
    case["micro_batch"] = config.schedule.micro_batch_tokens
    cases = {arm: case | ({"deterministic": "true"} if how.deterministic else {}) for arm, how in arms.items()}
    enter = {arm: functools.partial(fix_order, how) for arm, how in arms.items()}
    for arm in reversed(arms):  # cuBLAS takes its workspace once
        enter[arm]()
        rows.add("kdclimb", cases[arm], compile_s=warm_up(trainer))
    graphs = compiled_graphs()
    peak = next((v for name, v in PEAK_TFLOPS.items() if name in rows.fixed["device"]), None)
    blocks, theirs = beside(trainer, enter, args)
    for stage, tokens in enumerate(config.schedule.batch_tokens):
        place = {"stage": stage + 1}
        times = {arm: statistics.fmean(medians[stage][arm] for medians, _ in blocks) for arm in arms}
        for arm, ms in times.items():
            metrics = {"ms": ms, "tokens_per_s": 1e3 * tokens / ms}
            if peak:
                metrics["mfu"] = tokens * trainer.flops_per_token()[0] / (ms * 1e9 * peak)
            if config.device == "cuda":
                metrics["peak_gib"] = max(peaks[stage][arm] for _, peaks in blocks)
            if arm != "ce":
                metrics["ratio_to_ce"] = ms / times["ce"]
            if theirs:
                metrics["drift"] = blocks[-1][0][stage][arm] / blocks[0][0][stage][arm]
            rows.add("kdclimb", cases[arm] | place, **metrics)
        if theirs:
            peer, ms = args.peer_dir.name, statistics.fmean(medians[stage] for medians in theirs)
            rows.add(f"peer {peer}", place, ms=ms)
            rows.add("kdclimb", case | place | {"peer": peer}, ratio_to_peer=times["ce"] / ms)
    print(f"graphs made after the warm-up: {compiled_graphs() - graphs}")
    rows.write(args.out / "train_step.csv")


def beside(trainer: Trainer, enter: dict[str, Callable[[], None]], args: argparse.Namespace) -> tuple[list, list]:
    """(`measure`'s medians and peaks, by stage, of each block of our rounds; the medians by stage of each peer's run).

    Blocks and runs take turns, beginning and ending with ours; without a peer there is one block.
    """
    stages = len(trainer.config.schedule.batch_tokens)
    firsts = [first_step(trainer.config.schedule, stage) for stage in range(stages)]

    def block() -> tuple:
        return tuple(zip(*(measure(trainer, first, enter, args.rounds) for first in firsts), strict=True))

    blocks, theirs = [block()], []
    for _ in range(args.peer_runs if args.peer_dir else 0):
        theirs.append([typical(times) for times in peer_times(args.peer_dir, stages)])
        blocks.append(block())
    return blocks, theirs


def peer_times(folder: Path, stages: int) -> list[list[float]]:
    """Milliseconds of a peer's steps, by stage. SystemExit: it failed, or says no times of a stage."""
    folder = folder.resolve()
    fixed = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # it needs room of its own
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "bench.txt"
        with path.open("w") as out:
            done = subprocess.run(
                [sys.executable, "bench.py"],
                cwd=folder,
                env={"DATA_PATH": str(folder)} | os.environ | fixed,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        said = f"--peer-dir {folder}: bench.py ended with exit code {done.returncode}\n{last_lines(path)}"
        if done.returncode:
            raise SystemExit(said)
        try:
            log = read_log(path)
        except ValueError as error:
            raise SystemExit(f"{said}\n{error}") from error
    times = stage_times(log, stages) if log.total else [[]]
    if not all(times):
        raise SystemExit(f"{said}\nno lines like 'step:1/36 train_time:300ms' of each of {stages} equal stages")
    return times


def warm_up(trainer: Trainer) -> float:
    """Seconds of the first steps, in which every graph is made."""
    begun = time.perf_counter()
    for _ in range(max(2, trainer.config.optim.adam.every)):
        trainer.train_step()
    synchronize()
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
