"""GPTQ on super-blocks: the step sizes d and dmin are fixed at a super-block's start, its small scales refitted as each group arrives.

q2_k q4_k q5_k have a small scale and a small minimum a group; q3_k q6_k and iq4_xs a small signed scale.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

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
from r1q.quantize.gptq.scale_and_floor import keep_pair
from r1q.quantize.grids.arithmetic import ZERO, Codes, Floats, Halves, half_bits, half_value, inlined, kernel, nearest
from r1q.quantize.grids.codebook_scale import search_codebook
from r1q.quantize.grids.lanes import LANES, fresh
from r1q.quantize.grids.scale_and_minimum import FIRST, STEP, STEPS, search_offset
from r1q.quantize.grids.symmetric_scale import search_symmetric


@kernel
def code_offset(
    targets: Floats, weights: Floats, mix: Floats, stiffness: Floats, size: int, top: int, limit: int, tries: int,
    d: Halves, dmin: Halves, codes: Codes, sc: Codes, m: Codes, errors: Floats,
) -> None:  # fmt: skip
    """Code one super-block of all rows; codes are 0 … `top`, small scales and minimums 0 … `limit`.

    Shapes: targets, weights, codes and errors [rows, 256]; mix [256, 256]; stiffness [256]; d and dmin [rows] (given, and
    spoilt where nothing fits); sc and m [rows, 256 / size].
    """
    columns, high = targets.shape[1], np.float32(top)
    t, w, levels, missed = fresh(columns), fresh(columns), fresh(columns), fresh(columns)
    trial, room, rows = fresh(size), fresh(2), fresh(8)
    step, floor, best, best_floor, loss, best_loss = rows[0], rows[1], rows[2], rows[3], rows[4], rows[5]
    unit, unit_floor = rows[6], rows[7]
    values, importance = np.empty(LANES * size, np.float32), np.empty(LANES * size, np.float32)
    scale0, floor0 = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    spelled = np.empty(LANES * size, np.uint8)
    for first in range(0, targets.shape[0], LANES):
        gather_rows(targets, first, t)
        gather_rows(weights, first, w)
        _units(d, first, unit)
        _units(dmin, first, unit_floor)
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
                    _multiples(scale0, unit, wider, 0, limit, step)
                    _multiples(floor0, unit_floor, lower, 0, limit, floor)
                    rehearse(t, w, mix, stiffness, start, size, step, floor, ZERO, high, trial, room, loss)
                    keep_pair(step, floor, loss, best, best_floor, best_loss)
            commit(t, w, mix, start, size, best, best_floor, ZERO, high, levels, missed, room)
            _spoil(best, first, d)
            for lane in range(min(LANES, targets.shape[0] - first)):
                sc[first + lane, group] = _multiple(best[lane], unit[lane])
                m[first + lane, group] = _multiple(best_floor[lane], unit_floor[lane])
        scatter_codes(levels, ZERO, high, 0, first, codes)
        scatter_rows(missed, first, errors)


@kernel
def code_signed(
    targets: Floats, weights: Floats, mix: Floats, stiffness: Floats, size: int, zero: int, low: np.float32,
    high: np.float32, lowest: int, highest: int, tries: int, d: Halves, codes: Codes, sc: NDArray[np.int8], errors: Floats,
) -> None:  # fmt: skip
    """Code one super-block of all rows; small scales are `lowest` … `highest`. Shapes as in `code_offset`."""
    columns = targets.shape[1]
    t, w, levels, missed = fresh(columns), fresh(columns), fresh(columns), fresh(columns)
    trial, room, rows = fresh(size), fresh(2), fresh(7)
    step, best, best_floor, loss, best_loss = rows[0], rows[1], rows[2], rows[3], rows[4]
    none, unit = rows[5], rows[6]
    none[:] = ZERO
    values, importance = np.empty(LANES * size, np.float32), np.empty(LANES * size, np.float32)
    searched, spelled = np.empty(LANES, np.float32), np.empty(LANES * size, np.uint8)
    for first in range(0, targets.shape[0], LANES):
        gather_rows(targets, first, t)
        gather_rows(weights, first, w)
        _units(d, first, unit)
        for group in range(columns // size):
            start = group * size
            group_values(t, start, size, values)
            group_errors(stiffness, start, size, importance)
            if high < low:
                search_codebook(values, importance, size, searched)
            else:
                search_symmetric(values, importance, size, zero, spelled, searched)
            best[:] = UNFIT
            best_floor[:] = ZERO
            best_loss[:] = np.float32(np.inf)
            for wider in range(-tries, tries + 1):
                _multiples(searched, unit, wider, lowest, highest, step)
                rehearse(t, w, mix, stiffness, start, size, step, none, low, high, trial, room, loss)
                keep_pair(step, none, loss, best, best_floor, best_loss)
            commit(t, w, mix, start, size, best, none, low, high, levels, missed, room)
            _spoil(best, first, d)
            for lane in range(min(LANES, targets.shape[0] - first)):
                sc[first + lane, group] = _multiple(best[lane], unit[lane])
        scatter_codes(levels, low, high, zero, first, codes)
        scatter_rows(missed, first, errors)


@inlined
def _units(stored: Halves, first: int, unit: Floats) -> None:
    last = stored.size - 1
    for lane in range(LANES):
        unit[lane] = half_value(stored[min(first + lane, last)])


@inlined
def _spoil(best: Floats, first: int, d: Halves) -> None:
    """Make `d` infinite where no step fitted: no small scale can say so, and the run refuses what is not finite."""
    for lane in range(min(LANES, d.size - first)):
        if best[lane] == UNFIT:
            d[first + lane] = half_bits(UNFIT)


@inlined
def _multiples(wanted: Floats, unit: Floats, off: int, lowest: int, highest: int, out: Floats) -> None:
    """Fill `out` with the multiples of `unit` that are `off` notches from the one nearest to `wanted`, within the limits."""
    for lane in range(LANES):
        number = _multiple(wanted[lane], unit[lane]) + off
        out[lane] = unit[lane] * np.float32(max(lowest, min(highest, number)))


@inlined
def _multiple(value: np.float32, unit: np.float32) -> int:
    return int(nearest(value / unit)) if unit != ZERO and value != UNFIT else 0
