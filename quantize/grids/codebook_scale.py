"""One scale for a group spelled in the sixteen uneven levels of iq4: try fifteen, keep the best fit.

The tries put the furthest value near the outermost level; as in the symmetric search, the largest (Σwxq)² / Σwq² wins.
Source of algorithm and operation order: `quantize_row_iq4_nl_impl` of llama.cpp's ggml-quants.c.
"""

from __future__ import annotations

import numpy as np

from r1q.core.blocks import IQ4_LEVELS
from r1q.quantize.grids.arithmetic import ONE, TINY_GROUP, ZERO, Floats, inlined, kernel
from r1q.quantize.grids.lanes import LANES, fresh, furthest_of_lanes, gather
from r1q.quantize.grids.symmetric_scale import Fit, fresh_fit, keep_better, start

_REACH = 7
# llama.cpp compares x − below < above − x. Near the middle of two levels both differences are exact in float32, and further away
# rounding cannot turn them round, so comparing x with the middle is the same.
_MIDDLES = (IQ4_LEVELS[1:] + IQ4_LEVELS[:-1]) / np.float32(2)


@inlined
def closest_code(value: np.float32) -> int:
    """Return the code of the level nearest to `value`, the upper one of a tie."""
    code = 0
    for k in range(_MIDDLES.size):
        code += 0 if value < _MIDDLES[k] else 1
    return code


@inlined
def closest_level(value: np.float32) -> np.float32:
    """Return the level nearest to `value`, the upper one of a tie: fifteen selections, which lanes can do side by side."""
    level = np.float32(IQ4_LEVELS[0])
    for k in range(_MIDDLES.size):
        level = level if value < _MIDDLES[k] else IQ4_LEVELS[k + 1]
    return level


@kernel
def search_codebook(values: Floats, errors: Floats, size: int, scales: Floats) -> None:
    """Fill `scales` of all groups of `size` weights; 0 for a group of (almost) zeros."""
    x, w, fit = fresh(size), fresh(size), fresh_fit()
    lowest = IQ4_LEVELS[0]
    for group in range(0, scales.size, LANES):
        gather(values, size, group, x)
        gather(errors, size, group, w)
        furthest_of_lanes(x, fit.peak, fit.magnitude)
        for lane in range(LANES):
            fit.trial_inverse[lane] = ONE / (-fit.peak[lane] / lowest)
        _sum(x, w, fit)
        start(fit, True)
        for step in range(-_REACH, _REACH + 1):
            for lane in range(LANES):
                fit.trial_inverse[lane] = (np.float32(step) + lowest) / fit.peak[lane]
            _sum(x, w, fit)
            keep_better(fit)
        for lane in range(min(LANES, scales.size - group)):
            scales[group + lane] = ZERO if fit.magnitude[lane] < TINY_GROUP else fit.scale[lane]


@inlined
def _sum(x: Floats, w: Floats, fit: Fit) -> None:
    """Set Σwxq and Σwq² of the levels q nearest to inverse · x."""
    fit.cross[:] = ZERO
    fit.square[:] = ZERO
    for i in range(x.shape[0]):
        for lane in range(LANES):
            level = closest_level(fit.trial_inverse[lane] * x[i, lane])
            weighted = w[i, lane] * level
            fit.cross[lane] += weighted * x[i, lane]
            fit.square[lane] += weighted * level
