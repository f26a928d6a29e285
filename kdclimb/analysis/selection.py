"""Which candidates go on: teachers by projected and measured time, then by loss; KD points by their rank.

Each filter gives a reason, with numbers, for every candidate that it rejects.
"""

from __future__ import annotations

import math
import statistics
from itertools import pairwise
from pathlib import Path

from kdclimb.analysis.budget import projection, read_budget, refuse_timing, speed_of
from kdclimb.analysis.tables import (
    RUN_COLUMNS,
    RunFolder,
    read_csv,
    read_json,
    write_csv,
    write_json,
)
from kdclimb.analysis.targets import SCREEN_COLUMNS
from kdclimb.artifacts import FILES, WEIGHTS_ELSEWHERE
from kdclimb.schedule import total_tokens

PROBE_COLUMNS = tuple(
    "candidate run_id status reason steps horizon probe_step_ms projected_ms params_stored params_active "
    "flops_per_token device threads clock shared_device anchor_before_ms anchor_after_ms".split()
)
EARLY_VALIDATIONS = 3  # after step 0: the first checkpoints, over which a teacher must improve
EARLY_COLUMNS = tuple(f"early_val_{i}" for i in range(EARLY_VALIDATIONS + 1))  # nats; 0 is the one at step 0
TRAINED_COLUMNS = ("candidate", "imported", *RUN_COLUMNS, *EARLY_COLUMNS, "missing_artifacts")
WEIGHTS = ("checkpoints/model.safetensors", "checkpoints/model.json")
ELSEWHERE = f"checkpoints/{WEIGHTS_ELSEWHERE}"
SELECTED_KEYS = tuple("run_id candidate imported final_val best_val train_time_ms speed budget_ms reason".split())
TIMES = ("probe_step_ms", "projected_ms", "train_time_ms")


def teacher_probe(runs: list[RunFolder], out: Path) -> None:
    """Project the training time (ms) of each candidate from its first few steps; nothing for one that failed."""
    write_csv(out, PROBE_COLUMNS, [_probe_row(run) for run in runs])


def _probe_row(run: RunFolder) -> dict:
    schedule = run.config.schedule
    step_ms = projected = None
    if run.ok:
        step_ms = run.step_ms()
        projected = step_ms * schedule.horizon
        if len(set(schedule.batch_tokens)) > 1:  # later stages take longer steps than the probe saw
            projected = statistics.median(run.durations(per_token=True)) * total_tokens(schedule)
    return run.row() | {
        "candidate": run.label,
        "steps": len(run.steps),
        "probe_step_ms": step_ms,
        "projected_ms": projected,
    }


def filter_projected(probe: Path, budget: Path, out: Path) -> None:
    """Keep the candidates whose projected time is within the budget and was taken on the budget's terms."""
    limit = read_budget(budget)
    _filter(at_budgets_speed(read_csv(probe, PROBE_COLUMNS), limit), limit, _projected_problems, out)


def filter_measured(trained: Path, budget: Path, out: Path) -> None:
    """Keep the teachers that pass the checklist: time, status, early improvement, complete artifacts.

    Of an imported one only its declared time and its artifacts are checked: how its loss fell is not known.
    """
    limit = read_budget(budget)
    _filter(at_budgets_speed(read_csv(trained, TRAINED_COLUMNS), limit), limit, _measured_problems, out)


def at_budgets_speed(rows: list[dict], budget: dict) -> list[dict]:
    """Rows of probe.csv or trained.csv with their times at the speed of the machine that the budget's are at, and that
    factor as `speed`; 1 for a declared time.
    """
    found = []
    for row in rows:
        speed = speed_of(row, budget["anchor_ms"])
        times = {key: row[key] * speed for key in TIMES if row.get(key) is not None}
        found.append(row | times | {"speed": speed})
    return found


def _filter(rows: list[dict], budget: dict, problems, out: Path) -> None:
    rejected = {}
    for row in rows:
        if found := [problem for problem in problems(row, budget) if problem]:
            rejected[row["candidate"]] = "; ".join(found)
    survivors = [row["candidate"] for row in rows if row["candidate"] not in rejected]
    write_json(out, {"budget_ms": budget["budget_ms"], "survivors": survivors, "rejected": rejected})


def _projected_problems(row: dict, budget: dict) -> list[str]:
    if row["status"] != "ok":
        return [_failed(row)]
    return [refuse_timing(row, budget), _over_budget("projected", row["projected_ms"], budget, row["speed"])]


def _measured_problems(row: dict, budget: dict) -> list[str]:
    if row["status"] != "ok":
        return [_failed(row)]
    missing = f"artifacts missing: {row['missing_artifacts']}" if row["missing_artifacts"] else ""
    if row["imported"]:
        return [_over_budget("imported: declared", row["train_time_ms"], budget), missing]
    return [
        refuse_timing(row, budget),
        _over_budget("measured", row["train_time_ms"], budget, row["speed"]),
        _early_problem([row[column] for column in EARLY_COLUMNS]),
        missing,
    ]


def _failed(row: dict) -> str:
    reason = row["reason"] or "no reason recorded"
    return f"no OOM fallback: {reason}" if row["status"] == "oom" else f"{row['status']}: {reason}"


def _over_budget(how: str, ms: float | None, budget: dict, speed: float = 1.0) -> str:
    limit = budget["budget_ms"]
    if ms is None:
        return f"no {how} time"
    where = "" if speed == 1.0 else f" ({ms / speed:,.1f} ms on a machine of another speed)"
    of = f"{limit:,.1f} ms{projection(budget['projected_from'])}"
    return f"{how} time {ms:,.1f} ms{where} is over the budget of {of}" if ms > limit else ""


def _early_problem(losses: list[float | None]) -> str:
    losses = [loss for loss in losses if loss is not None]
    if len(losses) < 2:
        return "no validation after step 0"
    for i, (before, after) in enumerate(pairwise(losses), start=1):
        if not after < before:  # so that NaN is rejected too
            return f"validation not falling early: {before:.4f}, then {after:.4f} at validation {i} after step 0"
    return ""


def teacher_train(runs: list[RunFolder], out: Path) -> None:
    """Collect trained candidates and imported teachers: summaries, first validations (nats), missing artifacts."""
    write_csv(out, TRAINED_COLUMNS, [_trained_row(run) for run in runs])


def _trained_row(run: RunFolder) -> dict:
    losses = [row["val_loss"] for row in run.val[: len(EARLY_COLUMNS)]]
    losses += [None] * (len(EARLY_COLUMNS) - len(losses))
    owed = (*FILES, *(WEIGHTS[1:] if (run.folder / ELSEWHERE).is_file() else WEIGHTS))
    missing = [name for name in owed if not (run.folder / name).is_file()]
    early = dict(zip(EARLY_COLUMNS, losses, strict=True))
    marks = {"candidate": run.label, "imported": int(run.imported), "missing_artifacts": " ".join(missing)}
    return run.row() | early | marks


def teacher_select(trained: Path, projected: Path, measured: Path, budget: Path, out: Path) -> None:
    """The survivor of lowest final validation loss (nats); of equals, the cheaper one. None is a result too.

    Its train_time_ms is at the budget's speed of the machine, `speed` times what it took.
    """
    terms = read_budget(budget)
    limit = terms["budget_ms"]
    survivors = read_json(measured, ["survivors", "rejected"])
    rows = at_budgets_speed(read_csv(trained, TRAINED_COLUMNS), terms)
    rows = [row for row in rows if row["candidate"] in survivors["survivors"]]
    rows = [row for row in rows if row["final_val"] is not None and math.isfinite(row["final_val"])]
    decision = dict.fromkeys(SELECTED_KEYS) | {"budget_ms": limit}
    if not rows:
        rejected = read_json(projected, ["rejected"])["rejected"] | survivors["rejected"]
        why = "; ".join(f"{name}: {reason}" for name, reason in rejected.items())
        of = f"{limit:,.1f} ms{projection(terms['projected_from'])}"
        decision["reason"] = f"no teacher meets the budget of {of}: {why or 'no candidate was tried'}"
    else:
        # to 9 digits: what a time divided by a speed is off by decides nothing
        best = min(rows, key=lambda row: (row["final_val"], float(f"{row['train_time_ms']:.9g}")))
        decision |= {key: best[key] for key in SELECTED_KEYS if key in best} | {"imported": bool(best["imported"])}
        declared = "; imported: its time is declared, not measured" if best["imported"] else ""
        decision["reason"] = f"lowest final val_loss of {len(rows)} within the budget{declared}"
    write_json(out, decision)


def as_measured(selected: dict) -> dict:
    """The selected teacher with the time that it took, beside runs whose times are as measured."""
    if selected["run_id"] is None:
        return selected
    return selected | {"train_time_ms": selected["train_time_ms"] / selected["speed"]}


def kd_promote(screen: Path, ce_screen: Path, promote: int, out: Path) -> None:
    """The labels of the `promote` best screened points that trained to their end, best first; and CE's best one."""
    rows = sorted(read_csv(screen, SCREEN_COLUMNS), key=lambda row: row["rank"])
    points = [row["label"] for row in rows if row["status"] == "ok"][:promote]
    if points:
        reason = f"best {len(points)} of {len(rows)} by steps to target, then stability, then final val_loss"
    elif rows:
        reason = "every screened run failed: " + "; ".join(f"{row['label']}: {_failed(row)}" for row in rows)
    else:
        reason = "nothing was screened"
    best = [row for row in read_csv(ce_screen, SCREEN_COLUMNS) if row["status"] == "ok"]
    ce_point = min(best, key=lambda row: row["rank"])["label"] if best else None
    write_json(out, {"points": points, "ce_point": ce_point, "reason": reason})
