"""Operators that have no meaning by themselves: noted as formulas, which somebody further on holds against what they must be."""

from __future__ import annotations

from collections.abc import Callable

from r1q.core.onnx_graph import OnnxNode, OnnxTensor
from r1q.export.verify_onnx_values import Made, MisfitError, Product, Reading, Short, Value


def noted(reading: Reading, node: OnnxNode, *detail: object, places: tuple[int, ...] = (0,)) -> Made:
    """Return what the inputs at `places` are made into; the other inputs are in `detail`."""
    parts: list[Value] = []
    for place in places:
        part = reading.values.get(node.input(place))
        if not isinstance(part, Product | Short | Made):
            raise MisfitError(f"takes {node.input(place)!r}, which is not what belongs there")
        parts.append(part)
    return Made(node.op_type, tuple(parts), detail)


def transpose(reading: Reading, node: OnnxNode) -> None:
    """Note axes in another order."""
    order = node.attributes.get("perm")
    if not isinstance(order, list | tuple):
        raise MisfitError("does not say its order")
    reading.make(node, noted(reading, node, *order))


def concat(reading: Reading, node: OnnxNode) -> None:
    """Note values side by side."""
    if node.attributes.get("axis") != -1:
        raise MisfitError("is not along the last axis")
    reading.make(node, noted(reading, node, places=tuple(range(len(node.inputs)))))


def split(reading: Reading, node: OnnxNode) -> None:
    """Note parts of the last axis."""
    parts = tuple(reading.numbers(node, 1))
    if node.attributes.get("axis", 0) != -1 or len(parts) != len(node.outputs):
        raise MisfitError(f"cuts {list(parts)} of another axis")
    reading.make(node, *(noted(reading, node, parts, place) for place in range(len(parts))))


def matmul(reading: Reading, node: OnnxNode) -> None:
    """Note a product with the transposed matrix of each head."""
    reading.settings(node, {"alpha": 1.0, "transA": 0, "transB": 1})
    reading.make(node, Made("MatMul", noted(reading, node).parts, (reading.held(node, 1),)))


def add(reading: Reading, node: OnnxNode, held: OnnxTensor) -> None:
    """Note a stored vector that is added."""
    reading.make(node, noted(reading, node, held))


def top(reading: Reading, node: OnnxNode) -> None:
    """Note the largest values, and their places."""
    reading.settings(node, {"axis": -1, "largest": 1, "sorted": 1})
    counts = reading.numbers(node, 1)
    reading.make(node, *(noted(reading, node, *counts, place) for place in range(len(node.outputs))))


def reduce(reading: Reading, node: OnnxNode) -> None:
    """Note a sum or a least value along axes."""
    reading.settings(node, {}, free=("keepdims",))
    reading.make(node, noted(reading, node, tuple(reading.numbers(node, 1)), node.attributes.get("keepdims", 1)))


def of_two(reading: Reading, node: OnnxNode) -> None:
    """Note a comparison."""
    reading.make(node, noted(reading, node, places=(0, 1)))


def unsqueeze(reading: Reading, node: OnnxNode) -> None:
    """Note an axis of one more."""
    reading.make(node, noted(reading, node, *reading.numbers(node, 1)))


def where(reading: Reading, node: OnnxNode) -> None:
    """Note values of which some are a constant instead."""
    reading.make(node, noted(reading, node, reading.single(node, 1), places=(0, 2)))


RULES: dict[str, Callable[[Reading, OnnxNode], None]] = {
    "Transpose": transpose,
    "Concat": concat,
    "TopK": top,
    "ReduceMin": reduce,
    "Less": of_two,
    "Unsqueeze": unsqueeze,
    "Where": where,
}
