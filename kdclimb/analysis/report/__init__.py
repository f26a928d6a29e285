"""The report of a campaign: one self-contained HTML page to open, to read and to send.

It computes nothing. Each number on the page is a cell of a CSV file that the page links to, rounded for reading; its
charts are drawn by the page's own script from the same cells.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path

from kdclimb.analysis.alts import finding
from kdclimb.analysis.budget import BUDGET_KEYS, ISOLATE_COLUMNS, PROFILE_COLUMNS
from kdclimb.analysis.checklist import STOP_COLUMNS, SUMMARY_COLUMNS
from kdclimb.analysis.compare import COMPARE_COLUMNS, CURVE_COLUMNS, SAVINGS, TEACHER_COLUMNS
from kdclimb.analysis.details import OUTPUTS as DETAILS
from kdclimb.analysis.figures import draw
from kdclimb.analysis.ledger import LEDGER_COLUMNS
from kdclimb.analysis.report.document import document
from kdclimb.analysis.report.parts import Page
from kdclimb.analysis.report.sections import SECTIONS, missing_section
from kdclimb.analysis.savings import BREAK_EVEN_COLUMNS, TREND_COLUMNS
from kdclimb.analysis.selection import SELECTED_KEYS
from kdclimb.analysis.tables import RUN_COLUMNS, TEXT, AnalysisError, read_csv, read_json, read_text
from kdclimb.analysis.targets import COLLECTED_COLUMNS, REACHED_COLUMNS, SCREEN_COLUMNS, TARGET_KEYS
from kdclimb.analysis.tested import VERDICT_COLUMNS
from kdclimb.analysis.tuning import TUNING_COLUMNS
from kdclimb.artifacts import write_text

VERDICT_KEYS = (
    "sentence claimable not_claimable_because kd_alive kd_pays_steps kd_pays_time_with_teacher n_seeds steps_saved_min "
    "steps_saved_max budget_share teacher_ms point horizon rules tuning ngram kd_pays_horizon explained_by "
    "not_told_apart_from explained_in_time_by not_told_apart_in_time_from within_of_ce within_to_target"
).split() + [f"{column}_mean" for column in SAVINGS]
TABLES = {
    "timing": RUN_COLUMNS,
    "teachers": TEACHER_COLUMNS,
    "isolates": ISOLATE_COLUMNS,
    "profile": PROFILE_COLUMNS,
    "screen": SCREEN_COLUMNS,
    "ce_screen": SCREEN_COLUMNS,
    "tuning": TUNING_COLUMNS,
    "full": COLLECTED_COLUMNS,
    "controls": COLLECTED_COLUMNS,
    "curves": CURVE_COLUMNS,
    "runs": RUN_COLUMNS,
    "compare": COMPARE_COLUMNS,
    "ledger": LEDGER_COLUMNS,
    "reached": REACHED_COLUMNS,
    "tests": VERDICT_COLUMNS,
    "trend": TREND_COLUMNS,
    "break_even": BREAK_EVEN_COLUMNS,
    "stop": STOP_COLUMNS,
    "summary": SUMMARY_COLUMNS,
    **DETAILS,
}
WORDS = {  # tables whose columns are text but for these
    "ledger": (),
    "run_pages": (),
    "run_configs": (),
    "warnings": (),
    "advice": (),
    "headline": tuple(column for column in DETAILS["headline"] if column not in ("figure", "source")),
    "traces": tuple(column for column in DETAILS["traces"] if column not in ("run_id", "phase")),
}
DECISIONS = {"budget": BUDGET_KEYS, "selected": SELECTED_KEYS, "target": TARGET_KEYS, "verdict": VERDICT_KEYS}
INPUTS = (*TABLES, *DECISIONS)
IF_THERE = ("profile",)  # made only when it is asked for


def report(campaign: str, figures: Path, out: Path, so_far: str = "", **files: Path) -> None:
    """Draw the figures into the folder `figures` and write the page to `out`, from the files named in INPUTS.

    Raises AnalysisError where one of them is missing, but for those of IF_THERE, or malformed; but with `so_far`, which
    says in words how far the campaign is, a missing one is said on the page.
    """
    there = {name: path for name, path in files.items() if not (so_far or name in IF_THERE) or path.is_file()}
    data = dict.fromkeys(INPUTS)
    data |= {name: read_table(path, name) for name, path in there.items() if name in TABLES}
    data |= {name: read_json(path, DECISIONS[name]) for name, path in there.items() if name in DECISIONS}
    links = {name: os.path.relpath(path, out.parent) for name, path in files.items()}
    folders = {row["run_id"]: os.path.relpath(row["artifact_dir"], out.parent) for row in data["run_pages"] or ()}
    drawn = draw(figures, data)
    page = Page(campaign, data, links, drawn, {name: finding(name, data) for name in drawn}, folders)
    parts = [section.render(page) for section in SECTIONS if page.has(*section.needs)]
    parts.append(missing_section(page))
    write_text(out, document(page, parts, so_far))


def read_table(path: Path, name: str) -> list[dict]:
    """All columns of a table, those of TABLES typed as ever; a further one is numbers if all its cells are.

    Raises AnalysisError where the file is missing, malformed, or lacks a column of TABLES.
    """
    columns = TABLES[name]
    further = [column for column in header(path) if column not in columns]
    text = {*TEXT} if name not in WORDS else {column for column in columns if column not in WORDS[name]}
    rows = read_csv(path, [*columns, *further], {*text, *further})
    for column in further:
        try:
            numbers = [float(row[column]) if row[column] else None for row in rows]
        except ValueError:
            continue
        for row, value in zip(rows, numbers, strict=True):
            row[column] = value
    return rows


def header(path: Path) -> Sequence[str]:
    lines = read_text(path).splitlines()
    if not lines:
        raise AnalysisError(f"{path}: is empty")
    return next(csv.reader(lines[:1]))
