"""What each named part of the student, its schedule and its optimisers is worth: CE without one of them at a time.

python benchmarks/ablate.py --seeds 0 1 2 --seconds 550 --out results/ablation.csv    # again, until none is left
python benchmarks/ablate.py --table results/ablation.csv                              # in Markdown

The first arm, `all`, is the config as it is, by default the pilot's regime (155 scheduled steps and 2 of extension).
Runs that the CSV holds to their end are not trained again; a run that diverges ends with a loss of nan. Runs compare on
one device and one state of the code alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import read_rows
from benchmarks.pilot import CONFIGS, ROOT, prepared
from kdclimb import campaign, expansion
from kdclimb.artifacts import write_csv
from kdclimb.attention import choose_backend
from kdclimb.config import ADAM_KINDS, RunConfig
from kdclimb.configfiles import merge, read_config
from kdclimb.data import Dataset
from kdclimb.train import Diverged, Trainer, fix_order

COLUMNS = "part keys seed step val_loss train_s run_id".split()
ALL = "all"
MIDDLE = 262144  # tokens: the mean of the three stages' batches
ADAM = {"lr_mult": 1.0, "beta1": 0.9, "beta2": 0.95, "decay_mult": 1.0}
PARTS: dict[str, dict[str, object]] = {  # what switches it off
    ALL: {},
    "value embeddings": {"student.value_layers": []},
    "value gates that see the value": {"student.value_gate": "hidden"},
    "bigram embedding": {"student.bigram_vocab_size": 0},
    "smear": {"student.smear": False},
    "skip": {"student.skip": []},
    "backout": {"student.backout": []},
    "attention gate": {"student.attention_gate": False},
    "key offset": {"student.key_offset": False},
    "QK-norm": {"student.qk_norm": False},
    "half-truncated rotary, and the key offset": {"student.half_rotary": False, "student.key_offset": False},
    "paired heads": {"student.paired_layers": []},
    "layer without attention": {"student.attention_free_layers": []},
    "x0 and residual factors": {"student.x0": False},
    "qkvo factors": {"student.qkvo_factors": False},
    "YaRN": {"student.yarn": False},
    "long layers": {"student.long_layers": []},
    "softcap": {"student.softcap": None},
    "tied head": {"student.untie_frac": 0.0},
    "untying": {"student.untie_frac": 1.0},
    "windows": {"train.windows": [], "train.extension_windows": [], "train.final_windows": []},
    "windows that grow": {"train.windows": [[640, 1408]] * 3, "train.extension_windows": []},
    "final windows": {"train.final_windows": []},
    "cut of documents": {"train.max_doc_tokens": 65536},
    "MTP": {"train.mtp_weights": [[1.0]]},
    "batch-size stages": {"train.batch_tokens": [MIDDLE] * 3, "train.batch_lr": [1.52] * 3},
    "LR by stage": {"train.batch_lr": [1.0] * 3},
    "cooldown": {"train.cooldown_frac": 0.0},
    "extension": {"train.extension_frac": 0.0, "train.extension_windows": []},
    "weight decay": {"optim.muon.weight_decay": 0.0, "optim.adam.weight_decay": 0.0},
    "cautious decay": {"optim.cautious_decay": False},
    "NorMuon": {"optim.muon.normuon": False},
    "Polar Express": {"optim.muon.orthogonalize": "newton_schulz"},
    "LR of the MLP's output": {"optim.muon.lr_mults": []},
    "momentum's warm-up": {"optim.muon.momentum_min": 0.95},
    "Adam in every step": {"optim.adam.every": 2},
    "Adam's groups": {"optim.adam.groups": [{"kinds": list(ADAM_KINDS), **ADAM}]},
}


def without(values: dict, part: str) -> dict:
    """The campaign's config with a part switched off."""
    for key, value in PARTS[part].items():
        for section in reversed(key.split(".")):
            value = {section: value}
        values = merge(values, value)
    return values


def ce(values: dict, seed: int, data: str) -> RunConfig:
    """CE at the campaign's last horizon."""
    make = expansion.Expansion(campaign.load(values, ROOT), data)
    return make.run("ce", "CE", horizon=make.last, seed=seed).config


class Said:
    """A run's reports, a line each."""

    def __init__(self, label: str):
        self.label = label

    def update(self, steps: int) -> None:
        pass

    def report(self, text: str) -> None:
        print(f"{self.label}: {text}", flush=True)


def train(config: RunConfig, dataset: Dataset, label: str) -> list[tuple[int, float, float]]:
    """(step, val_loss, train_s) of each validation; the last loss is nan if the run diverged.

    No checkpoint is written. Raises RuntimeError where torch.compile made a graph inside the clock.
    """
    said = Said(label)
    fix_order(config)
    trainer = Trainer(config, dataset, None, choose_backend(config.attention, config.device, config.deterministic))
    if config.clock == "measured":
        trainer.warm_up()
    try:
        trainer.train(lambda: None, lambda: False, said)
    except Diverged as error:
        said.report(str(error))
        trainer.vals.append({"step": trainer.step, "val_loss": math.nan, "train_time_ms": trainer.time_ms})
    if trainer.recompiles:
        raise RuntimeError(f"{label}: torch.compile made {trainer.recompiles} graphs inside the clock")
    return [(row["step"], row["val_loss"], row["train_time_ms"] / 1e3) for row in trainer.vals]


def free(config: RunConfig, following: RunConfig | None) -> None:
    """What a run leaves on the device; its graphs too, unless the following run has the same layers and windows."""
    if following is None or graphs_of(following) != graphs_of(config):
        torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def graphs_of(config: RunConfig) -> tuple:
    """What the layers are compiled for."""
    sched = config.schedule
    return config.model, sched.windows, sched.extension_windows, sched.final_windows


def ablate(values: dict, parts: list[str], seeds: list[int], out: Path, seconds: float) -> bool:
    """Train what `out` does not hold yet, the first seed of all parts first; whether all of it is there now.

    No run begins that would end after `seconds`, if it took as long as the longest so far; the first one does.
    """
    begun, longest = time.perf_counter(), 0.0
    loaded = campaign.load(values, ROOT)
    data = campaign.data_id(loaded, ROOT)
    rows = read_rows(out)
    there = {row["run_id"] for row in rows}
    todo = [(seed, part, ce(without(values, part), seed, data)) for seed in seeds for part in parts]
    todo = [(seed, part, config) for seed, part, config in todo if config.run_id not in there]
    dataset = Dataset(prepared(loaded, data)) if todo else None
    for i, (seed, part, config) in enumerate(todo):
        started = time.perf_counter()
        if i and started - begun + longest > seconds:
            print(f"{len(todo) - i} runs are left, the next one without {part}", flush=True)
            return False
        keys = "; ".join(f"{key}={json.dumps(value)}" for key, value in PARTS[part].items())
        run = {"part": part, "keys": keys, "seed": seed, "run_id": config.run_id}
        found = train(config, dataset, f"{part}, seed {seed}")
        rows += [run | dict(zip(("step", "val_loss", "train_s"), row, strict=True)) for row in found]
        write_csv(out, COLUMNS, rows)
        free(config, todo[i + 1][2] if i + 1 < len(todo) else None)
        longest = max(longest, time.perf_counter() - started)
    return True


def table(rows: list[dict]) -> str:
    """Markdown: what each part is worth at the end, in nats and in time, by the runs of the same seeds with all parts.

    Differences are means over seeds, with the standard error from two seeds on. A row without train_s, deleted by hand
    since the device had other work, has no time.
    """
    ends: dict[str, dict[str, dict]] = {}
    for row in rows:  # of a run's rows the last one stays
        ends.setdefault(row["part"], {})[row["seed"]] = row
    base, lines = ends.pop(ALL, {}), []
    for part, runs in ends.items():
        pairs = [(runs[seed], base[seed]) for seed in sorted(runs.keys() & base.keys())]
        if not pairs:
            continue
        worth = [float(mine["val_loss"]) - float(full["val_loss"]) for mine, full in pairs]
        slower = [float(a["train_s"]) / float(b["train_s"]) for a, b in pairs if a["train_s"] and b["train_s"]]
        error = f" ± {statistics.stdev(worth) / math.sqrt(len(worth)):.4f}" if len(worth) > 1 else ""
        loss = statistics.fmean(float(mine["val_loss"]) for mine, _ in pairs)
        cells = [part, f"`{pairs[0][0]['keys']}`", f"{loss:.4f}", f"{statistics.fmean(worth):+.4f}{error}"]
        cells += [f"{statistics.fmean(slower):.3f}" if slower else "-", str(len(pairs))]
        lines.append((statistics.fmean(worth), f"| {' | '.join(cells)} |"))
    losses = [float(row["val_loss"]) for row in base.values()]
    if not losses:
        raise SystemExit(f"no run with all parts (part {ALL}) is there to compare with")
    first = f"| with all parts | | {statistics.fmean(losses):.4f} | | 1 | {len(losses)} |"
    head = ["| without | keys | final val_loss | worth (nats) | time | seeds |", "| --- | --- |" + " ---: |" * 4]
    diverged = [line for worth, line in lines if math.isnan(worth)]
    ordered = sorted(((worth, line) for worth, line in lines if not math.isnan(worth)), reverse=True)
    return "\n".join([*head, first, *diverged, *(line for _, line in ordered)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--configfile", type=Path, nargs="+", default=CONFIGS)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="instead of the config's")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no run that would end later than this")
    parser.add_argument("--out", type=Path, default=Path("results/ablation.csv"))
    parser.add_argument("--table", type=Path, nargs="+", metavar="CSV", help="print the table of these files' runs")
    args = parser.parse_args()
    for path in args.table or ():
        if not path.is_file():
            parser.error(f"--table {path}: no such file")
    if args.table:
        print(table([row for path in args.table for row in read_rows(path)]))
        return
    values = read_config(args.configfile)
    values["device"] = args.device or values["device"]
    if not ablate(values, args.parts, args.seeds, args.out, args.seconds):
        raise SystemExit(75)


if __name__ == "__main__":
    main()
