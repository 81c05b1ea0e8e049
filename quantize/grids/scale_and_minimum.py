"""A scale and a minimum for offset groups: try a row of step sizes, solve both by least squares, keep the least error.

For codes q ≥ 0 of weights x with error weights w, value = scale · q + minimum has a 2 × 2 system of normal equations. The minimum
is kept ≤ 0 so that zero stays representable; where the solution is above, it is 0 and the scale alone is solved.
Source of algorithm and operation order: `make_qkx2_quants` and `make_qkx3_quants` of llama.cpp's ggml-quants.c, which are one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from r1q.quantize.grids.arithmetic import ONE, ZERO, Codes, Floats, inlined, kernel, nearest_between
from r1q.quantize.grids.lanes import LANES, fresh, gather

FIRST, STEP, STEPS = np.float32(-0.9), np.float32(0.05), 36
"""The row of step sizes that every type tries with importance."""
_NONE = np.float32(np.nan)


class _Fit(NamedTuple):
    """Numbers of each lane: its data's extent and moments, the best fit so far and the step it came from, and the trial's."""

    low: Floats
    high: Floats
    total: Floats
    moment: Floats
    scale: Floats
    minimum: Floats
    error: Floats
    inverse: Floats
    origin: Floats
    trial_inverse: Floats
    trial_scale: Floats
    trial_minimum: Floats
    trial_error: Floats
    plain: Floats
    square: Floats
    cross: Floats


@kernel
def search_offset(
    values: Floats,
    errors: Floats,
    size: int,
    top: int,
    first: np.float32,
    step: np.float32,
    steps: int,
    absolute: bool,
    codes: Codes,
    scales: Floats,
    floors: Floats,
) -> None:
    """Fill `scales` and `floors` (−minimum) of all groups of `size` weights, and their `codes` (0 … top).

    The step sizes tried are (highest − minimum) / (first + step · k + top) for k = 0 … steps, after the plain one, with the
    minimum of the best fit so far. Errors count squared, or plain if `absolute`, times `errors`.
    """
    x, w, trial, rows = fresh(size), fresh(size), fresh(size), fresh(16)
    fit = _Fit(
        rows[0], rows[1], rows[2], rows[3], rows[4], rows[5], rows[6], rows[7],
        rows[8], rows[9], rows[10], rows[11], rows[12], rows[13], rows[14], rows[15],
    )  # fmt: skip
    for group in range(0, scales.size, LANES):
        gather(values, size, group, x)
        gather(errors, size, group, w)
        _start(x, w, fit, np.float32(top), trial, absolute)
        for k in range(steps + 1):
            for lane in range(LANES):
                span = fit.high[lane] - fit.minimum[lane]
                fit.trial_inverse[lane] = (first + step * np.float32(k) + np.float32(top)) / span
            _spell(x, w, fit, fit.minimum, np.float32(top), trial)
            _solve(fit)
            _measure(x, w, fit, trial, absolute)
            _keep_better(fit)
        _finish(values, size, group, fit, np.float32(top), codes, scales, floors)


@inlined
def _start(x: Floats, w: Floats, fit: _Fit, top: np.float32, trial: Floats, absolute: bool) -> None:
    """Set extent and moments, and the first fit: the extent in `top` steps."""
    for lane in range(LANES):
        fit.low[lane] = x[0, lane]
        fit.high[lane] = x[0, lane]
        fit.total[lane] = w[0, lane]
        fit.moment[lane] = w[0, lane] * x[0, lane]
    for i in range(1, x.shape[0]):
        for lane in range(LANES):
            fit.low[lane] = x[i, lane] if x[i, lane] < fit.low[lane] else fit.low[lane]
            fit.high[lane] = x[i, lane] if x[i, lane] > fit.high[lane] else fit.high[lane]
            fit.total[lane] += w[i, lane]
            fit.moment[lane] += w[i, lane] * x[i, lane]
    for lane in range(LANES):
        fit.low[lane] = ZERO if fit.low[lane] > ZERO else fit.low[lane]
        fit.minimum[lane] = fit.low[lane]
        fit.trial_inverse[lane] = top / (fit.high[lane] - fit.low[lane])
        fit.trial_scale[lane] = ONE / fit.trial_inverse[lane]
        fit.trial_minimum[lane] = fit.low[lane]
    _spell(x, w, fit, fit.low, top, trial)
    _measure(x, w, fit, trial, absolute)
    for lane in range(LANES):
        fit.scale[lane] = fit.trial_scale[lane]
        fit.error[lane] = fit.trial_error[lane]
        fit.inverse[lane] = fit.trial_inverse[lane]
        fit.origin[lane] = fit.low[lane]


@inlined
def _spell(x: Floats, w: Floats, fit: _Fit, origin: Floats, top: np.float32, trial: Floats) -> None:
    """Fill `trial` with the codes q = nearest(inverse · (x − origin)) and set Σwq, Σwq² and Σwqx."""
    fit.plain[:] = ZERO
    fit.square[:] = ZERO
    fit.cross[:] = ZERO
    for i in range(x.shape[0]):
        for lane in range(LANES):
            code = nearest_between(fit.trial_inverse[lane] * (x[i, lane] - origin[lane]), ZERO, top)
            trial[i, lane] = code
            weighted = w[i, lane] * code
            fit.plain[lane] += weighted
            fit.square[lane] += weighted * code
            fit.cross[lane] += weighted * x[i, lane]


@inlined
def _solve(fit: _Fit) -> None:
    """Solve the normal equations of every lane; a lane without a solution keeps an error that nothing is better than."""
    for lane in range(LANES):
        total, moment, plain = fit.total[lane], fit.moment[lane], fit.plain[lane]
        square, cross = fit.square[lane], fit.cross[lane]
        determinant = total * square - plain * plain
        scale = (total * cross - moment * plain) / determinant
        minimum = (square * moment - plain * cross) / determinant
        alone = cross / square
        scale = alone if minimum > ZERO else scale
        minimum = ZERO if minimum > ZERO else minimum
        solved = determinant > ZERO
        fit.trial_scale[lane] = scale if solved else _NONE
        fit.trial_minimum[lane] = minimum


@inlined
def _measure(x: Floats, w: Floats, fit: _Fit, trial: Floats, absolute: bool) -> None:
    """Set the weighted sum of squared (or absolute) errors of the codes `trial`."""
    fit.trial_error[:] = ZERO
    if absolute:
        for i in range(x.shape[0]):
            for lane in range(LANES):
                error = fit.trial_scale[lane] * trial[i, lane] + fit.trial_minimum[lane] - x[i, lane]
                fit.trial_error[lane] += w[i, lane] * abs(error)
    else:
        for i in range(x.shape[0]):
            for lane in range(LANES):
                error = fit.trial_scale[lane] * trial[i, lane] + fit.trial_minimum[lane] - x[i, lane]
                fit.trial_error[lane] += w[i, lane] * (error * error)


@inlined
def _keep_better(fit: _Fit) -> None:
    """Take the trial over where its error is less; its codes came from the minimum that it replaces."""
    for lane in range(LANES):
        better = fit.trial_error[lane] < fit.error[lane]
        fit.error[lane] = fit.trial_error[lane] if better else fit.error[lane]
        fit.scale[lane] = fit.trial_scale[lane] if better else fit.scale[lane]
        fit.inverse[lane] = fit.trial_inverse[lane] if better else fit.inverse[lane]
        fit.origin[lane] = fit.minimum[lane] if better else fit.origin[lane]
        fit.minimum[lane] = fit.trial_minimum[lane] if better else fit.minimum[lane]


@inlined
def _finish(
    values: Floats, size: int, group: int, fit: _Fit, top: np.float32, codes: Codes, scales: Floats, floors: Floats
) -> None:
    """Write the fits of the groups from number `group` on, and spell their codes; a group without extent has codes 0."""
    for lane in range(min(LANES, scales.size - group)):
        flat = fit.high[lane] <= fit.low[lane]
        scales[group + lane] = ZERO if flat else fit.scale[lane]
        floors[group + lane] = -(fit.low[lane] if flat else fit.minimum[lane])
        inverse, origin = ZERO if flat else fit.inverse[lane], fit.origin[lane]
        for i in range((group + lane) * size, (group + lane + 1) * size):
            codes[i] = np.uint8(nearest_between(inverse * (values[i] - origin), ZERO, top))
