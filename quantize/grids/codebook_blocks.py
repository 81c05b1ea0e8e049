"""iq4_nl and iq4_xs: groups of 32 spelled in sixteen uneven levels; iq4_xs joins eight under one float16 step size.

The search tries fifteen scales that put the furthest value near the outermost level, and keeps the largest (Σwxq)² / Σwq² as the
symmetric search does. Codes are spelled anew under the scale that the file will hold.
Source: `quantize_row_iq4_nl_impl` of llama.cpp's ggml-quants.c.
"""

from __future__ import annotations

import numpy as np

from r1q.core.blocks import IQ4_LEVELS
from r1q.quantize.grids.arithmetic import (
    ONE,
    TINY_GROUP,
    ZERO,
    Codes,
    Floats,
    Halves,
    furthest,
    half_bits,
    kernel,
    sum_of_squares,
    weigh,
)
from r1q.quantize.grids.symmetric_scale import signed_code

_GROUP = 32
_REACH = 7
_LAST = 15
_TWO = np.float32(2.0)


@kernel
def _closest(value: np.float32) -> int:
    """Return the index of the level nearest to `value`, the upper one of a tie."""
    if value <= IQ4_LEVELS[0]:
        return 0
    if value >= IQ4_LEVELS[_LAST]:
        return _LAST
    below, above = 0, _LAST
    while above - below > 1:
        middle = (below + above) // 2
        if value < IQ4_LEVELS[middle]:
            above = middle
        else:
            below = middle
    return above - 1 if value - IQ4_LEVELS[above - 1] < IQ4_LEVELS[above] - value else above


@kernel
def _fit_sums(values: Floats, errors: Floats, inverse: np.float32) -> tuple[np.float32, np.float32]:
    """Return Σwxq and Σwq² of the levels q nearest to inverse · x."""
    cross, square = ZERO, ZERO
    for i in range(values.size):
        level = IQ4_LEVELS[_closest(inverse * values[i])]
        weighted = errors[i] * level
        cross += weighted * values[i]
        square += weighted * level
    return cross, square


@kernel
def _search(values: Floats, errors: Floats) -> np.float32:
    """Return the scale of the best fit; 0 for a group of (almost) zeros."""
    peak = furthest(values)
    if abs(peak) < TINY_GROUP:
        return ZERO
    cross, square = _fit_sums(values, errors, ONE / (-peak / IQ4_LEVELS[0]))
    scale = cross / square if square > ZERO else ZERO
    best = scale * cross
    for step in range(-_REACH, _REACH + 1):
        cross, square = _fit_sums(values, errors, (np.float32(step) + IQ4_LEVELS[0]) / peak)
        if square > ZERO and cross * cross > best * square:
            scale = cross / square
            best = scale * cross
    return scale


@kernel
def _spell(values: Floats, scale: np.float32, codes: Codes) -> None:
    """Fill `codes` with the levels nearest to x / scale, and with the level nearest to 0 where the scale is 0."""
    inverse = ONE / scale if scale != ZERO else ZERO
    for i in range(values.size):
        codes[i] = _closest(inverse * values[i])


@kernel
def _scales(values: Floats, importance: Floats, scales: Floats, errors: Floats) -> None:
    """Fill `scales` with the fit of each group of 32; without importance (no entries) errors weigh x²."""
    variance = sum_of_squares(values) * (_TWO / np.float32(values.size))
    for j in range(scales.size):
        part = slice(j * _GROUP, (j + 1) * _GROUP)
        if importance.size:
            weigh(values[part], importance[part], variance, errors)
        else:
            for i in range(_GROUP):
                errors[i] = values[part][i] * values[part][i]
        scales[j] = _search(values[part], errors)


@kernel
def lone(weights: Floats, importance: Floats, codes: Codes, d: Halves) -> None:
    """Fill `codes` and `d` of iq4_nl. `importance` has no entries where there is none."""
    scales, errors = np.empty(1, np.float32), np.empty(_GROUP, np.float32)
    for row in range(weights.shape[0]):
        for block in range(d.shape[1]):
            here = slice(block * _GROUP, (block + 1) * _GROUP)
            _scales(weights[row, here], importance[here], scales, errors)
            d[row, block] = half_bits(scales[0])
            _spell(weights[row, here], scales[0], codes[row, here])


@kernel
def joined(weights: Floats, importance: Floats, codes: Codes, d: Halves, sc: Codes) -> None:
    """Fill all fields of iq4_xs. `importance` has no entries where there is none."""
    groups = sc.shape[1] // d.shape[1]
    block_size = groups * _GROUP
    scales, errors = np.empty(groups, np.float32), np.empty(_GROUP, np.float32)
    for row in range(weights.shape[0]):
        for block in range(d.shape[1]):
            here = slice(block * block_size, (block + 1) * block_size)
            values, spelled = weights[row, here], codes[row, here]
            _scales(values, importance[here], scales, errors)
            step = -furthest(scales) / np.float32(32.0)
            d[row, block] = half_bits(step)
            inverse = ONE / step if step != ZERO else ZERO
            for j in range(groups):
                part = slice(j * _GROUP, (j + 1) * _GROUP)
                fine = signed_code(inverse * scales[j], 32)
                sc[row, block * groups + j] = fine + 32
                _spell(values[part], step * np.float32(fine), spelled[part])


@kernel
def lone_plain(weights: Floats, codes: Codes, d: Halves) -> None:
    """Fill `codes` and `d` of iq4_nl without importance."""
    lone(weights, np.empty(0, np.float32), codes, d)


@kernel
def joined_plain(weights: Floats, codes: Codes, d: Halves, sc: Codes) -> None:
    """Fill all fields of iq4_xs without importance."""
    joined(weights, np.empty(0, np.float32), codes, d, sc)
