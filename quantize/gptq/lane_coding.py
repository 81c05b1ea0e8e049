"""The column loop of GPTQ over thirty-two rows side by side: code a column, feed its error to the columns that follow.

With the Hessian factored as H = R·D·Rᵀ (R unit upper triangular), the loss of a row of weights w coded as v is
Σ D_k · (t_k − v_k)² with the target t_k = w_k + Σ_{i<k} (w_i − v_i) · R_ik (LDLQ, Chee 2023, theorem 6: the same codes as
Frantar 2022's GPTQ). So a group's parameters can be tried on the very loss that they will cause, feedback inside the group included.

Arrays of a batch: targets and weights [columns of the block, LANES], `mix` = R and `stiffness` = D of the block's columns.
"""

from __future__ import annotations

import numpy as np

from r1q.quantize.grids.arithmetic import ONE, ZERO, Codes, Floats, inlined, nearest_between
from r1q.quantize.grids.codebook_scale import closest_code, closest_level
from r1q.quantize.grids.lanes import LANES

CODEBOOK_LOW = np.float32(1.0)
"""As `low` (with `high` below it) it stands for iq4's sixteen uneven levels instead of a range of integers."""
UNFIT = np.float32(np.inf)
"""The step of a group that no step on trial fits, as with weights beyond float16's reach: its values are not finite."""


@inlined
def level_of(value: np.float32, low: np.float32, high: np.float32) -> np.float32:
    """Return the level nearest to `value`, which is in steps: an integer from `low` to `high`, or one of iq4's."""
    if high < low:
        return closest_level(value)
    return nearest_between(value, low, high)


@inlined
def code_of(level: np.float32, low: np.float32, high: np.float32, zero: int) -> np.uint8:
    """Return the stored code of a level."""
    if high < low:
        return np.uint8(closest_code(level))
    return np.uint8(int(level) + zero)


@inlined
def gather_rows(source: Floats, first: int, lanes: Floats) -> None:
    """Fill `lanes` [columns, LANES] with the rows of `source` from number `first` on; the last is repeated to the end."""
    last = source.shape[0] - 1
    for lane in range(LANES):
        row = min(first + lane, last)
        for column in range(lanes.shape[0]):
            lanes[column, lane] = source[row, column]


@inlined
def scatter_rows(lanes: Floats, first: int, out: Floats) -> None:
    """Undo `gather_rows`."""
    for lane in range(min(LANES, out.shape[0] - first)):
        for column in range(lanes.shape[0]):
            out[first + lane, column] = lanes[column, lane]


@inlined
def group_values(lanes: Floats, start: int, size: int, values: Floats) -> None:
    """Fill `values` [LANES · size] with one group of every lane, lane by lane, as the searches of `grids/` read them."""
    for lane in range(LANES):
        for i in range(size):
            values[lane * size + i] = lanes[start + i, lane]


@inlined
def group_errors(stiffness: Floats, start: int, size: int, errors: Floats) -> None:
    """Fill `errors` [LANES · size] with the stiffness of the group's columns, once for every lane."""
    for lane in range(LANES):
        for i in range(size):
            errors[lane * size + i] = stiffness[start + i]


@inlined
def inverses(step: Floats, inverse: Floats) -> None:
    """Fill `inverse` with 1 / step, and 0 where the step is 0."""
    for lane in range(LANES):
        inverse[lane] = ONE / step[lane] if step[lane] != ZERO else ZERO


@inlined
def rehearse(
    targets: Floats, weights: Floats, mix: Floats, stiffness: Floats, start: int, size: int,
    step: Floats, floor: Floats, low: np.float32, high: np.float32, trial: Floats, room: Floats, loss: Floats,
) -> None:  # fmt: skip
    """Set `loss` to what coding the group with `step` and `floor` would cost in itself; nothing is kept."""
    inverse, error = room[0], room[1]
    inverses(step, inverse)
    loss[:] = ZERO
    for i in range(size):
        for lane in range(LANES):
            trial[i, lane] = targets[start + i, lane]
    for i in range(size):
        column = start + i
        weight = stiffness[column]
        for lane in range(LANES):
            level = level_of((trial[i, lane] + floor[lane]) * inverse[lane], low, high)
            value = step[lane] * level - floor[lane]
            miss = trial[i, lane] - value
            loss[lane] += weight * miss * miss
            error[lane] = weights[column, lane] - value
        for later in range(i + 1, size):
            share = mix[column, start + later]
            for lane in range(LANES):
                trial[later, lane] += share * error[lane]


@inlined
def commit(
    targets: Floats, weights: Floats, mix: Floats, start: int, size: int, step: Floats, floor: Floats,
    low: np.float32, high: np.float32, levels: Floats, errors: Floats, room: Floats,
) -> None:  # fmt: skip
    """Code the group for good: fill `levels` and `errors` (w − v) of its columns and feed them to all columns after it."""
    inverse = room[0]
    inverses(step, inverse)
    for i in range(size):
        column = start + i
        for lane in range(LANES):
            level = level_of((targets[column, lane] + floor[lane]) * inverse[lane], low, high)
            levels[column, lane] = level
            errors[column, lane] = weights[column, lane] - (step[lane] * level - floor[lane])
        for later in range(column + 1, targets.shape[0]):
            share = mix[column, later]
            for lane in range(LANES):
                targets[later, lane] += share * errors[column, lane]


@inlined
def scatter_codes(levels: Floats, low: np.float32, high: np.float32, zero: int, first: int, codes: Codes) -> None:
    """Write the codes of a batch's levels [columns, LANES] to the rows of `codes` from number `first` on."""
    for lane in range(min(LANES, codes.shape[0] - first)):
        for column in range(levels.shape[0]):
            codes[first + lane, column] = code_of(levels[column, lane], low, high, zero)
