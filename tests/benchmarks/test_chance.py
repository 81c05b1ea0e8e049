"""Chance: published values, slow obvious ways to the same numbers, and intervals that hold what they promise."""

import itertools
import math

import numpy as np
import pytest

from r1q.benchmarks.chance import (
    detectable,
    effective_count,
    mcnemar,
    ratio_error,
    ratio_interval,
    share_interval,
    wilson,
)


@pytest.mark.parametrize(
    ("right", "of", "low", "high"),
    # Newcombe (Statistics in Medicine 17, 1998), table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_is_newcombes_third_method(right: int, of: int, low: float, high: float) -> None:
    found = wilson(right / of, of)
    assert found.low == pytest.approx(low, abs=5e-5)
    assert found.high == pytest.approx(high, abs=5e-5)


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (0, 6), (2, 7), (5, 5), (3, 11)])
def test_mcnemar_is_the_share_of_coin_rows_as_lopsided(lost: int, won: int) -> None:
    coins = itertools.product((0, 1), repeat=lost + won)
    lopsided = [abs(2 * sum(row) - lost - won) >= abs(lost - won) for row in coins]
    assert mcnemar(lost, won) == pytest.approx(sum(lopsided) / len(lopsided))


def test_mcnemar_does_not_overflow() -> None:
    assert mcnemar(2000, 2000) == 1.0
    assert 0 <= mcnemar(4000, 100) < 1e-200


def test_answers_that_repeat_each_other_count_once() -> None:
    rng = np.random.default_rng(1)
    right = (rng.random(400) < 0.7).astype(float)
    alike = effective_count(3 * right, np.full(400, 3.0))
    assert alike == 400
    apart = effective_count(rng.binomial(3, 0.7, 400).astype(float), np.full(400, 3.0))
    assert 900 < apart <= 1200
    assert effective_count(np.full(400, 3.0), np.full(400, 3.0)) == 400


def test_one_answer_a_problem_has_the_binomial_error() -> None:
    right, asked = np.array([1.0, 0, 1, 1, 0]), np.ones(5)
    assert ratio_error(right, asked) == pytest.approx(math.sqrt(0.6 * 0.4 / 4))
    assert ratio_error(right[:1], asked[:1]) == math.inf


def test_the_interval_of_a_share_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    held = 0
    for _ in range(500):
        ease = rng.beta(2, 1, 60)  # problems are easy or hard, and three answers to one resemble each other
        found = share_interval(rng.binomial(3, ease).astype(float), np.full(60, 3.0))
        held += found.low <= 2 / 3 <= found.high
    # 95 % of 500 is 475 ± 5; intervals from 180 independent answers would hold it in about 88 %, which is 440.
    assert 460 <= held <= 495


def test_a_ratios_interval_is_its_linearized_error_where_problems_are_many() -> None:
    rng = np.random.default_rng(3)
    bottom = rng.gamma(5, 20, 500)
    top = 1.3 * bottom + rng.normal(0, 15, 500)
    found = ratio_interval(top, bottom)
    assert found.value == pytest.approx(top.sum() / bottom.sum())
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * ratio_error(top, bottom), rel=0.1)
    assert ratio_interval(top, bottom) == found
    assert ratio_interval(top[:1], bottom[:1]).low == ratio_interval(top[:1], bottom[:1]).high
    with pytest.raises(ValueError, match="positive"):
        ratio_interval(top, np.zeros(500))


def test_what_can_be_seen_is_bounded_by_the_exact_test() -> None:
    assert detectable(0.01, 10_000) == pytest.approx(0.028, abs=5e-4)
    assert detectable(0.0, 600) == 0.01
    assert mcnemar(6, 0) < 0.05 < mcnemar(5, 0)
    assert detectable(math.inf, 3) == 1.0


def test_the_smallest_difference_is_found_four_times_in_five() -> None:
    rng = np.random.default_rng(4)
    problems, lost, won = 400, 0.06, 0.02
    flips = rng.choice([-1.0, 0, 1], p=[lost, 1 - lost - won, won], size=(400, problems))
    smallest = detectable(math.sqrt((lost + won - (lost - won) ** 2) / problems), problems)
    assert smallest == pytest.approx(lost - won, rel=0.1)  # so that this truth is one that is just about seen
    seen = sum(mcnemar(int((row < 0).sum()), int((row > 0).sum())) < 0.05 for row in flips) / len(flips)
    assert 0.65 < seen < 0.9
