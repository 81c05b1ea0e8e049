"""One scale for a symmetric group of q3_k without importance: move one code at a time, in up to five passes, errors weighing x².

With all other codes fixed, the best code of a value has a closed form; it is taken if it raises (Σwxq)² / Σwq².
Source of algorithm and operation order: `make_q3_quants` of llama.cpp's ggml-quants.c.
"""

from __future__ import annotations

import numpy as np

from r1q.quantize.grids.arithmetic import (
    ONE,
    TINY_GROUP,
    ZERO,
    Codes,
    Floats,
    furthest,
    inlined,
    kernel,
    nearest_between,
)

_PASSES = 5


@kernel
def refine_groups(flat: Floats, size: int, zero: int, codes: Codes, scales: Floats) -> None:
    """Fill `scales` of all groups of `size` weights, and their `codes` (0 … 2 · zero − 1)."""
    for group in range(scales.size):
        here = slice(group * size, (group + 1) * size)
        scales[group] = _refine(flat[here], zero, codes[here])


@inlined
def _refine(values: Floats, zero: int, codes: Codes) -> np.float32:
    """Return the scale of one group and fill `codes` (0 … 2 · zero − 1); (almost) zeros have the scale 0 and the codes 0."""
    peak, middle = furthest(values), np.float32(zero)
    if abs(peak) < TINY_GROUP:
        codes[:] = 0
        return ZERO
    inverse = -middle / peak
    cross, square = ZERO, ZERO
    for i in range(values.size):
        code = nearest_between(inverse * values[i], -middle, middle - ONE)
        weight = values[i] * values[i]
        cross += weight * values[i] * code
        square += weight * code * code
        codes[i] = np.uint8(code + middle)
    for _ in range(_PASSES):
        changed = False
        for i in range(values.size):
            old = np.float32(codes[i]) - middle
            new, cross, square = _move(values[i], old, middle, cross, square)
            if new != old:
                codes[i] = np.uint8(new + middle)
                changed = True
        if not changed:
            break
    return cross / square if square > ZERO else ZERO


@inlined
def _move(
    value: np.float32, old: np.float32, middle: np.float32, cross: np.float32, square: np.float32
) -> tuple[np.float32, np.float32, np.float32]:
    """Return the better code for one value while the others stay, and both sums with it."""
    weight = value * value
    rest_cross = cross - weight * value * old
    if not rest_cross > ZERO:
        return old, cross, square
    rest_square = square - weight * old * old
    new = nearest_between(value * rest_square / rest_cross, -middle, middle - ONE)
    if new == old:
        return old, cross, square
    rest_cross += weight * value * new
    rest_square += weight * new * new
    if rest_square > ZERO and rest_cross * rest_cross * square > cross * cross * rest_square:
        return new, rest_cross, rest_square
    return old, cross, square
