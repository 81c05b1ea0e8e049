"""In which order products take their inputs: a GatherElements before them, and rows before them that were put in order instead.

A checkpoint's columns may stand in another order than the inputs (act-order): column j is for input `columns[j]`. A graph whose
product takes the inputs `taken` (as they come: 0, 1, …) computes the same exactly if `taken` is `columns`; for down, whose inputs are
the rows of gate and up, exactly if gate's and up's row `taken[j]` is their row `columns[j]`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from r1q.core.checkpoint import QuantizedCheckpoint
from r1q.core.onnx_graph import OnnxNode, OnnxTensor
from r1q.core.tensors import TensorSpec
from r1q.export.verified import Defect
from r1q.export.verify_onnx_values import (
    Attended,
    Bound,
    Extent,
    Gated,
    Key,
    Matrix,
    MisfitError,
    Normed,
    Place,
    Reading,
    Spread,
)

Order = NDArray[np.int64]
DOWN, BEFORE_DOWN = "ffn_down", ("ffn_gate", "ffn_up")


def shape(reading: Reading, node: OnnxNode) -> None:
    """Note the sides of an input, which an order is spread over."""
    reading.settings(node, {}, free=())
    reading.make(node, _extent(reading, _place(reading, node)))


def spread(reading: Reading, node: OnnxNode) -> None:
    """Note an order of inputs for each position."""
    reading.make(node, Spread(order=_order(reading, reading.held(node, 0)), extent=reading.value(node, 1, Extent)))


def gather(reading: Reading, node: OnnxNode) -> None:
    """Put an input in an order."""
    found, indices = _place(reading, node), reading.value(node, 1, Spread)
    if indices.extent != _extent(reading, found) or node.attributes.get("axis", 0) not in (-1, 2):
        raise MisfitError(f"of {node.input(0)!r} is not along its inputs")
    if found.order is not None:
        raise MisfitError("puts in order what was put in an order before")
    reading.make(node, replace(found, order=indices.order))


def _extent(reading: Reading, found: Place) -> Extent:
    config = reading.config
    heads = config.num_heads * config.head_dim
    width = {Normed: config.hidden_size, Attended: heads, Gated: config.intermediate_size}[type(found)]
    return Extent(width=width, last=found.last)


def _place(reading: Reading, node: OnnxNode) -> Place:
    found = reading.value(node, 0, Place)
    if not isinstance(found, Normed | Attended | Gated):
        raise MisfitError(f"of {node.input(0)!r} is not expected")
    return found


def _order(reading: Reading, tensor: OnnxTensor) -> OnnxTensor:
    if tensor.dtype not in ("int64", "int32") or len(tensor.shape) != 1:
        raise MisfitError(f"takes {tensor.name!r}, {tensor.dtype} {list(tensor.shape)}, which is no list of inputs")
    if (wrong := _fault(_numbers(reading, tensor))) is not None:
        raise MisfitError(f"takes {tensor.name!r}, which is no order of {tensor.size} inputs: {wrong}")
    return tensor


def _fault(numbers: Order) -> str | None:
    """Return why `numbers` are not 0 … n − 1 in some order, None where they are."""
    outside = numbers[(numbers < 0) | (numbers >= numbers.size)]
    if outside.size:
        return f"it names input {outside[0]}"
    counts = np.bincount(numbers, minlength=numbers.size)
    twice = np.flatnonzero(counts > 1)
    return f"it names input {twice[0]} {counts[twice[0]]} times" if twice.size else None


def _numbers(reading: Reading, tensor: OnnxTensor) -> Order:
    return np.asarray(reading.folder.read(tensor), dtype=np.int64).reshape(-1)


def taken(reading: Reading, bound: Bound) -> Order:
    """Return which input [columns] each column of a bound matrix is multiplied by."""
    assert isinstance(bound.held, Matrix)
    return np.arange(bound.held.columns) if bound.order is None else _numbers(reading, bound.order)


def order_defect(checkpoint: QuantizedCheckpoint, reading: Reading, bound: Bound, spec: TensorSpec) -> Defect | None:
    """Return the defect of a matrix that takes its inputs in another order than the checkpoint has its columns in.

    Down is held against the rows before it: see `row_orders`.
    """
    columns = checkpoint.permutation(spec.name)
    if spec.kind == DOWN or (columns is None and bound.order is None):
        return None
    if not isinstance(bound.held, Matrix) or bound.held.columns != spec.columns:
        return None  # of another shape, which is a defect of its own
    wanted = np.arange(spec.columns) if columns is None else columns
    wrong = int((taken(reading, bound) != wanted).sum())
    if not wrong:
        return None
    what = f"{wrong} of {spec.columns} columns are multiplied by other inputs than the checkpoint's"
    return Defect(where=spec.name, what=what, difference=math.inf)


def row_orders(
    checkpoint: QuantizedCheckpoint, reading: Reading, specs: Mapping[Key, TensorSpec]
) -> dict[int | None, Order]:
    """Return by block which of their rows gate and up must give at each place, for blocks where that is not as they stand."""
    found: dict[int | None, Order] = {}
    for bound in reading.bound:
        spec = specs.get(bound.key)
        if spec is None or spec.kind != DOWN or not isinstance(bound.held, Matrix):
            continue
        columns = checkpoint.permutation(spec.name)
        if (columns is None and bound.order is None) or bound.held.columns != spec.columns:
            continue
        rows = np.empty(spec.columns, dtype=np.int64)
        rows[taken(reading, bound)] = np.arange(spec.columns) if columns is None else columns
        if (rows != np.arange(spec.columns)).any():
            found[bound.key[0]] = rows
    return found


def in_order(values: NDArray[Any], rows: Order | None) -> NDArray[Any]:
    """Return rows of `values` in the order asked for, None: as they are."""
    return values if rows is None else values[rows]
