"""Round to nearest on the integer grids: a group's scale spans its largest weight, or its minimum and maximum.

The symmetric rule is llama.cpp's for Q4_0 (the weight of largest magnitude becomes the lowest code, 2^(bits−1) steps below zero),
and at 8 bits its rule for Q8_0 (codes within ±127), so that int4 and int8 in groups of 32 are those grids. Codes are taken with the
scale as stored, in float16.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from r1q.core.integers import middle
from r1q.core.qtensor import Codes, Floats, QuantizedTensor
from r1q.core.scheme import Scheme


def quantize_integers(weights: Floats, scheme: Scheme) -> QuantizedTensor:
    """Quantize rows [rows, columns] on the integer grid of `scheme`."""
    rows, columns = weights.shape
    grouped = weights.reshape(rows, -1, scheme.group(columns))
    bits = scheme.facts.bits
    params: dict[str, NDArray[np.generic]] = {}
    if scheme.symmetric:
        scales = stored_scale(_symmetric_scales(grouped, bits))
        zeros = np.full(scales.shape, middle(bits), dtype=np.uint8)
        lowest = 1 if bits == 8 else 0  # −128 is left out at 8 bits, as in Q8_0
    else:
        scales, zeros = _asymmetric(grouped, bits)
        lowest = 0
        params["zeros"] = zeros
    params["scales"] = scales
    codes = nearest_codes(grouped, scales.astype(np.float32), zeros, lowest, (1 << bits) - 1)
    return QuantizedTensor(scheme=scheme, codes=codes.reshape(rows, columns), params=params)


def nearest_codes(grouped: Floats, scales: Floats, zeros: Codes, lowest: int, highest: int) -> Codes:
    """Return the codes [rows, groups, group] nearest to the weights; a zero scale gives the zero code."""
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales != 0)
    codes = np.rint(grouped * inverse[..., None]) + zeros[..., None].astype(np.float32)
    return np.asarray(np.clip(codes, lowest, highest), dtype=np.uint8)


def stored_scale(scales: Floats) -> NDArray[np.float16]:
    """Return scales as the file holds them. One too large for float16 becomes infinite, which the run refuses by name."""
    with np.errstate(over="ignore"):
        return scales.astype(np.float16)


def _symmetric_scales(grouped: Floats, bits: int) -> Floats:
    if bits == 8:
        return np.asarray(np.abs(grouped).max(axis=2) / np.float32(127), dtype=np.float32)
    where = np.abs(grouped).argmax(axis=2)
    largest = np.take_along_axis(grouped, where[..., None], axis=2)[..., 0]
    return np.asarray(largest / np.float32(-middle(bits)), dtype=np.float32)


def _asymmetric(grouped: Floats, bits: int) -> tuple[NDArray[np.float16], Codes]:
    # Zero is always inside the range, so that a weight of zero stays zero.
    low = np.minimum(grouped.min(axis=2), np.float32(0))
    high = np.maximum(grouped.max(axis=2), np.float32(0))
    highest = (1 << bits) - 1
    scales = stored_scale((high - low) / np.float32(highest))
    width = scales.astype(np.float32)
    zeros = np.rint(np.divide(-low, width, out=np.zeros_like(width), where=width != 0))
    return scales, np.clip(zeros, 0, highest).astype(np.uint8)
