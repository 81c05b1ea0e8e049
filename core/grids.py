"""Every grid by name: its steps, and its rows as stored bytes. One door to `core/blocks.py` and `core/integers.py`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from r1q.core import blocks, integers
from r1q.core.qtensor import Codes, Floats, Params, QuantizedTensor, Steps
from r1q.core.scheme import Scheme

Bytes = NDArray[np.uint8]


def steps(scheme: Scheme, params: Params, columns: int) -> Steps:
    """Return how codes of rows of `columns` weights become values under `scheme` and `params`."""
    if scheme.facts.family == "int":
        return integers.steps_of_integers(scheme, params, columns)
    return blocks.steps_of_blocks(scheme.grid, params)


def pack(scheme: Scheme, codes: Codes, params: Params) -> Bytes:
    """Return the stored bytes [rows, row_bytes] of quantized rows."""
    if scheme.facts.family == "int":
        return integers.pack_integers(scheme, codes, params)
    return blocks.pack(scheme.grid, codes, params)


def unpack(scheme: Scheme, packed: Bytes, columns: int) -> QuantizedTensor:
    """Return the quantized rows of `columns` weights that `packed` [rows, row_bytes] holds."""
    if scheme.facts.family == "int":
        return integers.unpack_integers(scheme, packed, columns)
    codes, params = blocks.unpack(scheme.grid, packed)
    return QuantizedTensor(scheme=scheme, codes=codes, params=params)


def float_bytes(grid: str, values: Floats) -> Bytes:
    """Return float rows as little-endian bytes [rows, row_bytes] in `grid` (f32, f16 or bf16, rounded to nearest even)."""
    rows = np.ascontiguousarray(values, dtype=np.float32)
    if grid == "f32":
        return rows.view(np.uint8)
    if grid == "f16":
        with np.errstate(over="ignore"):  # too large for float16: becomes inf, which the caller refuses by name
            return rows.astype(np.float16).view(np.uint8)
    return to_bfloat16(rows).view(np.uint8)


def bytes_to_floats(grid: str, stored: Bytes) -> Floats:
    """Return the float32 values [rows, columns] of little-endian float rows in `grid`; exact."""
    contiguous = np.ascontiguousarray(stored)
    if grid == "f32":
        return contiguous.view(np.float32)
    if grid == "f16":
        return contiguous.view(np.float16).astype(np.float32)
    return (contiguous.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(values: Floats) -> NDArray[np.uint16]:
    """Return bfloat16 bit patterns of float32 values, rounded to nearest even. Finite input only."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
