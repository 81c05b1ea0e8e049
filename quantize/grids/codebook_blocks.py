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


def lone_plain(weights: Floats, codes: Codes, d: Halves) -> None:
    """Fill `codes` and `d` of iq4_nl without importance."""
    _lone(weights.reshape(-1), squares(weights.reshape(-1)), codes, d)


def lone_weighted(weights: Floats, importance: Floats, codes: Codes, d: Halves) -> None:
    """Fill `codes` and `d` of iq4_nl with importance."""
    errors = by_importance(weights.reshape(-1), importance, _GROUP, ONE, np.float32(_GROUP // 2))
    _lone(weights.reshape(-1), errors, codes, d)


def joined_plain(weights: Floats, codes: Codes, d: Halves, sc: Codes) -> None:
    """Fill all fields of iq4_xs without importance."""
    _joined(weights.reshape(-1), squares(weights.reshape(-1)), codes, d, sc)


def joined_weighted(weights: Floats, importance: Floats, codes: Codes, d: Halves, sc: Codes) -> None:
    """Fill all fields of iq4_xs with importance."""
    errors = by_importance(weights.reshape(-1), importance, _BLOCK, ONE, np.float32(_BLOCK // 2))
    _joined(weights.reshape(-1), errors, codes, d, sc)


def _lone(flat: Floats, errors: Floats, codes: Codes, d: Halves) -> None:
    """Fill `codes` and `d` of iq4_nl under the error weights `errors`."""
    scales = np.empty(d.size, np.float32)
    search_codebook(flat, errors, _GROUP, scales)
    store_halves(scales, d.reshape(-1))
    _spell(flat, scales, codes.reshape(-1))


def _joined(flat: Floats, errors: Floats, codes: Codes, d: Halves, sc: Codes) -> None:
    """Fill all fields of iq4_xs under the error weights `errors`."""
    scales, steps = np.empty(sc.size, np.float32), np.empty(d.size, np.float32)
    search_codebook(flat, errors, _GROUP, scales)
    _join(scales, steps, sc.reshape(-1))
    store_halves(steps, d.reshape(-1))
    _spell(flat, scales, codes.reshape(-1))


@kernel
def _join(scales: Floats, steps: Floats, sc: Codes) -> None:
    """Round each block's scales to 6 bits, the furthest one to −32, and put the rounded ones in their place."""
    groups, low, high = sc.size // steps.size, np.float32(-_SCALE_ZERO), np.float32(_SCALE_ZERO - 1)
    for block in range(steps.size):
        steps[block] = -furthest(scales[block * groups : (block + 1) * groups]) / np.float32(_SCALE_ZERO)
        inverse = ONE / steps[block] if steps[block] != ZERO else ZERO
        for group in range(block * groups, (block + 1) * groups):
            fine = nearest_between(inverse * scales[group], low, high)
            sc[group] = np.uint8(fine - low)
            scales[group] = steps[block] * fine


@kernel
def _spell(flat: Floats, scales: Floats, codes: Codes) -> None:
    """Fill `codes` with the levels nearest to x / scale, and with the level nearest to 0 where the scale is 0."""
    for group in range(scales.size):
        inverse = ONE / scales[group] if scales[group] != ZERO else ZERO
        for i in range(group * _GROUP, (group + 1) * _GROUP):
            codes[i] = closest_code(inverse * flat[i])
