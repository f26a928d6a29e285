"""What to try next: each piece of advice only where the tables say so."""

import pytest
from test_analysis_synthetic import SyntheticCampaign, read_rows

from kdclimb.analysis.advice import advice_rows
from kdclimb.analysis.savings import BREAK_EVEN_COLUMNS, TREND_COLUMNS
from kdclimb.analysis.tested import VERDICT_COLUMNS

POINT = "T1"
ALIVE = {"kd_below_ce": True, "random_below_ce": False}
ALIVE |= {"first_val_kd": 5.3, "first_val_ce": 5.5, "first_val_random": 7.0}
VERDICT = {"point": POINT, "budget_share": 0.4, "kd_alive": ALIVE, "explained_by": [], "not_claimable_because": []}
VERDICT |= {"budget_projected_from": None}
EVEN = dict.fromkeys(BREAK_EVEN_COLUMNS) | {"label": POINT, "target_value": 4.4, "amortize": 10}
EVEN |= {"teacher_share": 0.12, "overhead": 0.15, "kd_share_of_tokens": 0.3, "needed": 0.16, "needed_amortized": 0.05}
EVEN |= {"cache_share": 0.0}
TESTED = dict.fromkeys(VERDICT_COLUMNS) | {"arm": "kd", "label": POINT, "against": "ce", "target": "teacher_final_val"}
TESTED |= {"cost": "steps", "target_value": 4.4, "n_pairs": 3, "n_censored": 0}
CROSSING = TESTED | {"measure": "crossing", "outcome": "no difference shown", "saved_share": 0.02}


def advised(verdict=VERDICT, tested=(), tuning=(), break_even=(), trend=(), teachers=()):
    return advice_rows(verdict, *map(list, (tested, tuning, break_even, trend, teachers)))


def only(**tables):
    (row,) = advised(**tables)
    return row


def test_nothing_follows_from_nothing():
    assert advised() == []


def test_without_a_teacher_the_nearest_one_is_named():
    verdict = VERDICT | {"budget_share": None, "point": None}
    rows = [{"candidate": name, "projected_ms": ms, "budget_ms": 100.0} for name, ms in (("A", 500.0), ("B", 200.0))]
    row = only(verdict=verdict, teachers=[*rows, {"candidate": "C", "projected_ms": None, "budget_ms": 100.0}])
    assert row["what"] == "Add cheaper teachers" and row["why"].endswith("B, takes 200 ms of a budget of 100 ms")
    row = only(verdict=verdict | {"budget_projected_from": 1000}, teachers=rows)
    assert row["why"].endswith("a budget of 100 ms (projected from 1,000-step runs)")


@pytest.mark.parametrize(
    "cells, what",
    [
        ({"measured": -0.02}, "Look for a teacher that saves steps"),
        ({"measured": 0.08}, "Let several students share the teacher"),
        ({"measured": 0.03}, "Cut the teacher's time first"),
        ({"measured": 0.03, "teacher_share": 0.02}, "Cut what KD adds to a step first"),
        ({"measured": 0.03, "cache_share": 0.13}, "Cut what the cache takes first"),
    ],
)
def test_what_break_even_lacks(cells, what):
    row = only(break_even=[EVEN | {"pays": 0} | cells, EVEN | {"pays": 0, "measured": -0.9}])
    assert row["what"] == what and "4.4000 nats, where it must save 16% of CE's tokens" in row["why"]
    assert row["source"] == "break_even.csv"


def test_a_step_with_kd_may_take_less():
    said = [only(break_even=[EVEN | {"pays": 0, "measured": 0.03, "overhead": o}])["why"] for o in (-0.014, 0.15)]
    assert "a step with KD takes 1% less, in 30%" in said[0] and "a step with KD takes 15% more, in 30%" in said[1]


def test_where_kd_is_level_in_time_nothing_is_to_be_cut():
    rows = [EVEN | {"pays": 1, "measured": 0.2}, EVEN | {"pays": 0, "measured": 0.0}]
    assert advised(break_even=[*rows, EVEN | {"label": "another", "pays": 0, "measured": 0.0}]) == []


def lead(seed, *saved):
    rows = enumerate(saved)
    blank = dict.fromkeys(TREND_COLUMNS) | {"label": POINT, "seed": seed}
    return [blank | {"val_loss": 5.0 - i / 10, "steps_saved": steps} for i, steps in rows]


def test_a_lead_that_every_seed_loses():
    row = only(trend=lead(0, 2.3, -8.0, -33.1) + lead(1, 1.0, None))
    assert "seed 0 is 2.3 steps ahead at 5.0000 nats, 33.1 behind at 4.8000" in row["why"]
    assert "seed 1 is 1 steps ahead at 5.0000 nats, never there at 4.9000" in row["why"]


@pytest.mark.parametrize("kept", [(2.3, 1.0), (-1.0, -2.0), (0.9, -1.0), (None,)])
def test_a_lead_that_one_seed_keeps_or_never_had_says_nothing(kept):
    assert advised(trend=lead(0, 2.3, -1.0) + lead(1, *kept)) == []


def test_times_that_were_refused_are_to_be_taken_again():
    doubts = ["times only: the run shared its device", "the campaign is exploratory: a lock was lifted"]
    row = only(verdict=VERDICT | {"not_claimable_because": doubts})
    assert (row["why"], row["source"]) == ("the run shared its device", "compare.csv")


def test_grids_are_widened_where_a_choice_lies_on_their_edge():
    edges = {"ce": "adam_lr 0.04 of 0.02, 0.04", "kd": ""}
    row = only(tuning=[{"arm": arm, "edge": edge} for arm, edge in edges.items()])
    assert (row["what"], row["keys"]) == ("Widen the grid of CE", "controls.ce_grid") and edges["ce"] in row["why"]


@pytest.mark.parametrize("needed, what", [(12, "Run 12 seeds"), (13, "Do not count on more seeds")])
def test_seeds(needed, what):
    row = only(tested=[CROSSING | {"seeds_needed": needed, "smallest_effect": 0.5}])
    assert (
        row["what"] == what and f"+2.0% of the steps takes {needed} seeds" in row["why"] and "one of 50%" in row["why"]
    )


def test_a_verdict_that_is_there_needs_no_more_seeds():
    assert advised(tested=[CROSSING | {"outcome": "better", "seeds_needed": 3}]) == []


def test_a_target_outside_the_horizons():
    row = TESTED | {"measure": "horizon"}
    assert only(tested=[row | {"n_censored": 3}])["keys"] == "train.horizons"
    assert advised(tested=[row | {"n_censored": 2}]) == []


def test_what_does_not_teach_and_what_explains_the_gain():
    dead = VERDICT | {"kd_alive": ALIVE | {"kd_below_ce": False}}
    assert "not below CE's 5.5000" in only(verdict=dead)["why"]
    odd = VERDICT | {"kd_alive": ALIVE | {"random_below_ce": True}}
    assert "a random teacher's student stands at 7.0000" in only(verdict=odd)["why"]
    assert "CE with KD's LR" in only(verdict=VERDICT | {"explained_by": ["control_boost"]})["why"]


def test_every_source_is_a_table_beside_it(tmp_path):
    campaign = SyntheticCampaign(tmp_path)
    campaign.run_all()
    rows = read_rows(campaign.path("tables/advice.csv"))
    assert rows and all(campaign.path(f"tables/{row['source']}").is_file() for row in rows)
