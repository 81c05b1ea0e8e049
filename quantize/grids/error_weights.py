"""How much an error in each weight counts in llama.cpp's searches: with importance, the importance times about the weight's size.

With importance q of a column, the weight x of an error is q · sqrt(σ² + x²), where σ² is the mean square of the surroundings: of the
row for the small blocks, of the super-block otherwise (doubled for all but q2_k). q6_k takes q itself. Without importance it is x²,
|x| or |x| plus the group's root mean square, as the type has it.
"""

from __future__ import annotations

import numpy as np

from r1q.quantize.grids.arithmetic import ZERO, Floats, inlined, kernel


@inlined
def _sum_of_squares(values: Floats) -> np.float32:
    """Return the sum of squares, added in order."""
    total = ZERO
    for value in values:
        total += value * value
    return total


@kernel
def squares(flat: Floats) -> Floats:
    """Return x² of all weights."""
    return flat * flat


@kernel
def magnitudes_and_spread(flat: Floats, size: int) -> Floats:
    """Return |x| plus the root mean square of its group of `size`."""
    errors = np.empty(flat.size, np.float32)
    for start in range(0, flat.size, size):
        spread = np.sqrt(_sum_of_squares(flat[start : start + size]) / np.float32(size))
        for i in range(start, start + size):
            errors[i] = spread + abs(flat[i])
    return errors


@kernel
def by_importance(flat: Floats, importance: Floats, span: int, times: np.float32, over: np.float32) -> Floats:
    """Return q · sqrt(σ² + x²) with σ² = times · Σx² / over, summed over each `span` weights.

    `flat` holds whole rows, so that the columns of `importance` come round again.
    """
    errors = np.empty(flat.size, np.float32)
    for start in range(0, flat.size, span):
        column = start % importance.size
        variance = times * _sum_of_squares(flat[start : start + span]) / over
        for i in range(span):
            value = flat[start + i]
            errors[start + i] = importance[column + i] * np.sqrt(variance + value * value)
    return errors


@kernel
def sums_of_groups(errors: Floats, size: int) -> Floats:
    """Return the sum of each group of `size`, added in order: the weight of an error in the group's scale."""
    sums = np.zeros(errors.size // size, np.float32)
    for group in range(sums.size):
        for i in range(size):
            sums[group] += errors[group * size + i]
    return sums
