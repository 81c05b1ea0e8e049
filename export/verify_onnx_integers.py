"""What QuantizeLinear and DequantizeLinear around a product mean, and whether the integers are those that the checkpoint says."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from r1q.core.activations import Activations, Range
from r1q.core.onnx_graph import OnnxNode, OnnxTensor
from r1q.export.verified import Defect
from r1q.export.verify_onnx_values import Matrix, MisfitError, Place, Reading, Spelled


def quantize(reading: Reading, node: OnnxNode) -> None:
    """Note an input as integers of one scale and one zero."""
    scale, zero = reading.held(node, 1), reading.held(node, 2)
    if (scale.dtype, scale.size, zero.dtype, zero.size) != ("float32", 1, "uint8", 1):
        raise MisfitError(f"spells by {scale.name!r} and {zero.name!r}, not one float32 and one uint8")
    reading.settings(node, {}, free=("axis",))
    reading.make(node, Spelled(of=reading.value(node, 0, Place), scale=scale, zero=zero))


def dequantize(reading: Reading, node: OnnxNode) -> None:
    """Note floats that are made of integers: an input again, or a matrix with one scale a row."""
    if node.input(0) in reading.constants:
        reading.make(node, _matrix(reading, node))
        return
    found = reading.value(node, 0, Spelled)
    if (reading.held(node, 1), reading.held(node, 2)) != (found.scale, found.zero):
        raise MisfitError("does not undo the QuantizeLinear before it")
    reading.settings(node, {}, free=("axis",))
    reading.integers[node.outputs[0]] = (found.scale, found.zero)
    reading.make(node, found.of)


def _matrix(reading: Reading, node: OnnxNode) -> Matrix:
    codes, scales = reading.held(node, 0), reading.held(node, 1)
    rows, columns = scales.size, codes.size // max(scales.size, 1)
    if node.input(2) or (codes.dtype, codes.shape, scales.dtype) != ("int8", (columns, rows), "float32"):
        raise MisfitError(f"takes {codes.name!r}, {codes.dtype} {list(codes.shape)}, with {list(scales.shape)} scales")
    if node.attributes.get("axis", 1) not in (1, -1):
        raise MisfitError("scales columns, not rows")
    reading.settings(node, {}, free=("axis",))
    return Matrix(weight=codes, rows=rows, columns=columns, scales=scales, bits=8, block=columns, across=True)


def input_defects(reading: Reading, activations: Activations | None) -> Iterator[Defect]:
    """Yield the layers whose inputs are other integers than the checkpoint says, or integers where it says floats, or not."""
    for (layer, kind), have in reading.inputs.items():
        want = None if activations is None else activations.static(layer, kind)
        found = None if have is None else _numbers(reading, have)
        expected = None if want is None else _expected(want)
        if found != expected:
            where = f"{reading.graph.path.name}: inputs of {kind} of block {layer}"
            yield Defect(where=where, what=f"are {_said(found)}, the checkpoint has {_said(expected)}")


def _expected(want: Range) -> tuple[float, int]:
    return float(np.float32(want.scale)), want.zero


def _numbers(reading: Reading, pair: tuple[OnnxTensor, OnnxTensor]) -> tuple[float, int]:
    scale, zero = (reading.folder.read(tensor).reshape(-1)[0] for tensor in pair)
    return float(scale), int(zero)


def _said(spelled: tuple[float, int] | None) -> str:
    return "floats" if spelled is None else f"integers of scale {spelled[0]:.6g} and zero {spelled[1]}"
