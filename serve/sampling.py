"""Drawing tokens for many sequences at once: temperature, then the nucleus, without sorting a vocabulary.

Same order and same nucleus as `calibration/sampling.py`, which draws for one; here the work over the vocabulary is done for all rows
together in float32, and only the few tokens that can be in the nucleus are sorted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from r1q.core.errors import InputError

Floats = NDArray[np.float32]
COLDEST = 1e-4  # below it the likeliest token is taken: its reciprocal soon leaves float32, and no second token would be drawn
# Candidates are first sought within this factor of the likeliest token. A speed-up: where they do not reach top_p, the bound is exact.
_NEAR = np.float32(1e-4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How one request wants its tokens drawn; the penalties and biases are OpenAI's, added to the logits before the temperature."""

    temperature: float = 0.6
    top_p: float = 0.95
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    biases: Mapping[int, float] = field(default_factory=dict)

    @property
    def penalizes(self) -> bool:
        """Whether tokens already said matter."""
        return bool(self.frequency_penalty or self.presence_penalty)


def draw_tokens(
    logits: Floats,
    settings: Sequence[Sampling],
    chances: Sequence[np.random.Generator],
    said: Sequence[Mapping[int, int]] = (),
) -> NDArray[np.int64]:
    """Return one token for each row of `logits` [rows, vocab], which is used up as working space.

    `chances` gives each row's source of chance, from which one number is taken where the temperature is not next to 0; `said` how
    often each row's request has said a token so far. Raises `InputError` for logits that are not finite.
    """
    for row, wish in enumerate(settings):
        if wish.biases or wish.penalizes:
            _bias(logits[row], wish, said[row])
    best: NDArray[np.int64] = logits.argmax(axis=1)
    highest = logits[np.arange(len(logits)), best]
    # A NaN is its row's maximum to argmax, and so is an infinity: one number a row tells.
    if not np.isfinite(highest).all():
        raise InputError("the model made logits that are not finite; the file is broken, take another")
    warm = [row for row, wish in enumerate(settings) if wish.temperature >= COLDEST]
    if not warm:
        return best
    rows = logits if len(warm) == len(logits) else logits[warm]
    rows -= highest[warm, None]
    rows *= np.array([1 / settings[row].temperature for row in warm], dtype=np.float32)[:, None]
    np.exp(rows, out=rows)
    whole = rows.sum(axis=1, dtype=np.float64)
    points = np.array([chances[row].random() for row in warm])
    shares = np.array([settings[row].top_p for row in warm])
    best[warm] = _draw_rows(rows, whole, shares, points)
    return best


def _draw_rows(
    weights: Floats, totals: NDArray[np.float64], top_p: NDArray[np.float64], points: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Return for each row the token at `points` [rows] in [0, 1) of its nucleus of `weights` [rows, vocab].

    `totals` are the rows' sums; each row's largest weight is 1. A row's token does not depend on the rows beside it.
    """
    count, vocab = weights.shape
    drawn = np.empty(count, dtype=np.int64)
    wanted = top_p * totals
    # A flat search and a division of the few that are found: numpy's own search in two dimensions is several times slower.
    rows, tokens = np.divmod(np.flatnonzero(weights >= _NEAR), vocab)
    near = weights[rows, tokens]
    short = (np.bincount(rows, weights=near, minlength=count) < wanted) | (top_p >= 1)
    order = np.lexsort((-near, rows))
    starts = np.searchsorted(rows, np.arange(count + 1))
    sizes = np.diff(starts)
    # Each row's candidates, the likeliest first, and nothing after the last: summed along the row, as it would be alone.
    ranks = np.arange(len(near)) - starts[rows]
    table = np.zeros((count, int(sizes.max())), dtype=np.float64)
    table[rows, ranks] = near[order]
    sums = np.cumsum(table, axis=1)
    kept = np.minimum((sums < wanted[:, None]).sum(axis=1) + 1, sizes)
    edges = points * sums[np.arange(count), kept - 1]
    chosen = np.minimum((sums <= edges[:, None]).sum(axis=1), kept - 1)
    drawn[:] = tokens[order[starts[:-1] + chosen]]
    for row in np.flatnonzero(short):
        drawn[row] = _draw(weights[row], float(totals[row]), float(top_p[row]), float(points[row]))
    return drawn


def _draw(weights: Floats, total: float, top_p: float, point: float) -> int:
    """Return the token at `point` in [0, 1) of the nucleus of `weights` [vocab], whose sum is `total`, where it is a wide one."""
    if top_p >= 1:
        sums = np.cumsum(weights, dtype=np.float64)
        return min(int(np.searchsorted(sums, point * sums[-1], side="right")), len(weights) - 1)
    wanted = top_p * total
    # All tokens rarer than this have less than 1 − top_p together, so the nucleus lies within the others.
    likely = np.flatnonzero(weights >= (1 - top_p) * total / len(weights))
    near = weights[likely]
    order = np.argsort(-near, kind="stable")
    sums = np.cumsum(near[order], dtype=np.float64)
    count = min(int(np.searchsorted(sums, wanted)) + 1, len(sums))
    chosen = int(np.searchsorted(sums[:count], point * sums[count - 1], side="right"))
    return int(likely[order[min(chosen, count - 1)]])


def _bias(row: Floats, wish: Sampling, said: Mapping[int, int]) -> None:
    if wish.penalizes and said:
        tokens = np.fromiter(said.keys(), dtype=np.int64, count=len(said))
        counts = np.fromiter(said.values(), dtype=np.float32, count=len(said))
        row[tokens] -= np.float32(wish.frequency_penalty) * counts + np.float32(wish.presence_penalty)
    for token, bias in wish.biases.items():
        row[token] += np.float32(bias)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogProbability:
    """What the model thought of the token that was drawn, at temperature 1 and before any bias; `top` the likeliest, best first."""

    token: int
    value: float
    top: tuple[tuple[int, float], ...]


def log_probability(logits: Floats, token: int, top: int) -> LogProbability:
    """Return the natural log-probability of `token` under `logits` [vocab], and of the `top` likeliest tokens."""
    values = logits.astype(np.float64)
    highest = values.max()
    whole = highest + np.log(np.exp(values - highest).sum())
    leaders = np.argpartition(values, -top)[-top:] if 0 < top < len(values) else np.arange(len(values))[: top or 0]
    leaders = leaders[np.argsort(-values[leaders], kind="stable")]
    best = tuple((int(leader), float(values[leader] - whole)) for leader in leaders)
    return LogProbability(token=token, value=float(values[token] - whole), top=best)
