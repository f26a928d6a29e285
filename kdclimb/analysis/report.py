"""The report of a campaign: one self-contained HTML page, light and dark, readable on a phone.

It computes nothing. Each number on the page is a cell of a CSV or JSON file that the page links to,
rounded for reading.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path
from typing import NamedTuple

from kdclimb.analysis.budget import BUDGET_KEYS, ISOLATE_COLUMNS
from kdclimb.analysis.checklist import STOP_COLUMNS, SUMMARY_COLUMNS
from kdclimb.analysis.compare import COMPARE_COLUMNS, CURVE_COLUMNS, SAVINGS, TEACHER_COLUMNS
from kdclimb.analysis.figures import ARM_STYLE, draw
from kdclimb.analysis.ledger import LEDGER_COLUMNS
from kdclimb.analysis.savings import BREAK_EVEN_COLUMNS, TREND_COLUMNS
from kdclimb.analysis.selection import SELECTED_KEYS
from kdclimb.analysis.tables import RUN_COLUMNS, TEXT, read_csv, read_json, show_ms, show_number
from kdclimb.analysis.targets import COLLECTED_COLUMNS, REACHED_COLUMNS, SCREEN_COLUMNS, TARGET_KEYS
from kdclimb.analysis.tested import VERDICT_COLUMNS
from kdclimb.analysis.tuning import TUNING_COLUMNS
from kdclimb.artifacts import write_text

VERDICT_KEYS = (
    "sentence claimable not_claimable_because kd_alive kd_pays_steps kd_pays_time_with_teacher n_seeds steps_saved_min "
    "steps_saved_max budget_share teacher_ms point horizon rules tuning ngram"
).split() + [f"{column}_mean" for column in SAVINGS]
TABLES = {
    "timing": RUN_COLUMNS,
    "teachers": TEACHER_COLUMNS,
    "isolates": ISOLATE_COLUMNS,
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
}
DECISIONS = {"budget": BUDGET_KEYS, "selected": SELECTED_KEYS, "target": TARGET_KEYS, "verdict": VERDICT_KEYS}
INPUTS = (*TABLES, *DECISIONS)
ARM_NAMES = {arm: style[0] for arm, style in ARM_STYLE.items()} | {"screen": "KD screen"}
NOTHING = '<span class="none">&ndash;</span>'


class Column(NamedTuple):
    heading: str
    cell: Callable[[dict], str]  # the HTML of a row's cell
    words: bool = False  # set left, as words are, and not right


def report(campaign: str, figures: Path, out: Path, **files: Path) -> None:
    """Draw the figures into the folder `figures` and write the page to `out`, from the files named in INPUTS.

    Raises AnalysisError where one of them is missing or malformed.
    """
    data = {
        name: read_csv(files[name], columns, LEDGER_COLUMNS if name == "ledger" else TEXT)
        for name, columns in TABLES.items()
    }
    data |= {name: read_json(files[name], keys) for name, keys in DECISIONS.items()}
    drawn = draw(figures, data)
    page = Page(data, {name: os.path.relpath(path, out.parent) for name, path in files.items()}, drawn)
    body = "\n".join(part(page) for part in SECTIONS)
    write_text(out, HTML.format(campaign=escape(campaign), css=CSS, body=body))


class Page:
    """The data of the page, and the pieces that its sections are made of."""

    def __init__(self, data: dict, files: dict[str, str], drawn: dict[str, str]):
        self.data, self.files, self.drawn = data, files, drawn

    def links(self, *names: str) -> str:
        """Links to the files that the numbers of a section are read from."""
        parts = (f'<a href="{escape(self.files[n])}">{escape(os.path.basename(self.files[n]))}</a>' for n in names)
        return f'<p class="source">Source: {", ".join(parts)}</p>'

    def figure(self, name: str, caption: str) -> str:
        plot = f'<div class="plot">{self.drawn[name]}</div>' if self.drawn[name] else '<p class="empty">no data</p>'
        return f"<figure>{plot}<figcaption>{caption}</figcaption></figure>"

    @property
    def horizon(self) -> int:
        return self.data["verdict"]["horizon"]


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
        cells = "".join(f"<td{side[column]}>{column.cell(row)}</td>" for column in columns)
        body += f"<tr{mark}>{cells}</tr>\n"
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def section(title: str, lead: str, *parts: str) -> str:
    return f"<section><h2>{title}</h2><p>{lead}</p>{''.join(parts)}</section>"


def verdict_section(page: Page) -> str:
    verdict = page.data["verdict"]
    badge = '<span class="badge yes">CLAIMABLE</span>'
    doubts = ""
    if not verdict["claimable"]:
        badge = '<span class="badge no">NOT A CLAIM</span>'
        items = "".join(f"<li>{escape(reason)}</li>" for reason in verdict["not_claimable_because"])
        doubts = f'<ul class="doubts">{items}</ul>'
    seeds, low, high = verdict["n_seeds"], verdict["steps_saved_min"], verdict["steps_saved_max"]
    over = f"mean of {seeds} seed{'' if seeds == 1 else 's'}" if seeds else "nothing to compare"
    spread = over if low is None or seeds < 2 else f"{over}: {show_number(low)} to {show_number(high)}"
    tiles = [
        ("Steps saved", number("steps_saved_mean", 1, signed=True), spread),
        ("Tokens saved", number("tokens_saved_mean", 0, signed=True), over),
        ("Time saved, student", ms("time_saved_ms_mean", signed=True), over),
        ("Time saved, + teacher", ms("time_saved_with_teacher_ms_mean", signed=True), over),
    ]
    cells = "".join(f"<div><dt>{n}</dt><dd>{cell(verdict)}</dd><small>{s}</small></div>" for n, cell, s in tiles)
    return (
        f'<section class="verdict">{badge}<p class="sentence">{escape(verdict["sentence"])}</p>{doubts}'
        f'<dl class="tiles">{cells}</dl>{page.links("verdict", "compare")}</section>'
    )


def budget_section(page: Page) -> str:
    budget, teacher, share = page.data["budget"], page.data["selected"], page.data["verdict"]["budget_share"]
    terms = (
        f"CE takes {show_ms(budget['ce_train_time_ms'])} over {budget['horizon']} steps (median of its seeds; "
        f"{escape(str(budget['device']))}, {text('threads')(budget)} threads, {escape(budget['clock'])} clock). "
        f"A teacher may take {budget['fraction']:.0%} of that: {show_ms(budget['budget_ms'])}."
    )
    if teacher["run_id"] is None:
        return section(
            "Teacher budget",
            terms,
            f'<p class="empty">{escape(teacher["reason"])}</p>',
            page.links("budget", "selected"),
        )
    used = (
        f"<p>{'Imported teacher' if teacher['imported'] else 'Teacher'} <b>{escape(teacher['candidate'])}</b> "
        f"{'is declared to have taken' if teacher['imported'] else 'took'} {show_ms(teacher['train_time_ms'])}, "
        f"{share:.0%} of its budget, and reached {teacher['final_val']:.4f} nats, which is the target.</p>"
        f'<div class="bar"><i style="width:{min(share, 1):.1%}"></i></div>'
    )
    return section("Teacher budget", terms, used, page.links("budget", "selected", "target", "timing"))


def alive_section(page: Page) -> str:
    alive = page.data["verdict"]["kd_alive"]
    rows = [
        {"name": "KD", "val": alive["first_val_kd"], "below": alive["kd_below_ce"]},
        {"name": "CE", "val": alive["first_val_ce"], "below": None},
        {"name": "KD, random teacher", "val": alive["first_val_random"], "below": alive["random_below_ce"]},
    ]
    columns = [
        Column("Arm", text("name"), words=True),
        Column("First validation (nats)", nats("val")),
        Column("Below CE", lambda row: NOTHING if row["below"] is None else "yes" if row["below"] else "no"),
    ]
    lead = (
        "A teacher that teaches pulls the student below CE from the first validation on. A random teacher of the same "
        "shape should not; if it does, something else than its knowledge is at work."
    )
    figure = page.figure("kd_alive", "The first validations at the screen&rsquo;s horizon, one seed.")
    return section("Is KD alive?", lead, figure, table(rows, columns, ""), page.links("verdict", "curves"))


def curves_section(page: Page) -> str:
    steps = page.figure("val_loss_steps", f"Validation loss over {page.horizon} steps, one line a seed.")
    timed = page.figure(
        "val_loss_time", "The same over training time. Dotted: KD moved right by what its teacher took to train."
    )
    lead = "Every arm at the full horizon, on the same data, batch and LR schedule. Step 0 is left out."
    return section("Validation curves", lead, f'<div class="pair">{steps}{timed}</div>', page.links("curves"))


def named(row: dict) -> str:
    """Which run it is: the arm, and below it the point, the horizon and the seed."""
    point = "" if row["arm"] == "ce" else f"{escape(row['label'])}, "
    return f"{ARM_NAMES[row['arm']]}<small>{point}{row['horizon']} steps, seed {row['seed']}</small>"


COMPARED: list[Column] = [
    Column("Run", named, words=True),
    Column("Steps to target", reached),
    Column("Tokens", number("tokens_to_target")),
    Column("Time", ms("time_to_target_ms")),
    Column("Time + teacher", ms("time_to_target_with_teacher_ms")),
    Column("Steps saved", number("steps_saved", 0, signed=True)),
    Column("Time saved, + teacher", ms("time_saved_with_teacher_ms", signed=True)),
    Column("Final val", nats("final_val")),
    Column("against CE", nats("final_val_delta", signed=True)),
]


def compare_section(page: Page) -> str:
    rows = [row for row in page.data["compare"] if row["arm"] in ("ce", "kd", "log")]
    why = f": {escape(page.data['target']['reason'])}" if page.data["target"]["value"] is None else ""
    lead = (
        "Reaching the target takes two validations in a row at or below it. Each run is held against the CE run of the "
        "same horizon and seed."
    )
    if not any(row["arm"] == "kd" for row in rows):
        lead += f" There is no KD run at the full horizon{why}."
    notes = sorted({row["time_note"] for row in page.data["compare"] if row["time_note"]})
    notes = "".join(f'<p class="empty">{escape(note)}</p>' for note in notes)
    parts = table(rows, COMPARED, "no run to compare"), notes, page.links("compare", "full", "runs")
    return section("Steps and time to the target", lead, *parts)


MEASURES = {"crossing": "on the way", "horizon": "complete horizon", "final": "at the end"}
COST_NAMES = {
    "steps": "steps",
    "tokens": "tokens",
    "time_ms": "time",
    "time_with_teacher_ms": "time, + teacher",
    "time_amortized_ms": "time, + teacher shared",
    "val_loss": "loss",
}


def percent(key: str) -> Callable[[dict], str]:
    """The saving, in percent, that the ratio under `key` is."""
    return quantity(key, lambda ratio: f"{100 * (1 - ratio):+.1f} %")


def compared(row: dict) -> str:
    name = f"{ARM_NAMES[row['arm']]} against {ARM_NAMES[row['against']]}"
    where = MEASURES[row["measure"]] + (f", to {row['target_value']:.4f} nats" if row["target_value"] else "")
    return f"{escape(name)}<small>{escape(where)}</small>"


def said(row: dict) -> str:
    note = f"<small>{escape(row['note'])}</small>" if row["note"] else ""
    return f'<span class="words">{escape(row["outcome"]) or NOTHING}</span>{note}'


def tests_section(page: Page) -> str:
    rules, verdict = page.data["verdict"]["rules"], page.data["verdict"]
    columns = [
        Column("What", compared, words=True),
        Column("Cost", lambda row: COST_NAMES[row["cost"]], words=True),
        Column("Saved", percent("ratio")),
        Column("from", percent("high")),
        Column("to", percent("low")),
        Column("p", quantity("p_sooner", "{:.2g}".format)),
        Column("Holm", quantity("p_holm", "{:.2g}".format)),
        Column("Seeds", number("n_pairs")),
        Column("censored", number("n_censored")),
        Column("Seeds needed", number("seeds_needed")),
        Column("Could be seen", quantity("smallest_effect", "{:.0%}".format)),
        Column("Outcome", said, words=True),
    ]
    lead = (
        "Pairs of one seed; saved is 1 minus the ratio of their figures. Set before the runs: intervals at "
        f"{rules['confidence']:.0%}, one-sided p below {rules['p_value']:g} after Holm&rsquo;s adjustment, "
        f"power {rules['power']:.0%}, a teacher shared by {rules['amortize']} students. On the way, a run meets a "
        "target while its LR is still high: that shows how fast it learns, not what a run that stops there would "
        "cost. The complete horizon is the shortest run that ends at the target, as a speedrun would pay for it, "
        "and known no finer than the horizons are close. &lsquo;Seeds needed&rsquo; would show a saving of the size "
        "measured; &lsquo;could be seen&rsquo; is the smallest that these could show."
    )
    tuning = "".join(f'<p class="empty">{escape(verdict[key])}</p>' for key in ("tuning", "ngram") if verdict[key])
    judged = [row for row in page.data["tests"] if row["cost"] != "tokens"]
    parts = (
        table(judged, columns, "nothing was compared"),
        tuning,
        page.links("tests", "reached", "tuning", "ce_screen"),
    )
    return section("How sure", lead, *parts)


def trend_section(page: Page) -> str:
    lead = (
        "Steps saved at each loss at which CE stood at a validation, at the full horizon. Left is early; above the "
        "line KD is ahead. A lead that shrinks to the right does not last."
    )
    figure = page.figure("steps_saved_trend", "CE&rsquo;s step less KD&rsquo;s at the same loss, one line a seed.")
    return section("Where KD saves", lead, figure, page.links("trend"))


def break_even_section(page: Page) -> str:
    share = "{:.0%}".format
    columns = [
        Column("Target", lambda row: f"{row['target_value']:.4f}"),
        Column("Point", text("label"), words=True),
        Column("Overhead of a step with KD", quantity("overhead", share)),
        Column("Steps with KD", quantity("kd_share_of_steps", share)),
        Column("Teacher, of CE&rsquo;s time", quantity("teacher_share", share)),
        Column("Saving needed", quantity("needed", share)),
        Column("needed if shared", quantity("needed_amortized", share)),
        Column("Saving measured", quantity("measured", share)),
        Column("from", quantity("measured_low", share)),
        Column("to", quantity("measured_high", share)),
    ]
    lead = (
        "What share of CE&rsquo;s steps KD must save to be level in time to the target, beside the share that it saved."
    )
    rows = table(page.data["break_even"], columns, "nothing was compared")
    return section("Break-even", lead, rows, page.links("break_even"))


def controls_section(page: Page) -> str:
    rows = [row for row in page.data["compare"] if row["arm"].startswith("control")]
    lead = (
        "What else could explain a gain: the same LR boost without KD, label smoothing, and KD from a teacher with "
        "random weights, which runs at the screen&rsquo;s horizon only. CE with the teacher&rsquo;s time in further "
        "steps has a horizon of its own, and is compared by its end."
    )
    return section("Controls", lead, table(rows, COMPARED, "no control was run"), page.links("controls", "compare"))


def candidate(row: dict) -> str:
    return text("candidate")(row) + ("<small>imported; time declared</small>" if row["imported"] else "")


def promoted(row: dict) -> str:
    """The checklist: yes or no, and below it the points that are not met or not known."""
    names = {"budget": "budget", "falling": "falling", "no_oom": "no OOM", "artifacts": "artifacts"}
    parts = [
        f"{name} {row[f'check_{key}'] or 'not known'}: {row[f'check_{key}_by'] or 'not trained'}"
        for key, name in names.items()
    ]
    return f"{text('promoted')(row)}<small>{escape('; '.join(parts))}</small>"


def teachers_section(page: Page) -> str:
    columns = [
        Column("Candidate", candidate, words=True),
        Column("Verdict", lambda row: f'<span class="tag {row["verdict"]}">{row["verdict"]}</span>', words=True),
        Column("Projected", ms("projected_ms")),
        Column("Measured", ms("train_time_ms")),
        Column("Final val", nats("final_val")),
        Column("MFLOPs a token", quantity("flops_per_token", lambda flops: show_number(flops / 1e6, 2))),
        Column("Promote", promoted, words=True),
        Column("Projection off by", quantity("projection_error", "{:+.0%}".format)),
        Column("Reason", lambda row: f'<span class="words">{text("reason")(row)}</span>', words=True),
    ]
    lead = (
        "Every candidate, with the reason for what became of it. The projection comes from a few steps, the measured "
        "time from the whole training; an imported teacher's is what was declared. FLOPs, not parameters, are what a "
        "teacher costs."
    )
    rows = table(page.data["teachers"], columns, "no candidate was tried", lambda row: row["verdict"] == "selected")
    figure = page.figure("teachers", "Training time against loss. Left of the dashed line is within the budget.")
    return section("Teachers", lead, figure, rows, page.links("teachers", "summary"))


def stop_section(page: Page) -> str:
    columns = [
        Column("May stop", text("condition"), words=True),
        Column("Met", text("met"), words=True),
        Column("Evidence", lambda row: f'<span class="words">{text("evidence")(row)}</span>', words=True),
    ]
    lead = "What the campaign set out to answer, and whether it did."
    return section("Stop conditions", lead, table(page.data["stop"], columns, ""), page.links("stop"))


def screen_section(page: Page) -> str:
    columns = [
        Column("Rank", number("rank")),
        Column("Point", text("label"), words=True),
        Column("Steps to target", reached),
        Column("Stability (nats up)", nats("stability")),
        Column("First val", nats("first_val")),
        Column("Final val", nats("final_val")),
        Column("KD stops at", number("kd_stop_step")),
        Column("KD share of the gradient", number("kd_share_mean", 3)),
        Column("Status", text("status"), words=True),
    ]
    lead = (
        "Each point of the KD grid at the first horizon, one seed, ranked by steps to target, then by how little the "
        "curve turns up, then by final loss. The best go on to the full horizon."
    )
    point = page.data["verdict"]["point"]
    rows = table(page.data["screen"], columns, "nothing was screened", lambda row: row["label"] == point)
    return section("KD screen", lead, rows, page.links("screen"))


def isolates_section(page: Page) -> str:
    lead = "What a step costs: CE alone, with the teacher&rsquo;s forward pass, and with the whole of KD."
    figure = page.figure("isolates", "Median milliseconds of a step; the first steps are dropped.")
    failed = [row for row in page.data["isolates"] if row["status"] != "ok"]
    words = "".join(
        f'<p class="empty">{escape(row["label"])}: {escape(row["status"])}: {escape(row["reason"])}</p>'
        for row in failed
    )
    return section("Cost of a step", lead, figure, words, page.links("isolates"))


def ledger_section(page: Page) -> str:
    words = ("run_id", "mode", "status", "artifact_dir")
    columns = [Column(name, _ledger_cell(name), name in words) for name in LEDGER_COLUMNS]
    lead = (
        "Every run of the campaign. &lsquo;-&rsquo; means not applicable; alpha is the weight of the KD term; "
        "val_instability is the sum of the upward moves of the validation loss, in nats."
    )
    return section("Ledger", lead, table(page.data["ledger"], columns, "no run"), page.links("ledger"))


def _ledger_cell(name: str) -> Callable[[dict], str]:
    digits = {"teacher_params_m": 3, "teacher_train_time_ms": 0, "best_val": 4, "final_val": 4, "val_instability": 4}

    def cell(row: dict) -> str:
        value = row[name]
        try:
            return f"{float(value):,.{digits[name]}f}" if name in digits else escape(value)
        except ValueError:
            return escape(value)

    return cell


def glossary_section(page: Page) -> str:
    terms = {
        "target": "the selected teacher&rsquo;s final validation loss; reached at the first of two validations in a "
        "row at or below it. A run is validated every so many steps, which is as fine as steps saved can be.",
        "saved": "CE minus the arm, same horizon and seed. Plus is better.",
        "against CE": "the arm minus CE, in nats. Minus is better.",
        "+ teacher": "the teacher&rsquo;s whole training time is added to the student&rsquo;s. Without it a "
        "teacher looks free, which it is only if it is used many times.",
        "time": "training steps and data loading; compilation, validation and checkpoints are not in it.",
        "loss": "mean cross-entropy per token, in nats.",
        "on the way, complete horizon": "where a long run first meets the target, and the shortest complete run that "
        "ends at it. Only the second can&rsquo;t be flattered by the schedule.",
        "mean of n seeds": "over the seeds with which CE and KD both reached the target. With few, read the range.",
        "NOT A CLAIM": "the numbers are what was measured, but one of the conditions for claiming them is not met.",
    }
    items = "".join(f"<dt>{term}</dt><dd>{meaning}</dd>" for term, meaning in terms.items())
    return f'<section><h2>How to read this</h2><dl class="glossary">{items}</dl></section>'


SECTIONS = (
    verdict_section,
    budget_section,
    tests_section,
    curves_section,
    trend_section,
    compare_section,
    break_even_section,
    alive_section,
    controls_section,
    teachers_section,
    screen_section,
    isolates_section,
    stop_section,
    ledger_section,
    glossary_section,
)

HTML = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>kdclimb: {campaign}</title>
<style>{css}</style>
</head>
<body>
<main>
<h1>Does distillation pay? <small>campaign {campaign}</small></h1>
{body}
</main>
</body>
</html>
"""

CSS = """
:root { --page:#f6f7f9; --card:#fff; --ink:#20242b; --muted:#5f6672; --line:#dfe3e8; --link:#1257a0; --good:#0a6f52;
  --bad:#b23a06; --mark:#fff4e8; --fig-ink:#20242b; --fig-muted:#6a717d; --fig-grid:#dfe3e8; --fig-ce:#1f6fb4;
  --fig-kd:#d5500b; --fig-boost:#0a8f6a; --fig-random:#8a5bb5; }
@media (prefers-color-scheme: dark) { :root { --page:#14171b; --card:#1c2026; --ink:#e4e7eb; --muted:#9aa3af;
  --line:#323841; --link:#82b6f0; --good:#4fc99d; --bad:#ff9061; --mark:#33281e; --fig-ink:#e4e7eb; --fig-muted:#9aa3af;
  --fig-grid:#323841; --fig-ce:#62a8ea; --fig-kd:#ff8345; --fig-boost:#3fc79b; --fig-random:#b892e0; } }
* { box-sizing:border-box; }
body { margin:0; background:var(--page); color:var(--ink); font:16px/1.5 system-ui, sans-serif; }
main { max-width:64rem; margin:0 auto; padding:1rem; }
h1 { font-size:1.5rem; margin:.5rem 0 1rem; } h1 small { color:var(--muted); font-weight:400; font-size:1rem; }
h2 { font-size:1.15rem; margin:0 0 .3rem; } p { margin:.4rem 0 .8rem; } a { color:var(--link); }
section { background:var(--card); border:1px solid var(--line); border-radius:.6rem; padding:1rem; margin:0 0 1rem; }
section > p, figcaption, .glossary dd { max-width:46rem; }
.badge { display:inline-block; border-radius:.3rem; padding:.1rem .5rem; font-size:.8rem; font-weight:700;
  letter-spacing:.04em; border:1.5px solid; } .yes, .good { color:var(--good); } .no, .bad { color:var(--bad); }
.sentence { font-size:1.2rem; line-height:1.45; margin:.6rem 0; } .doubts { margin:.2rem 0 .8rem; padding-left:1.2rem; }
.tiles { display:grid; grid-template-columns:repeat(auto-fit, minmax(9.5rem, 1fr)); gap:.6rem; margin:.8rem 0; }
.tiles div { border:1px solid var(--line); border-radius:.5rem; padding:.6rem .7rem; }
.tiles dt, small, .source, figcaption, .empty { color:var(--muted); font-size:.85rem; }
.tiles dd { margin:0; font-size:1.5rem; font-weight:600; font-variant-numeric:tabular-nums; white-space:nowrap; }
.bar { height:.7rem; border-radius:.35rem; background:var(--line); overflow:hidden; margin:0 0 .8rem; max-width:30rem; }
.bar i { display:block; height:100%; background:var(--fig-kd); }
.pair { display:grid; grid-template-columns:repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap:1rem; }
figure { margin:.5rem 0; } .plot { max-width:34rem; } .plot svg { display:block; width:100%; height:auto; }
.plot text { font-family:system-ui, sans-serif !important; }
.scroll { overflow-x:auto; margin:.5rem 0; }
table { border-collapse:collapse; font-size:.85rem; font-variant-numeric:tabular-nums; width:100%; }
th, td { text-align:right; padding:.35rem .55rem; border-bottom:1px solid var(--line); white-space:nowrap;
  vertical-align:top; }
th { color:var(--muted); font-weight:600; white-space:normal; vertical-align:bottom; }
.left { text-align:left; }
.marked td { background:var(--mark); } .none { color:var(--muted); }
td small { display:block; white-space:normal; overflow-wrap:anywhere; min-width:9rem; line-height:1.3; }
.words, .miss { white-space:normal; display:inline-block; min-width:12rem; text-align:left; }
.miss { color:var(--muted); } .tag { font-weight:600; } 
.tag.selected { color:var(--good); } .tag.rejected { color:var(--muted); }
.glossary { margin:0; } .glossary dt { font-weight:600; } .glossary dd { margin:0 0 .5rem; }
"""
