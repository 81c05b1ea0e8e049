"""GPTQ on grids whose groups have one float16 scale: q4_0 q5_0 q8_0, the symmetric integers, and iq4_nl."""

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
from r1q.quantize.grids.arithmetic import ONE, ZERO, Codes, Floats, Halves, half_bits, half_value, inlined, kernel
from r1q.quantize.grids.codebook_scale import search_codebook
from r1q.quantize.grids.lanes import LANES, fresh
from r1q.quantize.grids.symmetric_scale import search_symmetric

SPREAD = np.float32(0.02)
"""Notch between two scales on trial, as a share of the searched one."""


@kernel
def code_single_scale(
    targets: Floats, weights: Floats, mix: Floats, stiffness: Floats, size: int, zero: int,
    low: np.float32, high: np.float32, tries: int, codes: Codes, scales: Halves, errors: Floats,
) -> None:  # fmt: skip
    """Code a block of columns of all rows. `tries` scales to each side of the searched one are rehearsed.

    Shapes: targets, weights, codes and errors [rows, columns]; mix [columns, columns]; stiffness [columns];
    scales [rows, columns / size], the bits of halves.
    """
    columns = targets.shape[1]
    t, w, levels, missed = fresh(columns), fresh(columns), fresh(columns), fresh(columns)
    trial, room, rows = fresh(size), fresh(2), fresh(5)
    step, best, best_loss, loss, none = rows[0], rows[1], rows[2], rows[3], rows[4]
    none[:] = ZERO
    values, importance = np.empty(LANES * size, np.float32), np.empty(LANES * size, np.float32)
    searched, spelled = np.empty(LANES, np.float32), np.empty(LANES * size, np.uint8)
    for first in range(0, targets.shape[0], LANES):
        gather_rows(targets, first, t)
        gather_rows(weights, first, w)
        for group in range(columns // size):
            start = group * size
            group_values(t, start, size, values)
            group_errors(stiffness, start, size, importance)
            if high < low:
                search_codebook(values, importance, size, searched)
            else:
                search_symmetric(values, importance, size, zero, spelled, searched)
            best[:] = UNFIT
            best_loss[:] = np.float32(np.inf)
            for trying in range(-tries, tries + 1):
                for lane in range(LANES):
                    step[lane] = half_value(half_bits(searched[lane] * (ONE + SPREAD * np.float32(trying))))
                rehearse(t, w, mix, stiffness, start, size, step, none, low, high, trial, room, loss)
                _keep(step, loss, best, best_loss)
            commit(t, w, mix, start, size, best, none, low, high, levels, missed, room)
            for lane in range(min(LANES, targets.shape[0] - first)):
                scales[first + lane, group] = half_bits(best[lane])
        scatter_codes(levels, low, high, zero, first, codes)
        scatter_rows(missed, first, errors)


@kernel
def code_given_scale(
    targets: Floats, weights: Floats, mix: Floats, stiffness: Floats, zero: int, low: np.float32, high: np.float32,
    steps: Floats, floors: Floats, codes: Codes, errors: Floats, loss: Floats,
) -> None:  # fmt: skip
    """Code a block of columns of all rows with the `steps` and `floors` [rows], and add what it costs to `loss` [rows]."""
    columns, last = targets.shape[1], targets.shape[0] - 1
    t, w, levels, missed = fresh(columns), fresh(columns), fresh(columns), fresh(columns)
    room, step, floor = fresh(2), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    for first in range(0, targets.shape[0], LANES):
        gather_rows(targets, first, t)
        gather_rows(weights, first, w)
        for lane in range(LANES):
            step[lane], floor[lane] = steps[min(first + lane, last)], floors[min(first + lane, last)]
        commit(t, w, mix, 0, columns, step, floor, low, high, levels, missed, room)
        for lane in range(min(LANES, targets.shape[0] - first)):
            for column in range(columns):
                miss = t[column, lane] - (w[column, lane] - missed[column, lane])
                loss[first + lane] += stiffness[column] * miss * miss
        scatter_codes(levels, low, high, zero, first, codes)
        scatter_rows(missed, first, errors)


@inlined
def _keep(step: Floats, loss: Floats, best: Floats, best_loss: Floats) -> None:
    for lane in range(LANES):
        better = loss[lane] < best_loss[lane]
        best[lane] = step[lane] if better else best[lane]
        best_loss[lane] = loss[lane] if better else best_loss[lane]
