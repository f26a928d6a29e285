"""Tables of the pilot's blocks: its runs, their curves against CE, pairs and what would have to be saved to break even.

`pilot.py` writes the blocks and calls this; `python benchmarks/pilot.py --tables results/pilot` makes the tables alone.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from scipy.stats import t

from benchmarks.common import read_rows
from kdclimb.artifacts import write_csv
from kdclimb.cache import DESCRIPTION

OF_CONTROLS = {"plain", "no_mtp", "long", "half", "cool"}  # options of CE that make a task of its own
CONFIDENCE = 0.95
RUN_COLUMNS = (
    "block arm seed run_id status shared_device teacher teacher_ms steps train_time_ms final_val gain kd_step_share "
    "kd_overhead kd_share_first kd_share_mean"
).split()
CURVE_COLUMNS = "block arm seed step tokens train_time_ms val_loss gain".split()
PAIR_COLUMNS = (
    "target block arm seed ce_steps kd_steps steps_saved tokens_saved ce_ms kd_ms kd_ms_with_teacher time_saved_ms "
    "time_saved_with_teacher_ms teacher_over_ce steps_saved_needed steps_saved_needed_with_teacher"
).split()
SUMMED = "steps_saved tokens_saved time_saved_ms time_saved_with_teacher_ms".split()
BREAK_EVEN_COLUMNS = (
    "target arm pairs reached kd_overhead kd_step_share teacher_over_ce ce_steps steps_saved_needed "
    "steps_saved_needed_with_teacher".split()
    + [f"{name}{end}" for name in SUMMED for end in ("", "_low", "_high")]
)
ARM_COLUMNS = "arm pairs final_val gain gain_low gain_high gains kd_overhead kd_step_share kd_share_mean".split()


class Run:
    """One run's tables, as numbers."""

    def __init__(self, folder: Path, arm: str, seed: int | None):
        self.folder, self.block, self.arm, self.seed, self.run_id = folder, folder.parent.name, arm, seed, folder.name
        self.config = json.loads((folder / "config.json").read_text())
        status = json.loads((folder / "status.json").read_text())
        self.status, self.shared_device = status["status"], status["shared_device"]  # with another run: no times
        (self.summary,) = read_rows(folder / "summary.csv")
        self.steps, self.vals = read_rows(folder / "steps.csv"), read_rows(folder / "val.csv")
        ends = [0.0, *(float(row["train_time_ms"]) for row in self.steps)]
        self.step_ms = [after - before for before, after in zip(ends, ends[1:])]
        self.teacher: Run | None = None
        self.control: Run | None = None  # CE of the same block, seed and model

    @property
    def is_control(self) -> bool:
        kind, *words = self.arm.split(":")
        return kind == "ce" and OF_CONTROLS.issuperset(words)

    @property
    def task(self) -> tuple:
        """What a run shares with its control; of a teacher, nothing that a control has."""
        schedule = self.config.get("schedule", {})
        shared = (schedule.get(name) for name in ("horizon", "batch_tokens", "mtp_weights", "cooldown_frac"))
        return self.seed, self.config.get("model"), *shared

    @property
    def teacher_ms(self) -> float:
        """What the teacher cost before the run began, the cache of its targets included."""
        cache = self.folder / DESCRIPTION
        written = json.loads(cache.read_text())["cost_ms"] if cache.is_file() else 0.0
        return float(self.teacher.summary["train_time_ms"]) + written

    @property
    def active(self) -> list[bool]:
        return [row["kd_active"] == "1" for row in self.steps]

    @property
    def timed(self) -> bool:
        """Whether its times compare with its control's: each had the device to itself."""
        return self.control is not None and not (self.shared_device or self.control.shared_device)

    @property
    def gain(self) -> float | None:
        """CE's final loss less this one's."""
        if self.control is None or self.control is self:
            return None
        return float(self.control.summary["final_val"]) - float(self.summary["final_val"])

    @property
    def kd_shares(self) -> list[float]:
        """KD's share of the gradient, at the steps that measured it."""
        found = [row.get("kd_share") for row in self.steps]
        return [float(cell) for cell in found if cell not in ("", "nan", None)]

    @property
    def overhead(self) -> float | None:
        """Median over the steps with KD of its time over that of CE's same step: batch, windows and labels are equal.

        The first step of either is left out: it waits for what the warm-up left.
        """
        if not self.timed or not any(self.active):
            return None
        rows = list(zip(self.step_ms, self.control.step_ms, self.active))[1:]
        return statistics.median(kd / plain for kd, plain, on in rows if on)

    @property
    def step_share(self) -> float:
        return sum(self.active) / len(self.active)

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


def read_block(path: Path) -> list[Run]:
    """The runs of one block, each with its control and its teacher."""
    runs = [Run(path / r["run_id"], r["arm"], r["seed"]) for r in json.loads((path / "block.json").read_text())["runs"]]
    for run in runs:
        controls = (r for r in runs if r.is_control and r.task == run.task)
        run.control = next(controls, None)
        source = (run.config.get("kd") or {}).get("teacher") or run.config.get("grown_from")
        if source:
            run.teacher = next(r for r in runs if r.run_id == source)
    return runs


def tables(out: Path) -> None:
    runs = [run for path in sorted(out.rglob("block.json")) for run in read_block(path.parent)]
    pairs = pair_rows(runs)
    write_csv(out / "runs.csv", RUN_COLUMNS, [run_row(run) for run in runs])
    write_csv(out / "curves.csv", CURVE_COLUMNS, [row for run in runs for row in curve(run)])
    write_csv(out / "arms.csv", ARM_COLUMNS, arm_rows(runs))
    write_csv(out / "pairs.csv", PAIR_COLUMNS, pairs)
    write_csv(out / "break_even.csv", BREAK_EVEN_COLUMNS, break_even(runs, pairs))
    plot(runs, out / "curves.png")


def run_row(run: Run) -> dict:
    row = {name: getattr(run, name) for name in ("block", "arm", "seed", "run_id", "status", "shared_device", "gain")}
    row |= {name: run.summary.get(name) for name in ("steps", "train_time_ms", "final_val")}
    if run.teacher is None:
        return row
    shares = run.kd_shares
    return row | {
        "teacher": run.teacher.run_id,
        "teacher_ms": run.teacher_ms,
        "kd_step_share": run.step_share,
        "kd_overhead": run.overhead,
        "kd_share_first": shares[0] if shares else None,
        "kd_share_mean": statistics.mean(shares) if shares else None,
    }


def curve(run: Run) -> list[dict]:
    """Each validation, and by how much it is below CE's at the same step."""
    base = {row["step"]: float(row["val_loss"]) for row in run.control.vals} if run.gain is not None else {}
    kept = ("step", "tokens", "train_time_ms", "val_loss")
    return [
        {"block": run.block, "arm": run.arm, "seed": run.seed}
        | {name: row[name] for name in kept}
        | {"gain": base[row["step"]] - float(row["val_loss"]) if row["step"] in base else None}
        for row in run.vals
    ]


def interval(values: list[float]) -> tuple[float | None, float | None]:
    """Student's t, of the mean; none below 3."""
    if len(values) < 3 or not statistics.stdev(values):
        return None, None
    spread = statistics.stdev(values) / len(values) ** 0.5
    return t.interval(CONFIDENCE, len(values) - 1, statistics.mean(values), spread)


def mean(values) -> float | None:
    """Of those that are not None."""
    found = [value for value in values if value is not None]
    return statistics.mean(found) if found else None


def by_arm(runs: list[Run]) -> dict[str, list[Run]]:
    """The runs that have another as their control, by arm, in order of appearance."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        if run.gain is not None:
            found.setdefault(run.arm, []).append(run)
    return found


def arm_rows(runs: list[Run]) -> list[dict]:
    rows = []
    for arm, members in by_arm(runs).items():
        gains = [run.gain for run in members]
        low, high = interval(gains)
        row = {"arm": arm, "pairs": len(gains), "final_val": mean(float(r.summary["final_val"]) for r in members)}
        row |= {"gain": mean(gains), "gain_low": low, "gain_high": high, "gains": " ".join(f"{g:.4f}" for g in gains)}
        if members[0].teacher:
            row |= {"kd_overhead": mean(r.overhead for r in members), "kd_step_share": members[0].step_share}
            row["kd_share_mean"] = mean(share for r in members for share in r.kd_shares)
        rows.append(row)
    return sorted(rows, key=lambda row: -row["gain"])


def pair_rows(runs: list[Run]) -> list[dict]:
    """For each target and KD run: what it saved against its CE control, and what it would have had to save.

    Targets are fixed ones, and the final loss of each run's own teacher.
    """
    rows = []
    for target in ("teacher", 4.6, 4.3, 4.1, 4.0, 3.9):
        for run in runs:
            if run.teacher is None or run.control is None:
                continue
            value = float(run.teacher.summary["final_val"]) if target == "teacher" else target
            rows.append({"target": target, "block": run.block, "arm": run.arm, "seed": run.seed} | saved(run, value))
    return rows


def saved(run: Run, target: float) -> dict:
    """Nothing where CE never meets the target; no saving where this run doesn't; no times of runs that shared a GPU."""
    ce, mine, theirs = run.control, run.crossing(target), run.control.crossing(target)
    if theirs is None:
        return {}
    row = {"ce_steps": theirs["step"]}
    if mine is not None:
        row |= {"kd_steps": mine["step"], "steps_saved": theirs["step"] - mine["step"]}
        row["tokens_saved"] = theirs["tokens"] - mine["tokens"]
    if not run.timed:
        return row
    at = ce.step_ms[min(len(ce.step_ms) - 1, int(theirs["step"]))]
    extra = sum(kd - plain for kd, plain, on in zip(run.step_ms, ce.step_ms, run.active) if on)
    row |= {
        "ce_ms": theirs["train_time_ms"],
        "teacher_over_ce": run.teacher_ms / theirs["train_time_ms"],
        "steps_saved_needed": extra / at,
        "steps_saved_needed_with_teacher": (extra + run.teacher_ms) / at,
    }
    if mine is None:
        return row
    with_teacher = mine["train_time_ms"] + run.teacher_ms
    return row | {
        "kd_ms": mine["train_time_ms"],
        "kd_ms_with_teacher": with_teacher,
        "time_saved_ms": theirs["train_time_ms"] - mine["train_time_ms"],
        "time_saved_with_teacher_ms": theirs["train_time_ms"] - with_teacher,
    }


def break_even(runs: list[Run], pairs: list[dict]) -> list[dict]:
    """The pairs of each target and arm as one row: means, and intervals of the savings from 3 pairs on."""
    groups, members = {}, by_arm(runs)
    for row in pairs:
        groups.setdefault((row["target"], row["arm"]), []).append(row)
    rows = []
    for (target, arm), group in groups.items():
        row = {"target": target, "arm": arm, "pairs": len(group), "reached": sum("kd_steps" in r for r in group)}
        row |= {"kd_overhead": mean(r.overhead for r in members[arm]), "kd_step_share": members[arm][0].step_share}
        for name in ("teacher_over_ce", "ce_steps", "steps_saved_needed", "steps_saved_needed_with_teacher"):
            row[name] = mean(r.get(name) for r in group)
        for name in SUMMED:
            values = [r[name] for r in group if name in r]
            low, high = interval(values)
            row |= {name: mean(values), f"{name}_low": low, f"{name}_high": high}
        rows.append(row)
    return rows


def plot(runs: list[Run], path: Path) -> None:
    """Validation loss less that of the CE control, over steps, the mean of each arm's pairs; below 0 beats CE."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(10, 6))
    axis.axhline(0, color="black", linewidth=0.8)
    for place, (arm, members) in enumerate(by_arm(runs).items()):
        gains: dict[int, list[float]] = {}
        for row in (row for run in members for row in curve(run) if row["gain"] is not None):
            gains.setdefault(int(row["step"]), []).append(-row["gain"])
        points = [(step, statistics.mean(values)) for step, values in sorted(gains.items())]
        style = ("-", "--", ":")[place // 10 % 3]  # there are ten colours
        axis.plot(*zip(*points), style, marker="o", markersize=3, label=f"{arm} ({len(members)})")
    axis.set(xlabel="step", ylabel="validation loss less CE's (nats)", title="Against the CE control of the same seed")
    axis.set_yscale("symlog", linthresh=0.01)
    axis.grid(alpha=0.3)
    if axis.lines[1:]:
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
