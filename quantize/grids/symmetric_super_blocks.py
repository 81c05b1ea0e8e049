"""q3_k q6_k: super-blocks of 256 in sixteen symmetric groups, each with a small signed scale under one float16 step size.

Sources: `quantize_row_q3_K_ref`, `quantize_row_q6_K_ref` and their `_impl` (with importance) of llama.cpp's ggml-quants.c.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from r1q.quantize.grids.arithmetic import (
    ONE,
    TINY_GROUP,
    ZERO,
    Codes,
    Floats,
    Halves,
    furthest,
    half_bits,
    half_value,
    kernel,
    nearest,
    nearest_between,
    store_halves,
)
from r1q.quantize.grids.error_weights import by_importance, squares, sums_of_groups
from r1q.quantize.grids.moved_codes import refine_groups
from r1q.quantize.grids.symmetric_scale import search_symmetric

_BLOCK = 256
_GROUP = 16
_GROUPS = 16
_Q3_ZERO = 4
_Q6_ZERO = 32
_SCALE_ZERO = 32
_TWO = np.float32(2.0)


def q3_plain(weights: Floats, codes: Codes, d: Halves, sc: Codes) -> None:
    """Fill all fields of q3_k without importance: codes are moved one by one, scales rounded from the furthest."""
    flat, spelled = weights.reshape(-1), codes.reshape(-1)
    scales = np.empty(sc.size, np.float32)
    refine_groups(flat, _GROUP, _Q3_ZERO, spelled, scales)
    _store_q3(scales, d.reshape(-1), sc.reshape(-1))
    _spell(flat, d.reshape(-1), sc.reshape(-1), _SCALE_ZERO, _Q3_ZERO, spelled)


def q3_weighted(weights: Floats, importance: Floats, codes: Codes, d: Halves, sc: Codes) -> None:
    """Fill all fields of q3_k with importance: groups, then their scales, by the search for a symmetric scale."""
    flat, spelled = weights.reshape(-1), codes.reshape(-1)
    errors = by_importance(flat, importance, _BLOCK, _TWO, np.float32(_BLOCK))
    scales, steps = np.empty(sc.size, np.float32), np.empty(d.size, np.float32)
    search_symmetric(flat, errors, _GROUP, _Q3_ZERO, spelled, scales)
    search_symmetric(scales, sums_of_groups(errors, _GROUP), _GROUPS, _SCALE_ZERO, sc.reshape(-1), steps)
    store_halves(steps, d.reshape(-1))
    _spell(flat, d.reshape(-1), sc.reshape(-1), _SCALE_ZERO, _Q3_ZERO, spelled)


def q6_plain(weights: Floats, codes: Codes, d: Halves, sc: NDArray[np.int8]) -> None:
    """Fill all fields of q6_k without importance: errors weigh x²."""
    _q6(weights.reshape(-1), squares(weights.reshape(-1)), codes.reshape(-1), d.reshape(-1), sc.reshape(-1))


def q6_weighted(weights: Floats, importance: Floats, codes: Codes, d: Halves, sc: NDArray[np.int8]) -> None:
    """Fill all fields of q6_k with importance: errors weigh the importance itself."""
    errors = np.tile(importance, len(weights))
    _q6(weights.reshape(-1), errors, codes.reshape(-1), d.reshape(-1), sc.reshape(-1))


def _q6(flat: Floats, errors: Floats, codes: Codes, d: Halves, sc: NDArray[np.int8]) -> None:
    """Fill all fields of q6_k under the error weights `errors`."""
    scales = np.empty(sc.size, np.float32)
    search_symmetric(flat, errors, _GROUP, _Q6_ZERO, codes, scales)
    _store_q6(scales, d, sc, codes)
    _spell(flat, d, sc, 0, _Q6_ZERO, codes)


@kernel
def _store_q3(scales: Floats, d: Halves, sc: Codes) -> None:
    """Round each block's scales to 6 bits, the furthest one to the lowest number."""
    low, high = np.float32(-_SCALE_ZERO), np.float32(_SCALE_ZERO - 1)
    for block in range(d.size):
        peak = furthest(scales[block * _GROUPS : (block + 1) * _GROUPS])
        inverse = low / peak if peak != ZERO else ZERO
        d[block] = half_bits(ONE / inverse if peak != ZERO else ZERO)
        for group in range(block * _GROUPS, (block + 1) * _GROUPS):
            # a block of zeros leaves its scale bytes 0, which stand for −32
            fine = nearest_between(inverse * scales[group], low, high) if peak != ZERO else low
            sc[group] = np.uint8(fine - low)


@kernel
def _store_q6(scales: Floats, d: Halves, sc: NDArray[np.int8], codes: Codes) -> None:
    """Round each block's scales to 8 bits, the furthest one to −128; a block of (almost) zeros is all zero bytes."""
    for block in range(d.size):
        here = slice(block * _GROUPS, (block + 1) * _GROUPS)
        peak = furthest(scales[here])
        if abs(peak) < TINY_GROUP:
            codes[block * _BLOCK : (block + 1) * _BLOCK] = 0
            sc[here] = 0
            d[block] = 0
            continue
        inverse = np.float32(-128.0) / peak
        d[block] = half_bits(ONE / inverse)
        for group in range(block * _GROUPS, (block + 1) * _GROUPS):
            sc[group] = min(127, int(nearest(inverse * scales[group])))


@kernel
def _spell(flat: Floats, d: Halves, sc: NDArray[np.generic], sc_zero: int, zero: int, codes: Codes) -> None:
    """Fill `codes` with the nearest x / step of each group; one whose step is 0 keeps the codes of its own fit."""
    middle = np.float32(zero)
    for group in range(sc.size):
        step = half_value(d[group // _GROUPS]) * (np.float32(sc[group]) - np.float32(sc_zero))
        if step == ZERO:
            continue
        for i in range(group * _GROUP, (group + 1) * _GROUP):
            codes[i] = np.uint8(middle + nearest_between(flat[i] / step, -middle, middle - ONE))
