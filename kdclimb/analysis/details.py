"""The tables that only the report reads: the headline's figures, steps, horizons, configs, warnings and advice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kdclimb.analysis.advice import ADVICE_COLUMNS, advice_rows
from kdclimb.analysis.budget import BUDGET_KEYS
from kdclimb.analysis.cautions import WARNING_COLUMNS, warning_rows
from kdclimb.analysis.compare import COMPARE_COLUMNS, TEACHER_COLUMNS
from kdclimb.analysis.savings import BREAK_EVEN_COLUMNS, TREND_COLUMNS
from kdclimb.analysis.selection import SELECTED_KEYS, as_measured
from kdclimb.analysis.tables import RunFolder, read_csv, read_json, write_csv
from kdclimb.analysis.targets import TARGET_KEYS, TEACHERS
from kdclimb.analysis.tested import VERDICT_COLUMNS, find
from kdclimb.analysis.traces import (
    CONFIG_COLUMNS,
    HORIZON_COLUMNS,
    PAGE_COLUMNS,
    TRACE_COLUMNS,
    config_rows,
    distinct,
    horizon_rows,
    page_rows,
    trace_rows,
)
from kdclimb.analysis.tuning import TUNING_COLUMNS
from kdclimb.analysis.verdict import SAVINGS, pair_up

HEADLINE_COLUMNS = "figure value low high n_seeds saved_share saved_share_low saved_share_high source".split()
COSTS = dict(zip(SAVINGS, ("steps", "tokens", "time_ms", "time_with_teacher_ms"), strict=True))  # in verdict.csv
FACTS = {  # figures that the page's sentences hold: the decision that each is from, and its key there
    "budget_ms": ("budget", "budget_ms"),
    "ce_train_time_ms": ("budget", "ce_train_time_ms"),
    "horizon": ("budget", "horizon"),
    "projected_from": ("budget", "projected_from"),
    "fraction": ("budget", "fraction"),
    "threads": ("budget", "threads"),
    "teacher_ms": ("selected", "train_time_ms"),
    "teacher_final_val": ("selected", "final_val"),
    "target": ("target", "value"),
    "fixed_target": ("target", "fixed"),
    "full_horizon": ("verdict", "horizon"),
    "budget_share": ("verdict", "budget_share"),
    "teacher_share_of_ce": ("verdict", "teacher_share_of_ce"),
    "ce_time_to_target_ms": ("verdict", "ce_time_to_target_ms"),
    "teacher_share_to_target": ("verdict", "teacher_share_to_target"),
    "first_val_kd": ("verdict", "kd_alive.first_val_kd"),
    "first_val_ce": ("verdict", "kd_alive.first_val_ce"),
    "first_val_random": ("verdict", "kd_alive.first_val_random"),
    "confidence": ("verdict", "rules.confidence"),
    "p_value": ("verdict", "rules.p_value"),
    "power": ("verdict", "rules.power"),
    "amortize": ("verdict", "rules.amortize"),
}
VERDICT_KEYS = (
    "point horizon budget_projected_from budget_share teacher_share_of_ce ce_time_to_target_ms teacher_share_to_target "
    "kd_alive explained_by rules not_claimable_because"
).split()
OUTPUTS = {
    "traces": TRACE_COLUMNS,
    "horizon_curve": HORIZON_COLUMNS,
    "run_pages": PAGE_COLUMNS,
    "run_configs": CONFIG_COLUMNS,
    "warnings": WARNING_COLUMNS,
    "headline": HEADLINE_COLUMNS,
    "advice": ADVICE_COLUMNS,
}


def details(
    runs: list[RunFolder],
    budget: Path,
    selected: Path,
    target: Path,
    compare: Path,
    tests: Path,
    verdict: Path,
    tuning: Path,
    break_even: Path,
    trend: Path,
    teachers: Path,
    confidence: float,
    **outputs: Path,
) -> None:
    """Write the tables of OUTPUTS, each to `out_<name>`, from all runs, the decisions and the comparison."""
    decisions = {
        "budget": read_json(budget, BUDGET_KEYS),
        "selected": read_json(selected, SELECTED_KEYS),
        "target": read_json(target, TARGET_KEYS),
        "verdict": read_json(verdict, VERDICT_KEYS),
    }
    rows, tested = read_csv(compare, COMPARE_COLUMNS), read_csv(tests, VERDICT_COLUMNS)
    tables = tables_of(runs, as_measured(decisions["selected"]), decisions["verdict"], confidence)
    tables["headline"] = headline_rows(decisions, rows, tested)
    tables["advice"] = advice_rows(
        decisions["verdict"],
        tested,
        read_csv(tuning, TUNING_COLUMNS),
        read_csv(break_even, BREAK_EVEN_COLUMNS),
        read_csv(trend, TREND_COLUMNS),
        read_csv(teachers, TEACHER_COLUMNS),
    )
    for name, columns in OUTPUTS.items():
        write_csv(outputs[f"out_{name}"], columns, tables[name])


def tables_of(runs: Sequence[RunFolder], teacher: dict, verdict: dict | None, confidence: float) -> dict:
    """{name: rows} of all OUTPUTS that need no comparison."""
    each = distinct(runs)
    teacher = teacher | {
        "counted_ms": {run.run_id: run.summary["train_time_ms"] for run in runs if run.arm == "ngram_teacher"}
    }
    return {
        "traces": [row for run in each for row in trace_rows(run, teacher)],
        "horizon_curve": horizon_rows(each, confidence),
        "run_pages": page_rows(each),
        "run_configs": config_rows(each),
        "warnings": warning_rows(each, verdict),
    }


def headline_rows(decisions: dict[str, dict | None], compared: list[dict], tested: list[dict]) -> list[dict]:
    """Rows of HEADLINE_COLUMNS: once there is a verdict the four savings of the judged point, each with the range of
    its seeds and the share saved with its interval; and FACTS, from the decisions that are there.
    """
    rows = [] if decisions["verdict"] is None else _savings(decisions["verdict"]["point"], decisions, compared, tested)
    for figure, (name, keys) in FACTS.items():
        found = decisions[name]
        for key in keys.split("."):
            found = found and found[key]
        for value in found if isinstance(found, list) else [found]:
            if decisions[name] is not None:
                source = {"figure": figure, "value": value, "source": f"{name}.json: {keys}"}
                rows.append(dict.fromkeys(HEADLINE_COLUMNS) | source)
    return rows


def _savings(point: str | None, decisions: dict, compared: list[dict], tested: list[dict]) -> list[dict]:
    pairs = [pair["kd"] for pair in pair_up(compared, point) if pair["outcome"] == "both"] if point else []
    rows = []
    for column, cost in COSTS.items():
        seen = [row[column] for row in pairs if row[column] is not None]
        test = find(tested, cost=cost, measure="crossing", arm="kd", label=point, against="ce", target=TEACHERS) or {}
        row = {"figure": column, "value": decisions["verdict"][f"{column}_mean"], "n_seeds": len(seen)}
        row |= {"low": min(seen, default=None), "high": max(seen, default=None)}
        row |= {key: test.get(key) for key in ("saved_share", "saved_share_low", "saved_share_high")}
        rows.append(row | {"source": f"verdict.json: {column}_mean"})
    return rows
