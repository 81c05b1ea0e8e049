"""q2_k q4_k q5_k: super-blocks of 256 whose groups have a small scale and a small minimum under two float16 step sizes.

Each group is fitted alone, then its scale and minimum are rounded to 4 or 6 bits, then its codes are spelled anew under the rounded
ones, as the reader will decode them. q2_k has sixteen groups of 16, the others eight groups of 32.
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
    inlined,
    kernel,
    nearest,
    nearest_between,
)
from r1q.quantize.grids.error_weights import by_importance, magnitudes_and_spread, sums_of_groups
from r1q.quantize.grids.positive_scales import search_positive
from r1q.quantize.grids.scale_and_minimum import FIRST, STEP, STEPS, search_offset

_BLOCK = 256
_PLAIN_STEP = np.float32(0.1)
_Q5_TOP = 31


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
    flat, spelled, size = weights.reshape(-1), codes.reshape(-1), weights.size // sc.size
    nibbles = size == 16
    errors = np.abs(flat) if nibbles else magnitudes_and_spread(flat, size)
    scales, floors = np.empty(sc.size, np.float32), np.empty(sc.size, np.float32)
    search_offset(flat, errors, size, top, first, _PLAIN_STEP, steps, nibbles, spelled, scales, floors)
    _store_rounded(scales, floors, d.reshape(-1), dmin.reshape(-1), sc.reshape(-1), m.reshape(-1))
    _spell(flat, d.reshape(-1), dmin.reshape(-1), sc.reshape(-1), m.reshape(-1), top, spelled)


def weighted(
    weights: Floats, importance: Floats, codes: Codes, d: Halves, dmin: Halves, sc: Codes, m: Codes, top: int
) -> None:
    """Fill all fields with importance; `top` is the largest code."""
    flat, spelled, size = weights.reshape(-1), codes.reshape(-1), weights.size // sc.size
    times = np.float32(1.0 if size == 16 else 2.0)
    errors = by_importance(flat, importance, _BLOCK, times, np.float32(_BLOCK))
    scales, floors = np.empty(sc.size, np.float32), np.empty(sc.size, np.float32)
    search_offset(flat, errors, size, top, FIRST, STEP, STEPS, False, spelled, scales, floors)
    # q5_k caps a scale that has wrapped in its byte, q4_k does not
    sums, capped = sums_of_groups(errors, size), top == _Q5_TOP
    _store_searched(scales, floors, sums, capped, d.reshape(-1), dmin.reshape(-1), sc.reshape(-1), m.reshape(-1))
    _spell(flat, d.reshape(-1), dmin.reshape(-1), sc.reshape(-1), m.reshape(-1), top, spelled)


@kernel
def _store_rounded(scales: Floats, floors: Floats, d: Halves, dmin: Halves, sc: Codes, m: Codes) -> None:
    """Round each block's scales and floors to steps of its largest ones."""
    groups = sc.size // d.size
    fine, coarse = np.empty(groups, np.uint8), np.empty(groups, np.uint8)
    limit = 15 if groups == 16 else 63
    for block in range(d.size):
        here = slice(block * groups, (block + 1) * groups)
        d[block] = half_bits(_round_to_steps(scales[here], limit, fine))
        dmin[block] = half_bits(_round_to_steps(floors[here], limit, coarse))
        _settle(fine, coarse, True, sc[here], m[here])


@kernel
def _store_searched(
    scales: Floats, floors: Floats, sums: Floats, capped: bool, d: Halves, dmin: Halves, sc: Codes, m: Codes
) -> None:
    """Round each block's scales and floors to the steps that a search weighing them by `sums` finds."""
    groups = sc.size // d.size
    fine, coarse = np.empty(groups, np.uint8), np.empty(groups, np.uint8)
    limit = 15 if groups == 16 else 63
    for block in range(d.size):
        here = slice(block * groups, (block + 1) * groups)
        d[block] = half_bits(search_positive(scales[here], sums[here], limit, fine))
        dmin[block] = half_bits(search_positive(floors[here], sums[here], limit, coarse))
        _settle(fine, coarse, capped, sc[here], m[here])


@inlined
def _round_to_steps(values: Floats, limit: int, codes: Codes) -> np.float32:
    """Return the step size that maps the largest of `values` ≥ 0 to `limit`, and fill `codes` with the nearest steps."""
    peak = ZERO
    for value in values:
        peak = value if value > peak else peak
    inverse = np.float32(limit) / peak if peak > ZERO else ZERO
    for i in range(values.size):
        codes[i] = nearest(inverse * values[i]) & 255
    return peak / np.float32(limit)


@inlined
def _settle(fine: Codes, coarse: Codes, capped: bool, sc: Codes, m: Codes) -> None:
    """Fill `sc` and `m` with the numbers that the file's bytes will hold."""
    if sc.size == 16:
        _settle_nibbles(fine, coarse, sc, m)
    else:
        _settle_six_bits(fine, capped, sc)
        _settle_six_bits(coarse, capped, m)


@inlined
def _settle_nibbles(fine: Codes, coarse: Codes, sc: Codes, m: Codes) -> None:
    """Fill `sc` and `m` of q2_k with what a reader finds in the byte fine | coarse << 4, a number below zero having wrapped."""
    for j in range(sc.size):
        stored = (int(np.int64(fine[j])) | (int(np.int64(coarse[j])) << 4)) & 255
        sc[j] = stored & 15
        m[j] = stored >> 4


@inlined
def _settle_six_bits(numbers: Codes, capped: bool, out: Codes) -> None:
    """Fill `out` with what a reader finds of eight 6-bit numbers, of which one below zero has wrapped in its byte.

    The last four lend their top two bits to the bytes of the first four, so a wrapped number spills into another.
    """
    for j in range(4):
        low, high = int(np.int64(numbers[j])), int(np.int64(numbers[j + 4]))
        if capped:
            low, high = min(63, low), min(63, high)
        out[j] = low & 63
        out[j + 4] = (high & 15) | ((((low >> 6) | (high >> 4)) & 3) << 4)


@kernel
def _spell(flat: Floats, d: Halves, dmin: Halves, sc: Codes, m: Codes, top: int, codes: Codes) -> None:
    """Fill `codes` with the nearest (x + floor) / step of each group; one whose step is 0 keeps the codes of its own fit."""
    size, groups = flat.size // sc.size, sc.size // d.size
    for group in range(sc.size):
        step = half_value(d[group // groups]) * np.float32(sc[group])
        floor = half_value(dmin[group // groups]) * np.float32(m[group])
        if step == ZERO:
            continue
        for i in range(group * size, (group + 1) * size):
            codes[i] = np.uint8(nearest_between((flat[i] + floor) / step, ZERO, np.float32(top)))
