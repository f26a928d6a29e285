"""Blocks of the pilot: a CE control, teachers and KD arms, trained one after another on one device, in one process.

python benchmarks/pilot.py --arms ce teacher dense:0.1 dense:0.25 bigram:0.12 --seeds 0 --out results/pilot/0
python benchmarks/pilot.py --tables results/pilot    # of the blocks that are in there

Arms: ce; teacher and small, the config's first two candidates, teacher2, teacher3, ... those after these; bigram and
trigram, which are counted; grown:TEACHER, CE that starts with a teacher's weights; KD, TEACHER:F, in the first F of the
tokens (dense:F from `teacher`). Options after the last two and CE: boost, the LR boost of KD's grid; plain, no bigram
table in the student; no_mtp, the next token's loss alone; fp8, products of the logits in FP8; long, the first stage's
batches throughout, and as many more steps as that takes for the same tokens; half, half of these batches, at sqrt(1/2)
of the LR; cool, a cooldown over the last three quarters. After KD also: an alpha; norm, the dynamic
norm; better, on tokens whose label the teacher gives more probability than the student; one, in one micro-batch of each
step; hidden, top_k or samples, a neural teacher's targets from a cache of these, whose time is counted with the
teacher's. The run configs are those of the workflow. Only tables are kept, no weights. Runs compare within one block
alone, with the CE run of their seed, model, batches and labels; one that a block has is not trained again.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.pilot_tables import tables
from kdclimb import campaign, count_ngrams, expansion, write_cache
from kdclimb.artifacts import write_json
from kdclimb.cache import DESCRIPTION
from kdclimb.config import BoostConfig, CacheConfig, KDConfig, RunConfig
from kdclimb.configfiles import read_config
from kdclimb.prepare import prepare
from kdclimb.run import run as train
from kdclimb.schedule import total_tokens
from kdclimb.sections import Campaign

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "results/runs"
THREADS = min(8, len(os.sched_getaffinity(0)))
CONFIGS = [ROOT / "config/seed155.yaml", ROOT / "config/pilot155.yaml"]
KEPT = ("config.json", "status.json", "steps.csv", "summary.csv", "train.log", "val.csv")
BOOST = BoostConfig(2.0, 0.15, 0.30)
STUDENT_OPTIONS = ("boost", "plain", "no_mtp", "fp8", "long", "half", "cool")
SCHEDULES = {"fp8": {"head_dtype": "fp8"}, "no_mtp": {"mtp_weights": ((1.0,),)}, "cool": {"cooldown_frac": 0.75}}
KD_OPTIONS = {
    "norm": {"dynamic_norm": True},
    "better": {"token_gate": "teacher_better"},
    "one": {"micro_batches": 1},
    "top_k": {"top_k": 64},
}
CACHES = ("hidden", "top_k", "samples")
NUMBER = re.compile(r"\d+(\.\d+)?")
TRAINED = ("teacher", "small", *(f"teacher{place}" for place in range(2, 10)))  # by their places in the config
COUNTED = ("bigram", "trigram")
TEACHERS = {"dense": "teacher"} | {name: name for name in (*TRAINED[1:], *COUNTED)}


def prepared(loaded: Campaign, data: str) -> Path:
    """The manifest of the campaign's data, whose id is `data`; made here if it isn't there yet."""
    manifest = ROOT / "results/data" / data / "manifest.json"
    if not manifest.is_file():
        prepare(campaign.data_spec(loaded, ROOT), manifest.parent, ROOT)
    return manifest


def parsed(arm: str) -> tuple[str, list[str], list[float]]:
    """(ce or the kind of teacher, its options, its numbers) of an arm. SystemExit: there is none such."""
    kind, *rest = arm.split(":")
    numbers = [float(word) for word in rest if NUMBER.fullmatch(word)]
    words = [word for word in rest if not NUMBER.fullmatch(word)]
    of_kd = (*STUDENT_OPTIONS, *KD_OPTIONS, *CACHES)
    ce = kind == "ce" and not numbers and set(words) <= set(STUDENT_OPTIONS)
    kd = kind in TEACHERS and len(numbers) in (1, 2) and set(words) <= set(of_kd) and len({*words} & {*CACHES}) < 2
    grown = kind == "grown" and not numbers and sum(word in TRAINED for word in words) == 1
    grown &= set(words) <= {*TRAINED, *STUDENT_OPTIONS}
    if not ce and not kd and not grown and arm not in TEACHERS.values():
        raise SystemExit(
            f"--arms {arm}: no such arm; allowed: ce; a teacher, {', '.join(TEACHERS.values())}; grown:TEACHER; KD "
            f"from {', '.join(TEACHERS)} with its share of the tokens and an alpha; after these and CE "
            f"{', '.join(STUDENT_OPTIONS)}; after KD also {', '.join(KD_OPTIONS)}, and of {', '.join(CACHES)} one"
        )
    return kind, words, numbers


class Block:
    """Trains arms, each once; `out`/block.json says which run is which."""

    def __init__(self, files: list[Path], out: Path, device: str | None):
        values = read_config(files)
        values["device"] = device or values["device"]
        self.campaign, self.out = campaign.load(values, ROOT), out
        data = campaign.data_id(self.campaign, ROOT)
        self.manifest = prepared(self.campaign, data)
        self.data, self.make = data, expansion.Expansion(self.campaign, data)
        self.work, self.done = WORK, []
        if (out / "block.json").is_file():
            self.done = json.loads((out / "block.json").read_text())["runs"]

    def has(self, arm: str, seed: int) -> bool:
        return any((run["arm"], run["seed"]) == (arm, seed) for run in self.done)

    def teacher(self, which: str) -> Path:
        """The checkpoint of a teacher, trained or counted here if it isn't yet."""
        if which in COUNTED:
            (table,) = (t for t in self.make.tables() if t.config.order == (2 if which == "bigram" else 3))
            if not (self.work / table.run_id / "status.json").is_file():
                count_ngrams.make(table.config, self.work / table.run_id, self.manifest, THREADS)
            self.keep(which, table.run_id, None)
            return self.work / table.run_id / "checkpoints"
        place, candidates = TRAINED.index(which), self.campaign.teacher.candidates
        if place >= len(candidates):
            raise SystemExit(f"{which}: teacher.candidates has {len(candidates)} entries, so none at {place}")
        config = self.make.teachers("teacher", candidates[place : place + 1])[0].config
        if not (self.work / config.run_id / "status.json").is_file():
            self.train(which, config, None)
        self.keep(which, config.run_id, None)
        return self.work / config.run_id / "checkpoints"

    def go(self, arm: str, seed: int) -> None:
        if arm in TEACHERS.values():
            self.teacher(arm)
            return
        kind, words, numbers = parsed(arm)
        options = self.student(words, seed)
        kinds = [word for word in words if word in CACHES]
        section = dataclasses.replace(self.campaign.kd, cache=(kinds or ["none"])[0])
        make = expansion.Expansion(dataclasses.replace(self.campaign, kd=section), self.data)
        teacher = None
        if kind == "grown":
            (source,) = (word for word in words if word in TRAINED)
            teacher = self.teacher(source)
            options["grown_from"] = teacher.parent.name
        elif kind != "ce":
            teacher = self.teacher(TEACHERS[kind])
            options |= {"kd": self.kd(teacher.parent.name, words, numbers), "cached": True}
        config = make.run(kind, arm, **options).config  # its id goes by what it trains, not by that name
        for word in (word for word in words if word in SCHEDULES):
            config = dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, **SCHEDULES[word]))
        cache = self.cache(make.caches[config.kd.cache], teacher) if kinds else None
        self.train(arm, config, teacher, cache)

    def student(self, words: list[str], seed: int) -> dict:
        """What the options make of the student and its schedule, as `Expansion.run` takes it."""
        model, train = self.make.student(), self.campaign.train
        if "plain" in words:
            model = dataclasses.replace(model, bigram_vocab_size=0)
        options = {"horizon": self.make.last, "seed": seed, "model": model}
        options["boost"] = BOOST if "boost" in words else None
        if "long" in words or "half" in words:
            share, stages = 1 / 2 if "half" in words else 1, len(train.batch_tokens)
            tokens = total_tokens(self.make.run("ce", "CE", **options).config.schedule)
            batch, lr = int(share * train.batch_tokens[0]), share**0.5 * train.batch_lr[0]
            options |= {"horizon": tokens // batch, "batch_tokens": (batch,) * stages, "batch_lr": (lr,) * stages}
        return options

    def kd(self, teacher: str, words: list[str], numbers: list[float]) -> KDConfig:
        kd = dataclasses.replace(self.make.kd(teacher, 1.0), dynamic_norm=False, token_frac=numbers[0])
        for alpha in numbers[1:]:
            kd = dataclasses.replace(kd, alpha=alpha)
        for word in (word for word in words if word in KD_OPTIONS):
            kd = dataclasses.replace(kd, **KD_OPTIONS[word])
        return kd

    def cache(self, config: CacheConfig, teacher: Path) -> Path:
        """The cache of the teacher's targets, written here if it isn't yet."""
        out = self.work.parent / "caches" / config.cache_id
        out.parent.mkdir(exist_ok=True)
        if not out.is_dir():
            write_cache.write(config, out, self.manifest, teacher, THREADS)
        return out

    def train(self, arm: str, config: RunConfig, teacher: Path | None, cache: Path | None = None) -> None:
        out = self.work / config.run_id
        out.mkdir(parents=True, exist_ok=True)
        inputs = {"cache": cache, "threads": THREADS}
        code = train(config, out, self.manifest, teacher, any_code=False, last_attempt=True, **inputs)
        if code:
            raise SystemExit(f"{config.run_id}: ended with exit code {code}; see its train.log")
        if arm not in TEACHERS.values():
            shutil.rmtree(out / "checkpoints", ignore_errors=True)  # a student's weights; a failed one has none
            self.keep(arm, config.run_id, config.seed)
        if cache is not None:
            shutil.copy(cache / DESCRIPTION, self.out / config.run_id / DESCRIPTION)
        gc.collect()
        if config.device == "cuda":
            torch.cuda.empty_cache()

    def keep(self, arm: str, run_id: str, seed: int | None) -> None:
        if self.has(arm, seed):
            return
        here = self.out / run_id
        here.mkdir(parents=True, exist_ok=True)
        for name in KEPT:
            if (self.work / run_id / name).is_file():
                shutil.copy(self.work / run_id / name, here / name)
        self.done.append({"arm": arm, "run_id": run_id, "seed": seed})
        write_json(self.out / "block.json", {"runs": self.done})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=["ce"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--configfile", type=Path, nargs="+", default=CONFIGS)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="instead of the config's")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no run later than this")
    parser.add_argument("--out", type=Path, default=Path("results/pilot/0"), help="the block's folder")
    parser.add_argument(
        "--tables", type=Path, metavar="OUT", help="make only the tables of the blocks that are in there"
    )
    args = parser.parse_args()
    if args.tables:
        tables(args.tables)
        return
    for arm in args.arms:  # before the first of them is trained
        parsed(arm)
    begun = time.perf_counter()
    block = Block(args.configfile, args.out, args.device)
    for seed in args.seeds:
        for arm in args.arms:
            if block.has(arm, None if arm in TEACHERS.values() else seed):
                continue
            if time.perf_counter() - begun > args.seconds:
                print(f"no time left for {arm}, seed {seed}", flush=True)
                continue
            block.go(arm, seed)
            print(f"{time.perf_counter() - begun:6.1f} s: {arm}, seed {seed}", flush=True)
    tables(args.out)


if __name__ == "__main__":
    main()
