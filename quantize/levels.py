"""A quantized matrix as levels, steps and floors: `value = step · level − floor`, the same for every grid, and back to codes.

Levels are integers around a symmetric grid's zero, from 0 up in the others, or iq4's own uneven numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from r1q.core.blocks import LAYOUTS
from r1q.core.grids import steps
from r1q.core.qtensor import Codes, Floats, QuantizedTensor
from r1q.quantize.gptq.lane_coding import code_of
from r1q.quantize.grids.arithmetic import ONE, ZERO, kernel

_FIXED = np.float32(-1.0)


@dataclass(slots=True, kw_only=True)
class Levels:
    """`level` [rows, columns]; `step`, `floor` and their units [rows, groups]; levels go from `low` to `high` (below it: iq4's).

    A unit is what a step or floor is a multiple of; 0 where it is a half of its own, below 0 where it has to stay. `lowest` and
    `highest` bound the multiples.
    """

    tensor: QuantizedTensor
    level: Floats
    step: Floats
    floor: Floats
    step_unit: Floats
    floor_unit: Floats
    lowest: np.float32
    highest: np.float32
    low: np.float32
    high: np.float32
    zero: int

    @classmethod
    def of(cls, tensor: QuantizedTensor) -> Levels:
        """Take a quantized matrix apart."""
        rows, columns = tensor.codes.shape
        found, facts = steps(tensor.scheme, tensor.params, columns), tensor.scheme.facts
        shape = (rows, columns // found.group)
        step, whole, offset = (_wide(array, shape) for array in (found.scale, found.zero, found.offset))
        symmetric = found.table is None and bool((whole == whole.flat[0]).all())
        zero = int(whole.flat[0]) if symmetric else 0
        if found.table is not None:
            level, low, high = found.table[tensor.codes], ONE, ZERO
        else:
            level = tensor.codes.astype(np.float32) - np.float32(zero)
            low, high = np.float32(-zero), np.float32((1 << facts.bits) - 1 - zero)
            low = np.float32(-127) if symmetric and facts.bits == 8 else low
            offset = offset if symmetric else offset + step * whole
        unit, floor_unit, lowest, highest = _units(tensor, shape)
        return cls(
            tensor=tensor, level=level, step=step, floor=offset, step_unit=unit, floor_unit=floor_unit, lowest=lowest, highest=highest,
            low=low, high=high, zero=zero,
        )  # fmt: skip

    def values(self) -> Floats:
        """Return what the levels stand for [rows, columns]."""
        grouped = self.level.reshape(*self.step.shape, -1)
        return np.asarray(self.step[..., None] * grouped - self.floor[..., None], np.float32).reshape(self.level.shape)

    def quantized(self) -> QuantizedTensor:
        """Return the matrix with codes of these levels and params of these steps and floors."""
        codes = np.empty(self.level.shape, np.uint8)
        _codes(self.level, self.low, self.high, self.zero, codes)
        return QuantizedTensor(scheme=self.tensor.scheme, codes=codes, params=self._params())

    def _params(self) -> dict[str, NDArray[np.generic]]:
        params = {name: np.array(array) for name, array in self.tensor.params.items()}
        if "scales" in params:
            params["scales"] = self.step.astype(np.float16)
            return params
        if "sc" not in params:
            params["d"] = self.step.astype(np.float16)
            if "m" in params:
                params["m"] = (-self.floor).astype(np.float16)
            return params
        zero = LAYOUTS[self.tensor.scheme.grid].sc_zero
        params["sc"] = (_multiples(self.step, self.step_unit) + zero).astype(params["sc"].dtype)
        if "m" in params:
            params["m"] = _multiples(self.floor, self.floor_unit).astype(np.uint8)
        return params


def _units(tensor: QuantizedTensor, shape: tuple[int, int]) -> tuple[Floats, Floats, np.float32, np.float32]:
    """Return the units of steps and floors, and the multiples that are stored."""
    params, grid = tensor.params, tensor.scheme.grid
    half, fixed = np.zeros(shape, np.float32), np.full(shape, _FIXED, np.float32)
    if "sc" not in params:
        if "zeros" in params:
            return fixed, fixed, ZERO, ONE  # a floor that is a multiple of the step: neither moves alone
        return half, half if "m" in params else fixed, ZERO, ONE
    groups = shape[1] // params["d"].shape[1]
    unit = np.repeat(params["d"].astype(np.float32), groups, axis=1)
    if "dmin" not in params:
        lowest, highest = (-128, 127) if grid == "q6_k" else (-32, 31)
        return unit, fixed, np.float32(lowest), np.float32(highest)
    return (
        unit,
        np.repeat(params["dmin"].astype(np.float32), groups, axis=1),
        ZERO,
        np.float32(15 if grid == "q2_k" else 63),
    )


def _wide(array: Floats, shape: tuple[int, int]) -> Floats:
    return np.array(np.broadcast_to(array, shape), dtype=np.float32)


def _multiples(values: Floats, units: Floats) -> NDArray[np.int64]:
    safe = np.where(units == 0, ONE, units)
    return np.rint(np.where(units == 0, ZERO, values / safe)).astype(np.int64)


@kernel
def _codes(level: Floats, low: np.float32, high: np.float32, zero: int, codes: Codes) -> None:
    for row in range(level.shape[0]):
        for column in range(level.shape[1]):
            codes[row, column] = code_of(level[row, column], low, high, zero)
