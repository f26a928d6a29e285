"""Time of a training step by stage of the batch schedule, on one GPU, on synthetic tokens of documents' lengths.

python benchmarks/train_step.py --configfile config/seed155.yaml --out results/bench
python benchmarks/train_step.py --teacher 3 6 128    # and KD from an untrained teacher of that shape, interleaved

The student, schedule and optimisers are the config's. `compile_s` is all of the warm-up: every graph that the clock
will see, from an empty cache unless TORCHINDUCTOR_CACHE_DIR holds one. Steps take the learning rate, windows and labels
of their stage's start.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import Rows
from kdclimb import campaign, expansion, schedule, sections
from kdclimb.artifacts import seal, sha256, write_json
from kdclimb.attention import choose_backend
from kdclimb.config import ATTENTION_BACKENDS, AttentionConfig, RunConfig
from kdclimb.data import Dataset
from kdclimb.distill import KDController
from kdclimb.explain import read_config
from kdclimb.model import GPT
from kdclimb.run import PEAK_TFLOPS
from kdclimb.shards import write_shard
from kdclimb.train import Trainer, compiled_graphs

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


def student(files: list[Path], horizon: int | None) -> tuple[RunConfig, sections.Campaign]:
    values = read_config(files)
    values["data"]["source"] = "text"  # whose files are there; only the shapes count
    loaded = campaign.load(values, ROOT)
    runs = [run.config for run in expansion.expand(loaded, {}) if run.arm == "ce"]
    config = next(run for run in runs if horizon in (None, run.schedule.horizon))
    one_batch = dataclasses.replace(config.validation, tokens=config.schedule.micro_batch_tokens)
    return dataclasses.replace(config, validation=one_batch), loaded


def with_teacher(trainer: Trainer, shape: list[int], loaded: sections.Campaign) -> None:
    """Give the trainer an untrained teacher: a step takes as long."""
    candidate = sections.Candidate(*shape, steps=1)
    config = campaign._Expansion(loaded, "synthetic").teacher(candidate)
    with torch.device(trainer.device):
        teacher = GPT(config, **trainer.options).requires_grad_(False)
    teacher.set_windows(*schedule.windows(trainer.config.schedule, trainer.config.schedule.horizon))
    kd = dataclasses.replace(campaign._Expansion(loaded, "synthetic").kd("untrained", 1.0), stop_mode="none")
    trainer.config = dataclasses.replace(trainer.config, kd=kd)
    trainer.kd = KDController(kd, teacher, 0.0, trainer.config.schedule)


def take_step(trainer: Trainer, kd_on: bool) -> None:
    if trainer.kd:
        trainer.kd.stop_step = None if kd_on else 0
    trainer.train_step()


def warm_up(trainer: Trainer, arms: dict[str, bool]) -> float:
    start = time.perf_counter()
    for kd_on in arms.values():
        for _ in range(max(2, trainer.config.optim.adam.every)):
            take_step(trainer, kd_on)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(trainer: Trainer, stage: int, arms: dict[str, bool], rounds: int) -> dict[str, float]:
    """Median milliseconds of a step of each arm, interleaved."""
    sched = trainer.config.schedule
    first = next(s for s in range(sched.horizon) if schedule.stage(sched, s) == stage)
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    for i in range(rounds + 1):
        for arm, kd_on in arms.items():
            trainer.step = first + first % 2 + i % 2  # Adam steps in every second one, as in training
            torch.cuda.synchronize()
            start = time.perf_counter()
            take_step(trainer, kd_on)
            torch.cuda.synchronize()
            if i:  # the first meets a stage's windows anew
                times[arm].append(1e3 * (time.perf_counter() - start))
    return {
        arm: statistics.fmean([statistics.median(ms[0::2]), statistics.median(ms[1::2])]) for arm, ms in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configfile", type=Path, nargs="+", default=[ROOT / "config/seed155.yaml"])
    parser.add_argument("--horizon", type=int, help="of the config's; default: the first")
    parser.add_argument("--teacher", type=int, nargs=3, metavar=("LAYERS", "HEADS", "HEAD_DIM"))
    parser.add_argument("--rounds", type=int, default=10, help="timed steps of each stage and arm")
    parser.add_argument("--head-dtype", choices=("same", "fp8"), help="instead of the config's")
    parser.add_argument("--attention", choices=ATTENTION_BACKENDS, default="auto")
    parser.add_argument("--micro-batch", type=int, help="tokens, instead of the config's")
    parser.add_argument("--commit", help="for the CSV, where there is no git")
    parser.add_argument("--out", type=Path, default=Path("results/bench"), help="folder of train_step.csv, kd_step.csv")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("an NVIDIA GPU is needed: on a CPU these times mean nothing")
    config, loaded = student(args.configfile, args.horizon)
    if args.head_dtype:
        config = dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, head_dtype=args.head_dtype))
    if args.micro_batch:
        sched = dataclasses.replace(config.schedule, micro_batch_tokens=args.micro_batch)
        config = dataclasses.replace(config, schedule=sched)
    with tempfile.TemporaryDirectory() as folder:
        run(config, loaded, synthetic(Path(folder), 60_000_000, config.data.vocab_size - 48), args)


def run(config: RunConfig, loaded: sections.Campaign, dataset: Dataset, args: argparse.Namespace) -> None:
    backend = choose_backend(AttentionConfig(args.attention, False), "cuda")
    trainer = Trainer(config, dataset, None, backend)
    arms = {"ce": False}
    if args.teacher:
        with_teacher(trainer, args.teacher, loaded)
        arms["kd"] = True
    case = {"attention": trainer.backend, "head": {"same": "bf16"}.get(config.schedule.head_dtype, "fp8")}
    case["micro_batch"] = config.schedule.micro_batch_tokens
    seconds = warm_up(trainer, arms)
    steps, kd_steps = Rows("train_step", args.commit), Rows("kd_step", args.commit)
    steps.add("kdclimb", case, compile_s=seconds)
    graphs = compiled_graphs()
    peak = next((v for name, v in PEAK_TFLOPS.items() if name in torch.cuda.get_device_name()), None)
    for stage, tokens in enumerate(config.schedule.batch_tokens):
        torch.cuda.reset_peak_memory_stats()
        times = measure(trainer, stage, arms, args.rounds)
        here = case | {"stage": stage + 1}
        metrics = {"ms": times["ce"], "tokens_per_s": 1e3 * tokens / times["ce"]}
        if peak:
            metrics["mfu"] = tokens * trainer.flops_per_token()[0] / (times["ce"] * 1e9 * peak)
        memory = torch.cuda.max_memory_allocated() / 2**30
        if args.teacher:
            kd_case = here | {"mode": "dense", "teacher": "x".join(map(str, args.teacher))}
            kd_steps.add("kdclimb", kd_case, ms=times["kd"], ratio_to_ce=times["kd"] / times["ce"], peak_gib=memory)
        else:
            metrics["peak_gib"] = memory
        steps.add("kdclimb", here, **metrics)
    print(f"graphs made after the warm-up: {compiled_graphs() - graphs}")
    steps.write(args.out / "train_step.csv")
    if args.teacher:
        kd_steps.write(args.out / "kd_step.csv")


if __name__ == "__main__":
    main()
