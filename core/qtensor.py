"""QuantizedTensor: codes, what the grid stores beside them, and the one reference dequantize."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from r1q.core.scheme import Scheme

Floats = NDArray[np.float32]
Codes = NDArray[np.uint8]
Params = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """How codes become values, block by block: `value = scale · (level − zero) − offset`.

    `level` is the code itself, or `table[code]` where the grid has a codebook. `scale`, `zero` and `offset` have the shape
    [rows, groups] (or broadcast to it); each entry serves `group` neighbouring columns. All float32.
    """

    group: int
    scale: Floats
    zero: Floats
    offset: Floats
    table: Floats | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedTensor:
    """A quantized matrix. Shapes: codes [rows, columns]; params by the grid (see `core/blocks.py` and `core/integers.py`)."""

    scheme: Scheme
    codes: Codes
    params: Params

    def dequantize(self) -> Floats:
        """Return the values [rows, columns] that these codes stand for, in float32."""
        from r1q.core.grids import steps

        return apply_steps(self.codes, steps(self.scheme, self.params, self.codes.shape[1]))


def apply_steps(codes: Codes, steps: Steps) -> Floats:
    """Return the values [rows, columns] of `codes` under `steps`."""
    rows, columns = codes.shape
    levels = codes.astype(np.float32) if steps.table is None else steps.table[codes]
    grouped = levels.reshape(rows, columns // steps.group, steps.group)
    values = steps.scale[..., None] * (grouped - steps.zero[..., None]) - steps.offset[..., None]
    return np.asarray(values, dtype=np.float32).reshape(rows, columns)
