"""The ledger: every run of the campaign on one line, in the columns that such campaigns have always used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from kdclimb.analysis.tables import RunFolder, write_csv
from kdclimb.analysis.targets import crossing, read_target, stability
from kdclimb.config import RunConfig

LEDGER_COLUMNS = tuple(  # the seed's, then ours
    "run_id mode teacher_params_m teacher_steps teacher_train_time_ms alpha temp kd_lr_boost student_steps best_val "
    "final_val steps_to_target status artifact_dir seed tokens active_flops val_instability clock device code_hash "
    "data_hash enters_claims kd_cache_ms kd_cache_ms_amortised "
    "anchor_before_ms anchor_after_ms".split()
)
MODES = {
    "ce": "ce_baseline",
    "ce_screen": "ce_screen",
    "probe": "teacher_probe",
    "teacher": "teacher",
    "imported": "teacher_imported",
    "ngram_teacher": "teacher_ngram",
    "isolate": "kd_isolate",
    "screen": "kd_screen",
    "kd": "kd_full",
    "ngram": "kd_ngram",
    "control_boost": "ce_lr_policy",
    "control_random": "kd_random_teacher",
    "control_tuned": "ce_tuned",
    "control_smooth": "ce_label_smoothing",
    "control_batch": "ce_smaller_batches",
    "control_extra": "ce_extra_steps",
    "control_growth": "ce_grown",
    "log": "imported_log",
}
TEACHER_ARMS = ("probe", "teacher", "imported", "ngram_teacher")
TARGET_ARMS = tuple(
    arm for arm in MODES if arm not in (*TEACHER_ARMS, "isolate")
)  # whose steps to target mean something
NOT_APPLICABLE = "-"


def ledger(runs: list[RunFolder], target: Path, exploratory: bool, out: Path, unfinished: Sequence[dict] = ()) -> None:
    """Write one row for each distinct run, in the order of the arms; a run shared by arms counts for the first. The
    `unfinished` runs of an unfinished campaign, rows of its table of runs, come last.

    Parameters are the stored ones in millions, times ms, losses nats, and alpha the weight of the KD term; active FLOPs
    count what a token passes through, the teacher's forward pass where KD was on. val_instability is the sum of the
    upward moves of the validation loss.
    """
    goal = read_target(target)
    distinct: dict[str, RunFolder] = {}
    for run in sorted(runs, key=lambda run: list(MODES).index(run.arm)):
        distinct.setdefault(run.run_id, run)
    teachers = {run.run_id: run for run in runs if run.arm in TEACHER_ARMS and run.arm != "probe"}
    sharing = Counter(run.config.kd.cache for run in distinct.values() if run.config.kd)
    rows = [
        _ledger_row(run, teachers, goal) | _ours(run, exploratory) | _cache_cells(run, sharing)
        for run in distinct.values()
    ]
    rows += [_unfinished_row(row) for row in unfinished]
    write_csv(out, LEDGER_COLUMNS, [{k: NOT_APPLICABLE if v is None else v for k, v in row.items()} for row in rows])


def _unfinished_row(row: dict) -> dict:
    known = {key: row[key] for key in ("run_id", "status", "artifact_dir", "seed", "clock")}
    barred = {"mode": MODES[row["arm"]], "enters_claims": f"no: {row['status']}"}
    return dict.fromkeys(LEDGER_COLUMNS) | known | barred


def _cache_cells(run: RunFolder, sharing: Counter) -> dict:
    """What writing the cache of its teacher's targets took (ms), and that over all runs of the ledger that read it."""
    cost = run.summary["kd_cache_ms"]
    amortised = None if cost is None else cost / sharing[run.config.kd.cache]
    return {"kd_cache_ms": cost, "kd_cache_ms_amortised": amortised}


def _ledger_row(run: RunFolder, teachers: dict[str, RunFolder], target: dict) -> dict:
    kd, summary, is_teacher = run.config.kd, run.summary, run.arm in TEACHER_ARMS
    source = run if is_teacher else teachers.get(kd.teacher) if kd else None
    params = source.summary["params_stored"] if source else None
    trained = source is not None and not (kd and kd.random_teacher)  # random weights cost no training
    reached = crossing(run, target).step if run.arm in TARGET_ARMS else None
    taught = kd is not None and not kd.infer_only
    boost = run.config.schedule.lr_boost if isinstance(run.config, RunConfig) else None
    return {
        "run_id": run.run_id,
        "mode": MODES[run.arm],
        "teacher_params_m": None if params is None else params / 1e6,
        "teacher_steps": source.summary["steps"] if trained else None,
        "teacher_train_time_ms": source.summary["train_time_ms"] if trained else None,
        "alpha": kd.alpha if taught else None,
        "temp": kd.temperature if taught else None,
        "kd_lr_boost": boost.mult if boost else 1.0 if taught else None,
        "student_steps": None if is_teacher else summary["steps"],
        "best_val": summary["best_val"],
        "final_val": summary["final_val"],
        "steps_to_target": "never" if reached is None and run.arm in TARGET_ARMS else reached,
        "status": run.status,
        "artifact_dir": run.folder,
    }


def _ours(run: RunFolder, exploratory: bool) -> dict:
    row, losses = run.summary, [v["val_loss"] for v in run.val]
    return {
        "seed": run.config.seed,
        "tokens": row["tokens"],
        "active_flops": active_flops(run),
        "val_instability": stability(run) if None not in losses else None,
        "clock": run.config.clock,
        "anchor_before_ms": row["anchor_before_ms"],
        "anchor_after_ms": row["anchor_after_ms"],
        "device": row["device"] or None,
        "code_hash": row["code_hash"] or None,
        "data_hash": row["data_hash"] or None,
        "enters_claims": f"no: {why}" if (why := barred(run, exploratory)) else "yes",
    }


def active_flops(run: RunFolder) -> float | None:
    """FLOPs of all training tokens: the student's, and the teacher's for the tokens of steps with KD."""
    row = run.summary
    if not row["tokens"] or row["flops_per_token"] is None:
        return None
    taught = sum(step["batch_tokens"] or 0 for step in run.steps if step["kd_active"])
    return row["tokens"] * row["flops_per_token"] + taught * (row["teacher_flops_per_token"] or 0.0)


def barred(run: RunFolder, exploratory: bool) -> str:
    """Why a run can enter no claim; empty where it can."""
    if run.arm in ("probe", "isolate", "screen", "ce_screen"):
        return "a part of a run" if not run.arm.endswith("screen") else "it chose, and does not judge"
    if run.imported:
        return "provisional" if not run.ok else "imported"
    reasons = {
        "exploratory": exploratory or run.arm == "control_growth",
        run.status: not run.ok,
        f"{run.config.clock} time": run.config.clock != "measured",
    }
    return ", ".join(reason for reason, holds in reasons.items() if holds)
