"""The integer grids int2, int3, int4, int8: groups along a row share a float16 scale and, when asymmetric, a zero code.

`value = scale · (code − zero)`; codes are unsigned, and a symmetric grid's zero is the middle code 2^(bits−1).
A stored row is its codes, packed densely from the low bit of the first byte up; then its scales (float16, little-endian);
then, when asymmetric, its zeros (a byte each).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from r1q.core.qtensor import Codes, Params, QuantizedTensor, Steps
from r1q.core.scheme import Scheme

Bytes = NDArray[np.uint8]


def middle(bits: int) -> int:
    """Return the code that stands for zero in a symmetric grid."""
    return 1 << (bits - 1)


def steps_of_integers(scheme: Scheme, params: Params, columns: int) -> Steps:
    """Return how the codes of rows of `columns` weights become values. `params`: scales, and zeros when asymmetric."""
    scales = np.asarray(params["scales"], dtype=np.float32)
    zeros = (
        np.asarray(params["zeros"], dtype=np.float32) if not scheme.symmetric else np.float32(middle(scheme.facts.bits))
    )
    zero = np.broadcast_to(zeros, scales.shape).astype(np.float32)
    return Steps(group=scheme.group(columns), scale=scales, zero=zero, offset=np.zeros_like(scales))


def pack_integers(scheme: Scheme, codes: Codes, params: Params) -> Bytes:
    """Return the stored rows [rows, row_bytes] of `codes` [rows, columns]."""
    parts = [pack_bits(codes, scheme.facts.bits)]
    parts.append(np.ascontiguousarray(params["scales"], dtype="<f2").view(np.uint8))
    if not scheme.symmetric:
        parts.append(np.ascontiguousarray(params["zeros"], dtype=np.uint8))
    return np.concatenate(parts, axis=1)


def unpack_integers(scheme: Scheme, packed: Bytes, columns: int) -> QuantizedTensor:
    """Return the quantized rows of `columns` weights that `packed` [rows, row_bytes] holds."""
    rows, bits = packed.shape[0], scheme.facts.bits
    groups, code_bytes = columns // scheme.group(columns), -(-columns * bits // 8)
    scales = np.ascontiguousarray(packed[:, code_bytes : code_bytes + 2 * groups]).view("<f2").reshape(rows, groups)
    params: dict[str, NDArray[np.generic]] = {"scales": scales}
    if not scheme.symmetric:
        params["zeros"] = np.ascontiguousarray(packed[:, code_bytes + 2 * groups :])
    return QuantizedTensor(scheme=scheme, codes=unpack_bits(packed[:, :code_bytes], bits, columns), params=params)


def pack_bits(codes: Codes, bits: int) -> Bytes:
    """Return rows of `bits`-bit codes packed densely, low bits first; the last byte of a row is filled with zeros."""
    if bits == 8:
        return np.ascontiguousarray(codes)
    if bits == 4 and codes.shape[1] % 2 == 0:
        return np.asarray(codes[:, 0::2] | (codes[:, 1::2] << np.uint8(4)), dtype=np.uint8)
    planes = np.unpackbits(codes[..., None], axis=2, count=bits, bitorder="little")
    return np.packbits(planes.reshape(codes.shape[0], -1), axis=1, bitorder="little")


def unpack_bits(packed: Bytes, bits: int, columns: int) -> Codes:
    """Return the codes [rows, columns] that `pack_bits` packed."""
    if bits == 8:
        return np.ascontiguousarray(packed)
    rows = packed.shape[0]
    if bits == 4 and columns % 2 == 0:
        return np.stack([packed & np.uint8(15), packed >> np.uint8(4)], axis=2).reshape(rows, columns)
    planes = np.unpackbits(packed, axis=1, count=columns * bits, bitorder="little").reshape(rows, columns, bits)
    return np.packbits(planes, axis=2, bitorder="little")[..., 0]
