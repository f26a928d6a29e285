"""The seed's checklists, answered: is a teacher promoted, may a search stop; and all candidates in one table."""

from __future__ import annotations

from itertools import pairwise

from kdclimb.analysis.selection import EARLY_COLUMNS
from kdclimb.analysis.tables import RunFolder, show_ms, show_number

CHECKS = ("check_budget", "check_falling", "check_no_oom", "check_artifacts")
CHECK_COLUMNS = (*(column for check in CHECKS for column in (check, f"{check}_by")), "promoted", "projection_error")
STOP_COLUMNS = ("condition", "met", "evidence")
SUMMARY_COLUMNS = (
    "kind candidate run_id status steps projected_ms train_time_ms budget_ms final_val steps_to_target verdict reason"
).split()
YES, NO = "yes", "no"


def checks(probe: dict, trained: dict | None, budget_ms: float) -> dict:
    """CHECK_COLUMNS of a candidate: yes, no, or nothing where it was not trained; and the figure behind each.

    `probe` has projected_ms and status (nothing for an imported teacher), `trained` is its row of trained.csv. Falling
    means each of the first three validations below the one before. The projection's error is measured / projected - 1.
    """
    found: dict = dict.fromkeys(CHECK_COLUMNS)
    row = trained or probe
    imported = trained is not None and trained["imported"]
    how, ms = (
        ("declared" if imported else "measured", row["train_time_ms"])
        if trained
        else ("projected", probe["projected_ms"])
    )
    within = None if ms is None else ms <= budget_ms
    found["check_budget"] = None if within is None else _yes(within)
    found["check_budget_by"] = f"{how}: {'none' if ms is None else show_ms(ms)} of {show_ms(budget_ms)}"
    found["check_no_oom"] = _yes(row["status"] != "oom")
    found["check_no_oom_by"] = row["status"]
    if trained:
        losses = [trained[column] for column in EARLY_COLUMNS if trained[column] is not None]
        if not imported:
            falling = len(losses) > 1 and all(after < before for before, after in pairwise(losses))
            found["check_falling"] = _yes(falling)
        found["check_falling_by"] = "not known" if imported else ", ".join(f"{loss:.4f}" for loss in losses) or "none"
        found["check_artifacts"] = _yes(not trained["missing_artifacts"])
        found["check_artifacts_by"] = trained["missing_artifacts"] or "all there"
        if probe.get("projected_ms") and trained["train_time_ms"] is not None:
            found["projection_error"] = trained["train_time_ms"] / probe["projected_ms"] - 1
    asked = [found[check] for check in CHECKS if not (imported and check == "check_falling")]
    found["promoted"] = _yes(asked == [YES] * len(asked))
    return found


def _yes(holds: bool) -> str:
    return YES if holds else NO


def stop_conditions(teachers: list[dict], teacher: dict, pairs: list[dict], verdict: dict) -> list[dict]:
    """Rows of STOP_COLUMNS: may the teacher search, the KD campaign and the whole of it stop? `pairs` as of pair_up."""
    promoted = [row["candidate"] for row in teachers if row["promoted"] == YES]
    if teacher["run_id"] is None:
        search = f"none of {len(teachers)} candidates: {teacher['reason']}"
    else:
        search = (
            f"{len(promoted)} of {len(teachers)} pass the checklist; {teacher['candidate']} took "
            f"{show_ms(teacher['train_time_ms'])} of {show_ms(teacher['budget_ms'])}, to {teacher['final_val']:.4f}"
        )
    told = [_told(pair) for pair in pairs]
    both = verdict["budget_share"] is not None and verdict["budget_share"] <= 1 and bool(told)
    share = "no teacher" if verdict["budget_share"] is None else f"{verdict['budget_share']:.0%} of the budget"
    rows = (
        ("teacher search", teacher["run_id"] is not None, search),
        ("KD campaign", bool(told), "; ".join(told) or "no KD run at the full horizon"),
        ("final", both, f"teacher: {share}; {verdict['sentence']}"),
    )
    return [{"condition": name, "met": _yes(met), "evidence": evidence} for name, met, evidence in rows]


def _told(pair: dict) -> str:
    """Steps to the target of KD and CE with one seed, or why there are none."""
    steps = [
        row["miss_reason"] if row["steps_to_target"] is None else f"{show_number(row['steps_to_target'])} steps"
        for row in (pair["kd"], pair["ce"])
    ]
    return f"seed {pair['kd']['seed']}: KD {steps[0]}, CE {steps[1]}"


def summary(
    teachers: list[dict], counted: list[RunFolder], budget_ms: float, runs: list[dict], point: str | None
) -> list[dict]:
    """Rows of SUMMARY_COLUMNS: every teacher, counted ones too, then every screened and full KD run of compare.csv."""
    nothing = dict.fromkeys(SUMMARY_COLUMNS)
    rows = [
        nothing | {key: row[key] for key in SUMMARY_COLUMNS if key in row} | {"kind": "teacher"} for row in teachers
    ]
    rows += [nothing | _counted(run, budget_ms) for run in counted]
    kinds = {"screen": "kd_screen", "kd": "kd_full", "ngram": "kd_ngram"}
    for row in runs:
        if row["arm"] in kinds:
            verdict = "beside the sweep" if row["arm"] == "ngram" else _promoted(row["label"] == point)
            place = {"kind": kinds[row["arm"]], "candidate": row["label"]}
            kept = {
                key: row[key] for key in ("run_id", "status", "steps_to_target", "final_val", "train_time_ms", "steps")
            }
            rows.append(nothing | kept | place | {"verdict": verdict, "reason": row["reason"] or row["miss_reason"]})
    return rows


def _promoted(holds: bool) -> str:
    return "promoted" if holds else "not promoted"


def _counted(run: RunFolder, budget_ms: float) -> dict:
    """An n-gram teacher: no candidate of the sweep, but held against the same budget."""
    row = run.summary
    within = run.ok and row["train_time_ms"] <= budget_ms
    return {key: row[key] for key in ("train_time_ms", "final_val", "steps")} | {
        "kind": "ngram_teacher",
        "candidate": run.label,
        "run_id": run.run_id,
        "status": run.status,
        "budget_ms": budget_ms,
        "verdict": "within the budget" if within else "rejected",
        "reason": run.reason or f"counting took {show_ms(row['train_time_ms'])} of {show_ms(budget_ms)}",
    }
