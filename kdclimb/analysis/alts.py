"""What each figure shows, in a sentence: for those who can't see it, and for those who look and wonder."""

from __future__ import annotations

from kdclimb.analysis.budget import projection
from kdclimb.analysis.tables import show_ms, show_number


def finding(name: str, data: dict) -> str:
    """The finding of a figure, in words with cells of its table; empty where there is nothing to say."""
    said = FINDINGS.get(name)
    return said(data) if said else ""


def facts(data: dict) -> dict[str, float | None]:
    """The figures that sentences hold, each a cell of headline.csv."""
    return {row["figure"]: row["value"] for row in data["headline"] or ()}


def _ends(data: dict) -> str:
    """Where CE and KD ended at the longest horizon, seed by seed."""
    rows = [row for row in data["runs"] or () if row["arm"] in ("ce", "kd") and row["final_val"] is not None]
    if not rows:
        return ""
    last = max(row["horizon"] for row in rows if row["arm"] == "ce") if any(r["arm"] == "ce" for r in rows) else 0
    point = (data["verdict"] or {}).get("point")
    rows = [row for row in rows if row["horizon"] == last and (row["arm"] == "ce" or point in (None, row["label"]))]
    ends = {arm: ", ".join(f"{r['final_val']:.4f}" for r in rows if r["arm"] == arm) for arm in ("ce", "kd")}
    words = [f"{arm.upper()} ends at {losses} nats" for arm, losses in ends.items() if losses]
    target = facts(data).get("target")
    return "; ".join(words) + (f"; the target is {target:.4f}." if target is not None else ".") if words else ""


def _teachers(data: dict) -> str:
    rows = data["teachers"] or []
    chosen = next((row for row in rows if row["verdict"] == "selected"), None)
    lost = sum(row["verdict"] == "rejected" for row in rows)
    if chosen is None:
        return f"None of {len(rows)} candidates was selected; {lost} were rejected." if rows else ""
    return (
        f"{chosen['candidate']} was selected: {show_ms(chosen['train_time_ms'])} of a budget of "
        f"{show_ms(chosen['budget_ms'])}{projection(facts(data).get('projected_from'))}, "
        f"{chosen['final_val']:.4f} nats; {lost} of {len(rows)} were rejected."
    )


def _isolates(data: dict) -> str:
    rows = [row for row in data["isolates"] or () if row["step_ms_median"] is not None]
    parts = [
        f"{row['label']} takes {show_ms(row['step_ms_median'])}"
        + (f" ({row['ratio_to_ce']:.2f} of CE)" if row["ratio_to_ce"] else "")
        for row in rows
    ]
    return "; ".join(parts) + "." if parts else ""


def _parts(data: dict) -> str:
    """The largest part of each isolate's step."""
    largest: dict[str, dict] = {}
    for row in data["profile"] or ():
        best = largest.get(row["label"])
        if best is None or row["share_of_step"] > best["share_of_step"]:
            largest[row["label"]] = row
    parts = [
        f"{label} {row['part']}, {row['share_of_step']:.0%} of {show_ms(row['step_ms_median'])}"
        for label, row in largest.items()
    ]
    return f"The largest part of a step: {'; '.join(parts)}." if parts else ""


def _trend(data: dict) -> str:
    point = (data["verdict"] or {}).get("point")
    rows = [row for row in data["trend"] or () if row["label"] == point]
    last = {row["seed"]: row for row in rows if row["steps_saved"] is not None}
    parts = [f"seed {seed}: {show_number(row['steps_saved'])} at {row['val_loss']:.4f}" for seed, row in last.items()]
    return f"Steps saved at the lowest loss that both reached: {'; '.join(parts)}." if parts else ""


def _break_even(data: dict) -> str:
    rows = [row for row in data["break_even"] or () if row["measured"] is not None]
    parts = []
    for row in rows:
        needed = "how much is needed is not known" if row["needed"] is None else f"{row['needed']:.0%} needed"
        parts.append(f"{row['target_value']:.4f}: {row['measured']:.0%} measured, {needed}")
    return f"Share of tokens saved, by target: {'; '.join(parts)}." if parts else ""


def _horizons(data: dict) -> str:
    rows = [row for row in data["horizon_curve"] or () if row["seed"] is None]
    parts = [f"{row['label'] or 'CE'} at {row['horizon']} steps {row['final_val']:.4f}" for row in rows]
    mean = "Mean final" if any(row["n_seeds"] for row in rows) else "Final"
    return f"{mean} loss: {'; '.join(parts)}." if parts else ""


def _sweep(data: dict) -> str:
    best = next((row for row in data["screen"] or () if row["rank"] == 1), None)
    if best is None or best["final_val"] is None:
        return ""
    return f"Of {len(data['screen'])} points {best['label']} ranks first, ending at {best['final_val']:.4f} nats."


def _alive(data: dict) -> str:
    known, parts = facts(data), []
    for name, key in {"KD": "kd", "CE": "ce", "KD from a random teacher": "random"}.items():
        if known.get(f"first_val_{key}") is not None:
            parts.append(f"{name} {known[f'first_val_{key}']:.4f}")
    return f"First validation (nats): {', '.join(parts)}." if parts else ""


def _step_times(data: dict) -> str:
    rows = [row for row in data["runs"] or () if row["arm"] in ("ce", "kd") and row["step_ms_median"] is not None]
    last = max((row["horizon"] for row in rows), default=0)
    words = []
    for arm in ("ce", "kd"):
        mine = [show_ms(row["step_ms_median"]) for row in rows if row["arm"] == arm and row["horizon"] == last]
        words += [f"{arm.upper()} {', '.join(mine)}"] if mine else []
    return f"Median step: {'; '.join(words)}." if words else ""


def _stops(data: dict) -> str:
    rows = [row for row in data["runs"] or () if row["arm"] == "kd" and row["kd_stop_step"] is not None]
    last = max((row["horizon"] for row in rows), default=0)
    stops = [f"{row['kd_stop_step']} (seed {row['seed']})" for row in rows if row["horizon"] == last]
    return f"KD stops at step {', '.join(stops)}." if stops else ""


def _claims(data: dict) -> str:
    """The matched claims whose runs differ by more than two runs of the same thing."""
    rows = [row for row in data["claims"] if row["val_delta"] is not None]
    clear = [row for row in rows if row["noise"] is None or abs(row["val_delta"]) > row["noise"]]
    parts = [f"{row['run_id']} {row['val_delta']:+.4f} against {row['against']}" for row in clear]
    return f"By more than two runs of the same thing differ (nats): {'; '.join(parts) or 'none'}." if rows else ""


def _claim_times(data: dict) -> str:
    rows = sorted((row for row in data["claims"] if row["time_ratio"] is not None), key=lambda row: row["time_ratio"])
    ends = [f"{row['time_ratio']:.2f} ({row['run_id']} against {row['against']})" for row in (rows[:1] + rows[-1:])]
    return f"From {' to '.join(ends)} of the other's time." if rows else ""


FINDINGS = {
    "claims": _claims,
    "claim_times": _claim_times,
    "val_loss_steps": _ends,
    "val_loss_time": _ends,
    "teachers": _teachers,
    "isolates": _isolates,
    "step_parts": _parts,
    "steps_saved_trend": _trend,
    "break_even": _break_even,
    "horizon_curve": _horizons,
    "sweep_parallel": _sweep,
    "sweep_knobs": _sweep,
    "kd_alive": _alive,
    "step_deltas": _step_times,
    "lr_phases": _stops,
}
