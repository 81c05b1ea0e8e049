"""The one data file beside an ONNX graph: tensors at aligned offsets, each made when it is written, a slab of rows at a time.

Block-quantized matrices are laid out as the operator MatMulNBits of ONNX Runtime wants them (its schema in `contrib_defs.cc`):
B uint8 [N, blocks, block·bits/8], codes along the inputs, low bits first; scales float32 [N, blocks]; zero points packed along the
blocks, each row padded to a byte, only where they are not the middle code. `w = scale · (code − zero)`. Where a checkpoint's columns
stand in another order than its inputs (act-order), they stay so: whoever multiplies puts the inputs in that order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from r1q.core.activations import Range
from r1q.core.checkpoint import QuantizedCheckpoint
from r1q.core.formats import BlockForm, onnx_form
from r1q.core.integers import pack_bits
from r1q.core.qtensor import QuantizedTensor
from r1q.core.tensors import TensorSpec

ALIGNMENT = 64
SLAB_BYTES = 1 << 24
Pieces = Callable[[], Iterator[NDArray[np.generic]]]
Order = NDArray[np.int32]
_Make = Callable[[QuantizedTensor, BlockForm], NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A tensor of the data file: `dtype` uint8, int8, int32 or float32, its shape, and the bytes `offset` … `offset` + `length`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


class DataFile:
    """Tensors in the order they were added; offsets are known before a byte is written."""

    def __init__(self) -> None:
        self.placed: dict[str, Placed] = {}
        self._sources: list[tuple[Placed, Pieces]] = []
        self._end = 0

    def add(self, name: str, dtype: str, shape: Sequence[int], pieces: Pieces) -> str:
        """Place a tensor whose bytes `pieces()` will yield in row order; return its name."""
        offset = -(-self._end // ALIGNMENT) * ALIGNMENT
        length = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        placed = Placed(name=name, dtype=dtype, shape=tuple(shape), offset=offset, length=length)
        self.placed[name] = placed
        self._sources.append((placed, pieces))
        self._end = offset + length
        return name

    def alias(self, name: str, of: str, shape: Sequence[int]) -> str:
        """Give the bytes of the tensor `of` a second name and shape; they are stored once."""
        first = self.placed[of]
        self.placed[name] = Placed(
            name=name, dtype=first.dtype, shape=tuple(shape), offset=first.offset, length=first.length
        )
        return name

    def write(self, file: BinaryIO) -> None:
        """Write every tensor; one slab is in memory at a time."""
        position = 0
        for placed, pieces in self._sources:
            file.write(bytes(placed.offset - position))
            position = placed.offset
            for piece in pieces():
                data = np.ascontiguousarray(piece, dtype=np.dtype(placed.dtype).newbyteorder("<"))
                file.write(data.reshape(-1).view(np.uint8).data)
                position += data.nbytes
            if position != placed.offset + placed.length:
                raise ValueError(f"{placed.name}: {position - placed.offset} bytes were made, {placed.length} planned")


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """The names of a block-quantized matrix in the data file, and what MatMulNBits must know of it. `rows` is N, `columns` K."""

    form: BlockForm
    rows: int
    columns: int
    weight: str
    scales: str
    zeros: str | None


def add_blocks(
    data: DataFile,
    checkpoint: QuantizedCheckpoint,
    name: str,
    specs: Sequence[TensorSpec],
    form: BlockForm,
    order: Order | None = None,
) -> Blocks:
    """Place matrices of one form and one number of columns, stacked along their rows, as `name`.weight, .scales (and .zeros).

    With `order` [rows of each] row i of a matrix is its row `order[i]`; one whole matrix is in memory then.
    """

    def pieces(make: _Make) -> Iterator[NDArray[np.generic]]:
        for spec, start, stop in _slabs(specs, whole=order is not None):
            yield _rows(make(checkpoint.read(spec.name, start, stop, in_order=False), form), order)

    sides = (sum(spec.rows for spec in specs),)
    return _place_blocks(data, name, form, sides, specs[0].columns, pieces)


def add_experts(
    data: DataFile,
    checkpoint: QuantizedCheckpoint,
    name: str,
    experts: Sequence[Sequence[TensorSpec]],
    form: BlockForm,
) -> Blocks:
    """Place a matrix of each expert, as the operator QMoE wants them: [experts, rows, …].

    An expert's may be several, whose rows alternate: first rows, then second rows. One expert's are in memory at once.
    """

    def pieces(make: _Make) -> Iterator[NDArray[np.generic]]:
        for specs in experts:
            parts = [make(checkpoint.read(spec.name, 0, spec.rows), form) for spec in specs]
            yield np.stack(parts, axis=1)

    sides = (len(experts), sum(spec.rows for spec in experts[0]))
    return _place_blocks(data, name, form, sides, experts[0][0].columns, pieces)


def _place_blocks(
    data: DataFile,
    name: str,
    form: BlockForm,
    sides: tuple[int, ...],
    columns: int,
    pieces: Callable[[_Make], Iterator[NDArray[np.generic]]],
) -> Blocks:
    """Place codes, scales and zero points whose rows `pieces` makes; `sides` are a matrix's rows, with experts before them."""
    count, size = columns // form.block, form.block * form.bits // 8
    cells = (count, size) if len(sides) == 1 else (count * size,)
    packed = -(-count * form.bits // 8)
    weight = data.add(f"{name}.weight", "uint8", (*sides, *cells), lambda: pieces(_codes))
    scales = data.add(f"{name}.scales", "float32", (*sides, count), lambda: pieces(_scales))
    zeros = None if form.symmetric else data.add(f"{name}.zeros", "uint8", (*sides, packed), lambda: pieces(_zeros))
    return Blocks(form=form, rows=prod(sides), columns=columns, weight=weight, scales=scales, zeros=zeros)


def _codes(tensor: QuantizedTensor, form: BlockForm) -> NDArray[Any]:
    return pack_bits(tensor.codes, form.bits)


def _scales(tensor: QuantizedTensor, form: BlockForm) -> NDArray[Any]:
    found = tensor.params["scales" if "scales" in tensor.params else "d"]
    return np.repeat(found.astype(np.float32), form.repeats, axis=1)


def _zeros(tensor: QuantizedTensor, form: BlockForm) -> NDArray[Any]:
    return pack_bits(np.repeat(tensor.params["zeros"].astype(np.uint8), form.repeats, axis=1), form.bits)


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """The names of a matrix whose inputs are integers too: int8 [columns, rows], a scale for each row; the inputs' scale and zero."""

    weight: str
    scales: str
    input_scale: str
    input_zero: str


def add_columns(
    data: DataFile, checkpoint: QuantizedCheckpoint, name: str, specs: Sequence[TensorSpec], inputs: Range
) -> Columns:
    """Place matrices of 8-bit codes with one scale a row, side by side and turned: ONNX multiplies by [columns, rows].

    The codes of all of them are in memory at once, a byte each.
    """
    rows, columns = sum(spec.rows for spec in specs), specs[0].columns

    def codes() -> Iterator[NDArray[np.generic]]:
        turned = np.empty((columns, rows), dtype=np.int8)
        place = 0
        for spec, start, stop in _slabs(specs):
            found = checkpoint.read(spec.name, start, stop).codes
            turned[:, place : place + stop - start] = (found.view(np.int8) ^ np.int8(-128)).T  # 128 stands for zero
            place += stop - start
        yield turned

    def scales() -> Iterator[NDArray[np.generic]]:
        for spec, start, stop in _slabs(specs):
            yield checkpoint.read(spec.name, start, stop).params["scales"].astype(np.float32).reshape(-1)

    return Columns(
        weight=data.add(f"{name}.weight", "int8", (columns, rows), codes),
        scales=data.add(f"{name}.scales", "float32", (rows,), scales),
        input_scale=data.add(
            f"{name}.input_scale", "float32", (), lambda: iter([np.array([inputs.scale], np.float32)])
        ),
        input_zero=data.add(f"{name}.input_zero", "uint8", (), lambda: iter([np.array([inputs.zero], np.uint8)])),
    )


def add_floats(
    data: DataFile,
    checkpoint: QuantizedCheckpoint,
    name: str,
    specs: Sequence[TensorSpec],
    order: Order | None = None,
) -> str:
    """Place float tensors, matrices stacked along their rows and vectors end to end, as float32; `order` as in `add_blocks`."""

    def values() -> Iterator[NDArray[np.generic]]:
        for spec, start, stop in _slabs(specs, whole=order is not None):
            yield _rows(checkpoint.read_rows(spec.name, start, stop), order)

    first = specs[0].shape
    shape = (sum(spec.shape[0] for spec in specs), *first[1:])
    return data.add(name, "float32", shape, values)


def add_order(data: DataFile, order: Order) -> str:
    """Place the order of a product's inputs as int32; equal orders are one tensor, named by what is in it."""
    name = f"model.order.{hashlib.sha256(order.astype('<i4').tobytes()).hexdigest()[:16]}"
    return name if name in data.placed else data.add(name, "int32", order.shape, lambda: iter([order]))


def common_form(checkpoint: QuantizedCheckpoint, specs: Sequence[TensorSpec]) -> tuple[BlockForm | None] | None:
    """Return the one form that all of `specs` have (None inside: float32), or None where they differ."""
    forms = {onnx_form(checkpoint.scheme(spec.name), spec.columns) for spec in specs}
    return (next(iter(forms)),) if len(forms) == 1 else None


def _rows(array: NDArray[Any], order: Order | None) -> NDArray[Any]:
    return array if order is None else array[order]


def _slabs(specs: Sequence[TensorSpec], *, whole: bool = False) -> Iterator[tuple[TensorSpec, int, int]]:
    for spec in specs:
        step = spec.rows if whole else max(1, SLAB_BYTES // (4 * spec.columns))
        for start in range(0, spec.rows, step):
            yield spec, start, min(start + step, spec.rows)
