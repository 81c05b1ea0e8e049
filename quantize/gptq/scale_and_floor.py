"""GPTQ on grids whose groups have a scale and a floor: q4_1 q5_1 (a float16 minimum), the asymmetric integers (a zero code)."""

from __future__ import annotations

import numpy as np

from r1q.quantize.gptq.lane_coding import (
    UNFIT,
    commit,
    gather_rows,
    group_errors,
    group_values,
    rehearse,
    scatter_codes,
    scatter_rows,
)
from r1q.quantize.gptq.single_scale import SPREAD
from r1q.quantize.grids.arithmetic import (
    ONE,
    ZERO,
    Codes,
    Floats,
    Halves,
    half_bits,
    half_value,
    inlined,
    kernel,
    nearest,
)
from r1q.quantize.grids.lanes import LANES, fresh
from r1q.quantize.grids.scale_and_minimum import FIRST, STEP, STEPS, search_offset


@kernel
def code_scale_and_floor(
    targets: Floats, weights: Floats, mix: Floats, stiffness: Floats, size: int, top: int, whole_zero: bool,
    tries: int, codes: Codes, scales: Halves, floors: Halves, errors: Floats,
) -> None:  # fmt: skip
    """Code a block of columns of all rows; codes are 0 … `top`.

    `whole_zero`: the floor is `scale` times a zero code, which goes to `floors`; else `floors` takes the bits of the half −floor.
    Shapes as in `single_scale`; floors [rows, columns / size].
    """
    columns, high = targets.shape[1], np.float32(top)
    t, w, levels, missed = fresh(columns), fresh(columns), fresh(columns), fresh(columns)
    trial, room, rows = fresh(size), fresh(2), fresh(6)
    step, floor, best, best_floor, loss, best_loss = rows[0], rows[1], rows[2], rows[3], rows[4], rows[5]
    values, importance = np.empty(LANES * size, np.float32), np.empty(LANES * size, np.float32)
    scale0, floor0 = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    spelled = np.empty(LANES * size, np.uint8)
    for first in range(0, targets.shape[0], LANES):
        gather_rows(targets, first, t)
        gather_rows(weights, first, w)
        for group in range(columns // size):
            start = group * size
            group_values(t, start, size, values)
            group_errors(stiffness, start, size, importance)
            search_offset(values, importance, size, top, FIRST, STEP, STEPS, False, spelled, scale0, floor0)
            best[:] = UNFIT
            best_floor[:] = ZERO
            best_loss[:] = np.float32(np.inf)
            for wider in range(-tries, tries + 1):
                for lower in range(-tries, tries + 1):
                    _propose(scale0, floor0, np.float32(wider), np.float32(lower), high, whole_zero, step, floor)
                    rehearse(t, w, mix, stiffness, start, size, step, floor, ZERO, high, trial, room, loss)
                    keep_pair(step, floor, loss, best, best_floor, best_loss)
            commit(t, w, mix, start, size, best, best_floor, ZERO, high, levels, missed, room)
            for lane in range(min(LANES, targets.shape[0] - first)):
                scales[first + lane, group] = half_bits(best[lane])
                zero = best_floor[lane] / best[lane] if best[lane] != ZERO else ZERO
                floors[first + lane, group] = nearest(zero) if whole_zero else half_bits(-best_floor[lane])
        scatter_codes(levels, ZERO, high, 0, first, codes)
        scatter_rows(missed, first, errors)


@inlined
def _propose(
    scale0: Floats, floor0: Floats, wider: np.float32, lower: np.float32, top: np.float32, whole_zero: bool,
    step: Floats, floor: Floats,
) -> None:  # fmt: skip
    """Fill `step` and `floor` with a pair that the file can hold, `wider` and `lower` notches off the searched one."""
    for lane in range(LANES):
        step[lane] = half_value(half_bits(scale0[lane] * (ONE + SPREAD * wider)))
        if whole_zero:
            zero = np.float32(nearest(floor0[lane] / step[lane])) + lower if step[lane] != ZERO else ZERO
            zero = top if zero > top else (ZERO if zero < ZERO else zero)
            floor[lane] = step[lane] * zero
        else:
            floor[lane] = -half_value(half_bits(-(floor0[lane] + lower * SPREAD * top * scale0[lane])))


@inlined
def keep_pair(step: Floats, floor: Floats, loss: Floats, best: Floats, best_floor: Floats, best_loss: Floats) -> None:
    """Take a rehearsed scale and floor over in every lane where they cost less."""
    for lane in range(LANES):
        better = loss[lane] < best_loss[lane]
        best[lane] = step[lane] if better else best[lane]
        best_floor[lane] = floor[lane] if better else best_floor[lane]
        best_loss[lane] = loss[lane] if better else best_loss[lane]
