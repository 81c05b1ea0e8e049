"""Thirty-two groups side by side: transposed, so that one vector instruction advances the same sum of many groups.

A group's sums must be added one weight after another, as C adds them, which leaves a core waiting for every addition. Groups do not
depend on each other, so they fill the lanes: each lane does exactly the C code's operations, and the whole is several times faster.
"""

from __future__ import annotations

import numpy as np

from r1q.quantize.grids.arithmetic import ZERO, Floats, inlined

LANES = 32  # LLVM unrolls shorter loops before it looks for vectors in them, and then finds none (measured at 8 and 16)


@inlined
def gather(source: Floats, size: int, first: int, lanes: Floats) -> None:
    """Fill `lanes` [size, LANES] with the groups of `size` weights from number `first` on; the last is repeated to the end."""
    groups = source.size // size
    for lane in range(LANES):
        start = min(first + lane, groups - 1) * size
        for i in range(size):
            lanes[i, lane] = source[start + i]


@inlined
def furthest_of_lanes(values: Floats, peak: Floats, magnitude: Floats) -> None:
    """Fill `peak` with each lane's value of largest magnitude, the first of several, and `magnitude` with that magnitude."""
    peak[:] = ZERO
    magnitude[:] = ZERO
    for i in range(values.shape[0]):
        for lane in range(LANES):
            further = abs(values[i, lane]) > magnitude[lane]
            peak[lane] = values[i, lane] if further else peak[lane]
            magnitude[lane] = abs(values[i, lane]) if further else magnitude[lane]


@inlined
def fresh(size: int) -> Floats:
    """Return room for `size` numbers a lane."""
    return np.empty((size, LANES), np.float32)
