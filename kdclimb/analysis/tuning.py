"""What tuning each arm was given, in numbers, and which choices lie on the edge of their grid."""

from __future__ import annotations

import math

from kdclimb.analysis.tables import RunFolder, show_ms

TUNING_COLUMNS = (
    "arm n_points n_failed train_steps train_time_ms chosen steps_to_target final_val untuned_final_val edge".split()
)
TUNED = (  # of a screen's rows
    "temperature kd_alpha kd_token_frac adam_lr lr_boost_mult lr_boost_hold_frac lr_boost_drop_frac".split()
)
NO_MORE = {"kd_alpha": 1.0, "kd_token_frac": 1.0}  # beyond which no value lies
SCREEN_ARMS = {"ce": "ce_screen", "kd": "screen"}


def tuning_rows(
    screened: dict[str, list[dict]], runs: list[RunFolder], point: str | None, ce_point: str | None
) -> list[dict]:
    """One row of TUNING_COLUMNS for CE and one for KD, from their screens: {arm: rows of screen.csv}.

    Both have one horizon and one seed. `untuned_final_val` is CE's own at these, with the learning rates of every arm.
    """
    found = []
    for arm, chosen in (("ce", ce_point), ("kd", point)):
        rows, spent = screened[arm], [run for run in runs if run.arm == SCREEN_ARMS[arm]]
        row = next((row for row in rows if row["label"] == chosen), None)
        plain = [r for r in runs if r.arm == "ce" and spent and _place(r) == _place(spent[0])]
        found.append(
            {
                "arm": arm,
                "n_points": len(rows),
                "n_failed": sum(not run.ok for run in spent),
                "train_steps": sum(run.summary["steps"] or 0 for run in spent),
                "train_time_ms": math.fsum((run.summary["train_time_ms"] or 0.0) * run.speed for run in spent),
                "chosen": chosen or "",
                "steps_to_target": row and row["steps_to_target"],
                "final_val": row and row["final_val"],
                "untuned_final_val": plain[0].summary["final_val"] if plain else None,
                "edge": "; ".join(_edges(rows, row)) if row else "",
            }
        )
    return found


def _place(run: RunFolder) -> tuple[int, int]:
    return run.horizon, run.config.seed


def _edges(rows: list[dict], chosen: dict) -> list[str]:
    """The choices that lie on the edge of their grid, where a better value may lie beyond it."""
    edges = []
    for key in TUNED:
        values = {row[key] for row in rows if row[key] is not None}
        ends = {min(values), max(values)} - {NO_MORE.get(key)} if values else set()
        if chosen[key] is not None and len(values) > 1 and chosen[key] in ends:
            edges.append(f"{key} {chosen[key]:g} of {', '.join(f'{value:g}' for value in sorted(values))}")
    return edges


def tuning(rows: list[dict]) -> str:
    """The rows of tuning.csv in words."""
    ce, kd = rows
    spent = [f"{row['arm'].upper()} {row['n_points']} points, {show_ms(row['train_time_ms'])}" for row in rows]
    words = [f"Tuning, on a seed of its own: {'; '.join(spent)}."]
    if ce["n_points"] != kd["n_points"]:
        words.append("The arms were not tuned equally: controls.ce_grid and kd.grid differ in points.")
    if ce["chosen"]:
        words.append(f"CE's best point, {ce['chosen']}, is the arm that KD has to beat besides plain CE.")
    for row in rows:
        if row["edge"]:
            words.append(f"{row['arm'].upper()}'s choice is on the edge of its grid: {row['edge']}.")
    return " ".join(words)
