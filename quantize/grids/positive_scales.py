"""One step size for a block's own scales (or minimums), all ≥ 0, weighted by what hangs on each: search, then move single codes.

Source of algorithm and operation order: `make_qp_quants` of llama.cpp's ggml-quants.c.
"""

from __future__ import annotations

import numpy as np

from r1q.quantize.grids.arithmetic import ONE, TINY_GROUP, ZERO, Codes, Floats, inlined, nearest

_STEP = np.float32(0.1)
_REACH = 4
_PASSES = 5


@inlined
def _capped(value: np.float32, top: int) -> int:
    """Return the nearest integer, at most `top`. A scale below zero stays below; its byte wraps when it is stored, as in C."""
    return min(top, int(nearest(value)))


@inlined
def _error(values: Floats, weights: Floats, inverse: np.float32, top: int) -> np.float32:
    """Return Σ w · (x − scale · q)² of the codes that `inverse` gives."""
    scale, total = ONE / inverse, ZERO
    for i in range(values.size):
        error = values[i] - scale * np.float32(_capped(inverse * values[i], top))
        total += weights[i] * error * error
    return total


@inlined
def _best_inverse(values: Floats, weights: Floats, peak: np.float32, top: int) -> np.float32:
    """Return the inverse step with the least error among nine around top / peak."""
    best_inverse = np.float32(top) / peak
    best = ZERO
    scale = ONE / best_inverse
    # The first candidate is not capped and its codes wrap in a byte, unlike those of the other eight.
    for i in range(values.size):
        error = values[i] - scale * np.float32(nearest(best_inverse * values[i]) & 255)
        best += weights[i] * error * error
    for step in range(-_REACH, _REACH + 1):
        if step == 0:
            continue
        inverse = (_STEP * np.float32(step) + np.float32(top)) / peak
        error = _error(values, weights, inverse, top)
        if error < best:
            best, best_inverse = error, inverse
    return best_inverse


@inlined
def search_positive(values: Floats, weights: Floats, top: int, codes: Codes) -> np.float32:
    """Return the step size for `values` ≥ 0 and fill `codes` (0 … top)."""
    peak = ZERO
    for value in values:
        peak = peak if peak > value else value
    if peak < TINY_GROUP:
        codes[:] = 0
        return ZERO
    inverse = _best_inverse(values, weights, peak, top)
    cross, square = ZERO, ZERO
    for i in range(values.size):
        code = _capped(inverse * values[i], top)
        codes[i] = code
        cross += weights[i] * values[i] * np.float32(code)
        square += weights[i] * np.float32(code) * np.float32(code)
    for _ in range(_PASSES):
        changed = False
        for i in range(values.size):
            moved, cross, square = _move(values[i], weights[i], int(np.int64(codes[i])), top, cross, square)
            if moved != int(np.int64(codes[i])):
                codes[i] = moved
                changed = True
        if not changed:
            break
    return cross / square if square > ZERO else ZERO


@inlined
def _move(
    value: np.float32, weight: np.float32, code: int, top: int, cross: np.float32, square: np.float32
) -> tuple[int, np.float32, np.float32]:
    """Return the better code for one value while the others stay, and both sums with it."""
    old = np.float32(code)
    rest_cross = cross - weight * value * old
    rest_square = square - weight * old * old
    if not (rest_cross > ZERO and rest_square > ZERO):
        return code, cross, square
    moved = _capped(value * rest_square / rest_cross, top)
    if moved == code:
        return code, cross, square
    new = np.float32(moved)
    rest_cross += weight * value * new
    rest_square += weight * new * new
    if rest_cross * rest_cross * square > cross * cross * rest_square:
        return moved, rest_cross, rest_square
    return code, cross, square
