"""Refine coded rows on the whole quadratic: single codes by coordinate descent, then each group's scale and floor in closed form.

GPTQ decides each column once, from left to right. With E = W − V and G = E·H, moving one value by δ changes the loss E·H·Eᵀ by
δ²·H_jj − 2·δ·G_j; so the best level of a column, all others standing, is the one nearest to v_j + G_j / H_jj, and G follows each
change by a row of H. Moving a group's step by α and floor by β changes its values by c = α·q − β, and the loss by c·H_gg·cᵀ − 2·c·G_g.
Changes that do not lower the loss, as the file will hold them, are not made.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from r1q.core.qtensor import Floats, QuantizedTensor
from r1q.quantize.gptq.factor import Factor
from r1q.quantize.gptq.lane_coding import level_of
from r1q.quantize.grids.arithmetic import ZERO, half_bits, half_value, inlined, kernel
from r1q.quantize.levels import Levels

_ROWS = 32
_TINY = np.float32(1e-30)


def refine(tensor: QuantizedTensor, wanted: Floats, factor: Factor, *, passes: int, threads: int) -> QuantizedTensor:
    """Return `tensor` with codes and scales moved so that E·H·Eᵀ of E = `wanted` − values falls; [rows, columns] both."""
    found = Levels.of(tensor)
    moment = factor.moment
    if moment is None:
        raise ValueError("the factor was made without keeping the moments")
    weights = moment.cpu().numpy()
    for _ in range(passes):
        error = torch.from_numpy(wanted - found.values()).to(moment.device)
        pull = (error.flip(1) @ moment).flip(1).cpu().numpy()
        _refine_rows(found, weights, pull, threads)
    return found.quantized()


def _refine_rows(found: Levels, moment: Floats, pull: Floats, threads: int) -> None:
    def one(first: int) -> None:
        here = slice(first, first + _ROWS)
        _refine(
            found.level[here], found.step[here], found.floor[here], found.step_unit[here], found.floor_unit[here],
            found.lowest, found.highest, found.low, found.high, moment, pull[here],
        )  # fmt: skip

    with ThreadPoolExecutor(max(1, threads)) as pool:
        for _ in pool.map(one, range(0, len(pull), _ROWS)):
            pass


@kernel
def _refine(
    level: Floats, step: Floats, floor: Floats, step_unit: Floats, floor_unit: Floats, lowest: np.float32,
    highest: np.float32, low: np.float32, high: np.float32, moment: Floats, pull: Floats,
) -> None:  # fmt: skip
    """One pass over all rows: the codes of a group, then its step and floor. Rows and columns of `moment` are in reverse."""
    last = level.shape[1] - 1
    size = level.shape[1] // step.shape[1]
    change = np.empty(size, np.float32)
    for row in range(level.shape[0]):
        for group in range(step.shape[1]):
            width, start = step[row, group], group * size
            if width == ZERO:
                continue
            for column in range(start, start + size):
                along = moment[last - column]
                stiff = along[last - column]
                if stiff <= ZERO:
                    continue
                old = level[row, column]
                new = level_of(old + pull[row, column] / (stiff * width), low, high)
                moved = width * (new - old)
                if new != old and moved * (moved * stiff - np.float32(2) * pull[row, column]) < ZERO:
                    level[row, column] = new
                    for other in range(level.shape[1]):
                        pull[row, other] -= moved * along[last - other]
            _rescale(
                level[row, start : start + size], step[row], floor[row], group, step_unit[row, group],
                floor_unit[row, group], lowest, highest, moment, pull[row], start, change,
            )  # fmt: skip


@inlined
def _rescale(
    level: Floats, step: Floats, floor: Floats, group: int, unit: np.float32, floor_unit: np.float32,
    lowest: np.float32, highest: np.float32, moment: Floats, pull: Floats, start: int, change: Floats,
) -> None:  # fmt: skip
    """Move one group's step and floor to the least squares, rounded to what is stored, if that lowers the loss."""
    size, last = level.size, pull.size - 1
    if unit < ZERO:
        return
    qq, q1, ones, qg, g1 = ZERO, ZERO, ZERO, ZERO, ZERO
    for i in range(size):
        row_q, row_1 = ZERO, ZERO
        for j in range(size):
            stiff = moment[last - start - i, last - start - j]
            row_q += stiff * level[j]
            row_1 += stiff
        qq += level[i] * row_q
        q1 += row_q
        ones += row_1
        qg += level[i] * pull[start + i]
        g1 += pull[start + i]
    alpha, beta = (qg / qq if qq > _TINY else ZERO), ZERO
    determinant = qq * ones - q1 * q1
    if floor_unit >= ZERO and determinant > _TINY:
        alpha = (qg * ones - g1 * q1) / determinant
        beta = (qg * q1 - g1 * qq) / determinant
    wider = _stored(step[group] + alpha, unit, lowest, highest)
    lower = _stored(floor[group] + beta, floor_unit, lowest, highest) if floor_unit >= ZERO else floor[group]
    loss = ZERO
    for i in range(size):
        change[i] = (wider - step[group]) * level[i] - (lower - floor[group])
    for i in range(size):
        bent = ZERO
        for j in range(size):
            bent += moment[last - start - i, last - start - j] * change[j]
        loss += change[i] * (bent - np.float32(2) * pull[start + i])
    if not loss < ZERO:
        return
    step[group], floor[group] = wider, lower
    for i in range(size):
        if change[i] != ZERO:
            for other in range(pull.size):
                pull[other] -= change[i] * moment[last - start - i, last - other]


@inlined
def _stored(value: np.float32, unit: np.float32, lowest: np.float32, highest: np.float32) -> np.float32:
    """Return the nearest number that the file can hold: a half, or a multiple of `unit` from `lowest` to `highest`."""
    if unit == ZERO:
        return half_value(half_bits(value))
    number = np.rint(value / unit)
    number = highest if number > highest else (lowest if number < lowest else number)
    return unit * np.float32(number)
