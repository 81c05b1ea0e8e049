"""A lesson: what one routed expert is seen reading, and the two stages that are made of it. It needs nothing of the other experts.

So lessons can be taken in any order, and by any process that has the rows. Only an expert that saw too little for second moments
leans on the others: it is coded by the mean squares of its inputs, shrunk toward the layer's mean:
(Σ own + few · mean) / (own tokens + few).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from r1q.calibration.moments import add_product, add_second_moment
from r1q.calibration.stage import Stage
from r1q.models import moe
from r1q.models.linear import Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Others:
    """What the experts of a layer read: `mean` squares [hidden_size], and Σx² of what down projections read [inner], of `tokens`."""

    mean: Tensor
    inner: Tensor
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """What `expert` is seen reading: `rows` of the coded model and, beside, of the float one (`exact`), both [tokens, hidden_size].

    `tokens` are the places of its rows among them, None where all are its own; they are summed `tile` at a time. Where they are
    fewer than `few`, too few for second moments, there are the `others` to lean on. `note` says what was done otherwise than asked.
    """

    expert: int
    rows: Tensor
    exact: Tensor | None
    tokens: Tensor | None
    tile: int
    few: int
    note: str
    others: Others | None = None

    @property
    def count(self) -> int:
        """Number of tokens."""
        return len(self.rows if self.tokens is None else self.tokens)

    def tiles(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield some rows at a time of both models, float32, in memory of their own: how it lies can decide last bits."""
        for start in range(0, self.count, self.tile):
            here = slice(start, start + self.tile)
            exact = None if self.exact is None else _rows(self.exact, self.tokens, here)
            yield _rows(self.rows, self.tokens, here), exact


def first_stage(lesson: Lesson, dtype: torch.dtype) -> Stage:
    """Return the statistics of what gate and up read, multiplied in `dtype`."""
    gate, up, _ = moe.kinds(lesson.expert)
    sums = _Sums(lesson.rows.shape[-1], lesson, dtype)
    for rows, wanted in lesson.tiles():
        sums.add(rows, wanted)
    importance = None if lesson.others is None else _shrunk(sums.squares, lesson.others.mean, lesson)
    return sums.stage((gate, up), importance, lesson.note)


def second_stage(
    lesson: Lesson, coded: Weights, exact: Mapping[str, Tensor], dtype: torch.dtype
) -> tuple[Stage, Tensor]:
    """Return the statistics of what down reads, and its Σx² [inner].

    `coded` has gate and up as coded; `exact`, where the lesson has the float model's rows, that model's matrices.
    """
    gate, _, down = moe.kinds(lesson.expert)
    sums = _Sums(len(coded[f"{gate}.weight"]), lesson, dtype)
    for rows, wanted in lesson.tiles():
        inner = moe.expert_inner(coded, lesson.expert, rows)
        sums.add(inner, None if wanted is None else moe.expert_inner(exact, lesson.expert, wanted))
    others, importance = lesson.others, None
    if others is not None:
        tokens = others.tokens + lesson.count
        mean = (others.inner + sums.squares) / tokens if tokens else torch.ones_like(sums.squares)
        importance = _shrunk(sums.squares, mean, lesson)
    return sums.stage((down,), importance, ""), sums.squares


class _Sums:
    """Sums over a lesson's tokens: Σx², and where there are enough of them xᵀx and the drift."""

    def __init__(self, columns: int, lesson: Lesson, dtype: torch.dtype) -> None:
        device, square = lesson.rows.device, (columns if lesson.others is None else 0, columns)
        self._dtype, self._lesson = dtype, lesson
        self.squares = torch.zeros(columns, dtype=torch.float64, device=device)
        self.moment = torch.zeros(square, device=device)
        self.drift = None if lesson.exact is None else torch.zeros(square, device=device)

    def add(self, inputs: Tensor, wanted: Tensor | None) -> None:
        """Add some tokens' `inputs`, and what the float model reads there."""
        self.squares += inputs.square().sum(0, dtype=torch.float64)
        if self._lesson.others is not None:
            return
        add_second_moment(self.moment, inputs, self._dtype)
        if self.drift is not None and wanted is not None:
            add_product(self.drift, wanted - inputs, inputs, self._dtype)

    def stage(self, kinds: tuple[str, ...], importance: Tensor | None, note: str) -> Stage:
        """Return the stage of these sums: a plain one with an `importance`."""
        tokens = self._lesson.count
        if importance is None:
            return Stage(kinds=kinds, tokens=tokens, moment=self.moment, drift=self.drift, note=note)
        return Stage(kinds=kinds, tokens=tokens, moment=self.moment, importance=importance, plain=True, note=note)


def _rows(rows: Tensor, tokens: Tensor | None, here: slice) -> Tensor:
    return rows[here].to(torch.float32, copy=True) if tokens is None else rows[tokens[here]].float()


def _shrunk(squares: Tensor, mean: Tensor, lesson: Lesson) -> Tensor:
    few = max(lesson.few, 1)
    return (squares + few * mean) / (lesson.count + few)
