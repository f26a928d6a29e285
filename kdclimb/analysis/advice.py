"""What to try next, as far as it follows from a campaign's tables. Each piece of advice names the cells behind it."""

from __future__ import annotations

from kdclimb.analysis.budget import projection
from kdclimb.analysis.paired import UNDECIDED
from kdclimb.analysis.tables import show_ms, show_number
from kdclimb.analysis.targets import TEACHERS
from kdclimb.analysis.tested import find
from kdclimb.analysis.verdict import CONTROL_NAMES, TIMES

ADVICE_COLUMNS = ("what", "why", "keys", "source")
GRIDS = {"kd": "kd.grid", "ce": "controls.ce_grid"}
LEAD = 1.0  # steps: a smaller lead is none
WORTH_RUNNING = 4  # times the seeds that there are: an effect that needs more is too small for this campaign


def advice_rows(
    verdict: dict,
    tested: list[dict],
    tuning: list[dict],
    break_even: list[dict],
    trend: list[dict],
    teachers: list[dict],
) -> list[dict]:
    """Rows of ADVICE_COLUMNS, what weighs most first; none where nothing follows from the tables."""
    point = verdict["point"]
    if verdict["budget_share"] is None:
        return _cheaper_teachers(teachers, verdict["budget_projected_from"])
    rows = [*_refused(verdict["not_claimable_because"]), *_alive(verdict["kd_alive"]), *_explained(verdict)]
    rows += _break_even([row for row in break_even if row["label"] == point], verdict["budget_share"])
    rows += _lost_lead([row for row in trend if row["label"] == point])
    rows += [row for arm in tuning for row in _edge(arm)]
    asked = {"arm": "kd", "label": point, "against": "ce", "target": TEACHERS, "cost": "steps"}
    rows += _horizons(find(tested, measure="horizon", **asked))
    return rows + _seeds(find(tested, measure="crossing", **asked))


def _row(what: str, why: str, keys: str, source: str) -> dict:
    return {"what": what, "why": why, "keys": keys, "source": source}


def _cheaper_teachers(teachers: list[dict], projected_from: int | None) -> list[dict]:
    known = [row for row in teachers if row["projected_ms"] is not None]
    if not known:
        return []
    nearest = min(known, key=lambda row: row["projected_ms"])
    why = (
        f"the candidate projected to be fastest, {nearest['candidate']}, takes {show_ms(nearest['projected_ms'])} of a "
        f"budget of {show_ms(nearest['budget_ms'])}{projection(projected_from)}"
    )
    return [_row("Add cheaper teachers", why, "teacher.candidates", "teachers.csv")]


def _refused(doubts: list[str]) -> list[dict]:
    """Of times that may not be compared."""
    why = "; ".join(doubt.removeprefix(TIMES) for doubt in doubts if doubt.startswith(TIMES))
    return [_row("Time these runs again, alone", why, "python -m kdclimb retry --run", "compare.csv")] if why else []


def _alive(alive: dict) -> list[dict]:
    rows, first = [], {key: alive[f"first_val_{key}"] for key in ("kd", "ce", "random")}
    if alive["kd_below_ce"] is False:
        why = f"at the first validation KD stands at {first['kd']:.4f} nats, not below CE's {first['ce']:.4f}"
        rows.append(_row("See that KD teaches at all", why, "kd.alpha kd.grid teacher.candidates", "headline.csv"))
    if alive["random_below_ce"]:
        why = (
            f"a random teacher's student stands at {first['random']:.4f} nats at the first validation, below CE's "
            f"{first['ce']:.4f}"
        )
        rows.append(_row("Find what else than knowledge is at work", why, "controls", "headline.csv"))
    return rows


def _explained(verdict: dict) -> list[dict]:
    names = ", ".join(CONTROL_NAMES[arm] for arm in verdict["explained_by"])
    why = f"{names} is sooner than CE too, and KD is not sooner than it"
    return [_row("Take the gain without a teacher", why, "controls", "verdict.csv")] if names else []


def _break_even(rows: list[dict], budget_share: float) -> list[dict]:
    """What falls short at the target where KD comes nearest to being level in time; nothing where it is level."""
    known = [row for row in rows if row["needed"] is not None and row["measured"] is not None]
    if not known or any(row["pays"] for row in known):
        return []
    row = max(known, key=lambda row: row["measured"] - row["needed"])
    on_steps = row["overhead"] * row["kd_share_of_tokens"]
    why = (
        f"KD comes nearest to break-even at {row['target_value']:.4f} nats, where it must save {row['needed']:.0%} of "
        f"CE's tokens and saved {row['measured']:.0%}: the teacher is {row['teacher_share']:.0%} of CE's time there, "
        f"its cache {row['cache_share']:.0%}, and a step with KD takes {abs(row['overhead']):.0%} "
        f"{'less' if row['overhead'] < 0 else 'more'}, in {row['kd_share_of_tokens']:.0%} of the tokens"
    )
    if row["measured"] <= 0:
        why += f". Costs alone are not what is missing; the teacher took {budget_share:.0%} of its budget"
        keys = "teacher.candidates kd.grid kd.alpha"
        return [_row("Look for a teacher that saves steps", why, keys, "break_even.csv")]
    if row["measured"] > row["needed_amortized"]:
        why += f". Shared by {row['amortize']} students it needs {row['needed_amortized']:.0%}"
        return [_row("Let several students share the teacher", why, "verdict.amortize", "break_even.csv")]
    terms = {
        ("Cut the teacher's time first", "teacher.candidates"): row["teacher_share"],
        ("Cut what the cache takes first", "kd.cache kd.token_frac"): row["cache_share"],
        ("Cut what KD adds to a step first", "kd.token_frac kd.every kd.cache"): on_steps,
    }
    what, keys = max(terms, key=terms.get)
    return [_row(what, why, keys, "break_even.csv")]


def _lost_lead(rows: list[dict]) -> list[dict]:
    """A lead that every seed has on the way and none at the end: KD helps early, so less of it may keep the lead."""
    parts = []
    for seed in dict.fromkeys(row["seed"] for row in rows):
        mine = [row for row in rows if row["seed"] == seed]
        best = max((row for row in mine if row["steps_saved"] is not None), key=_saved, default=None)
        last = mine[-1]
        if best is None or best["steps_saved"] < LEAD or (last["steps_saved"] or 0) > 0:
            return []
        lost = "never there" if last["steps_saved"] is None else f"{show_number(-last['steps_saved'])} behind"
        ahead = f"{show_number(best['steps_saved'])} steps ahead at {best['val_loss']:.4f} nats"
        parts.append(f"seed {seed} is {ahead}, {lost} at {last['val_loss']:.4f}")
    why, keys = f"the lead is lost on the way: {'; '.join(parts)}", "kd.token_frac kd.stop_margin kd.stop_mode"
    return [_row("End KD sooner", why, keys, "steps_saved_trend.csv")] if parts else []


def _saved(row: dict) -> float:
    return row["steps_saved"]


def _edge(arm: dict) -> list[dict]:
    name = arm["arm"].upper()
    why = f"{name}'s best point lies on an edge: {arm['edge']}"
    return [_row(f"Widen the grid of {name}", why, GRIDS[arm["arm"]], "tuning.csv")] if arm["edge"] else []


def _horizons(row: dict | None) -> list[dict]:
    if row is None or not row["n_pairs"] or row["n_censored"] < row["n_pairs"]:
        return []
    why = f"the target of {row['target_value']:.4f} nats lies outside the horizons of all {row['n_pairs']} seeds"
    return [_row("Add a horizon on the other side of the target", why, "train.horizons", "reached.csv")]


def _seeds(row: dict | None) -> list[dict]:
    """Whether more seeds could settle what these leave open."""
    if row is None or row["outcome"] != UNDECIDED or row["seeds_needed"] is None or row["saved_share"] is None:
        return []
    needed, there = row["seeds_needed"], row["n_pairs"]
    why = f"to show a saving like the measured {row['saved_share']:+.1%} of the steps takes {show_number(needed)} seeds"
    if row["smallest_effect"] is not None:
        why += f"; these {there} could have shown one of {row['smallest_effect']:.0%}"
    what = f"Run {needed} seeds" if needed <= WORTH_RUNNING * there else "Do not count on more seeds"
    return [_row(what, why, "train.seeds", "verdict.csv")]
