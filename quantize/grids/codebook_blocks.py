"""iq4_nl and iq4_xs: groups of 32 spelled in sixteen uneven levels; iq4_xs joins eight under one float16 step size.

Source: `quantize_row_iq4_nl_impl` of llama.cpp's ggml-quants.c.
"""

from __future__ import annotations

import numpy as np

from r1q.quantize.grids.arithmetic import (
    ONE,
    ZERO,
    Codes,
    Floats,
    Halves,
    furthest,
    kernel,
    nearest_between,
    store_halves,
)
from r1q.quantize.grids.codebook_scale import closest_code, search_codebook
from r1q.quantize.grids.error_weights import by_importance, squares

_GROUP = 32
_BLOCK = 256
_SCALE_ZERO = 32


@kernel
def lone_plain(weights: Floats, codes: Codes, d: Halves) -> None:
    """Fill `codes` and `d` of iq4_nl without importance."""
    _lone(weights, squares(weights), codes, d)


@kernel
def lone_weighted(weights: Floats, importance: Floats, codes: Codes, d: Halves) -> None:
    """Fill `codes` and `d` of iq4_nl with importance."""
    _lone(weights, by_importance(weights, importance, _GROUP, ONE, np.float32(_GROUP // 2)), codes, d)


@kernel
def joined_plain(weights: Floats, codes: Codes, d: Halves, sc: Codes) -> None:
    """Fill all fields of iq4_xs without importance."""
    _joined(weights, squares(weights), codes, d, sc)


@kernel
def joined_weighted(weights: Floats, importance: Floats, codes: Codes, d: Halves, sc: Codes) -> None:
    """Fill all fields of iq4_xs with importance."""
    _joined(weights, by_importance(weights, importance, _BLOCK, ONE, np.float32(_BLOCK // 2)), codes, d, sc)


@kernel
def _lone(weights: Floats, errors: Floats, codes: Codes, d: Halves) -> None:
    """Fill `codes` and `d` of iq4_nl under the error weights `errors`."""
    flat, spelled = weights.reshape(-1), codes.reshape(-1)
    scales = np.empty(d.size, np.float32)
    search_codebook(flat, errors, _GROUP, scales)
    store_halves(scales, d)
    for group in range(scales.size):
        here = slice(group * _GROUP, (group + 1) * _GROUP)
        _spell(flat[here], scales[group], spelled[here])


@kernel
def _joined(weights: Floats, errors: Floats, codes: Codes, d: Halves, sc: Codes) -> None:
    """Fill all fields of iq4_xs under the error weights `errors`."""
    flat, spelled, small = weights.reshape(-1), codes.reshape(-1), sc.reshape(-1)
    scales, steps = np.empty(sc.size, np.float32), np.empty(d.size, np.float32)
    search_codebook(flat, errors, _GROUP, scales)
    groups, low, high = _BLOCK // _GROUP, np.float32(-_SCALE_ZERO), np.float32(_SCALE_ZERO - 1)
    for block in range(d.size):
        steps[block] = -furthest(scales[block * groups : (block + 1) * groups]) / np.float32(_SCALE_ZERO)
        inverse = ONE / steps[block] if steps[block] != ZERO else ZERO
        for group in range(block * groups, (block + 1) * groups):
            here = slice(group * _GROUP, (group + 1) * _GROUP)
            fine = nearest_between(inverse * scales[group], low, high)
            small[group] = np.uint8(fine - low)
            _spell(flat[here], steps[block] * fine, spelled[here])
    store_halves(steps, d)


@kernel
def _spell(values: Floats, scale: np.float32, codes: Codes) -> None:
    """Fill `codes` with the levels nearest to x / scale, and with the level nearest to 0 where the scale is 0."""
    inverse = ONE / scale if scale != ZERO else ZERO
    for i in range(values.size):
        codes[i] = closest_code(inverse * values[i])
