"""GPTQ on integer groups wider than a panel, whole rows above all: the same rehearsals, each of them panel by panel.

Every scale on trial codes the whole group, with the feedback from panel to panel as matrix products, and each row keeps its best. One
kernel over such a group, as over narrow ones, would read all of R again for every batch of rows, and for every scale on trial.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from r1q.core.integers import middle
from r1q.core.qtensor import Codes, Floats
from r1q.core.scheme import Scheme
from r1q.quantize.gptq import WIDTH, Panel, code_rows, panel_of
from r1q.quantize.gptq.coders import TRIES, symmetric_levels
from r1q.quantize.gptq.factor import Factor
from r1q.quantize.gptq.lane_coding import UNFIT
from r1q.quantize.gptq.single_scale import SPREAD, code_given_scale
from r1q.quantize.grids.scale_and_minimum import FIRST, STEP, STEPS, search_offset
from r1q.quantize.grids.symmetric_scale import search_symmetric


class Coded(NamedTuple):
    """A group of columns coded, row by row: codes and errors [rows, size]; step, floor and loss [rows, 1]."""

    codes: Codes
    errors: Floats
    step: Floats
    floor: Floats
    loss: Floats


def code_wide_group(weights: Floats, errors: Tensor, factor: Factor, scheme: Scheme, threads: int) -> Coded:
    """Code the group of columns [rows, size] that follows the columns whose `errors` are given."""
    start = errors.shape[1]
    panels = [slice(first, min(first + WIDTH, weights.shape[1])) for first in range(0, weights.shape[1], WIDTH)]
    moved = [panel_of(weights[:, p], weights[:, p], errors, factor, start + p.start).targets for p in panels]
    targets = np.concatenate(moved, axis=1)
    best = _room(weights.shape)
    for step, floor in _on_trial(targets, factor.stiffness[start : start + weights.shape[1]], scheme):
        trial = _room(weights.shape)._replace(step=step, floor=floor, loss=np.zeros_like(step))
        for p in panels:
            known = torch.from_numpy(trial.errors[:, : p.start])
            work = panel_of(weights[:, p], targets[:, p], known, factor, start + p.start, first=start)
            trial.errors[:, p] = _code(work, scheme, trial, trial.codes[:, p], threads)
        better = (trial.loss < best.loss)[:, 0]
        for name in Coded._fields:
            getattr(best, name)[better] = getattr(trial, name)[better]
    return best


def _room(shape: tuple[int, ...]) -> Coded:
    """Return what a row keeps that nothing fits."""
    columns = [np.full((shape[0], 1), value, np.float32) for value in (UNFIT, 0, np.inf)]
    return Coded(np.zeros(shape, np.uint8), np.zeros(shape, np.float32), *columns)


def _code(work: Panel, scheme: Scheme, trial: Coded, codes: Codes, threads: int) -> Floats:
    """Fill the codes of a panel with the step and floor of `trial`, add to its loss, and return the panel's errors."""
    bits = scheme.facts.bits
    zero, low, high = symmetric_levels(bits) if scheme.symmetric else (0, 0, (1 << bits) - 1)
    coder = partial(_given, zero=zero, low=np.float32(low), high=np.float32(high))
    fields: dict[str, Any] = {"step": trial.step, "floor": trial.floor, "loss": trial.loss}
    missed = np.empty(work.targets.shape, np.float32)
    code_rows(coder, work, codes, fields, missed, threads)
    return missed


def _given(work: Panel, codes: Any, fields: Any, missed: Any, *, zero: int, low: np.float32, high: np.float32) -> None:
    code_given_scale(
        work.targets, work.weights, work.mix, work.stiffness, zero, low, high, fields["step"][:, 0],
        fields["floor"][:, 0], codes, missed, fields["loss"][:, 0],
    )  # fmt: skip


def _on_trial(targets: Floats, stiffness: Floats, scheme: Scheme) -> Iterator[tuple[Floats, Floats]]:
    """Yield steps and floors [rows, 1] as the file can hold them: what `single_scale` and `scale_and_floor` try."""
    (rows, size), bits = targets.shape, scheme.facts.bits
    scales, floors, spelled = np.empty(rows, np.float32), np.empty(rows, np.float32), np.empty(rows * size, np.uint8)
    values, weights = targets.reshape(-1), np.tile(stiffness, rows)
    if scheme.symmetric:
        search_symmetric(values, weights, size, middle(bits), spelled, scales)
        for trying in range(-2 * TRIES, 2 * TRIES + 1):
            yield _stored(scales, trying), np.zeros((rows, 1), np.float32)
        return
    top = (1 << bits) - 1
    search_offset(values, weights, size, top, FIRST, STEP, STEPS, False, spelled, scales, floors)
    for wider in range(-TRIES, TRIES + 1):
        step = _stored(scales, wider)
        zero = np.rint(np.divide(floors[:, None], step, out=np.zeros_like(step), where=step != 0))
        for lower in range(-TRIES, TRIES + 1):
            yield step, step * np.clip(zero + np.where(step != 0, np.float32(lower), 0), 0, top).astype(np.float32)


def _stored(scales: Floats, notches: int) -> Floats:
    """Return scales `notches` off the searched ones, rounded as a file stores them."""
    with np.errstate(over="ignore"):
        halves = (scales * (np.float32(1) + SPREAD * np.float32(notches))).astype(np.float16)
    return halves.astype(np.float32)[:, None]
