"""Graphs changed at random: verify finds a defect, or the graph computes the same logits to the bit; no change ends in a traceback."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from r1q.core.artifact import OutputFolder
from r1q.core.checkpoint import QuantizedCheckpoint
from r1q.core.errors import InputError
from r1q.export.verify_onnx import verify_onnx
from r1q.models.embedded import OpenedModel
from r1q.models.source import ModelSource
from r1q.plan.choose import Wish, choose_recipe
from r1q.plan.plan import make_plan
from r1q.plan.walk import quantize_model
from r1q.runtimes.base import Options
from r1q.runtimes.table import load_runtime

pytest.importorskip("onnxruntime")

MUTATIONS = 80
TOKENS = list(range(7, 31))
SIZES = {"num_hidden_layers": 2, "moe_intermediate_size": 64}
FAMILIES = {"qwen3_moe": SIZES, "deepseek_v3": SIZES | {"q_lora_rank": 64, "qk_rope_head_dim": 16, "v_head_dim": 16}}


def _input(graph: Any, node: Any, rng: random.Random) -> bool:
    """Let a node take something else."""
    names = [name for one in graph.node for name in one.output] + [tensor.name for tensor in graph.initializer]
    at, other = rng.randrange(len(node.input)), rng.choice(names)
    changed = bool(node.input[at] != other)
    node.input[at] = other
    return changed


def _swap(graph: Any, node: Any, rng: random.Random) -> bool:
    """Exchange two inputs or outputs."""
    side = rng.choice((node.input, node.output))
    if len(side) < 2:
        return False
    one, other = rng.sample(range(len(side)), 2)
    side[one], side[other] = side[other], side[one]
    return bool(side[one] != side[other])


def _attribute(graph: Any, node: Any, rng: random.Random) -> bool:
    """Give an attribute another value, or none."""
    if not node.attribute:
        return False
    found = rng.choice(node.attribute)
    name, old = found.name, helper.get_attribute_value(found)
    node.attribute.remove(found)
    turned = old[::-1] if isinstance(old, list) else old
    values: dict[type, list[Any]] = {int: [0, 1, 2, -1], float: [0.0, 1.0, 2.5], bytes: [b"x"], list: [turned]}
    new = rng.choice([*values.get(type(old), []), None])
    if new is not None:
        node.attribute.append(helper.make_attribute(name, new))
    return bool(new != old)


def _delete(graph: Any, node: Any, rng: random.Random) -> bool:
    graph.node.remove(node)
    return True


def _operator(graph: Any, node: Any, rng: random.Random) -> bool:
    before, node.op_type = node.op_type, rng.choice(sorted({one.op_type for one in graph.node}))
    return bool(before != node.op_type)


EDITS: tuple[Callable[[Any, Any, random.Random], bool], ...] = (_input, _swap, _attribute, _delete, _operator)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_verify_accepts_computes_the_same(moe_models: SimpleNamespace, tmp_path: Path, family: str) -> None:
    source = ModelSource.open(moe_models.write_moe_model(tmp_path / "m", family, **FAMILIES[family]))
    recipe = choose_recipe(Wish(formats=("onnx",), bits=4), source.tensors).recipe
    list(quantize_model(OpenedModel(source), make_plan(source, recipe, ("onnx",)), OutputFolder(tmp_path / "out")))
    checkpoint, folder = QuantizedCheckpoint.open(tmp_path / "out/checkpoint"), tmp_path / "out/onnx"
    path = folder / "model_all_logits.onnx"
    model, rng, found = onnx.load(path, load_external_data=False), random.Random(7), 0
    wanted = _logits(folder)
    for _ in range(MUTATIONS):
        changed = copy.deepcopy(model)
        if not rng.choice(EDITS)(changed.graph, rng.choice(changed.graph.node), rng):
            continue
        path.write_bytes(changed.SerializeToString())
        try:
            sound = not verify_onnx(checkpoint, folder).defects
        except InputError:
            sound = False
        if sound:
            np.testing.assert_array_equal(_logits(folder), wanted)
        found += not sound
    assert found > MUTATIONS // 2


def _logits(folder: Path) -> Any:
    with load_runtime("onnxruntime").open(folder, Options(threads=1)) as session:
        return session.logits(TOKENS)
