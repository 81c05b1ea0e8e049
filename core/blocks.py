"""Byte layouts of ggml's block types: codes and scales to the bytes of a GGUF row and back, and the steps they stand for.

One table row a type says which bits of which field lie in which bytes; one `pack` and one `unpack` read it.
Sources: the structs of llama.cpp's `ggml-common.h` and its `dequantize_row_*`; tests hold every type against `gguf`.

Params of each type, arrays [rows, blocks · entries]; `d`, `dmin` and the `m` of q4_1/q5_1 are float16:
q4_0 q5_0 q8_0 iq4_nl: d · q4_1 q5_1: d, m · q2_k q4_k q5_k: d, dmin, sc, m (uint8) · q3_k iq4_xs: d, sc (uint8, zero at 32) ·
q6_k: d, sc (int8).
Codes are unsigned with the zero in the middle for the symmetric types (8, 16, 128, 4, 32), indices into `IQ4_LEVELS` for iq4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
from numpy.typing import DTypeLike, NDArray

from r1q.core.qtensor import Codes, Floats, Params, Steps
from r1q.core.scheme import GRIDS

Bytes = NDArray[np.uint8]

IQ4_LEVELS: Floats = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float32
)
"""The sixteen levels of iq4_nl and iq4_xs, in the order of their codes."""
IQ4_LEVELS.setflags(write=False)


@dataclass(frozen=True, slots=True)
class Param:
    """One stored field beside the codes: `entries` numbers a block, each of `bits` bits (16 for a float16)."""

    dtype: np.dtype[np.generic]
    entries: int
    bits: int


@dataclass(frozen=True, slots=True)
class Piece:
    """`bits` bits from bit `low` on of the entries `entries` of `name` lie at bit `shift` of the bytes `place`."""

    name: str
    entries: slice
    place: slice
    low: int = 0
    bits: int = 8
    shift: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a block type spells its block. `zero` is the code of the value 0 where the type is symmetric.

    `flip` is XORed into stored codes (q8_0 stores signed bytes). `group` columns share a step. `sc_zero` is subtracted from `sc`.
    """

    params: Mapping[str, Param]
    pieces: tuple[Piece, ...]
    group: int = 32
    zero: int = 0
    sc_zero: int = 0
    flip: int = 0
    table: Floats | None = field(default=None)


def _whole(name: str, at: int, count: int) -> tuple[Piece, ...]:
    """Return the piece of `count` plain bytes at byte `at`."""
    return (Piece(name, slice(0, count), slice(at, at + count)),)


def _planes(name: str, entries: int, at: int, *, bits: int, width: int, low: int = 0) -> tuple[Piece, ...]:
    """Return the pieces of a bit field that stacks 8 / bits runs of `width` neighbouring entries into `width` bytes."""
    planes = 8 // bits
    if width == 1:  # neighbours share a byte: one strided piece a plane instead of one a byte
        size = entries // planes
        return tuple(
            Piece(name, slice(p, None, planes), slice(at, at + size), low, bits, p * bits) for p in range(planes)
        )
    return tuple(
        Piece(
            name,
            slice((run * planes + p) * width, (run * planes + p + 1) * width),
            slice(at + run * width, at + (run + 1) * width),
            low,
            bits,
            p * bits,
        )
        for run in range(entries // (planes * width))
        for p in range(planes)
    )


def _six_bit_pairs(at: int) -> tuple[Piece, ...]:
    """Return the pieces of q4_k's and q5_k's twelve bytes: eight 6-bit scales and eight 6-bit minimums."""
    first, second = slice(0, 4), slice(4, 8)
    low, middle, high = (slice(at + i, at + i + 4) for i in (0, 4, 8))
    return (
        Piece("sc", first, low, 0, 6, 0),
        Piece("sc", second, low, 4, 2, 6),
        Piece("m", first, middle, 0, 6, 0),
        Piece("m", second, middle, 4, 2, 6),
        Piece("sc", second, high, 0, 4, 0),
        Piece("m", second, high, 0, 4, 4),
    )


def _half(*names: str) -> dict[str, Param]:
    return {name: Param(np.dtype(np.float16), 1, 16) for name in names}


def _small(entries: int, bits: int, *names: str, dtype: DTypeLike = np.uint8) -> dict[str, Param]:
    return {name: Param(np.dtype(dtype), entries, bits) for name in names}


LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        "q4_0": Layout(
            params=_half("d"), zero=8, pieces=(*_whole("d", 0, 2), *_planes("codes", 32, 2, bits=4, width=16))
        ),
        "q4_1": Layout(
            params=_half("d", "m"),
            pieces=(*_whole("d", 0, 2), *_whole("m", 2, 2), *_planes("codes", 32, 4, bits=4, width=16)),
        ),
        "q5_0": Layout(
            params=_half("d"),
            zero=16,
            pieces=(
                *_whole("d", 0, 2),
                *_planes("codes", 32, 2, bits=1, width=1, low=4),
                *_planes("codes", 32, 6, bits=4, width=16),
            ),
        ),
        "q5_1": Layout(
            params=_half("d", "m"),
            pieces=(
                *_whole("d", 0, 2),
                *_whole("m", 2, 2),
                *_planes("codes", 32, 4, bits=1, width=1, low=4),
                *_planes("codes", 32, 8, bits=4, width=16),
            ),
        ),
        "q8_0": Layout(params=_half("d"), zero=128, flip=128, pieces=(*_whole("d", 0, 2), *_whole("codes", 2, 32))),
        "q2_k": Layout(
            params=_half("d", "dmin") | _small(16, 4, "sc", "m"),
            group=16,
            pieces=(
                Piece("sc", slice(0, 16), slice(0, 16), 0, 4, 0),
                Piece("m", slice(0, 16), slice(0, 16), 0, 4, 4),
                *_planes("codes", 256, 16, bits=2, width=32),
                *_whole("d", 80, 2),
                *_whole("dmin", 82, 2),
            ),
        ),
        "q3_k": Layout(
            params=_half("d") | _small(16, 6, "sc"),
            group=16,
            zero=4,
            sc_zero=32,
            pieces=(
                *_planes("codes", 256, 0, bits=1, width=32, low=2),
                *_planes("codes", 256, 32, bits=2, width=32),
                *_planes("sc", 16, 96, bits=4, width=8),
                *_planes("sc", 16, 104, bits=2, width=4, low=4),
                *_whole("d", 108, 2),
            ),
        ),
        "q4_k": Layout(
            params=_half("d", "dmin") | _small(8, 6, "sc", "m"),
            pieces=(
                *_whole("d", 0, 2),
                *_whole("dmin", 2, 2),
                *_six_bit_pairs(4),
                *_planes("codes", 256, 16, bits=4, width=32),
            ),
        ),
        "q5_k": Layout(
            params=_half("d", "dmin") | _small(8, 6, "sc", "m"),
            pieces=(
                *_whole("d", 0, 2),
                *_whole("dmin", 2, 2),
                *_six_bit_pairs(4),
                *_planes("codes", 256, 16, bits=1, width=32, low=4),
                *_planes("codes", 256, 48, bits=4, width=32),
            ),
        ),
        "q6_k": Layout(
            params=_half("d") | _small(16, 8, "sc", dtype=np.int8),
            group=16,
            zero=32,
            pieces=(
                *_planes("codes", 256, 0, bits=4, width=64),
                *_planes("codes", 256, 128, bits=2, width=32, low=4),
                *_whole("sc", 192, 16),
                *_whole("d", 208, 2),
            ),
        ),
        "iq4_nl": Layout(
            params=_half("d"), table=IQ4_LEVELS, pieces=(*_whole("d", 0, 2), *_planes("codes", 32, 2, bits=4, width=16))
        ),
        "iq4_xs": Layout(
            params=_half("d") | _small(8, 6, "sc"),
            sc_zero=32,
            table=IQ4_LEVELS,
            pieces=(
                *_whole("d", 0, 2),
                *_planes("sc", 8, 2, bits=2, width=1, low=4),
                *_planes("sc", 8, 4, bits=4, width=1),
                *_planes("codes", 256, 8, bits=4, width=16),
            ),
        ),
    }
)


def pack(grid: str, codes: Codes, params: Params) -> Bytes:
    """Return the bytes [rows, row_bytes] of the rows `codes` [rows, columns] with `params` [rows, blocks · entries].

    Raises ValueError where a shape, a dtype or a number does not fit `grid`: bits would run into their neighbours.
    """
    layout, facts = _layout(grid), GRIDS[grid]
    rows, blocks = _check_codes(grid, codes)
    _check_params(grid, params, rows, blocks)
    fields: dict[str, Bytes] = {"codes": np.ascontiguousarray(codes).reshape(rows * blocks, facts.block)}
    if layout.flip:
        fields["codes"] = fields["codes"] ^ np.uint8(layout.flip)
    for name, param in layout.params.items():
        array = np.ascontiguousarray(params[name], dtype=param.dtype.newbyteorder("<"))
        fields[name] = array.view(np.uint8).reshape(rows * blocks, param.entries * param.dtype.itemsize)
    packed = np.zeros((rows * blocks, facts.block_bytes), dtype=np.uint8)
    for piece in layout.pieces:
        packed[:, piece.place] |= _moved(fields[piece.name][:, piece.entries], piece.low, piece.bits, piece.shift)
    return packed.reshape(rows, blocks * facts.block_bytes)


def unpack(grid: str, packed: Bytes) -> tuple[Codes, dict[str, NDArray[np.generic]]]:
    """Return the codes [rows, columns] and params of the bytes `packed` [rows, row_bytes]: the inverse of `pack`.

    Raises ValueError where the rows are not whole blocks of `grid`.
    """
    layout, facts = _layout(grid), GRIDS[grid]
    if packed.dtype != np.uint8 or packed.ndim != 2 or packed.shape[1] % facts.block_bytes:
        raise ValueError(f"{grid} rows are uint8 [rows, n · {facts.block_bytes}], not {packed.dtype} {packed.shape}")
    rows, blocks = packed.shape[0], packed.shape[1] // facts.block_bytes
    source = np.ascontiguousarray(packed).reshape(rows * blocks, facts.block_bytes)
    fields = {
        name: np.zeros((rows * blocks, p.entries * p.dtype.itemsize), np.uint8) for name, p in layout.params.items()
    }
    fields["codes"] = np.zeros((rows * blocks, facts.block), dtype=np.uint8)
    for piece in layout.pieces:
        fields[piece.name][:, piece.entries] |= _moved(source[:, piece.place], piece.shift, piece.bits, piece.low)
    codes = fields.pop("codes").reshape(rows, blocks * facts.block)
    if layout.flip:
        codes ^= np.uint8(layout.flip)
    params: dict[str, NDArray[np.generic]] = {
        name: fields[name].view(p.dtype.newbyteorder("<")).astype(p.dtype, copy=False).reshape(rows, blocks * p.entries)
        for name, p in layout.params.items()
    }
    return codes, params


def steps_of_blocks(grid: str, params: Params) -> Steps:
    """Return what the codes of `grid` mean under `params`, in the operation order of llama.cpp: d · sc first, float32."""
    layout = _layout(grid)
    scale = params["d"].astype(np.float32)
    if "sc" in layout.params:
        scale = _per_group(scale, layout, "sc") * (params["sc"].astype(np.float32) - np.float32(layout.sc_zero))
    offset: Floats = np.zeros((1, 1), dtype=np.float32)
    if "dmin" in layout.params:
        offset = _per_group(params["dmin"].astype(np.float32), layout, "m") * params["m"].astype(np.float32)
    elif "m" in layout.params:
        offset = -params["m"].astype(np.float32)
    zero = np.full((1, 1), layout.zero, dtype=np.float32)
    return Steps(group=layout.group, scale=scale, zero=zero, offset=offset, table=layout.table)


def _layout(grid: str) -> Layout:
    if grid not in LAYOUTS:
        raise ValueError(f"{grid!r} is not a ggml block type ({', '.join(LAYOUTS)})")
    return LAYOUTS[grid]


def _moved(source: Bytes, low: int, bits: int, shift: int) -> Bytes:
    """Return `bits` bits from bit `low` of every byte, moved to bit `shift`."""
    if bits == 8:
        return source
    return ((source >> np.uint8(low)) & np.uint8((1 << bits) - 1)) << np.uint8(shift)


def _per_group(per_block: Floats, layout: Layout, name: str) -> Floats:
    """Return numbers [rows, blocks] repeated for each entry of `name`: [rows, groups]."""
    return np.repeat(per_block, layout.params[name].entries, axis=1)


def _check_codes(grid: str, codes: Codes) -> tuple[int, int]:
    """Return the rows and blocks of `codes`, or raise ValueError."""
    facts = GRIDS[grid]
    if codes.dtype != np.uint8 or codes.ndim != 2 or codes.shape[1] % facts.block:
        raise ValueError(f"{grid} codes are uint8 [rows, n · {facts.block}], not {codes.dtype} {codes.shape}")
    if codes.size and int(codes.max()) >> facts.bits:
        raise ValueError(f"{grid} codes have {facts.bits} bits, but one is {int(codes.max())}")
    return codes.shape[0], codes.shape[1] // facts.block


def _check_params(grid: str, params: Params, rows: int, blocks: int) -> None:
    """Raise ValueError unless `params` has the names, dtypes, shapes and number ranges of `grid`."""
    expected = _layout(grid).params
    if set(params) != set(expected):
        raise ValueError(f"{grid} stores {', '.join(expected)}, not {', '.join(params)}")
    for name, param in expected.items():
        array, shape = params[name], (rows, blocks * param.entries)
        if array.dtype != param.dtype or array.shape != shape:
            raise ValueError(f"{grid}'s {name} is {param.dtype} {shape}, not {array.dtype} {array.shape}")
        if param.bits < 8 and array.size and int(array.max()) >> param.bits:
            raise ValueError(f"{grid}'s {name} has {param.bits} bits, but one is {int(array.max())}")
