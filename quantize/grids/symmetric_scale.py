"""One scale for a symmetric group: try nineteen near the one that maps the furthest value to the end, keep the best fit.

For codes q (zero in the middle) of weights x, each with an error weight w, the least-squares scale is Σwxq / Σwq², and it leaves
the error Σwx² − (Σwxq)² / Σwq². So the search keeps the codes with the largest (Σwxq)² / Σwq², compared without dividing.
Source of algorithm and operation order: `make_qx_quants` of llama.cpp's ggml-quants.c.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from r1q.quantize.grids.arithmetic import ONE, TINY_GROUP, ZERO, Codes, Floats, inlined, kernel, nearest_between
from r1q.quantize.grids.lanes import LANES, fresh, furthest_of_lanes, gather

_STEP = np.float32(0.1)
_REACH = 9


class Fit(NamedTuple):
    """Numbers of each lane: its furthest value, the best fit so far with the inverse it came from, and the trial's sums."""

    peak: Floats
    magnitude: Floats
    scale: Floats
    merit: Floats
    inverse: Floats
    trial_inverse: Floats
    cross: Floats
    square: Floats


@inlined
def fresh_fit() -> Fit:
    """Return room for a fit."""
    rows = fresh(8)
    return Fit(rows[0], rows[1], rows[2], rows[3], rows[4], rows[5], rows[6], rows[7])


@kernel
def search_symmetric(values: Floats, errors: Floats, size: int, zero: int, codes: Codes, scales: Floats) -> None:
    """Fill `scales` of all groups of `size` weights, and their `codes` (0 … 2 · zero − 1, zero in the middle).

    A group of (almost) zeros has the scale 0 and the codes 0, not `zero`: so does llama.cpp, and its bytes show it.
    """
    x, w, fit, middle = fresh(size), fresh(size), fresh_fit(), np.float32(zero)
    for group in range(0, scales.size, LANES):
        gather(values, size, group, x)
        gather(errors, size, group, w)
        furthest_of_lanes(x, fit.peak, fit.magnitude)
        for lane in range(LANES):
            fit.trial_inverse[lane] = -middle / fit.peak[lane]
        _sum(x, w, fit, middle)
        start(fit, False)
        for step in range(-_REACH, _REACH + 1):
            if step == 0:
                continue
            for lane in range(LANES):
                fit.trial_inverse[lane] = -(middle + _STEP * np.float32(step)) / fit.peak[lane]
            _sum(x, w, fit, middle)
            keep_better(fit)
        _finish(values, size, group, fit, middle, codes, scales)


@inlined
def _sum(x: Floats, w: Floats, fit: Fit, middle: np.float32) -> None:
    """Set Σwxq and Σwq² of the codes q = nearest(inverse · x)."""
    fit.cross[:] = ZERO
    fit.square[:] = ZERO
    for i in range(x.shape[0]):
        for lane in range(LANES):
            code = nearest_between(fit.trial_inverse[lane] * x[i, lane], -middle, middle - ONE)
            fit.cross[lane] += w[i, lane] * x[i, lane] * code
            fit.square[lane] += w[i, lane] * code * code


@inlined
def start(fit: Fit, positive: bool) -> None:
    """Take the first trial as the best so far. Σwq² must be above 0 if `positive`, else it need only differ from 0, as NaN does."""
    for lane in range(LANES):
        cross, square = fit.cross[lane], fit.square[lane]
        usable = square > ZERO if positive else square != ZERO
        fit.scale[lane] = cross / square if usable else ZERO
        fit.merit[lane] = fit.scale[lane] * cross
        fit.inverse[lane] = fit.trial_inverse[lane]


@inlined
def keep_better(fit: Fit) -> None:
    """Take the trial over where it fits better."""
    for lane in range(LANES):
        cross, square = fit.cross[lane], fit.square[lane]
        better = (square > ZERO) & (cross * cross > fit.merit[lane] * square)
        scale = cross / square
        fit.scale[lane] = scale if better else fit.scale[lane]
        fit.merit[lane] = scale * cross if better else fit.merit[lane]
        fit.inverse[lane] = fit.trial_inverse[lane] if better else fit.inverse[lane]


@inlined
def _finish(values: Floats, size: int, group: int, fit: Fit, middle: np.float32, codes: Codes, scales: Floats) -> None:
    """Write the fits of the groups from number `group` on, and spell their codes."""
    for lane in range(min(LANES, scales.size - group)):
        tiny = fit.magnitude[lane] < TINY_GROUP
        scales[group + lane] = ZERO if tiny else fit.scale[lane]
        lift, inverse = ZERO if tiny else middle, ZERO if tiny else fit.inverse[lane]
        for i in range((group + lane) * size, (group + lane + 1) * size):
            codes[i] = np.uint8(lift + nearest_between(inverse * values[i], -middle, middle - ONE))
