"""Statistics of paired seeds: how much sooner one arm is than another, how sure that is, and what would settle it.

A pair is two runs that differ in their arm alone. What is judged is the logarithm of the ratio of the two figures
(steps, tokens or time to a target): seeds shift both arms alike, and the shift drops out of the ratio. Below, `logs`
are such logarithms, (..., n) for n pairs, so that many campaigns can be judged at once; negative is sooner.

Without a censored pair: Student's t on the logs. At three to five seeds a bootstrap has too few resamples to hold its
level, and t is exact where the logs are normal. With one: order statistics of the median, and the sign test, which
need of a pair only who was first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import scipy  # its parts load where they are used: tables without statistics are a second sooner

MIN_PAIRS = 3  # fewer have no interval: with two, t's reaches 13 standard errors to each side
MOST_SEEDS = 1000  # that are worth naming
BETTER, WORSE, UNDECIDED = "better", "worse", "no difference shown"


@dataclass(frozen=True)
class Rules:
    """What decides a verdict, set in the config before any run."""

    confidence: float  # of the two-sided intervals
    p_value: float  # of the one-sided tests
    power: float  # with which an effect counts as one that could have been seen


Seen = tuple[float, float]  # a figure lies between these; they are equal where it was seen
FAILED: Seen = (math.inf, math.inf)  # a run that failed is later than anything
UNKNOWN: Seen = (0.0, math.inf)


def beyond(limit: float) -> Seen:
    """Not reached by `limit`: right-censored."""
    return limit, math.inf


def within(limit: float) -> Seen:
    """Reached somewhere before `limit`: left-censored."""
    return 0.0, limit


@dataclass(frozen=True)
class Pair:
    """What was seen of an arm, and of the one that it is held against."""

    arm: Seen
    other: Seen

    @property
    def censored(self) -> bool:
        return self.arm[0] != self.arm[1] or self.other[0] != self.other[1] or FAILED in (self.arm, self.other)

    def bounds(self) -> tuple[float, float]:
        """Lowest and highest that the log ratio can be. The other's failure gives the arm no credit."""
        other = UNKNOWN if self.other == FAILED else self.other
        low = -math.inf if self.arm[0] == 0 or other[1] == math.inf else math.log(self.arm[0] / other[1])
        high = math.inf if self.arm[1] == math.inf or other[0] == 0 else math.log(self.arm[1] / other[0])
        return low, high


@dataclass(frozen=True)
class Judged:
    """What the pairs say. Ratios are arm / other, below 1 is sooner; None is what they can't say."""

    n_pairs: int
    n_censored: int
    ratio: float | None = None  # geometric mean; the median where a pair is censored
    low: float | None = None
    high: float | None = None
    p_sooner: float | None = None  # one-sided
    p_later: float | None = None
    seeds_needed: int | None = None  # for this ratio and spread to be shown
    smallest_effect: float | None = None  # smallest saving, as a fraction, that these pairs could have shown
    note: str = ""


def t_interval(logs: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """Two-sided t interval of the mean: (low, high), each (...)."""
    n = logs.shape[-1]
    mean, half = logs.mean(-1), scipy.stats.t.ppf(0.5 + confidence / 2, n - 1) * logs.std(-1, ddof=1) / math.sqrt(n)
    return mean - half, mean + half


def t_below(logs: np.ndarray) -> np.ndarray:
    """One-sided p (...) of Student's t that the mean is below 0. Without any spread, 0, 0.5 or 1 by its sign."""
    mean, error = logs.mean(-1), logs.std(-1, ddof=1) / math.sqrt(logs.shape[-1])
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(mean == 0, 0.0, mean / error)
    return scipy.stats.t.cdf(t, logs.shape[-1] - 1)


def median_interval(low: np.ndarray, high: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray] | None:
    """Interval of the median from order statistics, (...); None where n is too small for one.

    `low` and `high` (..., n) bound each log; they are equal where it was seen. It covers the median at least so often
    whatever the distribution (David & Nagaraja, Order Statistics, 7.1).
    """
    n = low.shape[-1]
    rank = int(scipy.stats.binom.ppf((1 - confidence) / 2, n, 0.5))  # of the lower limit, from 1
    return None if rank < 1 else (np.sort(low, -1)[..., rank - 1], np.sort(high, -1)[..., n - rank])


def sign_below(high: np.ndarray) -> np.ndarray:
    """One-sided p (...) of the sign test that the median is below 0; what is surely below (`high` < 0) counts."""
    n = high.shape[-1]
    return scipy.stats.binom.sf((high < 0).sum(-1) - 1, n, 0.5)


def judge(pairs: list[Pair], rules: Rules) -> Judged:
    """Judge the pairs of one arm and another. None is dropped: what was not reached counts as later than its limit."""
    n = len(pairs)
    bounds = np.array([pair.bounds() for pair in pairs]).reshape(n, 2)
    censored = sum(pair.censored for pair in pairs)
    if n < MIN_PAIRS:
        ratio = float(np.exp(bounds[:, 0].mean())) if n and not censored else None
        return Judged(n, censored, ratio, note=f"{n} of the {MIN_PAIRS} seeds that an interval needs")
    if censored:
        return _judge_censored(bounds[:, 0], bounds[:, 1], censored, rules)
    logs = bounds[:, 0]
    low, high = t_interval(logs, rules.confidence)
    mean, spread = float(logs.mean()), float(logs.std(ddof=1))
    return Judged(
        n_pairs=n,
        n_censored=0,
        ratio=math.exp(mean),
        low=float(np.exp(low)),
        high=float(np.exp(high)),
        p_sooner=float(t_below(logs)),
        p_later=float(t_below(-logs)),
        seeds_needed=seeds_needed(mean, spread, rules),
        smallest_effect=smallest_effect(spread, n, rules),
    )


def _judge_censored(low: np.ndarray, high: np.ndarray, censored: int, rules: Rules) -> Judged:
    n, interval = len(low), median_interval(low, high, rules.confidence)
    with np.errstate(invalid="ignore"):  # the middle of -inf and inf
        middle = np.median(low), np.median(high)
    note = f"{censored} of {n} pairs censored: median and sign test"
    if interval is None:
        note += f"; too few for an interval at {rules.confidence:.0%}"
    limits = [float(np.exp(limit)) for limit in interval or (-np.inf, np.inf)]
    return Judged(
        n_pairs=n,
        n_censored=censored,
        ratio=float(np.exp(middle[0])) if middle[0] == middle[1] and np.isfinite(middle[0]) else None,
        low=limits[0] if limits[0] > 0 else None,
        high=limits[1] if limits[1] < math.inf else None,
        p_sooner=float(sign_below(high)),
        p_later=float(sign_below(-low)),
        seeds_needed=signs_needed(rules.p_value) if (high < 0).all() else None,
        note=note,
    )


def signs_needed(p_value: float) -> int:
    """Seeds with which the sign test is below `p_value` if all of them are sooner."""
    return math.floor(math.log(p_value) / math.log(0.5)) + 1


@cache
def detectable(n: int, p_value: float, power: float) -> float:
    """Smallest mean, in standard deviations, that a one-sided t test of n pairs shows with this power; noncentral t."""
    df, critical = n - 1, scipy.stats.t.isf(p_value, n - 1)

    def missing(shift: float) -> float:
        return scipy.stats.nct.sf(critical, df, shift) - power

    return float(scipy.optimize.brentq(missing, 0.0, 20.0 * critical)) / math.sqrt(n)


def smallest_effect(spread: float, n: int, rules: Rules) -> float:
    """Smallest saving, as a fraction, that n pairs whose logs spread so show with `rules.power`."""
    return -math.expm1(-detectable(n, rules.p_value, rules.power) * spread)


def seeds_needed(mean: float, spread: float, rules: Rules) -> int | None:
    """Pairs that would show a mean log like this with `rules.power`; None if it is not sooner, or too many."""
    if mean >= 0:
        return None
    if spread == 0:
        return MIN_PAIRS
    low, high = MIN_PAIRS, MOST_SEEDS
    if detectable(high, rules.p_value, rules.power) > -mean / spread:
        return None
    while low < high:
        middle = (low + high) // 2
        if detectable(middle, rules.p_value, rules.power) <= -mean / spread:
            high = middle
        else:
            low = middle + 1
    return low


def holm(p_values: list[float | None]) -> list[float | None]:
    """Holm's step-down adjustment (1979) of a family of tests; None is no test and stays so."""
    order = sorted((i for i, p in enumerate(p_values) if p is not None), key=lambda i: p_values[i])
    adjusted: list[float | None] = [None] * len(p_values)
    worst = 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[i] = worst
    return adjusted


def outcome(p_sooner: float | None, p_later: float | None, p_value: float) -> str:
    """Better (lower), worse, or no difference shown; nothing where there was no test."""
    if p_sooner is None or p_later is None:
        return ""
    return BETTER if p_sooner < p_value else WORSE if p_later < p_value else UNDECIDED
