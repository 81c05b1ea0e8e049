"""One scale for a symmetric group: try nineteen near the one that maps the furthest value to the end, keep the best fit.

For codes q (zero in the middle) of weights x, each with an error weight w, the least-squares scale is Σwxq / Σwq², and it leaves
the error Σwx² − (Σwxq)² / Σwq². So the search keeps the codes with the largest (Σwxq)² / Σwq², compared without dividing.
Source of algorithm and operation order: `make_qx_quants` and `make_q3_quants` of llama.cpp's ggml-quants.c.
"""

from __future__ import annotations

import numpy as np

from r1q.quantize.grids.arithmetic import TINY_GROUP, ZERO, Codes, Floats, furthest, kernel, nearest

_STEP = np.float32(0.1)
_REACH = 9
_PASSES = 5


@kernel
def signed_code(value: np.float32, zero: int) -> int:
    """Return the nearest integer within −zero … zero − 1."""
    return max(-zero, min(zero - 1, nearest(value)))


@kernel
def fit_sums(values: Floats, weights: Floats, inverse: np.float32, zero: int) -> tuple[np.float32, np.float32]:
    """Return Σwxq and Σwq² of the codes q = nearest(inverse · x)."""
    cross, square = ZERO, ZERO
    for i in range(values.size):
        code = np.float32(signed_code(inverse * values[i], zero))
        cross += weights[i] * values[i] * code
        square += weights[i] * code * code
    return cross, square


@kernel
def search_symmetric(values: Floats, weights: Floats, zero: int, codes: Codes) -> np.float32:
    """Return the scale of the best fit and fill `codes` (0 … 2 · zero − 1, zero in the middle).

    A group of (almost) zeros returns 0 with codes 0, not `zero`: so does llama.cpp, and its bytes show it.
    """
    peak = furthest(values)
    if abs(peak) < TINY_GROUP:
        codes[:] = 0
        return ZERO
    best_inverse = np.float32(-zero) / peak
    cross, square = fit_sums(values, weights, best_inverse, zero)
    scale = cross / square if square != ZERO else ZERO
    best = scale * cross
    for step in range(-_REACH, _REACH + 1):
        if step == 0:
            continue
        inverse = -(np.float32(zero) + _STEP * np.float32(step)) / peak
        cross, square = fit_sums(values, weights, inverse, zero)
        if square > ZERO and cross * cross > best * square:
            scale = cross / square
            best = scale * cross
            best_inverse = inverse
    for i in range(values.size):
        codes[i] = zero + signed_code(best_inverse * values[i], zero)
    return scale


@kernel
def refine_symmetric(values: Floats, zero: int, codes: Codes) -> np.float32:
    """Return the scale and fill `codes` by moving one code at a time, up to five passes, weights x² (q3_k without importance)."""
    peak = furthest(values)
    if abs(peak) < TINY_GROUP:
        codes[:] = 0
        return ZERO
    inverse = np.float32(-zero) / peak
    cross, square = ZERO, ZERO
    for i in range(values.size):
        first = signed_code(inverse * values[i], zero)
        weight = values[i] * values[i]
        cross += weight * values[i] * np.float32(first)
        square += weight * np.float32(first) * np.float32(first)
        codes[i] = first + zero
    for _ in range(_PASSES):
        changed = False
        for i in range(values.size):
            moved, cross, square = _move(values[i], int(np.int64(codes[i])) - zero, zero, cross, square)
            if moved != int(np.int64(codes[i])) - zero:
                codes[i] = moved + zero
                changed = True
        if not changed:
            break
    return cross / square if square > ZERO else ZERO


@kernel
def _move(
    value: np.float32, code: int, zero: int, cross: np.float32, square: np.float32
) -> tuple[int, np.float32, np.float32]:
    """Return the better code for one value while the others stay, and both sums with it."""
    weight = value * value
    old = np.float32(code)
    rest_cross = cross - weight * value * old
    if not rest_cross > ZERO:
        return code, cross, square
    rest_square = square - weight * old * old
    moved = signed_code(value * rest_square / rest_cross, zero)
    if moved == code:
        return code, cross, square
    new = np.float32(moved)
    rest_cross += weight * value * new
    rest_square += weight * new * new
    if rest_square > ZERO and rest_cross * rest_cross * square > cross * cross * rest_square:
        return moved, rest_cross, rest_square
    return code, cross, square
