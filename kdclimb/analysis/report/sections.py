"""The sections of the page, in their order. Each names the files that it can't do without."""

from __future__ import annotations

import os
from collections.abc import Callable
from html import escape
from typing import NamedTuple

from kdclimb.analysis.budget import projection
from kdclimb.analysis.ledger import LEDGER_COLUMNS
from kdclimb.analysis.paired import WORSE
from kdclimb.analysis.report.parts import (
    ARM_NAMES,
    NOTHING,
    Column,
    Page,
    described,
    ms,
    named,
    nats,
    number,
    quantity,
    reached,
    section,
    table,
    text,
)
from kdclimb.analysis.tables import show_ms, show_number
from kdclimb.analysis.tested import headline

METRICS = {
    "step": "steps",
    "tokens": "tokens",
    "train_time_ms": "student's time",
    "time_with_teacher_ms": "time, + teacher",
}


def radios(name: str, legend: str, options: dict[str, str]) -> str:
    """One switch of several values, reachable by keyboard; shown once the page's script runs."""
    parts = "".join(
        f'<label><input type="radio" name="{name}" value="{value}"{" checked" * (i == 0)}><span>{words}</span></label>'
        for i, (value, words) in enumerate(options.items())
    )
    return f'<fieldset class="switch js"><legend>{legend}</legend>{parts}</fieldset>'


def verdict_section(page: Page) -> str:
    verdict = page.data["verdict"]
    badge = '<span class="badge yes">CLAIMABLE</span>'
    doubts = ""
    if not verdict["claimable"]:
        badge = '<span class="badge no">NOT A CLAIM</span>'
        items = "".join(f"<li>{escape(reason)}</li>" for reason in verdict["not_claimable_because"])
        doubts = f'<ul class="doubts">{items}</ul>'
    first, dot, rest = verdict["sentence"].partition(". ")
    answer, colon, fact = first.partition(": ")
    if "(" in answer or not colon:
        answer, colon, fact = first, "", ""
    sentence = f"<b>{escape(answer)}{colon}</b>{escape(fact)}{dot.strip()}"
    more = f'<p class="more">{escape(rest)}</p>' if rest else ""
    return (
        f'<section class="verdict" id="verdict">{badge}<p class="sentence">{sentence}</p>'
        f"{_tiles(page)}{_budget_line(page)}{_answers(page)}{more}{doubts}{page.warnings('verdict')}"
        f"{page.links('headline', 'compare', 'tests', 'verdict', behind=('full', 'controls'), arms=('ce',))}</section>"
    )


def _tiles(page: Page) -> str:
    """The four numbers, each a link to the table that it is a cell of."""
    found = {row["figure"]: row for row in page.data["headline"]}
    tiles = [
        ("Steps saved", "steps_saved", number("value", 1, signed=True)),
        ("Tokens saved", "tokens_saved", number("value", 0, signed=True)),
        ("Time saved, student", "time_saved_ms", ms("value", signed=True)),
        ("Time saved, + teacher", "time_saved_with_teacher_ms", ms("value", signed=True)),
    ]
    parts = ""
    for name, key, cell in tiles:
        value = f'<a href="{escape(page.files["headline"])}" data-cell="{key}">{cell(found[key])}</a>'
        parts += f"<div><dt>{name}</dt><dd>{value}</dd><small>{_spread(found[key])}</small></div>"
    return f'<dl class="tiles">{parts}</dl>'


def _spread(row: dict) -> str:
    """The range of the seeds, and the interval of the share saved."""
    seeds = row["n_seeds"]
    if not seeds:
        return "nothing to compare"
    show = show_ms if row["figure"].startswith("time") else show_number
    words = f"mean of {seeds} seeds: {show(row['low'])} to {show(row['high'])}".replace("-", "&minus;")
    if row["low"] == row["high"]:
        words = "of one seed" if seeds == 1 else f"with each of {seeds} seeds"
    if row["saved_share_low"] is not None and row["saved_share_high"] is not None:
        words += f"<br>interval {percent('saved_share_low')(row)} to {percent('saved_share_high')(row)}"
    return words


def _budget_line(page: Page) -> str:
    """The teacher's time of its budget, as words and as a bar."""
    share, teacher = (page.facts[name] for name in ("budget_share", "teacher_ms"))
    budget = show_ms(page.facts["budget_ms"]) + projection(page.facts["projected_from"])
    if share is None or teacher is None:
        return f'<p class="budget">No teacher within the budget of {budget}.</p>'
    return (
        f'<p class="budget">Teacher: <b>{show_ms(teacher)}</b> of its budget of {budget}, '
        f'{share:.0%}</p><div class="bar"><i style="width:{min(share, 1):.1%}"></i></div>'
    )


def _answers(page: Page) -> str:
    """Why: what was asked, and what the tests and the first validations answer; empty where KD was not tried."""
    verdict = page.data["verdict"]
    if not verdict["point"]:
        return ""
    tested = headline(page.data["tests"], verdict["point"])
    unbeaten = {
        "Sooner than its controls": [*verdict["explained_by"], *verdict["not_told_apart_from"]],
        "Better than its controls in time, teacher counted": [
            *verdict["explained_in_time_by"],
            *verdict["not_told_apart_in_time_from"],
        ],
    }
    asked = {
        "Pays in steps": (verdict["kd_pays_steps"], tested["crossing"]["steps"]),
        "Pays by complete horizons": (verdict["kd_pays_horizon"], tested["horizon"]["steps"]),
        "Pays in time, teacher counted": (
            verdict["kd_pays_time_with_teacher"],
            tested["crossing"]["time_with_teacher_ms"],
        ),
        "Teaches from the first validation on": (verdict["kd_alive"]["kd_below_ce"], None),
    }
    for what, arms in unbeaten.items():
        names = ", ".join(ARM_NAMES[arm] for arm in arms)
        asked[f"{what} (not than {names})" if arms else what] = (not arms, None)
    items = "".join(f"<li>{escape(what)}: {_answer(*found)}</li>" for what, found in asked.items())
    return f'<ul class="answers" aria-label="What the tests answer">{items}</ul>'


def _answer(holds: bool | None, test: dict | None) -> str:
    if holds is None:
        return '<b class="none">? not known</b>'
    if holds:
        return '<b class="good">&check; yes</b>'
    return f'<b class="bad">&cross; {"no, worse than CE" if test and test["outcome"] == WORSE else "not shown"}</b>'


def advice_section(page: Page) -> str:
    files = {os.path.basename(path): path for path in page.files.values()}
    items = "".join(
        f"<li><b>{escape(row['what'])}</b>: {escape(row['why'])}. "
        f"<small><code>{escape(row['keys'])}</code>, by "
        f'<a href="{escape(files[row["source"]])}">{escape(row["source"])}</a></small></li>'
        for row in page.data["advice"]
    )
    parts = f'<ol class="advice">{items}</ol>' if items else '<p class="empty">Nothing follows from the tables.</p>'
    return section(
        "What to try next", "What follows from the tables, with the keys of the config.", parts, page.links("advice")
    )


def budget_section(page: Page) -> str:
    budget, facts, teacher = page.data["budget"], page.facts, page.data["selected"]
    terms = (
        f"CE takes {show_ms(facts['ce_train_time_ms'])}{projection(facts['projected_from'])} over "
        f"{number('horizon')(facts)} steps (median of its seeds; {escape(str(budget['device']))}, "
        f"{text('threads')(facts)} thread{'s' * (facts['threads'] != 1)}, {escape(budget['clock'])} clock). "
        f"A teacher may take {facts['fraction']:.0%} of that: {show_ms(facts['budget_ms'])}."
    )
    if teacher is None:
        return section(
            "Teacher budget", terms, '<p class="empty">No teacher is selected yet.</p>', page.links("budget")
        )
    if teacher["run_id"] is None:
        used = f'<p class="empty">{escape(teacher["reason"])}</p>'
        return section("Teacher budget", terms, used, page.links("headline", "budget", "selected"))
    share = "" if facts.get("budget_share") is None else f", {facts['budget_share']:.0%} of its budget,"
    used = (
        f"<p>{'Imported teacher' if teacher['imported'] else 'Teacher'} <b>{escape(teacher['candidate'])}</b> "
        f"{'is declared to have taken' if teacher['imported'] else 'took'} {show_ms(facts['teacher_ms'])}{share} "
        f"and reached {facts['teacher_final_val']:.4f} nats, which is the target.</p>"
    )
    links = page.links("headline", "budget", "selected", "target", "timing", "break_even", "verdict")
    return section("Teacher budget", terms, used, _shares(page), links)


def _shares(page: Page) -> str:
    """The teacher's time beside CE's, by the budget's measure and by a stricter one; empty before the comparison."""
    verdict, facts = page.data["verdict"], page.facts
    if verdict is None:
        return ""
    whole = f"{number('horizon')(facts)} steps{projection(facts['projected_from'])}, as the budget has it"
    rows = [
        {"measure": whole, "ce": "ce_train_time_ms", "share": "teacher_share_of_ce", "within": "within_of_ce"},
        {
            "measure": "to the target, the mean of its seeds; stricter",
            "ce": "ce_time_to_target_ms",
            "share": "teacher_share_to_target",
            "within": "within_to_target",
        },
    ]
    words = {True: "yes", False: "no", None: "not known"}
    columns = [
        Column("CE&rsquo;s time", text("measure"), words=True),
        Column("CE", lambda row: ms(row["ce"])(facts)),
        Column("Teacher", lambda row: ms("teacher_ms")(facts)),
        Column("Share", lambda row: quantity(row["share"], "{:.1%}".format)(facts)),
        Column(f"Within {facts['fraction']:.0%}", lambda row: words[verdict[row["within"]]], words=True),
    ]
    return table(rows, columns, "")


def alive_section(page: Page) -> str:
    alive, facts = page.data["verdict"]["kd_alive"], page.facts
    rows = [
        {"name": "KD", "val": facts["first_val_kd"], "below": alive["kd_below_ce"]},
        {"name": "CE", "val": facts["first_val_ce"], "below": None},
        {"name": "KD, random teacher", "val": facts["first_val_random"], "below": alive["random_below_ce"]},
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
    source = page.links("headline", "curves", behind=("screen",), arms=("ce", "control_random"))
    return section("Is KD alive?", lead, figure, table(rows, columns, ""), source)


def curves_section(page: Page) -> str:
    horizons = sorted({row["horizon"] for row in page.data["curves"] if row["arm"] == "ce"}, reverse=True)
    options = "".join(f'<option value="{horizon}">{horizon} steps</option>' for horizon in horizons)
    controls = (
        '<div class="controls js">'
        + radios("x", "Over", METRICS)
        + radios("y", "Loss", {"val_loss": "validation", "train_loss": "training, hard, normalised"})
        + f'<label class="select">Horizon <select name="horizon">{options}</select></label></div>'
    )
    words = (
        "One line a seed; the circle is where KD stopped, the strip on top KD's phases: A with KD, B blending to C, "
        "the tail. Choose what it is drawn over above; click a line to see its run alone in all tables."
    )
    timed = "The same over training time. Dotted: KD moved right by what its teacher took to train."
    deltas = page.figure("step_deltas", "Milliseconds of a step over steps, median of each block of steps, CE and KD.")
    rate = page.figure("lr_phases", "The LR multiplier over steps, with KD's phases on it.")
    lead = (
        f"Every arm at the full horizon, {page.horizon} steps, on the same data, batch and LR schedule; without step 0."
    )
    return section(
        "Validation curves",
        lead,
        page.warnings("curves"),
        page.figure("val_loss_steps", words, controls),
        f'<div class="static">{page.figure("val_loss_time", timed)}</div>',
        f'<div class="pair">{deltas}{rate}</div>',
        page.links("curves", "traces", behind=("full", "controls"), arms=("ce", "kd", "ngram", "log")),
    )


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
    rows = sorted(rows, key=lambda row: -row["horizon"])  # what is judged comes first
    why = f": {escape(page.data['target']['reason'])}" if page.data["target"]["value"] is None else ""
    lead = (
        "Reaching the target takes two validations in a row at or below it. Each run is held against the CE run of the "
        "same horizon and seed."
    )
    if not any(row["arm"] == "kd" for row in rows):
        lead += f" There is no KD run at the full horizon{why}."
    notes = sorted({row["time_note"] for row in page.data["compare"] if row["time_note"]})
    notes = "".join(f'<p class="empty">{escape(note)}</p>' for note in notes)
    parts = page.warnings("compare"), table(rows, COMPARED, "no run to compare"), notes
    parts += (page.links("compare", "full", "runs", behind=("full",), arms=("ce", "log")),)
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
    """The share under `key`, in percent."""
    return quantity(key, lambda share: f"{share:+.1%}".replace("-", "&minus;"))


def compared(row: dict) -> str:
    name = f"{ARM_NAMES[row['arm']]} against {ARM_NAMES[row['against']]}"
    where = MEASURES[row["measure"]] + (f", to {row['target_value']:.4f} nats" if row["target_value"] else "")
    return f"{escape(name)}<small>{escape(where)}</small>"


def said(row: dict) -> str:
    note = f"<small>{escape(row['note'])}</small>" if row["note"] else ""
    return f'<span class="words">{escape(row["outcome"]) or NOTHING}</span>{note}'


def tests_section(page: Page) -> str:
    rules, verdict = page.facts, page.data["verdict"]
    columns = [
        Column("What", compared, words=True),
        Column("Cost", lambda row: COST_NAMES[row["cost"]], words=True),
        Column("Outcome", said, words=True),
        Column("Saved", percent("saved_share")),
        Column("from", percent("saved_share_low")),
        Column("to", percent("saved_share_high")),
        Column("p", quantity("p_sooner", "{:.2g}".format)),
        Column("Holm", quantity("p_holm", "{:.2g}".format)),
        Column("Seeds", number("n_pairs")),
        Column("censored", number("n_censored")),
        Column("Seeds needed", number("seeds_needed")),
        Column("Could be seen", quantity("smallest_effect", "{:.0%}".format)),
    ]
    lead = (
        "Pairs of one seed; saved is 1 minus the ratio of their figures. Set before the runs: intervals at "
        f"{rules['confidence']:.0%}, one-sided p below {rules['p_value']:g} after Holm&rsquo;s adjustment, power "
        f"{rules['power']:.0%}, a teacher shared by {number('amortize')(rules)} students. On the way, a run meets a "
        "target while its LR is still high: that shows how fast it learns, not what a run that stops there would "
        "cost. The complete horizon is the shortest run that ends at the target, as a speedrun would pay for it, "
        "and known no finer than the horizons are close. &lsquo;Seeds needed&rsquo; would show a saving of the size "
        "measured; &lsquo;could be seen&rsquo; is the smallest that these could show."
    )
    tuning = "".join(f'<p class="empty">{escape(verdict[key])}</p>' for key in ("tuning", "ngram") if verdict[key])
    judged = [row for row in page.data["tests"] if row["cost"] != "tokens"]
    parts = page.warnings("tests"), table(judged, columns, "nothing was compared"), tuning
    parts += (page.links("tests", "reached", "tuning", "ce_screen", behind=("full", "controls"), arms=("ce", "ngram")),)
    return section("How sure", lead, *parts)


def trend_section(page: Page) -> str:
    lead = (
        "Steps saved at each loss at which CE stood at a validation, at the full horizon. Left is early; above the "
        "line KD is ahead. A lead that shrinks to the right does not last."
    )
    figure = page.figure("steps_saved_trend", "CE&rsquo;s step less KD&rsquo;s at the same loss, one line a seed.")
    return section("Where KD saves", lead, figure, page.links("trend", arms=("ce", "kd")))


def break_even_section(page: Page) -> str:
    share = "{:.0%}".format
    columns = [
        Column("Target", lambda row: f"{row['target_value']:.4f}"),
        Column("Point", text("label"), words=True),
        Column("Overhead of a step with KD", quantity("overhead", share)),
        Column("Tokens with KD", quantity("kd_share_of_tokens", share)),
        Column("Teacher, of CE&rsquo;s time", quantity("teacher_share", share)),
        Column("Cache", quantity("cache_share", share)),
        Column("Saving needed", quantity("needed", share)),
        Column("needed if shared", quantity("needed_amortized", share)),
        Column("Saving measured", quantity("measured", share)),
        Column("from", quantity("measured_low", share)),
        Column("to", quantity("measured_high", share)),
    ]
    lead = "What share of CE&rsquo;s tokens KD must save to be level in time to the target, beside what it saved."
    figure = page.figure(
        "break_even", "Saving needed (diamond; open: if the teacher is shared) and measured, with its interval."
    )
    rows = table(page.data["break_even"], columns, "nothing was compared")
    return section("Break-even", lead, figure, rows, page.links("break_even", arms=("ce", "kd", "teacher")))


def controls_section(page: Page) -> str:
    rows = [row for row in page.data["compare"] if row["arm"].startswith("control")]
    lead = (
        "What else could explain a gain: the same LR boost without KD, label smoothing, and KD from a teacher with "
        "random weights, which runs at the screen&rsquo;s horizon only. CE with the teacher&rsquo;s time in further "
        "steps has a horizon of its own, and is compared by its end."
    )
    rows = table(rows, COMPARED, "no control was run")
    return section(
        "Controls",
        lead,
        page.warnings("controls"),
        rows,
        page.links("controls", "compare", behind=("controls",), arms=("ce",)),
    )


def candidate(row: dict) -> str:
    return described("candidate")(row) + ("<small>imported; time declared</small>" if row["imported"] else "")


def promoted(row: dict) -> str:
    """The checklist: yes or no, and folded away its points."""
    names = {"budget": "budget", "falling": "falling", "no_oom": "no OOM", "artifacts": "artifacts"}
    parts = [
        f"{name} {row[f'check_{key}'] or 'not known'}: {row[f'check_{key}_by'] or 'not trained'}"
        for key, name in names.items()
    ]
    return f"<details><summary>{text('promoted')(row)}</summary><small>{escape('; '.join(parts))}</small></details>"


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
    figure = page.figure(
        "teachers",
        "Training time against loss. Left of the dashed line is within the budget; the rejected are grey.",
    )
    return section(
        "Teachers",
        lead,
        page.warnings("teachers"),
        figure,
        rows,
        page.links("teachers", "summary", behind=("teachers",)),
    )


def stop_section(page: Page) -> str:
    columns = [
        Column("May stop", text("condition"), words=True),
        Column("Met", text("met"), words=True),
        Column("Evidence", lambda row: f'<span class="words">{text("evidence")(row)}</span>', words=True),
    ]
    lead = "What the campaign set out to answer, and whether it did."
    return section(
        "Stop conditions", lead, table(page.data["stop"], columns, ""), page.links("stop", behind=("teachers", "full"))
    )


def screen_section(page: Page) -> str:
    columns = [
        Column("Rank", number("rank")),
        Column("Point", described("label"), words=True),
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
    point = (page.data["verdict"] or {}).get("point")
    rows = table(page.data["screen"], columns, "nothing was screened", lambda row: row["label"] == point)
    across = page.figure(
        "sweep_parallel", "One line a point, from its knobs to what came of it; the best is the thick one."
    )
    each = page.figure("sweep_knobs", "Final validation loss by each knob; the judged point is filled.")
    figures = f'<div class="pair">{across}{each}</div>'
    return section("KD screen", lead, page.warnings("screen"), figures, rows, page.links("screen"))


def isolates_section(page: Page) -> str:
    lead = "What a step costs: CE alone, with the teacher&rsquo;s forward pass, and with the whole of KD."
    figure = page.figure(
        "isolates",
        "Median milliseconds of a step, the first ones dropped; the multiple of CE is at one speed of the machine.",
    )
    failed = [row for row in page.data["isolates"] if row["status"] != "ok"]
    words = "".join(
        f'<p class="empty">{escape(row["label"])}: {escape(row["status"])}: {escape(row["reason"])}</p>'
        for row in failed
    )
    if page.has("profile"):
        caption = "Where the time of a step goes, the same runs once more: medians of its parts, which need not add up."
        parts, sources = page.figure("step_parts", caption), ("isolates", "profile")
        if any(row["shared_device"] for row in page.data["profile"]):
            words += '<p class="empty">The device was shared while the parts were timed.</p>'
    else:
        command = f"<code>./run results/{escape(page.campaign)}/kd/profile.csv</code>, then <code>./run</code>"
        words += f'<p class="empty">The parts of a step are not measured: {command}.</p>'
        parts, sources = "", ("isolates",)
    return section("Cost of a step", lead, figure, parts, words, page.links(*sources))


def ledger_section(page: Page) -> str:
    words = ("run_id", "mode", "status", "artifact_dir")
    columns = [Column(name, _ledger_cell(page, name), name in words) for name in LEDGER_COLUMNS]
    lead = (
        "Every run of the campaign. &lsquo;-&rsquo; means not applicable; alpha is the weight of the KD term; "
        "val_instability is the sum of the upward moves of the validation loss, in nats."
    )
    rows = table(page.data["ledger"], columns, "no run")
    parts = f"<details><summary>{len(page.data['ledger'])} runs, {len(columns)} columns</summary>{rows}</details>"
    return section("Ledger", lead, page.warnings("ledger"), parts, page.links("ledger", behind=()))


def _ledger_cell(page: Page, name: str) -> Callable[[dict], str]:
    if name == "run_id":
        return described(name)
    if name == "artifact_dir":
        return lambda row: page.folder(row["run_id"], row[name])
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
    return f'<section id="how-to-read-this"><h2>How to read this</h2><dl class="glossary">{items}</dl></section>'


def horizon_section(page: Page) -> str:
    lead = (
        "Where runs end that were planned for so many steps. The shortest horizon at which a curve meets the target is "
        "what a speedrun would pay; where the curves lie level, KD saves nothing."
    )
    words = "Final loss by horizon (log): a point a seed, the monotone fit through the means, Student&rsquo;s interval."
    figure = page.figure("horizon_curve", words)
    return section("Complete horizons", lead, figure, page.links("horizon_curve", "reached", arms=("ce", "kd")))


def runs_section(page: Page) -> str:
    columns = [
        Column('<span class="js">Choose</span>', _choice),
        Column("Run", named, words=True),
        Column("Status", text("status"), words=True),
        Column("Steps", number("steps")),
        Column("Time", ms("train_time_ms")),
        Column("Step (median)", ms("step_ms_median")),
        Column("Best val", nats("best_val")),
        Column("Final val", nats("final_val")),
        Column("Files", lambda row: page.folder(row["run_id"], "folder"), words=True),
    ]
    lead = "Every run has a page of its own. Choose two to see them side by side."
    find = (
        '<p class="js"><label>Find <input type="search" id="find" placeholder="arm, point, seed, status"></label></p>'
    )
    distinct = list({row["run_id"]: row for row in reversed(page.data["runs"])}.values())[::-1]
    return section(
        "Runs",
        lead,
        page.warnings("runs"),
        find,
        table(distinct, columns, "no run has ended yet"),
        page.links("runs", "run_pages", behind=()),
    )


def _choice(row: dict) -> str:
    name = escape(row["run_id"])
    return f'<input class="js" type="checkbox" data-choose="{name}" aria-label="choose {name}">'


AFTER = {  # what a file waits for
    "budget": "the CE baseline",
    "timing": "the CE baseline",
    "selected": "the teacher's choice",
    "target": "the teacher's choice",
    "teachers": "the teacher's choice",
    "isolates": "the timing isolates",
    "screen": "the KD screen",
}


def missing_section(page: Page) -> str:
    """The sections some of whose files are not there yet, and what each waits for; empty where none is missing."""
    rows = []
    for section_ in SECTIONS:
        if names := [name for name in section_.needs if not page.has(name)]:
            waits = dict.fromkeys(AFTER.get(name, "the comparison, when all runs have ended") for name in names)
            files = ", ".join(page.files[name].lstrip("./") for name in names)
            rows.append({"section": section_.title, "waits": "; ".join(waits), "files": files})
    columns = [
        Column("Section", text("section"), words=True),
        Column("Waits for", text("waits"), words=True),
        Column("Files", lambda row: f'<span class="words">{text("files")(row)}</span>', words=True),
    ]
    return section("Not there yet", "What the rest of the campaign will add.", table(rows, columns, "")) if rows else ""


class Section(NamedTuple):
    needs: tuple[str, ...]  # of the page's data; where one is missing, the section is left out and said to be missing
    title: str
    render: Callable[[Page], str]


SECTIONS = (
    Section(("verdict", "headline", "compare", "tests"), "Verdict", verdict_section),
    Section(("advice",), "What to try next", advice_section),
    Section(("curves", "traces"), "Validation curves", curves_section),
    Section(("trend",), "Where KD saves", trend_section),
    Section(("break_even",), "Break-even", break_even_section),
    Section(("horizon_curve",), "Complete horizons", horizon_section),
    Section(("tests", "reached", "verdict", "headline"), "How sure", tests_section),
    Section(("compare", "target", "full", "runs"), "Steps and time to the target", compare_section),
    Section(("verdict", "headline", "curves"), "Is KD alive?", alive_section),
    Section(("compare", "controls"), "Controls", controls_section),
    Section(("budget", "headline", "timing"), "Teacher budget", budget_section),
    Section(("teachers",), "Teachers", teachers_section),
    Section(("screen",), "KD screen", screen_section),
    Section(("isolates",), "Cost of a step", isolates_section),
    Section(("stop",), "Stop conditions", stop_section),
    Section(("runs", "run_pages"), "Runs", runs_section),
    Section(("ledger",), "Ledger", ledger_section),
    Section((), "How to read this", glossary_section),
)
