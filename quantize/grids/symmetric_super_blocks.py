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
    sum_of_squares,
    weigh,
)
from r1q.quantize.grids.symmetric_scale import refine_symmetric, search_symmetric, signed_code

_BLOCK = 256
_GROUP = 16
_GROUPS = 16


@kernel
def _spell_block(values: Floats, d: np.uint16, scales: NDArray[np.int64], zero: int, codes: Codes) -> None:
    """Spell all groups under their stored scales; a group whose step is 0 keeps the codes of its own fit."""
    for j in range(_GROUPS):
        step = half_value(d) * np.float32(scales[j])
        if step == ZERO:
            continue
        for i in range(j * _GROUP, (j + 1) * _GROUP):
            codes[i] = zero + signed_code(values[i] / step, zero)


@kernel
def _q6_block(values: Floats, errors: Floats, codes: Codes, sc: NDArray[np.int8]) -> np.uint16:
    """Fill one super-block of q6_k under the error weights `errors` and return the bits of its step size."""
    scales = np.empty(_GROUPS, np.float32)
    for j in range(_GROUPS):
        part = slice(j * _GROUP, (j + 1) * _GROUP)
        scales[j] = search_symmetric(values[part], errors[part], 32, codes[part])
    peak = furthest(scales)
    if abs(peak) < TINY_GROUP:
        codes[:] = 0
        sc[:] = 0
        return np.uint16(0)
    inverse = np.float32(-128.0) / peak
    stored = np.empty(_GROUPS, np.int64)
    for j in range(_GROUPS):
        stored[j] = min(127, nearest(inverse * scales[j]))
        sc[j] = stored[j]
    d = half_bits(ONE / inverse)
    _spell_block(values, d, stored, 32, codes)
    return d


@kernel
def q6_plain(weights: Floats, codes: Codes, d: Halves, sc: NDArray[np.int8]) -> None:
    """Fill all fields of q6_k without importance: errors weigh x²."""
    errors = np.empty(_BLOCK, np.float32)
    for row in range(weights.shape[0]):
        for block in range(d.shape[1]):
            here = slice(block * _BLOCK, (block + 1) * _BLOCK)
            values = weights[row, here]
            for i in range(_BLOCK):
                errors[i] = values[i] * values[i]
            groups = slice(block * _GROUPS, (block + 1) * _GROUPS)
            d[row, block] = _q6_block(values, errors, codes[row, here], sc[row, groups])


@kernel
def q6_weighted(weights: Floats, importance: Floats, codes: Codes, d: Halves, sc: NDArray[np.int8]) -> None:
    """Fill all fields of q6_k with importance: errors weigh the importance itself."""
    for row in range(weights.shape[0]):
        for block in range(d.shape[1]):
            here = slice(block * _BLOCK, (block + 1) * _BLOCK)
            groups = slice(block * _GROUPS, (block + 1) * _GROUPS)
            d[row, block] = _q6_block(weights[row, here], importance[here], codes[row, here], sc[row, groups])


@kernel
def _q3_settle(values: Floats, scales: NDArray[np.int64], d: np.uint16, sc: Codes, codes: Codes) -> None:
    """Store the signed scales of a q3_k super-block with 32 as their zero and spell its codes under them."""
    for j in range(_GROUPS):
        sc[j] = scales[j] + 32
    _spell_block(values, d, scales, 4, codes)


@kernel
def q3_plain(weights: Floats, codes: Codes, d: Halves, sc: Codes) -> None:
    """Fill all fields of q3_k without importance: codes are refined one by one, scales rounded from the furthest."""
    scales, stored = np.empty(_GROUPS, np.float32), np.empty(_GROUPS, np.int64)
    for row in range(weights.shape[0]):
        for block in range(d.shape[1]):
            here = slice(block * _BLOCK, (block + 1) * _BLOCK)
            values, spelled = weights[row, here], codes[row, here]
            for j in range(_GROUPS):
                part = slice(j * _GROUP, (j + 1) * _GROUP)
                scales[j] = refine_symmetric(values[part], 4, spelled[part])
            peak = furthest(scales)
            inverse = np.float32(-32.0) / peak if peak != ZERO else ZERO
            for j in range(_GROUPS):
                stored[j] = signed_code(inverse * scales[j], 32) if peak != ZERO else -32
            d[row, block] = half_bits(ONE / inverse if peak != ZERO else ZERO)
            _q3_settle(values, stored, d[row, block], sc[row, block * _GROUPS : (block + 1) * _GROUPS], spelled)


@kernel
def q3_weighted(weights: Floats, importance: Floats, codes: Codes, d: Halves, sc: Codes) -> None:
    """Fill all fields of q3_k with importance: groups, then their scales, by the search for a symmetric scale."""
    errors, sums = np.empty(_GROUP, np.float32), np.empty(_GROUPS, np.float32)
    scales, stored, coarse = np.empty(_GROUPS, np.float32), np.empty(_GROUPS, np.int64), np.empty(_GROUPS, np.uint8)
    for row in range(weights.shape[0]):
        for block in range(d.shape[1]):
            start = block * _BLOCK
            values, spelled = weights[row, start : start + _BLOCK], codes[row, start : start + _BLOCK]
            variance = np.float32(2.0) * sum_of_squares(values) / np.float32(_BLOCK)
            for j in range(_GROUPS):
                part = slice(j * _GROUP, (j + 1) * _GROUP)
                sums[j] = weigh(values[part], importance[start:][part], variance, errors)
                scales[j] = search_symmetric(values[part], errors, 4, spelled[part])
            d[row, block] = half_bits(search_symmetric(scales, sums, 32, coarse))
            for j in range(_GROUPS):
                stored[j] = int(np.int64(coarse[j])) - 32
            _q3_settle(values, stored, d[row, block], sc[row, block * _GROUPS : (block + 1) * _GROUPS], spelled)
