"""DeepSeek's 8-bit floats: e4m3fn bytes, and a float32 scale (`weight_scale_inv`) for every block of 128 × 128 weights.

value = byte as e4m3fn × scale of its block; the blocks at the right and lower edge may be smaller. e4m3fn (Micikevicius 2022): a sign,
four bits of exponent with bias 7, three of mantissa; no infinities, and all ones below the sign is NaN.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from r1q.core.errors import InputError
from r1q.core.safetensors_file import Entry

Floats = NDArray[np.float32]
DTYPE = "F8_E4M3"
SCALE_SUFFIX = "_scale_inv"


def _values() -> Floats:
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    magnitude = np.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    magnitude[(codes & 127) == 127] = np.nan
    return np.where(codes & 128, -magnitude, magnitude).astype(np.float32)


E4M3: Floats = _values()
"""The value of each byte."""


def dequantize(codes: NDArray[np.uint8], scales: Floats, first: int, block: tuple[int, int]) -> Floats:
    """Return the values [rows, columns] of stored `codes`, whose first row is row `first` of the tensor.

    `scales` [blocks of rows, blocks of columns] are those of the whole tensor.
    """
    rows, columns = codes.shape
    values = E4M3[codes]
    high = scales[(first + np.arange(rows)) // block[0]]
    for place in range(scales.shape[1]):  # one block's columns at a time: the spread scales would be another array
        here = slice(place * block[1], min((place + 1) * block[1], columns))
        values[:, here] *= high[:, place, None]
    return values


def check_scales(headers: Mapping[str, Entry], block: tuple[int, int] | None, where: str) -> set[str]:
    """Return the names of all scales in `headers`, after checking that each 8-bit tensor has its own, of the right shape.

    Raises `InputError` with the tensor's name for one without scales, scales of another shape or dtype, or scales of nothing.
    """
    found = set()
    for name, header in headers.items():
        if header.dtype != DTYPE:
            continue
        scale = headers.get(f"{name}{SCALE_SUFFIX}")
        if block is None:
            raise InputError(f"{where}: {name} is stored as {DTYPE}, but config.json has no quantization_config for it")
        if scale is None:
            raise InputError(
                f"{where}: {name} is stored as {DTYPE} without {name}{SCALE_SUFFIX}; fetch the weights again"
            )
        if len(header.shape) != 2:
            raise InputError(f"{where}: {name} is stored as {DTYPE} with the shape {list(header.shape)}, not a matrix")
        wanted = tuple(-(-side // size) for side, size in zip(header.shape, block, strict=True))
        if scale.shape != wanted or scale.dtype != "F32":
            raise InputError(
                f"{where}: {name}{SCALE_SUFFIX} is {scale.dtype} {list(scale.shape)}; blocks of {block[0]} × {block[1]} of "
                f"{name} need F32 {list(wanted)}"
            )
        found.add(f"{name}{SCALE_SUFFIX}")
    lost = next((n for n in headers if n.endswith(SCALE_SUFFIX) and n not in found), None)
    if lost is not None:
        raise InputError(f"{where}: {lost} scales a tensor that is no 8-bit float; the weights do not belong together")
    return found
