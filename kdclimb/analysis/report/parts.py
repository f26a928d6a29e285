"""The pieces of the page: cells, tables, figures, warnings, sections. Nothing is computed, all text is escaped."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from html import escape
from typing import NamedTuple

from kdclimb.analysis.alts import facts
from kdclimb.analysis.figures import ARM_STYLE
from kdclimb.analysis.tables import show_ms, show_number

ARM_NAMES = {arm: style[0] for arm, style in ARM_STYLE.items()} | {"screen": "KD screen", "ce_screen": "CE screen"}
ARM_NAMES |= {
    "probe": "teacher probe",
    "teacher": "teacher",
    "imported": "imported teacher",
    "isolate": "timing isolate",
}
ARM_NAMES |= {"ngram_teacher": "n-gram teacher"}
NOTHING = '<span class="none">&ndash;</span>'


class Column(NamedTuple):
    heading: str
    cell: Callable[[dict], str]  # the HTML of a row's cell
    words: bool = False  # set left, as words are, and not right


@dataclass
class Page:
    """The data of the page, where they are from, and the pieces that its sections are made of.

    `campaign`: its name; `data`: rows of each table and the decisions, None where there is none yet; `files`: links,
    relative to the page; `drawn`: SVG of each figure; `alts`: what each figure shows, in words; `runs`: links to the
    runs' folders.
    """

    campaign: str
    data: dict
    files: dict[str, str]
    drawn: dict[str, str]
    alts: dict[str, str]
    runs: dict[str, str] = field(default_factory=dict)

    def has(self, *names: str) -> bool:
        return all(self.data[name] is not None for name in names)

    @property
    def facts(self) -> dict[str, float | None]:
        return facts(self.data)

    def links(self, *names: str, behind: Iterable[str] | None = None, arms: Iterable[str] = ()) -> str:
        """Links to the files, as far as they are there, that the numbers of a section are read from, and to the folders
        of the runs behind them: those that these tables name, or the tables `behind`, and those of `arms`.
        """
        paths = [self.files[name] for name in names if self.has(name)]
        parts = (f'<a href="{escape(path)}">{escape(os.path.basename(path))}</a>' for path in paths)
        source = f'<p class="source">Source: {", ".join(parts)}</p>'
        return source + self._folders(self._behind(names if behind is None else behind, arms))

    def _behind(self, names: Iterable[str], arms: Iterable[str]) -> list[str]:
        """The ids of the runs that these tables and decisions name, and of those of these arms."""
        tables = [rows if isinstance(rows, list) else [rows] for name in names if (rows := self.data[name])]
        tables.append([row for row in self.data["runs"] or () if row["arm"] in arms])
        found = (row.get(key) for rows in tables for row in rows for key in ("run_id", "probe_run_id"))
        return [run_id for run_id in dict.fromkeys(found) if run_id in self.runs]

    def folder(self, run_id: str, words: str) -> str:
        """A link to the run's folder, if its place is known."""
        place = self.runs.get(run_id)
        return f'<a href="{escape(place)}/">{escape(words)}</a>' if place else escape(words)

    def _folders(self, ids: list[str]) -> str:
        if not ids:
            return ""
        items = "".join(f"<li>{self.folder(run_id, run_id)}</li>" for run_id in ids)
        words = "folder of the run" if len(ids) == 1 else f"folders of the {len(ids)} runs"
        return f'<details class="folders"><summary>The {words} behind it</summary><ul>{items}</ul></details>'

    def figure(self, name: str, caption: str, controls: str = "") -> str:
        """A figure: drawn by matplotlib, and once the page's script runs drawn again to be explored."""
        plot, alt = self.drawn.get(name, ""), escape(self.alts.get(name, ""))
        if not plot:
            return '<figure><p class="empty">Nothing to draw.</p></figure>'
        label = alt or name.replace("_", " ")
        picture = f'<div class="plot" data-chart="{name}" role="img" aria-label="{label}">{plot}</div>'
        return f'<figure>{controls}{picture}<figcaption>{caption} <span class="alt">{alt}</span></figcaption></figure>'

    def warnings(self, place: str) -> str:
        found = [row for row in self.data["warnings"] or () if row["place"] == place]
        if not found:
            return ""
        items = "".join(f"<li>{escape(row['warning'])}{self._runs_of(row)}</li>" for row in found)
        return f'<ul class="warn" aria-label="Warnings">{items}</ul>'

    def _runs_of(self, row: dict) -> str:
        ids = (row["run_ids"] or "").split()
        links = ", ".join(run_link(run_id, run_id) for run_id in ids[:3])
        return f" <small>{links}{f' and {len(ids) - 3} more' if len(ids) > 3 else ''}</small>" if ids else ""

    @property
    def horizon(self) -> int:
        """The longest that CE was planned for, where arms are compared."""
        if self.facts.get("full_horizon") is not None:
            return int(self.facts["full_horizon"])
        return max((row["horizon"] for row in self.data["curves"] or () if row["arm"] == "ce"), default=0)


def run_link(run_id: str, words: str) -> str:
    """A link to the run's own page, inside this file."""
    return f'<a class="run" href="#run={escape(run_id)}">{escape(words)}</a>'


def quantity(key: str, show: Callable, signed: bool = False, lower_is_better: bool = False) -> Callable[[dict], str]:
    """A cell with the figure under `key`, as `show` rounds it; a signed one carries + or - and a colour for better."""

    def cell(row: dict) -> str:
        value = row[key]
        if value is None:
            return NOTHING
        if not signed:
            return show(value)
        sign = "+" if value > 0 else "&minus;" if value < 0 else ""
        mood = "" if value == 0 else "good" if (value < 0) == lower_is_better else "bad"
        return f'<span class="{mood}">{sign}{show(abs(value))}</span>'

    return cell


def number(key: str, digits: int = 0, signed: bool = False) -> Callable[[dict], str]:
    return quantity(key, lambda value: show_number(value, digits), signed)


def nats(key: str, signed: bool = False) -> Callable[[dict], str]:
    return quantity(key, "{:.4f}".format, signed, lower_is_better=True)


def ms(key: str, signed: bool = False) -> Callable[[dict], str]:
    return quantity(key, show_ms, signed)


def text(key: str) -> Callable[[dict], str]:
    return lambda row: NOTHING if row[key] in (None, "") else escape(str(row[key]))


def reached(row: dict) -> str:
    """The step at which the target was reached, or why it was not."""
    steps = row["steps_to_target"]
    return f'<span class="miss">{escape(row["miss_reason"])}</span>' if steps is None else show_number(steps)


def table(rows: Iterable[dict], columns: list[Column], empty: str, marked: Callable[[dict], bool] | None = None) -> str:
    """An HTML table that scrolls sideways on its own; `empty` says in words why there is no row."""
    rows = list(rows)
    if not rows:
        return f'<p class="empty">{escape(empty)}</p>'
    side = {column: ' class="left"' if column.words else "" for column in columns}
    head = "".join(f"<th{side[column]}>{column.heading}</th>" for column in columns)
    body = ""
    for row in rows:
        mark = ' class="marked"' if marked and marked(row) else ""
        mark += f' data-run="{escape(str(row["run_id"]))}"' if row.get("run_id") else ""
        cells = "".join(f"<td{side[column]}>{column.cell(row)}</td>" for column in columns)
        body += f"<tr{mark}>{cells}</tr>\n"
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def section(title: str, lead: str, *parts: str) -> str:
    slug = "".join(c if c.isalnum() else "-" for c in title.lower()).strip("-")
    return f'<section id="{slug}"><h2>{title}</h2><p>{lead}</p>{"".join(parts)}</section>'


def named(row: dict) -> str:
    """Which run it is: the arm, and below it the point, the horizon and the seed, linked to the run's page."""
    point = "" if row["arm"] == "ce" else f"{row['label']}, "
    words = f"{point}{row['horizon']} steps, seed {row['seed']}"
    return f"{escape(ARM_NAMES.get(row['arm'], row['arm']))}<small>{run_link(row['run_id'], words)}</small>"


def described(key: str) -> Callable[[dict], str]:
    """The text under `key`, linked to the page of the row's run if it has one."""
    return lambda row: run_link(row["run_id"], str(row[key])) if row.get("run_id") else text(key)(row)
