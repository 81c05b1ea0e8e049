"""q2_k q4_k q5_k: super-blocks of 256 whose groups have a small scale and a small minimum under two float16 step sizes.

Each group is fitted alone, then its scale and minimum are rounded to 4 or 6 bits, then its codes are spelled anew under the rounded
ones, as the reader will decode them.
Sources: `quantize_row_q2_K_ref`, `…_q4_K_ref`, `…_q5_K_ref` and their `_impl` (with importance) of llama.cpp's ggml-quants.c.
"""

from __future__ import annotations

import numpy as np

from r1q.quantize.grids.arithmetic import (
    ZERO,
    Codes,
    Floats,
    Halves,
    half_bits,
    half_value,
    kernel,
    nearest,
    sum_of_squares,
    weigh,
)
from r1q.quantize.grids.positive_scales import search_positive
from r1q.quantize.grids.scale_and_minimum import offset_code, search_offset

_BLOCK = 256
_FIRST = np.float32(-0.9)
_STEP = np.float32(0.05)
_STEPS = 36


@kernel
def _magnitudes(values: Floats, absolute: bool, weights: Floats) -> None:
    """Fill `weights` with |x| (q2_k), or with |x| and the group's root mean square added (q4_k, q5_k)."""
    base = ZERO if absolute else np.sqrt(sum_of_squares(values) / np.float32(values.size))
    for i in range(values.size):
        weights[i] = base + abs(values[i])


@kernel
def _round_to_steps(values: Floats, limit: int, codes: Codes) -> np.float32:
    """Return the step size that maps the largest of `values` ≥ 0 to `limit`, and fill `codes` with the nearest steps."""
    peak = ZERO
    for value in values:
        peak = value if value > peak else peak
    inverse = np.float32(limit) / peak if peak > ZERO else ZERO
    for i in range(values.size):
        codes[i] = nearest(inverse * values[i])
    return peak / np.float32(limit)


@kernel
def _settle_nibbles(fine: Codes, floors: Codes, sc: Codes, m: Codes) -> None:
    """Fill `sc` and `m` of q2_k with what a reader finds in the byte fine | floor << 4, a number below zero having wrapped."""
    for j in range(sc.size):
        stored = (int(np.int64(fine[j])) | (int(np.int64(floors[j])) << 4)) & 255
        sc[j] = stored & 15
        m[j] = stored >> 4


@kernel
def _settle_six_bits(numbers: Codes, capped: bool, out: Codes) -> None:
    """Fill `out` with what a reader finds of eight 6-bit numbers, of which one below zero had wrapped in its byte.

    The last four lend their top two bits to the bytes of the first four, so a wrapped number spills into another.
    """
    for j in range(4):
        low, high = int(np.int64(numbers[j])), int(np.int64(numbers[j + 4]))
        if capped:
            low, high = min(63, low), min(63, high)
        out[j] = low & 63
        out[j + 4] = (high & 15) | ((((low >> 6) | (high >> 4)) & 3) << 4)


@kernel
def _spell(values: Floats, d: np.float32, floor: np.float32, top: int, codes: Codes) -> None:
    """Fill `codes` with the nearest (x + floor) / d; a group whose step is 0 keeps the codes of its own fit."""
    if d == ZERO:
        return
    for i in range(values.size):
        codes[i] = offset_code((values[i] + floor) / d, top)


@kernel
def _spell_block(values: Floats, d: np.uint16, dmin: np.uint16, sc: Codes, m: Codes, top: int, codes: Codes) -> None:
    """Spell all groups of a super-block under their stored scales and minimums."""
    group = values.size // sc.size
    for j in range(sc.size):
        here = slice(j * group, (j + 1) * group)
        step = half_value(d) * np.float32(sc[j])
        _spell(values[here], step, half_value(dmin) * np.float32(m[j]), top, codes[here])


@kernel
def plain(
    weights: Floats,
    codes: Codes,
    d: Halves,
    dmin: Halves,
    sc: Codes,
    m: Codes,
    top: int,
    first: np.float32,
    steps: int,
) -> None:
    """Fill all fields without importance; `top` is the largest code, `first` and `steps` the search's first try and length."""
    groups = sc.shape[1] // d.shape[1]
    group, wide = _BLOCK // groups, groups == 8
    errors, trial = np.empty(group, np.float32), np.empty(group, np.float32)
    scales, floors = np.empty(groups, np.float32), np.empty(groups, np.float32)
    fine, coarse = np.empty(groups, np.uint8), np.empty(groups, np.uint8)
    for row in range(weights.shape[0]):
        for block in range(d.shape[1]):
            values = weights[row, block * _BLOCK : (block + 1) * _BLOCK]
            spelled = codes[row, block * _BLOCK : (block + 1) * _BLOCK]
            here = slice(block * groups, (block + 1) * groups)
            for j in range(groups):
                part = slice(j * group, (j + 1) * group)
                _magnitudes(values[part], not wide, errors)
                scales[j], floors[j] = search_offset(
                    values[part], errors, top, first, np.float32(0.1), steps, not wide, spelled[part], trial
                )
            limit = 63 if wide else 15
            d[row, block] = half_bits(_round_to_steps(scales, limit, fine))
            dmin[row, block] = half_bits(_round_to_steps(floors, limit, coarse))
            _settle(fine, coarse, True, sc[row, here], m[row, here])
            _spell_block(values, d[row, block], dmin[row, block], sc[row, here], m[row, here], top, spelled)


@kernel
def _settle(fine: Codes, coarse: Codes, capped: bool, sc: Codes, m: Codes) -> None:
    """Fill `sc` and `m` with the numbers that the file's bytes will hold."""
    if sc.size == 16:
        _settle_nibbles(fine, coarse, sc, m)
    else:
        _settle_six_bits(fine, capped, sc)
        _settle_six_bits(coarse, capped, m)


@kernel
def weighted(
    weights: Floats,
    importance: Floats,
    codes: Codes,
    d: Halves,
    dmin: Halves,
    sc: Codes,
    m: Codes,
    top: int,
) -> None:
    """Fill all fields with importance; `top` is the largest code."""
    groups = sc.shape[1] // d.shape[1]
    group, wide = _BLOCK // groups, groups == 8
    errors, trial, sums = np.empty(group, np.float32), np.empty(group, np.float32), np.empty(groups, np.float32)
    scales, floors = np.empty(groups, np.float32), np.empty(groups, np.float32)
    fine, coarse = np.empty(groups, np.uint8), np.empty(groups, np.uint8)
    for row in range(weights.shape[0]):
        for block in range(d.shape[1]):
            start = block * _BLOCK
            values = weights[row, start : start + _BLOCK]
            spelled = codes[row, start : start + _BLOCK]
            here = slice(block * groups, (block + 1) * groups)
            variance = np.float32(2.0 if wide else 1.0) * sum_of_squares(values) / np.float32(_BLOCK)
            for j in range(groups):
                part = slice(j * group, (j + 1) * group)
                sums[j] = weigh(values[part], importance[start:][part], variance, errors)
                scales[j], floors[j] = search_offset(
                    values[part], errors, top, _FIRST, _STEP, _STEPS, False, spelled[part], trial
                )
            limit = 63 if wide else 15
            d[row, block] = half_bits(search_positive(scales, sums, limit, fine))
            dmin[row, block] = half_bits(search_positive(floors, sums, limit, coarse))
            _settle(fine, coarse, top == 31, sc[row, here], m[row, here])  # q5_k caps a wrapped scale, q4_k does not
            _spell_block(values, d[row, block], dmin[row, block], sc[row, here], m[row, here], top, spelled)
