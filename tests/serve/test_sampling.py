"""Drawing for many rows: against the drawing for one, and against the chances that were asked for."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1q.calibration.sampling import draw_token
from r1q.core.errors import InputError
from r1q.serve.sampling import Sampling, draw_tokens, log_probability


def sources(count: int, seed: int = 5) -> list[np.random.Generator]:
    return [np.random.default_rng([seed, row]) for row in range(count)]


@given(
    seed=st.integers(0, 1000),
    rows=st.integers(1, 5),
    spread=st.sampled_from([0.1, 1.0, 6.0, 30.0]),
    temperature=st.sampled_from([0.0, 0.3, 0.6, 1.0, 2.0]),
    top_p=st.sampled_from([0.05, 0.5, 0.95, 1.0]),
)
def test_rows_are_drawn_as_one_by_one(seed: int, rows: int, spread: float, temperature: float, top_p: float) -> None:
    logits = (np.random.default_rng(seed).standard_normal((rows, 400)) * spread).astype(np.float32)
    # Mixed wishes in one batch: every second row takes the likeliest.
    wishes = [Sampling(temperature=temperature * (row % 2 == 0), top_p=top_p) for row in range(rows)]
    drawn = draw_tokens(logits.copy(), wishes, sources(rows, seed))
    for row, wish in enumerate(wishes):
        nudged = set()
        for nudge in (0.0, -1e-5, 1e-5):  # float32 sums may put a draw on the other side of a token's edge
            chance = _Fixed(sources(rows, seed)[row].random() + nudge)
            nudged.add(draw_token(logits[row], chance, temperature=wish.temperature, top_p=top_p))  # type: ignore[arg-type]
        if top_p < 1 or not wish.temperature:
            assert int(drawn[row]) in nudged


class _Fixed:
    """A source of one number, for draws next to an edge."""

    def __init__(self, value: float) -> None:
        self._value = min(max(value, 0.0), 1 - 1e-12)

    def random(self) -> float:
        return self._value


@pytest.mark.parametrize(
    ("temperature", "top_p", "chances"),
    [
        (1.0, 1.0, [0.15, 0.5, 0.05, 0.3]),
        (1.0, 0.79, [0, 0.625, 0, 0.375]),
        (0.5, 1.0, [9 / 146, 100 / 146, 1 / 146, 36 / 146]),
    ],
)
def test_tokens_come_as_often_as_they_should(temperature: float, top_p: float, chances: list[float]) -> None:
    rows, rounds = 50, 160
    logits = np.log(np.array([0.15, 0.5, 0.05, 0.3], np.float32))
    chance = sources(rows)
    wishes = [Sampling(temperature=temperature, top_p=top_p)] * rows
    drawn = [draw_tokens(np.tile(logits, (rows, 1)), wishes, chance) for _ in range(rounds)]
    seen = np.bincount(np.concatenate(drawn), minlength=4) / (rows * rounds)
    bound = 4.5 * np.sqrt(np.array(chances) * (1 - np.array(chances)) / (rows * rounds))  # one run in 100,000 leaves it
    assert (np.abs(seen - chances) <= bound).all()


def test_a_flat_distribution_is_drawn_from_whole() -> None:
    # Nothing is near the likeliest here but one spike: the nucleus of 0.95 needs nearly all of the thin tail.
    logits = np.zeros((1, 5000), np.float32)
    logits[0, 7] = 10.0
    share = math.exp(10) / (math.exp(10) + 4999)
    chance = np.random.default_rng(1)
    drawn = [int(draw_tokens(logits.copy(), [Sampling(temperature=1.0)], [chance])[0]) for _ in range(400)]
    spikes = drawn.count(7) / 400
    assert abs(spikes - share / 0.95) < 4.5 * math.sqrt(0.25 / 400)
    assert len(set(drawn)) > 20


def test_penalties_and_biases_move_logits_as_openai_says() -> None:
    logits = np.array([[3.0, 2.9, 0.0]], np.float32)
    greedy = [np.random.default_rng(0)]

    def best(**wish: object) -> int:
        asked = Sampling(temperature=0, **wish)  # type: ignore[arg-type]
        return int(draw_tokens(logits.copy(), [asked], greedy, [{0: 2, 2: 1}])[0])

    assert best() == 0
    assert best(presence_penalty=0.2) == 1  # 2.8 against 2.9
    assert best(frequency_penalty=0.04) == 0  # 2.92: twice 0.04 is not enough
    assert best(frequency_penalty=0.06) == 1
    assert best(biases={2: 100.0}) == 2


def test_a_temperature_next_to_nothing_takes_the_likeliest() -> None:
    # Found by schemathesis: its reciprocal is no float32, and one such request failed everybody's.
    logits = np.array([[1.0, 3.0, 2.0]] * 2, np.float32)
    drawn = draw_tokens(logits, [Sampling(temperature=1.7e-245), Sampling(temperature=1e-4)], sources(2))
    assert drawn.tolist() == [1, 1]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_stop_it(bad: float) -> None:
    with pytest.raises(InputError, match="not finite"):
        draw_tokens(np.array([[0, 1], [0, bad]], np.float32), [Sampling()] * 2, sources(2))


def test_log_probabilities_are_those_of_the_softmax() -> None:
    found = log_probability(np.log(np.array([0.15, 0.5, 0.05, 0.3], np.float32)) + 7, 0, 2)
    assert found.value == pytest.approx(math.log(0.15), abs=1e-6)
    assert [token for token, _ in found.top] == [1, 3]
    assert [value for _, value in found.top] == pytest.approx([math.log(0.5), math.log(0.3)], abs=1e-6)
    assert log_probability(np.zeros(4, np.float32), 2, 0).top == ()
