"""Chance: how sure a share, a difference and a ratio are, when every problem was answered several times.

Answers to one problem resemble each other, so problems and not answers are what is drawn at random: intervals come from the scatter
between problems. Everything is 95 %, two-sided, and the same numbers always give the same interval.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]

Z = 1.959963984540054  # two-sided 5 %
POWER = 0.8416212335729143  # of a normal: seen in 80 % of repetitions
RESAMPLES, PORTION = 4000, 500
SURE_FLIPS = 6  # flips all in one direction that the exact test calls significant: 2·2⁻⁶ = 0.03, 2·2⁻⁵ = 0.06


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A value and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def wilson(share: float, count: float) -> Interval:
    """Return Wilson's score interval of a share out of `count` independent tries (Wilson 1927); `count` need not be whole.

    >>> found = wilson(81 / 263, 263)
    >>> round(found.low, 4), round(found.high, 4)
    (0.2553, 0.3662)
    """
    if count <= 0:
        raise ValueError("no tries")
    middle = (share + Z * Z / (2 * count)) / (1 + Z * Z / count)
    half = Z / (1 + Z * Z / count) * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    return Interval(value=share, low=max(0.0, middle - half), high=min(1.0, middle + half))


def ratio_error(top: Doubles, bottom: Doubles) -> float:
    """Return the standard error of Σtop / Σbottom, both [problems], by the scatter between problems (linearized).

    Infinite for a single problem, which tells nothing of the others.
    """
    count = len(top)
    if count < 2:
        return math.inf
    residual = top - top.sum() / bottom.sum() * bottom
    return float(math.sqrt(count / (count - 1) * np.square(residual).sum()) / bottom.sum())


def effective_count(right: Doubles, asked: Doubles) -> float:
    """Return how many independent tries the answers are worth: `right` of `asked` answers, [problems] each.

    It is p(1 − p) over the variance found between problems (Korn and Graubard 1998), and lies between the number of problems
    (answers to one are all alike) and of answers (they are independent). Where all are right or all wrong nothing is known of that,
    and it is the number of problems.
    """
    share = float(right.sum() / asked.sum())
    error = ratio_error(right, asked)
    fewest, most = float(len(asked)), float(asked.sum())
    if not 0 < share < 1:
        return fewest
    return most if error == 0 else min(most, max(fewest, share * (1 - share) / error**2))


def share_interval(right: Doubles, asked: Doubles) -> Interval:
    """Return the share Σright / Σasked, [problems] each, with Wilson's interval for the effective number of tries."""
    return wilson(float(right.sum() / asked.sum()), effective_count(right, asked))


def ratio_interval(top: Doubles, bottom: Doubles) -> Interval:
    """Return Σtop / Σbottom, [problems] each, with the percentile interval of a bootstrap over problems.

    Raises ValueError where `bottom` is not positive throughout.
    """
    if len(top) != len(bottom) or not len(top) or (bottom <= 0).any():
        raise ValueError("a ratio needs a positive denominator for every problem")
    count = len(top)
    rng = np.random.default_rng(20)
    found = np.empty(RESAMPLES)
    for start in range(0, RESAMPLES, PORTION):
        drawn = rng.multinomial(count, np.full(count, 1 / count), size=PORTION)
        found[start : start + PORTION] = (drawn @ top) / (drawn @ bottom)
    low, high = np.quantile(found, (0.025, 0.975))
    return Interval(value=float(top.sum() / bottom.sum()), low=float(low), high=float(high))


def mcnemar(lost: int, won: int) -> float:
    """Return the exact two-sided p of McNemar's test: `lost` right answers became wrong, `won` wrong ones right.

    If neither were likelier, each flip would be a coin's. Pairs are taken as independent; answers to one problem are not quite, so
    the true p is somewhat larger.

    >>> mcnemar(6, 0), mcnemar(3, 3)
    (0.03125, 1.0)
    """
    flips, fewer = lost + won, min(lost, won)
    # Whole numbers to the last step: 2⁻ⁿ is nothing to a float long before n runs out.
    tail = sum(math.comb(flips, k) for k in range(fewer + 1))
    return min(1.0, float(Fraction(2 * tail, 2**flips)))


def detectable(error: float, pairs: int) -> float:
    """Return the smallest true difference that a run of this size finds in four of five repetitions (5 % two-sided).

    `error` is the standard error of the difference seen. Where hardly anything flipped it says nothing, and the six one-sided flips
    that the exact test needs are what counts.
    """
    return min(1.0, max((Z + POWER) * error, SURE_FLIPS / pairs))
