"""The tables that only the report reads: the headline's figures, steps, horizons, configs and warnings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kdclimb.analysis.cautions import WARNING_COLUMNS, warning_rows
from kdclimb.analysis.compare import COMPARE_COLUMNS
from kdclimb.analysis.selection import SELECTED_KEYS, as_measured
from kdclimb.analysis.tables import RunFolder, read_csv, read_json, write_csv
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
from kdclimb.analysis.verdict import SAVINGS, pair_up

HEADLINE_COLUMNS = "figure value low high n_seeds ratio ratio_low ratio_high".split()
COSTS = dict(zip(SAVINGS, ("steps", "tokens", "time_ms", "time_with_teacher_ms"), strict=True))  # in verdict.csv
OUTPUTS = {
    "traces": TRACE_COLUMNS,
    "horizon_curve": HORIZON_COLUMNS,
    "run_pages": PAGE_COLUMNS,
    "run_configs": CONFIG_COLUMNS,
    "warnings": WARNING_COLUMNS,
    "headline": HEADLINE_COLUMNS,
}


def details(
    runs: list[RunFolder],
    budget: Path,
    selected: Path,
    compare: Path,
    tests: Path,
    verdict: Path,
    confidence: float,
    **outputs: Path,
) -> None:
    """Write the tables of OUTPUTS, each to `out_<name>`, from all runs, the decisions and the comparison."""
    found, teacher = read_json(verdict), as_measured(read_json(selected, SELECTED_KEYS))
    rows, tested = read_csv(compare, COMPARE_COLUMNS), read_csv(tests, VERDICT_COLUMNS)
    tables = tables_of(runs, teacher, found, confidence)
    tables["headline"] = headline_rows(rows, tested, found, read_json(budget, ["budget_ms"]))
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


def headline_rows(compared: list[dict], tested: list[dict], verdict: dict, budget: dict) -> list[dict]:
    """Rows of HEADLINE_COLUMNS: the four savings of the judged point, each with the range of its seeds and the ratio
    with its interval, and the teacher's time beside its budget (ms).
    """
    point = verdict["point"]
    pairs = [pair["kd"] for pair in pair_up(compared, point) if pair["outcome"] == "both"] if point else []
    rows = []
    for column, cost in COSTS.items():
        seen = [row[column] for row in pairs if row[column] is not None]
        asked = {"measure": "crossing", "arm": "kd", "label": point, "against": "ce", "target": "teacher_final_val"}
        test = find(tested, cost=cost, **asked) or {}
        row = {"figure": column, "value": verdict[f"{column}_mean"], "n_seeds": len(seen)}
        row |= {"low": min(seen, default=None), "high": max(seen, default=None), "ratio": test.get("ratio")}
        rows.append(row | {"ratio_low": test.get("low"), "ratio_high": test.get("high")})
    blank = dict.fromkeys(HEADLINE_COLUMNS)
    rows.append(blank | {"figure": "teacher_ms", "value": verdict["teacher_ms"]})
    return rows + [blank | {"figure": "budget_ms", "value": budget["budget_ms"]}]
