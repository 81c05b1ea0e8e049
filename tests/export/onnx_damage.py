"""Damage to an ONNX folder, done with the onnx package: a graph edited, stored bytes changed, and the new hashes listed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx

from r1q.core.artifact import OutputFolder

Edit = Callable[[Any], None]


def node(graph: Any, name: str) -> Any:
    """Return the node of that name."""
    return next(node for node in graph.node if node.name == name)


def damage(output: OutputFolder, edit: Edit) -> None:
    """Change the graph that generates."""
    path = output.path / "onnx" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    edit(model.graph)
    onnx.save(model, path)
    output.record("onnx", output.path / "onnx", ())


def change_bytes(output: OutputFolder, name: str, change: Callable[[Any], None]) -> None:
    """Change the stored bytes of a tensor; where they lie is the onnx package's word."""
    path = output.path / "onnx" / "model.onnx"
    graph = onnx.load(path, load_external_data=False).graph
    tensor = next(tensor for tensor in graph.initializer if tensor.name == name)
    facts = {entry.key: entry.value for entry in tensor.external_data}
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    file, offset = path.with_name(facts["location"]), int(facts["offset"])
    values: Any = np.memmap(file, dtype, "r+", offset=offset, shape=tuple(tensor.dims))
    change(values)
    values.flush()
    output.record("onnx", output.path / "onnx", ())


def flip(place: tuple[int, ...]) -> Callable[[Any], None]:
    """Return the change of one bit."""

    def change(values: Any) -> None:
        values.view(f"u{values.dtype.itemsize}")[place] ^= 1

    return change


def set_attribute(name: str, key: str, value: Any) -> Edit:
    """Return the edit that gives a node another attribute."""

    def edit(graph: Any) -> None:
        found = node(graph, name)
        kept = [attribute for attribute in found.attribute if attribute.name != key]
        del found.attribute[:]
        found.attribute.extend([*kept, onnx.helper.make_attribute(key, value)])

    return edit
