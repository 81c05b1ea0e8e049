"""Reasoning: what a model got right, how long it thought, and how it failed, on problems with known answers.

Raw columns are kept, an entry an answer; shares, intervals and comparisons are computed from them when asked. The headline is the cost
of a right answer: a model that writes faster and thinks longer may be the slower one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from r1q.benchmarks.chance import (
    Interval,
    detectable,
    effective_count,
    mcnemar,
    ratio_error,
    ratio_interval,
    share_interval,
)
from r1q.core.metrics import Estimate

TEMPERATURE, TOP_P, SEEDS = 0.6, 0.95, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Columns, one entry an answer, by problem and then seed. `thinking` and `answer` in tokens; `said` is what was answered.

    `truncated`: cut off by the token limit. `said` is empty where nothing was answered. `loop`: see `thinking.loops`. `waits`: words
    like «Wait» in the thoughts. `seconds`: own prefill and a share of every step; their sum is the whole time.
    """

    problem: tuple[int, ...]
    seed: tuple[int, ...]
    right: tuple[bool, ...]
    said: tuple[str, ...]
    thinking: tuple[int, ...]
    answer: tuple[int, ...]
    truncated: tuple[bool, ...]
    loop: tuple[bool, ...]
    waits: tuple[int, ...]
    seconds: tuple[float, ...]

    @classmethod
    def of(cls, records: Iterable[Mapping[str, Any]]) -> Self:
        """Return the columns of records that came in any order."""
        ordered = sorted(records, key=lambda record: (record["problem"], record["seed"]))
        return cls(**{f.name: tuple(record[f.name] for record in ordered) for f in dataclasses.fields(cls)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Against:
    """An artifact beside the float model on the same problems and seeds.

    `lost`: right answers that became wrong; `won`: the opposite; `p`: McNemar's. `difference`: of accuracy. `inflation`: thinking
    tokens over the float model's. `detectable`: the smallest difference of accuracy that this many answers would have shown.
    """

    pairs: int
    lost: int
    won: int
    p: float
    difference: Interval
    inflation: Interval | None
    detectable: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What the columns say. Shares are fractions of 1; `waits` per 1000 thinking tokens; `*_per_right` None where none is right.

    `detectable`: the smallest difference in accuracy from another, independent run of this size that would show.
    """

    problems: int
    answers: int
    accuracy: Interval
    thinking: Estimate
    thinking_p90: float
    truncated: float
    unanswered: float
    loops: float
    waits: float
    seconds_per_right: float | None
    tokens_per_right: float | None
    detectable: float
    kinds: Mapping[str, tuple[int, int]]
    against: Against | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reasoning:
    """Answers to `tasks` (a name; `tasks_sha256` its content), each problem of `kinds` asked with `seeds` seeds.

    `reference` names the float artifact of the same bench; `reference_right` and `reference_thinking` are its columns for the same
    answers. All three are None without one, and for the float artifact itself.
    """

    tasks: str
    tasks_sha256: str
    kinds: tuple[str, ...]
    seeds: int
    temperature: float
    top_p: float
    max_tokens: int
    sequences: int
    answers: Answers
    reference: str | None = None
    reference_right: tuple[bool, ...] | None = None
    reference_thinking: tuple[int, ...] | None = None

    def outcome(self) -> Outcome:
        """Return shares, intervals and the comparison. Raises ValueError without a single answer."""
        rows, problem = self.answers, np.asarray(self.answers.problem)
        count = len(problem)
        right, asked = _sums(rows.right, problem), _sums(np.ones(count), problem)
        thinking = _sums(rows.thinking, problem)
        accuracy = share_interval(right, asked)
        tokens, seconds, correct = sum(rows.thinking) + sum(rows.answer), sum(rows.seconds), sum(rows.right)
        error = ratio_error(thinking, asked)
        # Near 0 and 1 the plain error of a share vanishes; Wilson's middle does not.
        middle = (accuracy.low + accuracy.high) / 2
        spread = math.sqrt(2 * middle * (1 - middle) / effective_count(right, asked))
        return Outcome(
            problems=len(asked),
            answers=count,
            accuracy=accuracy,
            thinking=Estimate(value=float(np.mean(rows.thinking)), error=error if math.isfinite(error) else None),
            thinking_p90=float(np.quantile(rows.thinking, 0.9)),
            truncated=sum(rows.truncated) / count,
            unanswered=sum(not said for said in rows.said) / count,
            loops=sum(rows.loop) / count,
            waits=1000 * sum(rows.waits) / max(1, sum(rows.thinking)),
            seconds_per_right=seconds / correct if correct else None,
            tokens_per_right=tokens / correct if correct else None,
            detectable=detectable(spread, count),
            kinds=self._by_kind(),
            against=self._against(problem, asked),
        )

    def summary(self) -> dict[str, Any]:
        """Return the outcome as plain JSON values."""
        found = dataclasses.asdict(self.outcome())
        return {**found, "kinds": {kind: list(counts) for kind, counts in found["kinds"].items()}}

    def compared(self, name: str, reference: Answers) -> Reasoning:
        """Return this result with the columns of the float artifact `name` beside it; answers that it lacks are left out."""
        theirs = {pair: i for i, pair in enumerate(zip(reference.problem, reference.seed, strict=True))}
        places = [theirs.get(pair) for pair in zip(self.answers.problem, self.answers.seed, strict=True)]
        both = [(own, place) for own, place in enumerate(places) if place is not None]
        if not both:
            return self
        columns = dataclasses.asdict(self.answers)
        kept = Answers(**{key: tuple(column[own] for own, _ in both) for key, column in columns.items()})
        return dataclasses.replace(
            self,
            answers=kept,
            reference=name,
            reference_right=tuple(reference.right[place] for _, place in both),
            reference_thinking=tuple(reference.thinking[place] for _, place in both),
        )

    def _by_kind(self) -> dict[str, tuple[int, int]]:
        found: dict[str, tuple[int, int]] = {}
        for problem, right in zip(self.answers.problem, self.answers.right, strict=True):
            kind = self.kinds[problem]
            done, of = found.get(kind, (0, 0))
            found[kind] = (done + right, of + 1)
        return dict(sorted(found.items()))

    def _against(self, problem: NDArray[np.intp], asked: NDArray[np.float64]) -> Against | None:
        if self.reference_right is None or self.reference_thinking is None:
            return None
        own, other = np.asarray(self.answers.right), np.asarray(self.reference_right)
        lost, won = int((other & ~own).sum()), int((own & ~other).sum())
        change = _sums(own.astype(float) - other, problem)
        before = _sums(self.reference_thinking, problem)
        error = ratio_error(change, asked)
        return Against(
            pairs=len(own),
            lost=lost,
            won=won,
            p=mcnemar(lost, won),
            difference=ratio_interval(change, asked),
            inflation=ratio_interval(_sums(self.answers.thinking, problem), before) if (before > 0).all() else None,
            detectable=detectable(error, len(own)),
        )


def _sums(column: Sequence[float] | NDArray[Any], problem: NDArray[np.intp]) -> NDArray[np.float64]:
    """Return a column's sum for each problem that was answered, [problems]."""
    _, place = np.unique(problem, return_inverse=True)
    return np.bincount(place, weights=np.asarray(column, dtype=np.float64)).astype(np.float64)
