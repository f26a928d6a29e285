"""The statistics of paired seeds: by hand, and on simulated campaigns whose truth is known."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from kdclimb.analysis import paired
from kdclimb.analysis.paired import FAILED, Pair, Rules, beyond, judge, within
from kdclimb.analysis.targets import crossing

RULES = Rules(confidence=0.95, p_value=0.01, power=0.8)
TARGET = {"value": 4.5, "consecutive": 2, "source": "fixed", "reason": "of a test"}
HORIZON, CAMPAIGNS, SEEDS = 400, 1000, 3


def seen(figure, limit=400):
    return beyond(limit) if figure is None else (figure, figure)


def simulate(generator, saving, seeds=SEEDS, seed_sd=0.05, noise=0.01):
    """Steps to the target of an arm that needs 1 - `saving` of CE's steps, and CE's, as pairs.

    Loss is 8 - 0.75 ln(step) for CE. A seed shifts both arms; run and validation have noise of their own.
    """
    pairs = []
    for shift in generator.normal(0.0, seed_sd, seeds):
        figures = []
        for faster in (saving, 0.0):
            steps = np.arange(25, HORIZON + 1, 25)
            losses = 8.0 - 0.75 * np.log(steps / (1 - faster)) + shift + generator.normal(0, noise, len(steps))
            losses += generator.normal(0.0, noise)
            val = [dict(step=0, val_loss=8.0, tokens=0, train_time_ms=0.0)]
            val += [dict(step=int(s), val_loss=v, tokens=0, train_time_ms=0.0) for s, v in zip(steps, losses)]
            figures.append(seen(crossing(SimpleNamespace(ok=True, val=val), TARGET).interp, HORIZON))
        pairs.append(Pair(*figures))
    return pairs


@pytest.fixture(scope="module")
def judged():
    """judged(saving, **values): the verdicts on 1,000 simulated campaigns."""

    def run(saving, **values):
        generator = np.random.default_rng(7)
        return [judge(simulate(generator, saving, **values), RULES) for _ in range(CAMPAIGNS)]

    return run


@pytest.mark.parametrize("saving", [0.0, 0.12])
def test_intervals_cover_the_truth_as_often_as_they_say(judged, saving):
    verdicts = judged(saving)
    assert all(v.n_censored == 0 for v in verdicts)
    covered = sum(v.low <= 1 - saving <= v.high for v in verdicts) / CAMPAIGNS
    assert 0.93 <= covered <= 0.97


def test_identical_arms_show_no_difference_at_the_stated_rate(judged):
    """One-sided at 1 % to each side, so wrong in 2 % of campaigns; 3.3 is three standard errors above."""
    verdicts = judged(0.0)
    outcomes = [paired.outcome(v.p_sooner, v.p_later, RULES.p_value) for v in verdicts]
    assert 0.007 <= 1 - outcomes.count(paired.UNDECIDED) / CAMPAIGNS <= 0.033


def test_an_effect_of_the_smallest_detectable_size_is_seen_with_the_power():
    generator, spread, n = np.random.default_rng(1), 0.03, 5
    mean = math.log(1 - paired.smallest_effect(spread, n, RULES))
    found = paired.t_below(generator.normal(mean, spread, (20_000, n))) < RULES.p_value
    assert found.mean() == pytest.approx(RULES.power, abs=0.01)


@pytest.mark.parametrize("n", [6, 9])
def test_censored_campaigns_keep_their_level(n):
    """A fifth of all runs never reach the target: the interval covers, and equal arms are rarely called sooner."""
    generator = np.random.default_rng(3)
    ce = np.exp(generator.normal(math.log(300), 0.15, (4000, n)))
    kd = ce * np.exp(generator.normal(0.0, 0.1, ce.shape))
    limit = 340.0
    verdicts = [
        judge([Pair(*(seen(f if f <= limit else None, limit) for f in pair)) for pair in zip(*row)], RULES)
        for row in zip(kd, ce)
    ]
    censored = [v for v in verdicts if v.n_censored]
    assert 0.1 < np.mean([v.n_censored for v in verdicts]) / n < 0.4
    covered = np.mean([(v.low or 0) <= 1 <= (v.high or math.inf) for v in censored])
    assert covered >= 0.95
    assert np.mean([v.p_sooner < RULES.p_value for v in censored]) <= RULES.p_value


def test_dropping_what_was_not_reached_would_flatter_what_keeping_it_does_not():
    """KD is 20 % later for the slow half of its seeds and reaches nothing there: kept, it is not sooner."""
    pairs = [Pair(seen(95.0), seen(100.0))] * 5 + [Pair(seen(None), seen(390.0))] * 5
    kept, dropped = judge(pairs, RULES), judge(pairs[:5], RULES)
    assert dropped.p_sooner < RULES.p_value <= kept.p_sooner
    assert (kept.n_pairs, kept.n_censored, kept.ratio) == (10, 5, None)


@pytest.mark.parametrize(
    ("pair", "bounds"),
    [
        (Pair(seen(50), seen(100)), (math.log(0.5), math.log(0.5))),
        (Pair(beyond(400), seen(100)), (math.log(4), math.inf)),
        (Pair(seen(100), beyond(400)), (-math.inf, math.log(0.25))),
        (Pair(beyond(400), beyond(400)), (-math.inf, math.inf)),
        (Pair(within(75), seen(100)), (-math.inf, math.log(0.75))),
        (Pair(seen(100), within(75)), (math.log(100 / 75), math.inf)),
        (Pair(FAILED, seen(100)), (math.inf, math.inf)),
        (Pair(seen(100), FAILED), (-math.inf, math.inf)),  # no credit for the other's failure
    ],
)
def test_bounds_of_a_pair(pair, bounds):
    assert pair.bounds() == pytest.approx(bounds)


def test_t_interval_and_test_are_scipys():
    logs = np.log([0.9, 0.85, 0.97, 0.92])
    found = judge([Pair(seen(r), seen(1.0)) for r in np.exp(logs)], RULES)
    peer = stats.ttest_1samp(logs, 0.0, alternative="less")
    both = stats.ttest_1samp(logs, 0.0).confidence_interval(0.95)
    assert found.p_sooner == pytest.approx(peer.pvalue)
    assert (found.low, found.high) == pytest.approx((math.exp(both.low), math.exp(both.high)))
    assert found.ratio == pytest.approx(math.exp(logs.mean())) and found.p_later == pytest.approx(1 - peer.pvalue)


@pytest.mark.parametrize("n", [0, 1, 2])
def test_no_interval_below_three_seeds(n):
    found = judge([Pair(seen(90), seen(100))] * n, RULES)
    assert (found.low, found.high, found.p_sooner) == (None, None, None)
    assert found.note == f"{n} of the 3 seeds that an interval needs"
    assert paired.outcome(found.p_sooner, found.p_later, 0.01) == ""


def test_seeds_needed_are_the_first_with_the_power():
    mean, spread = -0.05, 0.06
    n = paired.seeds_needed(mean, spread, RULES)
    enough = [paired.detectable(k, RULES.p_value, RULES.power) * spread <= -mean for k in (n - 1, n)]
    assert enough == [False, True]
    assert paired.seeds_needed(0.05, 0.06, RULES) is None and paired.seeds_needed(-1e-6, 0.06, RULES) is None
    assert paired.signs_needed(0.01) == 7 and 0.5**7 < 0.01 < 0.5**6


def test_median_interval_covers_by_the_binomial():
    assert paired.median_interval(np.arange(5.0), np.arange(5.0), 0.95) is None
    low, high = paired.median_interval(np.arange(10.0), np.arange(10.0), 0.95)
    assert (low, high) == (1.0, 8.0) and 1 - 2 * stats.binom.cdf(1, 10, 0.5) >= 0.95 > 1 - 2 * stats.binom.cdf(
        2, 10, 0.5
    )


def test_holm_by_hand():
    assert paired.holm([0.01, 0.04, None, 0.03]) == pytest.approx([0.03, 0.06, None, 0.06])
    assert paired.holm([]) == [] and paired.holm([0.9, 0.8]) == [1.0, 1.0]


def test_without_any_spread_the_sign_decides():
    logs = np.array([[-0.1] * 3, [0.0] * 3, [0.1] * 3])
    assert paired.t_below(logs) == pytest.approx([0.0, 0.5, 1.0])
