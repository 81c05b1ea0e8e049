"""Drawing tokens: against an obvious slow version, and against the chances that were asked for."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from r1q.calibration.sampling import draw_token
from r1q.core.errors import InputError

HALVES = np.log(np.array([0.15, 0.5, 0.05, 0.3], np.float32))


def slow_nucleus(logits: NDArray[np.float32], temperature: float, top_p: float) -> dict[int, float]:
    """Return the chance of each token of the nucleus: sort all, add until it is enough, share out again."""
    top = float(max(logits))
    powers = {token: math.exp((x - top) / temperature) for token, x in enumerate(logits.tolist())}
    whole = sum(powers.values())
    kept: dict[int, float] = {}
    for token in sorted(powers, key=lambda token: (-powers[token], token)):
        if sum(kept.values()) >= top_p:
            break
        kept[token] = powers[token] / whole
    return {token: chance / sum(kept.values()) for token, chance in kept.items()}


@given(
    logits=st.lists(st.floats(-20, 20, width=16), min_size=1, max_size=30),
    temperature=st.sampled_from([0.3, 0.6, 1.0, 2.0]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.95, 1.0]),
    seed=st.integers(0, 1000),
)
def test_a_draw_is_the_slow_versions_draw(logits: list[float], temperature: float, top_p: float, seed: int) -> None:
    values = np.array(logits, np.float32)
    kept = slow_nucleus(values, temperature, top_p)
    token = draw_token(values, np.random.default_rng(seed), temperature=temperature, top_p=top_p)
    assert token in kept
    point, before = np.random.default_rng(seed).random(), 0.0
    for other, chance in kept.items():
        if other == token:
            # The one whose stretch of [0, 1) holds the number drawn, up to the rounding of the sums.
            assert before - 1e-9 <= point <= before + chance + 1e-9
        before += chance


@pytest.mark.parametrize(
    ("temperature", "top_p", "chances"),
    [
        (1.0, 1.0, [0.15, 0.5, 0.05, 0.3]),
        (1.0, 0.79, [0, 0.625, 0, 0.375]),
        (0.5, 1.0, [9 / 146, 100 / 146, 1 / 146, 36 / 146]),
        (1.0, 0.01, [0, 1, 0, 0]),
        (0.0, 0.95, [0, 1, 0, 0]),
    ],
)
def test_tokens_come_as_often_as_they_should(temperature: float, top_p: float, chances: list[float]) -> None:
    rng, count = np.random.default_rng(11), 8000
    drawn = [draw_token(HALVES, rng, temperature=temperature, top_p=top_p) for _ in range(count)]
    seen = np.bincount(drawn, minlength=4) / count
    bound = 4.5 * np.sqrt(np.array(chances) * (1 - np.array(chances)) / count)  # one run in 100,000 leaves it by chance
    assert (np.abs(seen - chances) <= bound).all()


def test_of_a_large_vocabulary_only_the_nucleus_is_drawn() -> None:
    logits = np.full(150_000, -8.0, np.float32)
    logits[[7, 149_999]] = [4.0, 3.0]
    rng = np.random.default_rng(0)
    kept = slow_nucleus(logits, 0.6, 0.95)
    assert {draw_token(logits, rng, temperature=0.6, top_p=0.95) for _ in range(300)} == set(kept) == {7, 149_999}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_stop_it(bad: float) -> None:
    with pytest.raises(InputError, match="not finite"):
        draw_token(np.array([0, bad], np.float32), np.random.default_rng(0), temperature=0.6, top_p=0.95)
