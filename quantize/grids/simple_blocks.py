"""q4_0 q4_1 q5_0 q5_1 q8_0: blocks of 32 with one float16 scale, and one float16 minimum for the types ending in _1.

Without importance the scale is the block's extent and nothing is searched; with importance the searches of the larger types run
on blocks of 32, weighing errors with the row's mean square. q8_0 takes no importance.
Sources: `quantize_row_q4_0_ref` … `quantize_row_q8_0_ref` and `quantize_row_q4_0_impl` … of llama.cpp's ggml-quants.c.
"""

from __future__ import annotations

import numpy as np

from r1q.quantize.grids.arithmetic import (
    HALF,
    ONE,
    ZERO,
    Codes,
    Floats,
    Halves,
    furthest,
    half_bits,
    inlined,
    kernel,
    rounded_away,
    store_halves,
    truncated,
)
from r1q.quantize.grids.error_weights import by_importance
from r1q.quantize.grids.scale_and_minimum import FIRST, STEP, STEPS, search_offset
from r1q.quantize.grids.symmetric_scale import search_symmetric

_BLOCK = 32


@inlined
def _low_byte(number: int) -> int:
    """Return what C's cast to int8 leaves of an integer."""
    return ((number + 128) & 255) - 128


@kernel
def signed_plain(weights: Floats, codes: Codes, d: Halves, zero: int) -> None:
    """Fill `codes` and `d` of q4_0 (zero 8) or q5_0 (zero 16): the furthest value gets code 0."""
    for row in range(weights.shape[0]):
        for block in range(d.shape[1]):
            start = block * _BLOCK
            scale = furthest(weights[row, start : start + _BLOCK]) / np.float32(-zero)
            inverse = ONE / scale if scale != ZERO else ZERO
            d[row, block] = half_bits(scale)
            for i in range(start, start + _BLOCK):
                code = truncated(weights[row, i] * inverse + (np.float32(zero) + HALF))
                codes[row, i] = min(2 * zero - 1, _low_byte(code))


def signed_weighted(weights: Floats, importance: Floats, codes: Codes, d: Halves, zero: int) -> None:
    """Fill `codes` and `d` of q4_0 (zero 8) or q5_0 (zero 16) by the search for a symmetric scale."""
    flat, columns = weights.reshape(-1), weights.shape[1]
    errors = by_importance(flat, importance, columns, ONE, np.float32(columns))
    scales = np.empty(d.size, np.float32)
    search_symmetric(flat, errors, _BLOCK, zero, codes.reshape(-1), scales)
    store_halves(scales, d.reshape(-1))


@kernel
def offset_plain(weights: Floats, codes: Codes, d: Halves, m: Halves, top: int) -> None:
    """Fill `codes`, `d` and `m` of q4_1 (top 15) or q5_1 (top 31): the block's extent in `top` steps."""
    for row in range(weights.shape[0]):
        for block in range(d.shape[1]):
            start = block * _BLOCK
            low = high = weights[row, start]
            for value in weights[row, start : start + _BLOCK]:
                low = value if value < low else low
                high = value if value > high else high
            scale = (high - low) / np.float32(top)
            inverse = ONE / scale if scale != ZERO else ZERO
            d[row, block] = half_bits(scale)
            m[row, block] = half_bits(low)
            for i in range(start, start + _BLOCK):
                code = truncated((weights[row, i] - low) * inverse + HALF)
                codes[row, i] = min(top, _low_byte(code))


def offset_weighted(weights: Floats, importance: Floats, codes: Codes, d: Halves, m: Halves, top: int) -> None:
    """Fill `codes`, `d` and `m` of q4_1 (top 15) or q5_1 (top 31) by the search for a scale and a minimum."""
    flat, columns = weights.reshape(-1), weights.shape[1]
    errors = by_importance(flat, importance, columns, ONE, np.float32(columns))
    scales, floors = np.empty(d.size, np.float32), np.empty(d.size, np.float32)
    search_offset(flat, errors, _BLOCK, top, FIRST, STEP, STEPS, False, codes.reshape(-1), scales, floors)
    store_halves(scales, d.reshape(-1))
    store_halves(-floors, m.reshape(-1))


@kernel
def bytes_plain(weights: Floats, codes: Codes, d: Halves, top: int) -> None:
    """Fill `codes` (zero 128) and `d` of q8_0 (top 127): the largest magnitude in 127 steps."""
    for row in range(weights.shape[0]):
        for block in range(d.shape[1]):
            start = block * _BLOCK
            scale = abs(furthest(weights[row, start : start + _BLOCK])) / np.float32(top)
            inverse = ONE / scale if scale != ZERO else ZERO
            d[row, block] = half_bits(scale)
            for i in range(start, start + _BLOCK):
                codes[row, i] = _low_byte(rounded_away(weights[row, i] * inverse)) + 128
