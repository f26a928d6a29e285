"""Numbers that others published, read again: which of their comparisons are matched, and what those say.

Two runs are matched if both are complete and stand at the end of schedules of one length, for the same student. A
table holds one run of each, so no interval is possible; what stands beside a difference is the one between two runs of
the same thing (CE, and CE whose teacher's answer is dropped), and what the difference is worth in steps of CE.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

from scipy.optimize import isotonic_regression

from kdclimb.analysis.alts import finding
from kdclimb.analysis.figures import draw
from kdclimb.analysis.report import INPUTS
from kdclimb.analysis.report.document import data_of, html
from kdclimb.analysis.report.parts import Column, Page, ms, nats, number, section, table, text
from kdclimb.analysis.tables import AnalysisError, read_csv, show_ms, write_csv
from kdclimb.analysis.targets import shortest_horizon
from kdclimb.artifacts import write_text

RUN_COLUMNS = (
    "run_id series mode status label student_params_m teacher_params_m horizon step val_loss best_val train_time_ms "
    "step_ms_median step_ms_p90 note"
).split()
WORDS = ("run_id", "series", "mode", "status", "label", "note")
CLAIM_COLUMNS = ("claim", "run_id", "against")
FOUND_COLUMNS = (*CLAIM_COLUMNS, *"matched val_delta noise steps_worth_low steps_worth_high time_ratio verdict".split())
TEACHER_COLUMNS = "run_id status train_time_ms budget_ms within_budget val_loss verdict".split()
END_COLUMNS = "arm label run_id horizon seed final_val fitted low high n_seeds".split()
FIGURES = ("claims", "claim_times", "horizon_curve", "teachers")
SHAPE = re.compile(r"L\d+_H\d+_D\d+_\d+")  # layers, heads, their width, steps: in the name of a teacher's run
MIN_ENDS = 2  # complete CE runs, between whose ends a loss can be placed


def reread(folder: Path, out: Path, fraction: float) -> str:
    """Judge folder/claims.csv by folder/runs.csv; writes claims.csv, teachers.csv, ends.csv and index.html to `out`.

    Returns the claims and verdicts as text. Raises AnalysisError for a malformed table or a claim on an unknown run.
    """
    runs = read_csv(folder / "runs.csv", RUN_COLUMNS, WORDS)
    known = {run["run_id"]: run for run in runs}
    claims = read_csv(folder / "claims.csv", CLAIM_COLUMNS, CLAIM_COLUMNS)
    for claim in claims:
        for key in ("run_id", "against"):
            if claim[key] not in known:
                raise AnalysisError(f"{folder / 'claims.csv'}: {claim[key]!r} is no run of runs.csv")
    found = [claim | judge(known[claim["run_id"]], known[claim["against"]], runs) for claim in claims]
    teachers = judge_teachers(runs, fraction)
    write_csv(out / "claims.csv", FOUND_COLUMNS, found)
    write_csv(out / "teachers.csv", TEACHER_COLUMNS, teachers)
    write_csv(out / "runs.csv", RUN_COLUMNS, runs)
    ends = end_rows(runs)
    write_csv(out / "ends.csv", END_COLUMNS, ends)
    write_text(out / "index.html", _page(folder.name, runs, found, teachers, ends, out / "figures"))
    return "\n".join([*(f"{row['claim']}: {row['verdict']}" for row in found), f"written: {out / 'index.html'}"])


def judge(run: dict, other: dict, runs: list[dict]) -> dict:
    """What the two runs say of each other: the last of FOUND_COLUMNS. Worth is in CE's steps, plus is better."""
    found = dict.fromkeys(FOUND_COLUMNS[3:]) | {"matched": 0}
    if reasons := mismatches(run, other):
        return found | {"verdict": f"not matched, so it says nothing of KD: {'; '.join(reasons)}"}
    delta, noise = run["val_loss"] - other["val_loss"], repeat_noise(runs, run["student_params_m"])
    found |= {"matched": 1, "val_delta": delta, "noise": noise}
    words = [f"matched: {abs(delta):.4f} nats {'below' if delta < 0 else 'above'} the other"]
    words += _worth(found, run, runs)
    if noise is not None and abs(delta) <= noise:
        words.append(f"no more than two runs of the same thing differ by ({noise:.4f})")
    else:
        words.append("one run of each, so nothing is shown")
    if run["series"] == other["series"]:
        found["time_ratio"] = run["train_time_ms"] / other["train_time_ms"]
        words.append(f"{found['time_ratio']:.2f} times its time, no teacher counted")
    else:
        words.append("times are of different series and not compared")
    return found | {"verdict": "; ".join(words)}


def mismatches(run: dict, other: dict) -> list[str]:
    """Why these two can't be compared; empty where they can."""
    reasons = [f"{row['run_id']} is {row['status']}" for row in (run, other) if row["status"] != "complete"]
    where = [
        f"{row['run_id']} at step {row['step']} of {row['horizon'] or 'an unknown number'}" for row in (run, other)
    ]
    if len({run["horizon"], other["horizon"]}) > 1 or None in (run["horizon"], other["horizon"]):
        reasons.append(f"their schedules differ: {', '.join(where)}")
    elif any(row["step"] != row["horizon"] for row in (run, other)):
        reasons.append(f"not at their ends: {', '.join(where)}")
    if run["student_params_m"] != other["student_params_m"]:
        reasons.append("their students differ")
    return reasons


def _ends(runs: list[dict], student: float | None) -> list[dict]:
    """Complete CE runs of a student, at the ends of their schedules, shortest first."""
    whole = [
        row
        for row in runs
        if (row["mode"], row["status"], row["student_params_m"]) == ("ce", "complete", student)
        and row["step"] == row["horizon"]
    ]
    return sorted(whole, key=lambda row: row["horizon"])


def _worth(found: dict, run: dict, runs: list[dict]) -> list[str]:
    ends = _ends(runs, run["student_params_m"])
    if run["mode"] == "ce" or len(ends) < MIN_ENDS:
        return []
    low, high = shortest_horizon([row["horizon"] for row in ends], [row["val_loss"] for row in ends], run["val_loss"])
    found |= {"steps_worth_low": low - run["horizon"], "steps_worth_high": high - run["horizon"]}
    if low != high:
        bound = f"more than {low:.0f}" if high == math.inf else f"fewer than {high:.0f}"
        found |= {key: None for key in ("steps_worth_low", "steps_worth_high") if not math.isfinite(found[key])}
        return [f"CE would need {bound} steps to end there, beyond its runs"]
    return [f"CE would end there after {low:.1f} steps instead of {run['horizon']}"]


def repeat_noise(runs: list[dict], student: float | None) -> float | None:
    """The largest difference (nats) of runs that compute the same: CE, and CE whose teacher's answer is dropped."""
    pairs = [
        abs(a["val_loss"] - b["val_loss"])
        for a in _ends(runs, student)
        for b in runs
        if b["mode"] == "infer_only" and (a["series"], a["horizon"]) == (b["series"], b["horizon"])
    ]
    return max(pairs, default=None)


def judge_teachers(runs: list[dict], fraction: float) -> list[dict]:
    """Each teacher against the budget, which the longest complete CE run sets."""
    whole = [
        row for row in runs if row["mode"] == "ce" and row["status"] == "complete" and row["step"] == row["horizon"]
    ]
    if not whole:
        raise AnalysisError("runs.csv: holds no complete CE run, so there is no budget")
    budget = fraction * max(whole, key=lambda row: row["horizon"])["train_time_ms"]
    rows = []
    for row in (row for row in runs if row["mode"] == "teacher"):
        within, fit = row["train_time_ms"] <= budget, row["status"] == "complete"
        verdict = "within the budget" if within else f"over the budget of {budget:,.0f} ms"
        if not fit:
            verdict += f"; {row['status']}, so no candidate"
        rows.append(row | {"budget_ms": budget, "within_budget": int(within), "verdict": verdict})
    return rows


def _summary(found: list[dict]) -> str:
    """What all claims together show, as HTML."""
    known = [row for row in found if row["matched"]]
    clear = [row for row in known if row["noise"] is None or abs(row["val_delta"]) > row["noise"]]
    better = sum(row["val_delta"] < 0 for row in clear)
    return (
        f"<b>Nothing is shown:</b> {len(known)} of {len(found)} comparisons are matched, and each is of one run, so no "
        f"interval and no test is possible. {len(clear)} of them differ by more than two runs of the same thing: "
        f"{better} in favour of the claim&rsquo;s run, {len(clear) - better} against it."
    )


def end_rows(runs: list[dict]) -> list[dict]:
    """Where complete runs of one student end by their horizon: rows of END_COLUMNS, a run each, and without a seed CE's
    monotone fit. One run of each, so a number takes the seed's place and there is no interval.

    The student is the one with the most of such runs.
    """
    students = [run["student_params_m"] for run in runs if run["mode"] == "ce" and run["step"] == run["horizon"]]
    student = max(dict.fromkeys(students), key=students.count, default=None)
    whole = [
        run
        for run in runs
        if (run["status"], run["student_params_m"]) == ("complete", student) and run["step"] == run["horizon"]
    ]
    blank = dict.fromkeys(END_COLUMNS) | {"label": ""}
    rows = [
        blank
        | {"arm": arm, "run_id": run["run_id"], "horizon": run["horizon"], "seed": i, "final_val": run["val_loss"]}
        for arm in ("ce", "kd")
        for i, run in enumerate(run for run in whole if run["mode"] == arm)
    ]
    ends = _ends(runs, student)
    if len(ends) < MIN_ENDS:
        return rows
    fitted = isotonic_regression([run["val_loss"] for run in ends], increasing=False).x
    return rows + [
        blank | {"arm": "ce", "horizon": run["horizon"], "final_val": run["val_loss"], "fitted": float(value)}
        for run, value in zip(ends, fitted, strict=True)
    ]


def _candidates(teachers: list[dict]) -> list[dict]:
    """The teachers as the chart of a campaign's candidates has them."""
    nothing = dict.fromkeys(("projected_ms", "flops_per_token", "probe_run_id"))
    return [
        nothing
        | {key: row[key] for key in ("run_id", "status", "train_time_ms", "budget_ms")}
        | {"candidate": shape[0] if (shape := SHAPE.search(row["run_id"])) else row["run_id"][:20]}
        | {"final_val": row["val_loss"], "reason": row["verdict"], "imported": 0}
        | {"verdict": "survivor" if row["within_budget"] and row["status"] == "complete" else "rejected"}
        for row in teachers
    ]


def _page(name: str, runs: list[dict], found: list[dict], teachers: list[dict], ends: list[dict], figures: Path) -> str:
    budget = teachers[0]["budget_ms"] if teachers else None
    data = dict.fromkeys(INPUTS) | {"claims": found, "horizon_curve": ends, "teachers": _candidates(teachers)}
    data |= {"budget": {"budget_ms": budget} if teachers else None}
    data |= {"headline": [{"figure": "budget_ms", "value": budget}]}
    drawn = draw(figures, data, FIGURES)
    files = {"claims": "claims.csv", "teachers": "teachers.csv", "horizon_curve": "ends.csv", "runs": "runs.csv"}
    page = Page(name, data, files, drawn, {figure: finding(figure, data) for figure in drawn})
    claims = [
        Column("Claim", lambda row: f'<span class="words">{text("claim")(row)}</span>', words=True),
        Column(
            "Rests on", lambda row: f"{text('run_id')(row)}<small>against {text('against')(row)}</small>", words=True
        ),
        Column("Matched", lambda row: "yes" if row["matched"] else "no"),
        Column("Nats", nats("val_delta", signed=True)),
        Column("Time ratio", number("time_ratio", 2)),
        Column("Verdict", lambda row: f'<span class="words">{text("verdict")(row)}</span>', words=True),
    ]
    budgets = [
        Column("Teacher", text("run_id"), words=True),
        Column("Time", ms("train_time_ms")),
        Column("Val loss", nats("val_loss")),
        Column("Verdict", text("verdict"), words=True),
    ]
    ledger = [Column(key, text(key), key in WORDS) for key in RUN_COLUMNS]
    lead = "Matched: both complete, at the end of schedules of one length, for the same student."
    deltas = page.figure(
        "claims", "The matched claims: nats against the other run. Shaded: what two runs of the same thing differ by."
    )
    times = page.figure("claim_times", "Their training time, where both are of one series; no teacher is counted.")
    curve = page.figure(
        "horizon_curve", "Final loss by horizon (log): a point a run, and the monotone fit through CE&rsquo;s."
    )
    candidates = page.figure(
        "teachers", "Training time against final loss. Left of the dashed line is within the budget."
    )
    body = [
        f'<section class="verdict" id="verdict"><p class="sentence">{_summary(found)}</p></section>',
        section(
            "Claims",
            lead,
            f'<div class="pair">{deltas}{times}</div>',
            table(found, claims, "no claim"),
            page.links("claims"),
        ),
        section(
            "Complete horizons", "Where complete runs of the same student end.", curve, page.links("horizon_curve")
        ),
        section(
            "Teachers",
            f"A tenth of the longest complete CE run: {show_ms(budget) if teachers else 'not needed'}.",
            candidates,
            table(teachers, budgets, "no teacher"),
            page.links("teachers"),
        ),
        section(
            "All numbers",
            "As they were published, with their labels.",
            table(runs, ledger, "no run"),
            page.links("runs"),
        ),
    ]
    return html(f"kdclimb: {name}", f"{name}, read again", "\n".join(body), data_of(page))
