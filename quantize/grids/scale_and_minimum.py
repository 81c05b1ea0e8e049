"""A scale and a minimum for an offset group: try a row of step sizes, solve both by least squares, keep the least error.

For codes q ≥ 0 of weights x with error weights w, value = scale · q + minimum has a 2 × 2 system of normal equations. The minimum
is kept ≤ 0 so that zero stays representable; where the solution is above, it is 0 and the scale alone is solved.
Source of algorithm and operation order: `make_qkx2_quants` and `make_qkx3_quants` of llama.cpp's ggml-quants.c, which are one.
"""

from __future__ import annotations

import numpy as np

from r1q.quantize.grids.arithmetic import ONE, ZERO, Codes, Floats, kernel, nearest


@kernel
def offset_code(value: np.float32, top: int) -> int:
    """Return the nearest integer within 0 … top."""
    return max(0, min(top, nearest(value)))


@kernel
def _error(
    values: Floats, weights: Floats, trial: Floats, scale: np.float32, minimum: np.float32, absolute: bool
) -> np.float32:
    """Return the weighted sum of squared (or absolute) errors of the codes `trial`."""
    total = ZERO
    for i in range(values.size):
        error = scale * trial[i] + minimum - values[i]
        total += weights[i] * (abs(error) if absolute else error * error)
    return total


@kernel
def _spell(
    values: Floats, weights: Floats, inverse: np.float32, low: np.float32, top: int, trial: Floats
) -> tuple[np.float32, np.float32, np.float32]:
    """Fill `trial` with the codes q = nearest(inverse · (x − low)) and return Σwq, Σwq² and Σwqx."""
    plain, square, cross = ZERO, ZERO, ZERO
    for i in range(values.size):
        code = np.float32(offset_code(inverse * (values[i] - low), top))
        trial[i] = code
        weighted = weights[i] * code
        plain += weighted
        square += weighted * code
        cross += weighted * values[i]
    return plain, square, cross


@kernel
def _keep(trial: Floats, codes: Codes) -> None:
    """Copy the codes `trial` into `codes`."""
    for i in range(trial.size):
        codes[i] = np.uint8(trial[i])


@kernel
def _extent(values: Floats, weights: Floats) -> tuple[np.float32, np.float32, np.float32, np.float32]:
    """Return the lowest value (at most 0), the highest, Σw and Σwx."""
    low, high = values[0], values[0]
    total = weights[0]
    moment = total * values[0]
    for i in range(1, values.size):
        low = values[i] if values[i] < low else low
        high = values[i] if values[i] > high else high
        total += weights[i]
        moment += weights[i] * values[i]
    return (ZERO if low > ZERO else low), high, total, moment


@kernel
def search_offset(
    values: Floats,
    weights: Floats,
    top: int,
    first: np.float32,
    step: np.float32,
    steps: int,
    absolute: bool,
    codes: Codes,
    trial: Floats,
) -> tuple[np.float32, np.float32]:
    """Return the scale and −minimum of the best fit and fill `codes` (0 … top). `trial` is scratch of the group's size.

    The step sizes tried are (highest − minimum) / (first + step · k + top) for k = 0 … steps, after the plain one, with the
    minimum of the best fit so far.
    """
    low, high, total, moment = _extent(values, weights)
    if high <= low:
        codes[:] = 0
        return ZERO, -low
    inverse = np.float32(top) / (high - low)
    scale, minimum = ONE / inverse, low
    _spell(values, weights, inverse, low, top, trial)
    _keep(trial, codes)
    best = _error(values, weights, trial, scale, minimum, absolute)
    for k in range(steps + 1):
        inverse = (first + step * np.float32(k) + np.float32(top)) / (high - minimum)
        plain, square, cross = _spell(values, weights, inverse, minimum, top, trial)
        determinant = total * square - plain * plain
        if not determinant > ZERO:
            continue
        this_scale = (total * cross - moment * plain) / determinant
        this_minimum = (square * moment - plain * cross) / determinant
        if this_minimum > ZERO:
            this_minimum = ZERO
            this_scale = cross / square
        error = _error(values, weights, trial, this_scale, this_minimum, absolute)
        if error < best:
            best, scale, minimum = error, this_scale, this_minimum
            _keep(trial, codes)
    return scale, -minimum
