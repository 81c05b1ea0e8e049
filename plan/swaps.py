"""Swaps: after the knapsack, exchanges of room between two tensors are tried and measured; what lowers the divergence is kept.

The knapsack believes its predictions, which are good to some ten percent a tensor. An exchange is worth trying where one tensor would
gain about what another would lose and both are much: there a small error of the prediction decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from r1q.core.metrics import score
from r1q.core.qtensor import QuantizedTensor
from r1q.core.scheme import Scheme
from r1q.core.tensors import TensorSpec
from r1q.models.config import ModelConfig
from r1q.models.forward import logits
from r1q.models.source import ModelSource
from r1q.quantize.rtn import rtn

Tokens = NDArray[np.int64]
Floats = NDArray[np.float32]
_DOUBT = 0.3  # of what a step is predicted to change: how far the prediction may be off
_SLAB = 1 << 22  # weights in float32 at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One grid that a tensor could have: the bytes it takes, and the nats a token that it is predicted to cost."""

    scheme: Scheme
    bytes: int
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """Matrices that have one grid: each with the importance of its columns, and the options of all together."""

    members: Mapping[TensorSpec, Floats]
    options: tuple[Option, ...]

    def __add__(self, other: Stack) -> Stack:
        """Return both as one. Their options are of the same schemes, in the same order."""
        options = tuple(
            replace(one, bytes=one.bytes + two.bytes, loss=one.loss + two.loss)
            for one, two in zip(self.options, other.options, strict=True)
        )
        return Stack(members={**self.members, **other.members}, options=options)


@dataclass(frozen=True, slots=True, kw_only=True)
class Swap:
    """One exchange: what two stacks had and would have, and the measured divergence without and with it, in nats a token.

    It was `kept` where the divergence fell and the artifact, padding and all, stays within its budget.
    """

    was: Mapping[str, Option]
    to: Mapping[str, Option]
    before: float
    after: float
    kept: bool

    def __str__(self) -> str:
        parts = [f"{key} {self.was[key].scheme} to {new.scheme}" for key, new in self.to.items()]
        return f"{', '.join(parts)}: {self.before:.5f} to {self.after:.5f} nats a token"


def swapped(
    source: ModelSource,
    tokens: Tokens,
    stacks: Mapping[str, Stack],
    chosen: Mapping[str, Option],
    count: int,
    fits: Callable[[Mapping[str, Option]], bool],
) -> Iterator[Swap]:
    """Measure at most `count` exchanges of a choice, each on top of those before it that were kept, and yield them.

    `fits` says whether a choice keeps the budget. `tokens` [windows, length] are text that nothing was chosen by. The quantized model
    is in memory, a byte a weight, and the float model's logits of half the tokens.
    """
    state, tried = dict(chosen), set[frozenset[tuple[str, Scheme]]]()
    truth = np.concatenate(list(logits(source, tokens, first=tokens.shape[1] // 2)))
    rounded = _Rounded(source, stacks, state)
    before = _divergence(rounded, tokens, truth)
    for _ in range(count):
        found = _next(stacks, state, tried)
        if found is None:
            return
        tried.add(_key(found))
        held = rounded.exchange(found)
        after = _divergence(rounded, tokens, truth)
        kept = after < before and fits(state | found)
        swap = Swap(was={key: state[key] for key in found}, to=found, before=before, after=after, kept=kept)
        if kept:
            state |= found
            before = after
        else:
            rounded.tensors_now |= held
        yield swap


def _key(found: Mapping[str, Option]) -> frozenset[tuple[str, Scheme]]:
    return frozenset((key, option.scheme) for key, option in found.items())


def _next(
    stacks: Mapping[str, Stack], state: Mapping[str, Option], tried: set[frozenset[tuple[str, Scheme]]]
) -> dict[str, Option] | None:
    """Return the exchange of no more bytes most likely to help: of least predicted change, less what predictions may be off by."""
    up, down = [], []
    for key, stack in stacks.items():
        now = state[key]
        for option in stack.options:
            more, change = option.bytes - now.bytes, option.loss - now.loss
            if change < 0 < more:
                up.append((key, option, more, change))
            elif more < 0 < change:
                down.append((key, option, more, change))
    best, least = None, math.inf
    for key, option, more, change in up:
        for other, less, fewer, cost in down:
            if other == key or more + fewer > 0:
                continue
            hope = change + cost - _DOUBT * math.hypot(change, cost)
            if hope < least:
                found = {key: option, other: less}
                if _key(found) not in tried:
                    best, least = found, hope
    return best


class _Rounded:
    """The model as a choice rounds it: codes in memory, values when they are read."""

    def __init__(self, source: ModelSource, stacks: Mapping[str, Stack], state: Mapping[str, Option]) -> None:
        self._source, self._stacks = source, stacks
        self.tensors_now: dict[str, list[QuantizedTensor]] = {}
        self.exchange(state)

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        return tuple(self._source.tensors)

    @property
    def config(self) -> ModelConfig:
        return self._source.config

    def exchange(self, options: Mapping[str, Option]) -> dict[str, list[QuantizedTensor]]:
        """Round some stacks anew; return the codes that were there."""
        held: dict[str, list[QuantizedTensor]] = {}
        for key, option in options.items():
            for spec, weighed in self._stacks[key].members.items():
                if spec.name in self.tensors_now:
                    held[spec.name] = self.tensors_now[spec.name]
                self.tensors_now[spec.name] = self._codes(spec, option.scheme, weighed)
        return held

    def _codes(self, spec: TensorSpec, scheme: Scheme, weighed: Floats) -> list[QuantizedTensor]:
        if scheme.facts.family == "float":
            return []
        step = _step(spec)
        rows = range(0, spec.rows, step)
        read = (self._source.read_rows(spec.name, row, min(row + step, spec.rows)) for row in rows)
        return [rtn(np.ascontiguousarray(weights), scheme, weighed) for weights in read]

    def read_rows(self, name: str, start: int, stop: int) -> Floats:
        slabs = self.tensors_now.get(name)
        if not slabs:
            return self._source.read_rows(name, start, stop)
        step = len(slabs[0].codes)
        parts = [slab.dequantize() for slab in slabs[start // step : -(-stop // step)]]
        first = start // step * step
        return np.concatenate(parts)[start - first : stop - first]


def _step(spec: TensorSpec) -> int:
    return max(1, _SLAB // spec.columns)


def _divergence(model: _Rounded, tokens: Tokens, truth: Floats) -> float:
    """Return the mean divergence from the float model's logits [tokens, vocab] over the second half of each window."""
    half, total = tokens.shape[1] // 2, 0.0
    for number, given in enumerate(logits(model, tokens, first=half)):
        place = slice(number * len(given), (number + 1) * len(given))
        found = score(given, tokens[number, half:], truth[place]).kld
        assert found is not None
        total += float(found.sum())
    return total / len(truth)
