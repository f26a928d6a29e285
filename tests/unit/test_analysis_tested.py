"""Arms against each other: simulated campaigns whose truth is known, and Holm over the family."""

import dataclasses

import numpy as np
import pytest

from kdclimb.analysis import tested
from kdclimb.analysis.paired import BETTER, UNKNOWN, Rules, beyond
from kdclimb.analysis.targets import TEACHERS, Reached

RULES = Rules(confidence=0.95, p_value=0.01, power=0.8)
CAMPAIGNS = 1000


def reached(arm, seed, steps, label="T1", target=TEACHERS):
    place = {"measure": "crossing", "target": target, "target_value": 5.0, "arm": arm, "label": label, "seed": seed}
    return Reached(place | {"horizon": 100}, {"steps": steps}, (), "")


def campaign(generator, seeds, **savings):
    """Arms that need 1 - saving of CE's steps, with noise of 2 % a run and 5 % a seed that all share."""
    found = []
    for seed in range(seeds):
        shared = 80 * np.exp(generator.normal(0, 0.05))
        for arm, saving in ({"ce": 0.0} | savings).items():
            steps = float(shared * (1 - saving) * np.exp(generator.normal(0, 0.02)))
            found.append(reached(arm, seed, (steps, steps), "CE" if arm == "ce" else "T1"))
    return found


def answers(seeds, **savings):
    """(pays, explained by, not told apart from) of 1,000 simulated campaigns."""
    generator, found = np.random.default_rng(11), []
    for _ in range(CAMPAIGNS):
        rows = tested.verdict_rows(campaign(generator, seeds, **savings), RULES, 100, imported=False)
        head = tested.headline(rows, "T1")
        artefact, untold = tested.explained_by(rows, head["controls"]["steps"])
        found.append((tested.pays(head["crossing"]["steps"], not artefact and not untold), artefact, untold))
    return found


def share(found, holds):
    return sum(map(holds, found)) / CAMPAIGNS


def test_an_arm_that_is_only_its_lr_is_called_an_artefact_and_hardly_ever_pays():
    """At its own level, 1 %, KD beats a control that is as good; 2 % is three standard errors above."""
    found = answers(5, kd=0.2, control_boost=0.2)
    assert share(found, lambda f: f[1] == ["control_boost"]) > 0.95
    assert share(found, lambda f: f[0] is True) <= 0.02


def test_an_arm_that_beats_both_pays():
    assert share(answers(5, kd=0.2, control_boost=0.02), lambda f: f[0] is True) > 0.95


def test_equal_arms_do_not_pay():
    assert share(answers(3, kd=0.0, control_boost=0.0), lambda f: f[0] is True) <= 0.005


def test_holm_counts_every_point_and_target_of_a_family():
    found = []
    for seed, scale in enumerate((0.90, 0.93, 0.90)):
        for target in (TEACHERS, "4.6"):
            found.append(reached("ce", seed, (80.0, 80.0), "CE", target))
            for label in ("T1", "T2"):
                steps = 80 * scale * (1.05 if label == "T2" else 1.0)
                found.append(reached("kd", seed, (steps, steps), label, target))
    rows = tested.verdict_rows(found, RULES, 100, imported=False)
    family = [row for row in rows if row["against"] == "ce"]
    assert len(family) == 4 and RULES.p_value / 4 < min(row["p_sooner"] for row in family) < RULES.p_value
    assert min(row["p_holm"] for row in family) == pytest.approx(4 * min(row["p_sooner"] for row in family))
    assert BETTER not in {row["outcome"] for row in family}  # as 4 times as much is above it


def test_seeds_are_asked_for_at_the_level_that_holm_leaves():
    """With more targets the same pairs need more seeds, since the first of the family must be below its share."""
    needed = []
    for targets in ([TEACHERS], [TEACHERS, "4.6", "4.3", "4.1"]):
        found = []
        for seed, scale in enumerate((0.93, 0.97, 0.95, 0.99)):
            for target in targets:
                found += [reached("ce", seed, (80.0, 80.0), "CE", target)]
                found += [reached("kd", seed, (80 * scale,) * 2, "T1", target)]
        rows = tested.verdict_rows(found, RULES, 100, imported=False)
        needed.append(tested.find(rows, arm="kd", target=TEACHERS))
    assert needed[0]["ratio"] == needed[1]["ratio"] and needed[0]["p_sooner"] == needed[1]["p_sooner"]
    assert needed[0]["seeds_needed"] < needed[1]["seeds_needed"]
    assert needed[0]["smallest_effect"] < needed[1]["smallest_effect"]


def test_where_nothing_is_known_it_is_said_why_and_nothing_is_judged():
    found = []
    for seed in range(3):
        found.append(reached("kd", seed, beyond(200.0), "T1"))
        found.append(reached("ce", seed, UNKNOWN, "CE"))
        found[-2:] = [
            dataclasses.replace(found[-2], miss="too long"),
            dataclasses.replace(found[-1], miss="a run failed"),
        ]
    (row,) = tested.verdict_rows(found, RULES, 100, imported=False)
    assert (row["note"], row["outcome"], row["p_sooner"], row["n_pairs"]) == ("a run failed", "", None, 3)


def test_other_horizons_and_other_points_controls_are_not_compared():
    short = reached("kd", 0, (40.0, 40.0))
    short.place["horizon"] = 50
    found = [reached("ce", 0, (80.0, 80.0), "CE"), short, reached("kd", 1, beyond(100.0))]
    found += [reached("kd", 0, (70.0, 70.0), "T2"), reached("control_boost", 0, (70.0, 70.0), "T2")]
    rows = tested.verdict_rows(found, RULES, 100, imported=False)
    against = [(row["arm"], row["label"], row["against"], row["n_pairs"]) for row in rows]
    assert ("kd", "T2", "control_boost", 1) in against and ("kd", "T1", "ce", 0) in against
    assert not [row for row in against if row[:3] == ("kd", "T1", "control_boost")]


def test_kd_from_ngrams_is_judged_against_ce_with_a_holm_family_of_its_own():
    generator = np.random.default_rng(3)
    found = campaign(generator, 3, kd=0.3, ngram=0.3)
    rows = tested.verdict_rows(found, RULES, 100, imported=False)
    judged = [(row["arm"], row["against"]) for row in rows]
    assert judged == [("kd", "ce"), ("ngram", "ce")]
    assert all(row["low"] is not None and row["p_holm"] == row["p_sooner"] for row in rows)  # families of one
