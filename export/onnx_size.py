"""How large an ONNX folder will be, from headers alone: tensors are placed and graphs built as the exporter does, and not written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from r1q.core.cache_scales import CacheScales
from r1q.core.files import json_bytes
from r1q.core.recipe import PlannedTensor
from r1q.core.scheme import Scheme
from r1q.core.tensors import TensorSpec
from r1q.export.onnx import DATA, GRAPH, served_context
from r1q.export.onnx_config import genai_config
from r1q.export.onnx_data import DataFile
from r1q.export.onnx_graph import build_graph
from r1q.export.onnx_nodes import Shape
from r1q.export.onnx_weights import place_weights
from r1q.models.config import ModelConfig


class _Unwritten:
    """What the exporter asks of a checkpoint before it writes: which tensors, and under which scheme. There are no values."""

    activations = None

    def __init__(self, planned: Sequence[PlannedTensor]) -> None:
        self.tensors: tuple[TensorSpec, ...] = tuple(tensor.spec for tensor in planned)
        self._schemes = {tensor.spec.name: tensor.scheme for tensor in planned}

    def scheme(self, name: str) -> Scheme:
        return self._schemes[name]

    def permutation(self, name: str) -> None:
        return None


def folder_bytes(
    folder: Path,
    config: ModelConfig,
    sidecars: Iterable[Path],
    planned: Sequence[PlannedTensor],
    *,
    cache: bool = False,
) -> int:
    """Return the bytes of the ONNX folder of the model in `folder`: data, both graphs and what lies beside them.

    `planned` are its tensors; `cache` says whether keys and values are kept in 8 bits.
    """
    context, data = served_context(config), DataFile()
    steps = np.ones((config.num_layers, config.num_kv_heads, config.head_dim), dtype=np.float32)
    scales = CacheScales(keys=steps, values=steps, record={}) if cache else None
    weights = place_weights(cast(Any, _Unwritten(planned)), config, data, context, scales)
    graphs: list[int] = [
        build_graph(config, weights, data.placed, DATA, Shape(every=every, accuracy_level=4)).ByteSize()
        for every in (False, True)
    ]
    settings = len(json_bytes(genai_config(config, folder, context, GRAPH)))
    beside = sum(path.stat().st_size for path in sidecars)
    return max(placed.offset + placed.length for placed in data.placed.values()) + sum(graphs) + settings + beside
