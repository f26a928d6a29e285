"""Each arm against CE, and KD against its controls, by each measure, target and cost: the rows of verdict.csv.

KD pays only if it is sooner than CE, with p below the rule's after Holm's adjustment, and sooner than each control, by
the same cost; in time it must also end below the controls that spend theirs otherwise. A claim must hold against all of
these at once, so each of their tests may stay at the rule's level (intersection-union test, Berger 1982). The screen's
first point is judged: picking the best of several full runs would flatter KD.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections import Counter
from collections.abc import Iterable

from kdclimb.analysis.budget import refuse_timing
from kdclimb.analysis.paired import BETTER, UNKNOWN, WORSE, Judged, Pair, Rules, holm, judge, outcome
from kdclimb.analysis.tables import show_number
from kdclimb.analysis.targets import COSTS, TEACHERS, Reached

STATISTICS = tuple(field.name for field in dataclasses.fields(Judged))
VERDICT_COLUMNS = (
    *"measure target target_value arm label against cost saved_mean".split(),
    *STATISTICS,
    *("saved_share", "saved_share_low", "saved_share_high", "p_holm", "outcome"),
)
FAMILIES = ("kd", "ngram")  # arms with several points or targets, which Holm counts
COMPETITOR = "control_growth"  # shown, but no control: it uses the teacher too, and explains nothing away
LONGER = {  # controls of more steps than KD's, compared by their end
    "control_batch": "CE in smaller batches on as many tokens",
    "control_extra": "CE with the teacher's time in further steps",
}
COUNTED = "time_with_teacher_ms"
DECLARED = "the teacher's time is declared, not measured"


def verdict_rows(reached: list[Reached], rules: Rules, horizon: int, imported: bool) -> list[dict]:
    """Rows of VERDICT_COLUMNS. Crossings count at `horizon` alone; `imported`: the teacher's time is not measured."""
    groups: dict[tuple, dict] = {}
    for found in reached:
        place = found.place
        if place["horizon"] in (horizon, None):
            key = place["measure"], place["target"], place["arm"], place["label"]
            groups.setdefault(key, {})[place["seed"]] = found
    points = {label for _, _, arm, label in groups if arm == "kd"}
    size = Counter((arm, measure) for measure, _, arm, _ in groups if arm in FAMILIES)
    rows = []
    for (measure, target, arm, label), mine in groups.items():
        for (*same, against, other_label), others in groups.items():
            its_own = other_label == label or other_label not in points  # some controls belong to one point
            control = arm == "kd" and against.startswith("control") and its_own
            if same == [measure, target] and arm != "ce" and (against == "ce" or control):
                place = next(iter(mine.values())).place | {"against": against}
                costs = next(iter(mine.values())).seen
                family = max(1, size[arm, measure]) if against == "ce" else 1
                asked = dataclasses.replace(rules, p_value=rules.p_value / family)  # Holm's first step
                rows += [place | _judged(mine, others, cost, asked, imported) for cost in costs]
    _adjust(rows)
    for row in rows:
        adjusted = row["p_sooner"] if row["p_holm"] is None else row["p_holm"]
        row["outcome"] = outcome(adjusted, row["p_later"], rules.p_value)
    return rows


def _judged(mine: dict, others: dict, cost: str, rules: Rules, imported: bool) -> dict:
    seeds = [seed for seed in mine if seed in others]
    note = _refused([(mine[seed], others[seed]) for seed in seeds]) if cost.startswith("time") else ""
    if imported and cost in COSTS[3:]:
        note = note or DECLARED
    pairs = [Pair(mine[seed].seen[cost], others[seed].seen[cost]) for seed in seeds]
    if pairs and all(UNKNOWN in (pair.arm, pair.other) for pair in pairs):
        note = note or next(arm[seeds[0]].miss for arm in (mine, others) if arm[seeds[0]].seen[cost] == UNKNOWN)
    found = Judged(len(pairs), 0, note=note) if note else judge(pairs, rules)
    exact = not note and pairs and found.n_censored == 0
    saved = statistics.fmean(pair.other[0] - pair.arm[0] for pair in pairs) if exact else None
    shares = {"saved_share": found.ratio, "saved_share_low": found.high, "saved_share_high": found.low}
    shares = {name: None if ratio is None else 1 - ratio for name, ratio in shares.items()}
    return {"cost": cost, "saved_mean": saved, "p_holm": None} | dataclasses.asdict(found) | shares


def _refused(pairs: Iterable[tuple[Reached, Reached]]) -> str:
    """Why these times can't be compared; empty if they can. A failed run has no time, and needs none."""
    for arm, other in pairs:
        runs = [run.row() for run in (*other.runs, *arm.runs) if run.ok]
        for row in runs:
            if note := refuse_timing(row, runs[0]):
                return note
    return ""


def _adjust(rows: list[dict]) -> None:
    """Holm over KD's points and targets, for each measure and cost; and over those of KD from n-grams."""
    families: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["arm"] in FAMILIES and row["against"] == "ce":
            families.setdefault((row["arm"], row["measure"], row["cost"]), []).append(row)
    for family in families.values():
        for row, p in zip(family, holm([row["p_sooner"] for row in family]), strict=True):
            row["p_holm"] = p


def find(rows: list[dict], **asked) -> dict | None:
    """The first row with these cells."""
    return next((row for row in rows if all(row[key] == value for key, value in asked.items())), None)


def at_the_end(rows: list[dict], point: str | None, control: str) -> dict | None:
    """The judged point's final loss against that of a control whose steps are others than KD's."""
    return find(rows, measure="final", arm="kd", label=point, against=control)


def headline(rows: list[dict], point: str | None) -> dict:
    """The rows on the judged point at the teacher's target: {measure: {cost: row}}, and those against its controls.

    The controls are by cost, too; with the teacher's time counted those of LONGER are among them, by their ends.
    """
    asked = {"arm": "kd", "label": point, "target": TEACHERS}
    found = {
        measure: {cost: find(rows, measure=measure, cost=cost, against="ce", **asked) for cost in COSTS}
        for measure in ("crossing", "horizon")
    }
    controls = [
        row
        for row in rows
        if row["measure"] == "crossing" and row["against"] not in ("ce", "kd", COMPETITOR)
        if all(row[key] == value for key, value in asked.items())
    ]
    by_cost = {cost: [row for row in controls if row["cost"] == cost] for cost in ("steps", COUNTED)}
    by_cost[COUNTED] += [row for arm in LONGER if (row := at_the_end(rows, point, arm))]
    return found | {"controls": by_cost}


def explained_by(rows: list[dict], controls: list[dict]) -> tuple[list[str], list[str]]:
    """Controls that KD is not shown to be better than: those that are better than CE themselves, and the others.

    The first explain KD's gain: what they share with it, such as its LR, is enough for one.
    """
    artefact, open_ = [], []
    for row in controls:
        if row["outcome"] != BETTER:
            same = {key: row[key] for key in ("measure", "target", "cost")} | {"arm": row["against"], "against": "ce"}
            alone = find(rows, label=row["label"], **same) or find(rows, **same)  # not each belongs to a point
            (artefact if alone and alone["outcome"] == BETTER else open_).append(row["against"])
    return artefact, open_


def pays(row: dict | None, unexplained: bool = True) -> bool | None:
    """Whether KD is shown to be sooner and nothing else explains it; None where nothing can be said."""
    if row is None or not row["outcome"]:
        return None
    return row["outcome"] == BETTER and unexplained


def describe(row: dict) -> str:
    """A row in words: by how much, how sure, and what would settle it."""
    if row["ratio"] is None:
        return f"no ratio ({row['note']})"
    words = _share(row["ratio"])
    if row["low"] is not None and row["high"] is not None:
        words += f" (interval {_signed(1 - row['high'])} to {_signed(1 - row['low'])} saved"
    else:
        words += " (no interval"
    if row["p_sooner"] is not None:
        p = row["p_sooner"] if row["p_holm"] is None else row["p_holm"]
        words += f", one-sided p = {max(p, 0.0001):.2g}"
    words += f", {row['n_pairs']} seed{'s' * (row['n_pairs'] != 1)}{'; ' + row['note'] if row['note'] else ''})"
    return words


def _share(ratio: float) -> str:
    return f"{abs(1 - ratio):.1%} {'less' if ratio < 1 else 'more'}"


def _signed(share: float) -> str:
    return f"{share:+.1%}"


def missing(row: dict) -> str:
    """What it would take to show the effect, and what could have been seen."""
    if row["outcome"] in (BETTER, WORSE, "") or row["smallest_effect"] is None:
        return ""
    seen = f"{row['n_pairs']} seeds that spread so could have shown a saving of {row['smallest_effect']:.0%}"
    if row["seeds_needed"] is None:
        return f"{seen}."
    return f"{seen}; one of this size needs {show_number(row['seeds_needed'])} seeds."
