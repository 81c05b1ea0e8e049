"""Sharing a count out by weight, where some can give less than their share: the others give what is missing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction


def allocate(count: int, weights: Sequence[float], limits: Sequence[int | None]) -> list[int]:
    """Return whole numbers that sum to `count` in proportion to `weights`, none above its limit (None: no limit).

    Rounding follows the largest remainder, the first of equals. The sum is less than `count` only where every limit is reached.

    >>> allocate(10, [1, 1, 2], [None, 1, None])
    [3, 1, 6]
    """
    given = [0] * len(weights)
    active = [index for index, weight in enumerate(weights) if weight > 0]
    left = count
    while active:
        total = sum(Fraction(weights[index]) for index in active)
        ideal = {index: left * Fraction(weights[index]) / total for index in active}
        full = [index for index in active if (limit := limits[index]) is not None and limit <= ideal[index]]
        if not full:
            return _rounded(given, ideal, left)
        for index in full:
            given[index] = limits[index] or 0
            left -= given[index]
        active = [index for index in active if index not in full]
    return given


def _rounded(given: list[int], ideal: dict[int, Fraction], left: int) -> list[int]:
    # A limit is a whole number above its ideal share here, so rounding up cannot pass it.
    floors = {index: math.floor(share) for index, share in ideal.items()}
    order = sorted(ideal, key=lambda index: (floors[index] - ideal[index], index))
    for place, index in enumerate(order):
        given[index] = floors[index] + (place < left - sum(floors.values()))
    return given


def fill(count: int, weights: Sequence[float], get: Callable[[int, int], int]) -> list[int]:
    """Return how much each gives so that they give `count` together, by weight.

    `get(index, need)` returns how much of `need` there is; where that is less, there is no more, and the others are asked again.
    """
    limits: list[int | None] = [None] * len(weights)
    while True:
        wanted = allocate(count, weights, limits)
        missing = False
        for index, need in enumerate(wanted):
            held = get(index, need)
            if held < need:
                limits[index], missing = held, True
        if not missing:
            return wanted
