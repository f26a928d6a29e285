"""A block of the pilot: a CE control, teachers and KD arms, trained one after another on one device, in one process.

python benchmarks/pilot.py --arms ce teacher dense:0.1 dense:0.25 ngram:0.12 --seeds 0 --out results/pilot
python benchmarks/pilot.py --tables results/pilot    # of what is there

Arms: ce; ce:boost, CE with the LR boost of KD's grid; ce:fp8, with products of the logits in FP8; ce:plain, without the
student's bigram table; teacher and small, the config's two candidates; dense:F, exact KD from `teacher` in the first F
of the tokens, dense:F:A with alpha A; small:F, from `small`; ngram:F, KD from counted bigrams, ngram:F:plain to a
student without bigram table. The run configs are those of the workflow. Only tables are kept, no weights. Runs compare
within one block alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import shutil
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import read_rows
from kdclimb import campaign, count_ngrams, expansion
from kdclimb.artifacts import write_csv, write_json
from kdclimb.config import BoostConfig, RunConfig
from kdclimb.explain import read_config
from kdclimb.prepare import prepare
from kdclimb.run import run as train
from kdclimb.sections import Campaign

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = [ROOT / "config/seed155.yaml", ROOT / "config/pilot155.yaml"]
KEPT = ("config.json", "status.json", "steps.csv", "summary.csv", "train.log", "val.csv")
BOOST = BoostConfig(2.0, 0.15, 0.30)
RUN_COLUMNS = (
    "arm seed run_id status teacher teacher_ms steps train_time_ms final_val kd_step_share kd_overhead kd_share_first"
).split()
BREAK_EVEN_COLUMNS = (
    "target arm seed ce_steps kd_steps steps_saved tokens_saved ce_ms kd_ms kd_ms_with_teacher time_saved_ms "
    "time_saved_with_teacher_ms teacher_over_ce steps_saved_needed steps_saved_needed_with_teacher"
).split()


def prepared(loaded: Campaign, data: str) -> Path:
    """The manifest of the campaign's data, whose id is `data`; made here if it isn't there yet."""
    manifest = ROOT / "results/data" / data / "manifest.json"
    if not manifest.is_file():
        prepare(campaign.data_spec(loaded, ROOT), manifest.parent, ROOT)
    return manifest


class Block:
    """Trains arms, each once; `out`/block.json says which run is which."""

    def __init__(self, files: list[Path], out: Path, device: str | None):
        values = read_config(files)
        values["device"] = device or values["device"]
        self.campaign, self.out = campaign.load(values, ROOT), out
        data = campaign.data_id(self.campaign, ROOT)
        self.manifest = prepared(self.campaign, data)
        self.make = expansion.Expansion(self.campaign, data)
        self.work, self.done = ROOT / "results/runs", []

    def teacher(self, which: str) -> Path:
        """The checkpoint of a teacher, trained or counted here if it isn't yet."""
        if which == "ngram":
            (table,) = self.make.tables()
            if not (self.work / table.run_id / "status.json").is_file():
                count_ngrams.make(table.config, self.work / table.run_id, self.manifest, 8)
                self.keep("ngram", table.run_id, None)
            return self.work / table.run_id / "checkpoints"
        place = ("teacher", "small").index(which)
        config = self.make.teachers("teacher", self.campaign.teacher.candidates[place : place + 1])[0].config
        if not (self.work / config.run_id / "status.json").is_file():
            self.train(which, config, None)
        return self.work / config.run_id / "checkpoints"

    def go(self, arm: str, seed: int) -> None:
        kind, *rest = arm.split(":")
        if arm in ("teacher", "small"):
            self.teacher(arm)
            return
        model = self.make.student()
        if "plain" in rest:
            model = dataclasses.replace(model, bigram_vocab_size=0)
        options = {"horizon": self.make.last, "seed": seed, "model": model}
        if kind == "ce":
            config = self.make.run("ce", arm, boost=BOOST if "boost" in rest else None, **options).config
            if "fp8" in rest:
                config = dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, head_dtype="fp8"))
            self.train(arm, config, None)
            return
        teacher = self.teacher("teacher" if kind == "dense" else kind)
        kd = dataclasses.replace(self.make.kd(teacher.parent.name, 1.0), token_frac=float(rest[0]))
        if len(rest) > 1 and rest[1] != "plain":
            kd = dataclasses.replace(kd, alpha=float(rest[1]))
        self.train(arm, self.make.run("kd", arm, kd=kd, **options).config, teacher)

    def train(self, arm: str, config: RunConfig, teacher: Path | None) -> None:
        out = self.work / config.run_id
        out.mkdir(parents=True, exist_ok=True)
        code = train(config, out, self.manifest, teacher, threads=8, any_code=False, last_attempt=True)
        if code:
            raise SystemExit(f"{config.run_id}: ended with exit code {code}; see its train.log")
        if config.schedule.horizon == self.make.last and config.model.num_layers == self.make.student().num_layers:
            shutil.rmtree(out / "checkpoints", ignore_errors=True)  # a student's weights; a failed one has none
        self.keep(arm, config.run_id, config.seed)
        gc.collect()
        if config.device == "cuda":
            torch.cuda.empty_cache()

    def keep(self, arm: str, run_id: str, seed: int | None) -> None:
        here = self.out / run_id
        here.mkdir(parents=True, exist_ok=True)
        for name in KEPT:
            if (self.work / run_id / name).is_file():
                shutil.copy(self.work / run_id / name, here / name)
        self.done.append({"arm": arm, "run_id": run_id, "seed": seed})
        write_json(self.out / "block.json", {"runs": self.done})


# ---- tables ----------------------------------------------------------------------------------------------------------


class Run:
    """One run's tables, as numbers."""

    def __init__(self, folder: Path, arm: str, seed: int | None):
        self.arm, self.seed, self.run_id = arm, seed, folder.name
        self.config = json.loads((folder / "config.json").read_text())
        self.status = json.loads((folder / "status.json").read_text())["status"]
        (self.summary,) = read_rows(folder / "summary.csv")
        self.steps, self.vals = read_rows(folder / "steps.csv"), read_rows(folder / "val.csv")
        ends = [0.0, *(float(row["train_time_ms"]) for row in self.steps)]
        self.step_ms = [after - before for before, after in zip(ends, ends[1:])]

    @property
    def active(self) -> list[bool]:
        return [row["kd_active"] == "1" for row in self.steps]

    def crossing(self, target: float) -> dict | None:
        """Interpolated step, tokens and time of the first of two validations in a row at the target or below."""
        values = [float(row["val_loss"]) for row in self.vals]
        for i, value in enumerate(values):
            last = i + 1 == len(values)
            if value > target or (not last and values[i + 1] > target) or (last and i and values[i - 1] > target):
                continue
            before, after = self.vals[max(i - 1, 0)], self.vals[i]
            drop = float(before["val_loss"]) - value
            share = 1.0 if not drop else min(1.0, (float(before["val_loss"]) - target) / drop)
            keys = ("step", "tokens", "train_time_ms")
            return {k: float(before[k]) + share * (float(after[k]) - float(before[k])) for k in keys}
        return None


def tables(out: Path) -> None:
    runs = [Run(out / r["run_id"], r["arm"], r["seed"]) for r in json.loads((out / "block.json").read_text())["runs"]]
    by_id = {run.run_id: run for run in runs}
    write_csv(out / "runs.csv", RUN_COLUMNS, [run_row(run, runs, by_id) for run in runs])
    write_csv(out / "break_even.csv", BREAK_EVEN_COLUMNS, break_even(runs, by_id))
    plot(runs, out / "curves.png")


def control(run: Run, runs: list[Run]) -> Run | None:
    """The CE run of the same seed and model."""
    want = (run.seed, run.config.get("model"))
    return next((r for r in runs if r.arm in ("ce", "ce:plain") and (r.seed, r.config["model"]) == want), None)


def run_row(run: Run, runs: list[Run], by_id: dict[str, Run]) -> dict:
    row = {name: getattr(run, name) for name in ("arm", "seed", "run_id", "status")}
    row |= {name: run.summary.get(name) for name in ("steps", "train_time_ms", "final_val")}
    if not run.config.get("kd"):
        return row
    row["teacher"] = run.config["kd"]["teacher"]
    row["teacher_ms"] = by_id[row["teacher"]].summary["train_time_ms"]
    row["kd_step_share"] = sum(run.active) / len(run.active)
    row["kd_overhead"] = overhead(run, control(run, runs))
    row["kd_share_first"] = next((r["kd_share"] for r in run.steps if r.get("kd_share") not in ("", "nan", None)), None)
    return row


def overhead(run: Run, ce: Run | None) -> float | None:
    """Median over the steps with KD of its time over that of CE's same step: batch, windows and labels are equal."""
    if ce is None or not any(run.active):
        return None
    ratios = [kd / plain for kd, plain, on in zip(run.step_ms, ce.step_ms, run.active) if on]
    return statistics.median(ratios)


def break_even(runs: list[Run], by_id: dict[str, Run]) -> list[dict]:
    """For each target and KD run: what it saved against its CE control, and what it would have had to save."""
    rows = []
    finals = {round(float(r.summary["final_val"]), 4) for r in runs if r.arm in ("teacher", "small", "ngram")}
    for target in sorted({4.6, 4.3, 4.1, 4.0, 3.9} | finals, reverse=True):
        for run in runs:
            ce = control(run, runs)
            if not run.config.get("kd") or ce is None:
                continue
            mine, theirs = run.crossing(target), ce.crossing(target)
            row = {"target": target, "arm": run.arm, "seed": run.seed}
            if theirs is None:
                rows.append(row)
                continue
            teacher_ms = float(by_id[run.config["kd"]["teacher"]].summary["train_time_ms"])
            row |= {"ce_steps": theirs["step"], "ce_ms": theirs["train_time_ms"]}
            row["teacher_over_ce"] = teacher_ms / theirs["train_time_ms"]
            if mine is not None:
                row |= saved(run, ce, mine, theirs, teacher_ms)
            rows.append(row)
    return rows


def saved(run: Run, ce: Run, mine: dict, theirs: dict, teacher_ms: float) -> dict:
    at = min(len(ce.step_ms) - 1, int(theirs["step"]))
    extra = sum(kd - plain for kd, plain, on in zip(run.step_ms, ce.step_ms, run.active) if on)
    with_teacher = mine["train_time_ms"] + teacher_ms
    return {
        "kd_steps": mine["step"],
        "steps_saved": theirs["step"] - mine["step"],
        "tokens_saved": theirs["tokens"] - mine["tokens"],
        "kd_ms": mine["train_time_ms"],
        "kd_ms_with_teacher": with_teacher,
        "time_saved_ms": theirs["train_time_ms"] - mine["train_time_ms"],
        "time_saved_with_teacher_ms": theirs["train_time_ms"] - with_teacher,
        "steps_saved_needed": extra / ce.step_ms[at],
        "steps_saved_needed_with_teacher": (extra + teacher_ms) / ce.step_ms[at],
    }


def plot(runs: list[Run], path: Path) -> None:
    """Validation loss less that of the CE control, over steps; below 0 is better than CE."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 5))
    axis.axhline(0, color="black", linewidth=0.8)
    for run in runs:
        ce = control(run, runs)
        if ce is None or run is ce or len(run.vals) < 2:
            continue
        base = {row["step"]: float(row["val_loss"]) for row in ce.vals}
        points = [(int(r["step"]), float(r["val_loss"]) - base[r["step"]]) for r in run.vals if r["step"] in base]
        axis.plot(*zip(*points), marker="o", markersize=3, label=f"{run.arm}, seed {run.seed}")
    axis.set(xlabel="step", ylabel="validation loss less CE's (nats)", title="Against the CE control of the same seed")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=["ce"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--configfile", type=Path, nargs="+", default=CONFIGS)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="instead of the config's")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no run later than this")
    parser.add_argument("--out", type=Path, default=Path("results/pilot"))
    parser.add_argument("--tables", type=Path, metavar="OUT", help="make only the tables of a block that is there")
    args = parser.parse_args()
    if args.tables:
        tables(args.tables)
        return
    begun = time.perf_counter()
    block = Block(args.configfile, args.out, args.device)
    for seed in args.seeds:
        for arm in args.arms:
            if time.perf_counter() - begun > args.seconds:
                print(f"no time left for {arm}, seed {seed}", flush=True)
                continue
            block.go(arm, seed)
            print(f"{time.perf_counter() - begun:6.1f} s: {arm}, seed {seed}", flush=True)
    tables(args.out)


if __name__ == "__main__":
    main()
