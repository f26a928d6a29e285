"""What KD adds to a training step, by the way in which the teacher's targets come, on one GPU.

python benchmarks/kd_step.py --head-dtype bf16 fp8 --out docs/records/bench
python benchmarks/kd_step.py --toy    # a tiny student on the CPU, to try this file

The student, schedule, optimisers and KD are the config's, teacher and tokens untrained and random: a step takes as
long. Arms take turns, so that a drifting clock meets all alike; times are medians, ratios are to the CE step with the
same head in the same run, and extra_gib is the peak of memory above the CE step's, the teacher's weights included.
Cached targets are written to a temporary folder first and lie in the host's memory when they are read: a disk must give
a micro-batch in the time of one to be as fast. Liger's loss knows no softcap, no labels further ahead and no FP8.

Arms: ce; dense, exact KD from the teacher in each micro-batch; hidden, top_k, samples from a cache; infer, the
teacher's layers alone, their answer dropped; liger, its chunked CE + JSD(beta=0) in place of ours in `dense`.
With an FP8 head also those with the teacher's layers, or its cache, in FP8.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import Rows
from benchmarks.kd_loss import liger_loss
from benchmarks.train_step import ROOT, even, first_step, measure, student, synchronize, synthetic
from kdclimb import expansion, schedule, sections, write_cache
from kdclimb.attention import choose_backend
from kdclimb.cache import TargetCache
from kdclimb.config import ATTENTION_BACKENDS, AttentionConfig, CacheConfig, KDConfig, RunConfig
from kdclimb.data import Batch, Dataset
from kdclimb.distill import KDController
from kdclimb.kernels import DenseTeacher, DistillLoss
from kdclimb.model import GPT
from kdclimb.teacher import in_dtype
from kdclimb.train import Trainer, compiled_graphs

TOY_TEACHER = (1, 2, 32)
TOP_K, SAMPLES = 64, 50  # entries of the sparse caches
MARKS = {  # largest ratio to the CE step that is aimed at: with a bf16, and with an fp8 head
    "dense": (1.25, 1.20),
    "hidden": (1.16, 1.12),
    "top_k": (1.04, 1.04),
    "samples": (1.04, 1.04),
    "infer": (1.09, 1.09),
}


class LigerController(KDController):
    """`KDController` with Liger's loss: one chunked CE + KL on logits without a softcap."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.compute = liger_loss()

    def loss(self, hidden: Tensor, student: GPT, target: DenseTeacher, batch: Batch, **options) -> DistillLoss:
        weight = student.head_weight.to(hidden.dtype)
        total = self.compute(hidden, weight, target.hidden, target.head.to(hidden.dtype), batch.labels)
        unknown = torch.full_like(total.detach(), torch.nan)
        return DistillLoss(total, total.detach(), unknown, unknown, unknown, "liger")


@dataclass(frozen=True)
class Arm:
    mode: str  # a key of MARKS, ce or liger
    trunk: str  # of the teacher's layers, or of its cached states: same or fp8
    head: str  # of the logits: same or fp8
    kd: KDController | None
    cache: TargetCache | None

    @property
    def name(self) -> str:
        return self.mode + ("-fp8-teacher" if self.trunk == "fp8" else "")

    def enter(self, trainer: Trainer) -> None:
        """Make the trainer's next step one of this arm's, with what a step before it would have read ahead."""
        sched = dataclasses.replace(trainer.config.schedule, head_dtype=self.head)
        trainer.config = dataclasses.replace(trainer.config, kd=self.kd and self.kd.config, schedule=sched)
        trainer.kd, trainer.tokens = self.kd, 0
        if self.cache is not None:
            self.cache.read_ahead(0, trainer.device).result()

    def teacher_gib(self) -> float:
        if self.kd is None:
            return 0.0
        teacher = self.kd.teacher
        rounded = [tensor for block in teacher.blocks for rows in block.rounded for tensor in rows]
        return sum(t.numel() * t.element_size() for t in [*teacher.parameters(), *rounded]) / 2**30


class Arms:
    """Makes the arms of one student, with one teacher of each arithmetic and one cache of each kind."""

    def __init__(self, trainer: Trainer, loaded: sections.Campaign, shape: tuple[int, ...], folder: Path):
        self.trainer, self.folder = trainer, folder
        self.expansion = expansion.Expansion(loaded, "synthetic")
        with torch.device(trainer.device):
            teacher = GPT(self.expansion.teacher(sections.Candidate(*shape, steps=1)), **trainer.options)
        teacher.requires_grad_(False)
        teacher.set_windows(*schedule.windows(trainer.config.schedule, trainer.config.schedule.horizon))
        self.teachers, self.caches = {"same": teacher}, {}

    def teacher(self, trunk: str) -> GPT:
        if trunk not in self.teachers:
            self.teachers[trunk] = in_dtype(copy.deepcopy(self.teachers["same"]), trunk)
        return self.teachers[trunk]

    def cache(self, kind: str, dtype: str) -> TargetCache:
        """As many micro-batches as the largest step has, and one more to read ahead."""
        if (kind, dtype) in self.caches:
            return self.caches[kind, dtype]
        run, teacher = self.trainer.config, self.teachers["same"]
        sched = run.schedule
        config = CacheConfig(
            kind=kind,
            entries={"hidden": 0, "top_k": TOP_K, "samples": SAMPLES}[kind],
            temperature=1.0,
            dtype="fp8" if dtype == "fp8" else "bf16",
            teacher="untrained",
            teacher_dtype="same",
            seed=run.seed,
            micro_batch_tokens=sched.micro_batch_tokens,
            max_doc_tokens=sched.max_doc_tokens,
            attention=run.attention,
            micro_batches=max(sched.batch_tokens) // sched.micro_batch_tokens + 1,
            **self.expansion.shared(),
        )
        out, unfinished = (self.folder / f"{prefix}{config.cache_id}" for prefix in ("", "."))
        unfinished.mkdir()
        facts = dict.fromkeys(("code", "teacher_sha256", "data_hash", "device"), "synthetic")
        files = write_cache.Files(config, unfinished, teacher.config.dim, facts)
        write_cache.announce(config, teacher.config.dim, self.folder)
        write_cache.fill(config, files, self.trainer.dataset, teacher, SimpleNamespace(asked=lambda: False))
        files.publish(out, files.cost_ms)
        reader = dataclasses.replace(run, kd=self.kd(cache=config.cache_id))
        self.caches[kind, dtype] = TargetCache(out, reader, teacher, {})
        return self.caches[kind, dtype]

    def kd(self, **changes) -> KDConfig:
        config = self.expansion.kd("untrained", 1.0)
        return dataclasses.replace(config, stop_mode="none", token_frac=1.0, top_k=0, **changes)

    def arm(self, mode: str, trunk: str, head: str) -> Arm:
        if mode == "ce":
            return Arm(mode, trunk, head, None, None)
        cache = self.cache(mode, trunk) if mode in ("hidden", "top_k", "samples") else None
        kd = self.kd(infer_only=mode == "infer", cache=cache and cache.config.cache_id)
        controller = LigerController if mode == "liger" else KDController
        teacher = self.teacher("same" if cache else trunk)
        return Arm(mode, trunk, head, controller(kd, teacher, 0.0, self.trainer.config.schedule, cache), cache)

    def of_head(self, head: str) -> Iterator[Arm]:
        yield self.arm("ce", "same", head)
        for mode in MARKS:
            yield self.arm(mode, "same", head)
        if head == "fp8":
            for mode in ("dense", "hidden", "infer"):
                yield self.arm(mode, "fp8", head)
            return
        try:
            yield self.arm("liger", "same", head)
        except ImportError as missing:
            print(f"liger: absent, liger-kernel is not installed ({missing})", flush=True)


def warm_up(trainer: Trainer, arms: list[Arm]) -> list[Arm]:
    """Two steps of each arm, in which everything is compiled; the arms that can take them."""
    able = []
    for arm in arms:
        begun = time.perf_counter()
        try:
            for _ in range(max(2, trainer.config.optim.adam.every)):
                arm.enter(trainer)
                trainer.train_step()
        except Exception as failure:  # a peer's failure is a finding, not the end
            if arm.mode != "liger":
                raise
            print(f"liger: failed ({type(failure).__name__}: {str(failure)[:200]})", flush=True)
            continue
        synchronize()
        print(f"warm-up of {arm.name}, {_head(arm.head)} head: {time.perf_counter() - begun:.1f} s", flush=True)
        able.append(arm)
    return able


def _head(dtype: str) -> str:
    """How a CSV names a head: by the device's own dtype."""
    return dtype if dtype != "same" else "bf16" if torch.cuda.is_available() else "fp32"


def record(rows: Rows, case: dict, times: dict[str, float], peaks: dict[str, float], arms: list[Arm]) -> None:
    for arm in arms:
        ratio, mark = times[arm.name] / times["ce"], MARKS.get(arm.mode)
        metrics = {"ms": times[arm.name], "ratio_to_ce": ratio}
        if peaks:  # marks are of a GPU
            metrics |= {"mark": mark[arm.head == "fp8"]} if mark else {}
            metrics["extra_gib"] = peaks[arm.name] - peaks["ce"] + arm.teacher_gib()
        here = case | {"head": _head(arm.head), "teacher_dtype": arm.trunk, "mode": arm.mode}
        rows.add("liger-kernel" if arm.mode == "liger" else "kdclimb", here, **metrics)


def run(config: RunConfig, loaded: sections.Campaign, shape, dataset: Dataset, folder: Path, args) -> None:
    device = config.device
    trainer = Trainer(config, dataset, None, choose_backend(AttentionConfig(args.attention, False), device))
    arms, rows = Arms(trainer, loaded, shape, folder), Rows("kd_step", args.commit)
    stages = sorted({0, len(config.schedule.batch_tokens) - 1})
    for head in args.head_dtype:
        able = warm_up(trainer, list(arms.of_head("fp8" if head == "fp8" else "same")))
        graphs = compiled_graphs()
        for stage in stages:
            case = {"attention": trainer.backend, "micro_batch": config.schedule.micro_batch_tokens, "stage": stage + 1}
            case["teacher"] = "x".join(map(str, shape))
            calls = {arm.name: lambda arm=arm: arm.enter(trainer) for arm in able}
            times, peaks = measure(trainer, first_step(config.schedule, stage), calls, args.rounds)
            record(rows, case, times, peaks, able)
        print(f"graphs made after the warm-up: {compiled_graphs() - graphs}", flush=True)
    rows.write(args.out / "kd_step.csv")
    print(f"written: {args.out}/kd_step.csv")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configfile", type=Path, nargs="+", default=[ROOT / "config/seed155.yaml"])
    parser.add_argument("--teacher", type=int, nargs=3, default=(3, 6, 128), metavar=("LAYERS", "HEADS", "HEAD_DIM"))
    parser.add_argument("--head-dtype", nargs="+", choices=("bf16", "fp8"), default=["bf16", "fp8"])
    parser.add_argument("--rounds", type=even, default=4, help="timed steps of each stage and arm; an even number")
    parser.add_argument("--attention", choices=ATTENTION_BACKENDS, default="auto")
    parser.add_argument("--toy", action="store_true", help="the default campaign's student on the CPU, for no figures")
    parser.add_argument("--commit", help="for the CSV, where there is no git")
    parser.add_argument("--out", type=Path, default=Path("results/bench"), help="folder of kd_step.csv")
    args = parser.parse_args()
    if not args.toy and not torch.cuda.is_available():
        parser.error("an NVIDIA GPU is needed, since times of another device mean nothing here; --toy tries the file")
    if args.toy:
        args.configfile, args.head_dtype = [], ["bf16"]
    shape = TOY_TEACHER if args.toy else tuple(args.teacher)
    config, loaded = student(args.configfile, None, "cpu" if args.toy else "cuda")
    tokens = 200_000 if args.toy else 30_000_000
    with tempfile.TemporaryDirectory() as folder:
        dataset = synthetic(Path(folder), tokens, config.data.vocab_size - 48)
        run(config, loaded, shape, dataset, Path(folder), args)


if __name__ == "__main__":
    main()
