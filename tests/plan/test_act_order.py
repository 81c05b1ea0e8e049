"""GPTQ folders coded in order of activation, to ONNX: the same weights by definition, the same logits, and every other order found."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file

from r1q.core.artifact import OutputFolder
from r1q.core.checkpoint import PERMUTATIONS, QuantizedCheckpoint
from r1q.core.errors import CheckError, InputError
from r1q.core.metrics import score
from r1q.export.lint_onnx import lint_onnx
from r1q.export.onnx import write_onnx
from r1q.export.verified import Verified, refuse_failed
from r1q.export.verify import verify_path
from r1q.models.config import ModelConfig
from r1q.models.forward import Configured, logits
from r1q.plan.reexport import reexport
from r1q.runtimes.base import Options
from r1q.runtimes.table import load_runtime

MakeGptq = Callable[..., Path]
TOKENS = np.random.default_rng(7).integers(0, 300, 24)
_SHARED = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


def act_ordered(version: int, *, apart: tuple[str, ...] = ()) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    """Return an edit that gives every layer an order and zero points of its own; layers with one input share their order.

    Layers whose name is in `apart` have another order than their neighbours.
    """

    def edit(tensors: dict[str, Any], quantization: dict[str, Any]) -> None:
        random = np.random.default_rng(version)
        orders: dict[str, np.ndarray] = {}
        for name in sorted(name for name in tensors if name.endswith(".g_idx")):
            block, _, layer = name.removesuffix(".g_idx").rpartition(".")
            key = f"{block}.{layer if layer in apart else _SHARED.get(layer, layer)}"
            if key not in orders:
                orders[key] = random.permutation(tensors[name])
            tensors[name] = orders[key]
            zeros = name.replace("g_idx", "qzeros")
            nibbles = random.integers(6, 11, (*tensors[zeros].shape, 8)) - (2 - version)
            tensors[zeros] = (nibbles << np.arange(0, 32, 4)).sum(axis=-1).astype(np.uint32).view(np.int32)
        quantization |= {"desc_act": True, "sym": False, "checkpoint_format": "gptq" if version == 1 else "gptq_v2"}

    return edit


def by_definition(tensors: dict[str, Any], layer: str, version: int) -> np.ndarray:
    """Dequantize a 4-bit layer number by number, as GPTQ's packing says, for its first five outputs."""
    words, zeros = tensors[f"{layer}.qweight"].view(np.uint32), tensors[f"{layer}.qzeros"].view(np.uint32)
    groups, scales = tensors[f"{layer}.g_idx"], tensors[f"{layer}.scales"]
    values = np.empty((5, len(groups)), np.float32)
    for o in range(5):
        for i, group in enumerate(groups):
            code = int(words[i // 8, o]) >> (4 * (i % 8)) & 15
            zero = (int(zeros[group, o // 8]) >> (4 * (o % 8)) & 15) + (2 - version)
            values[o, i] = np.float32(scales[group, o]) * np.float32(code - zero)
    return values


def exported(folder: Path, out: Path) -> QuantizedCheckpoint:
    for _ in reexport(folder, ("onnx",), out):
        pass
    return QuantizedCheckpoint.open(out / "checkpoint")


def divergence(wanted: np.ndarray, found: np.ndarray) -> float:
    kld = score(found, np.zeros(len(found), np.int64), wanted).kld
    assert kld is not None
    return float(np.abs(kld).max())


def nodes_of(folder: Path) -> dict[str, Any]:
    return {node.name: node for node in onnx.load(folder / "model.onnx", load_external_data=False).graph.node}


@pytest.mark.parametrize(("version", "runtime"), [(1, "onnxruntime"), (2, "onnxruntime-genai")])
def test_weights_and_logits_are_the_folders(make_gptq: MakeGptq, tmp_path: Path, version: int, runtime: str) -> None:
    folder = make_gptq(act_ordered(version), bits=4, group_size=32)
    checkpoint = exported(folder, tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    for layer in ("0.self_attn.v_proj", "0.self_attn.o_proj", "1.mlp.up_proj", "1.mlp.down_proj"):
        found = checkpoint.read_rows(f"model.layers.{layer}.weight", 0, 5)
        np.testing.assert_array_equal(found, by_definition(tensors, f"model.layers.{layer}", version), err_msg=layer)
    refuse_failed(list(verify_path(tmp_path / "out")))
    level_1 = write_onnx(checkpoint, tmp_path / "level-1", accuracy_level=1)
    wanted = next(logits(Configured(ModelConfig.read(checkpoint.sidecar), checkpoint), TOKENS[None]))
    with load_runtime(runtime).open(level_1, Options(context=64)) as session:
        found = session.logits(TOKENS.tolist())
        assert divergence(wanted, found) < 1e-5
        session.prefill(0, TOKENS[:-1].tolist())
        last = session.step([(0, int(TOKENS[-1]))])
    assert divergence(wanted[-1:], last) < 1e-5
    assert np.abs(wanted).max() > 0.1  # logits that say something


def test_layers_that_share_an_order_take_one_and_down_takes_none(make_gptq: MakeGptq, tmp_path: Path) -> None:
    exported(make_gptq(act_ordered(1), bits=4, group_size=32), tmp_path / "one")
    gathers = {name for name, node in nodes_of(tmp_path / "one/onnx").items() if name.endswith("/order/GatherElements")}
    layers = [f"/model/layers.{layer}" for layer in range(2)]
    assert gathers == {
        f"{layer}/{product}/order/GatherElements"
        for layer in layers
        for product in ("attn/qkv_proj", "attn/o_proj", "mlp/gate_up_proj")
    }
    (finding,) = [found for found in lint_onnx(tmp_path / "one/onnx") if "act-order" in found.what]
    assert finding.count == 6


def test_layers_of_different_orders_stand_alone_and_equal_ones_share_a_gather(
    make_gptq: MakeGptq, tmp_path: Path
) -> None:
    exported(make_gptq(act_ordered(2, apart=("v_proj", "up_proj")), bits=4, group_size=32), tmp_path / "out")
    nodes = nodes_of(tmp_path / "out/onnx")
    inputs = {part: nodes[f"/model/layers.0/attn/{part}_proj/MatMul"].input[0] for part in "qkv"}
    assert inputs["q"] == inputs["k"] != inputs["v"]
    assert (
        nodes["/model/layers.0/mlp/gate_proj/MatMul"].input[0] != nodes["/model/layers.0/mlp/up_proj/MatMul"].input[0]
    )
    refuse_failed(list(verify_path(tmp_path / "out")))


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Where the folder that the next tests damage is kept: it is made once."""
    return {"root": tmp_path_factory.mktemp("act-order")}


@pytest.fixture
def output(make_gptq: MakeGptq, kept: dict[str, Path], tmp_path: Path) -> OutputFolder:
    """Return a fresh export with one order for each input of block 1."""
    if "made" not in kept:
        exported(make_gptq(act_ordered(1), bits=4, group_size=32), kept["root"] / "out")
        kept["made"] = kept["root"] / "out"
    return OutputFolder(Path(shutil.copytree(kept["made"], tmp_path / "copy")))


def onnx_result(output: OutputFolder) -> Verified:
    return next(result for result in verify_path(output.path) if result.format == "onnx")


def change_order(output: OutputFolder, node: str, change: Callable[[np.ndarray], None]) -> None:
    """Change the stored order of a product of block 1; where it lies is the onnx package's word."""
    path = output.path / "onnx/model.onnx"
    graph = onnx.load(path, load_external_data=False).graph
    name = next(one for one in graph.node if one.name == f"/model/layers.1/{node}/order/GatherElements").input[1]
    name = next(one for one in graph.node if one.output[0] == name).input[0]
    tensor = next(one for one in graph.initializer if one.name == name)
    facts = {entry.key: entry.value for entry in tensor.external_data}
    numbers = np.memmap(
        path.with_name(facts["location"]), "<i4", "r+", offset=int(facts["offset"]), shape=tuple(tensor.dims)
    )
    change(numbers)
    numbers.flush()
    output.record("onnx", output.path / "onnx", ())


def _swap(numbers: np.ndarray) -> None:
    numbers[[3, 70]] = numbers[[70, 3]]


def _twice(numbers: np.ndarray) -> None:
    numbers[3] = numbers[70]


def _outside(numbers: np.ndarray) -> None:
    numbers[3] = 128


def _negative(numbers: np.ndarray) -> None:
    numbers[3] = numbers[3] - 128  # which GatherElements takes, counting from the end


def test_another_order_is_found_for_every_layer_that_reads_it(output: OutputFolder) -> None:
    change_order(output, "attn/qkv_proj", _swap)
    found = onnx_result(output).defects
    assert {defect.where for defect in found} == {f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkv"}
    assert {defect.what for defect in found} == {
        "2 of 128 columns are multiplied by other inputs than the checkpoint's"
    }
    with pytest.raises(CheckError):
        refuse_failed([onnx_result(output)])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_twice, r"no order of 128 inputs: it names input \d+ 2 times"),
        (_outside, "no order of 128 inputs: it names input 128"),
        (_negative, r"no order of 128 inputs: it names input -\d+"),
    ],
)
def test_what_is_no_order_is_refused(output: OutputFolder, change: Callable[[np.ndarray], None], said: str) -> None:
    change_order(output, "attn/o_proj", change)
    assert all(re.search(said, defect.what) for defect in onnx_result(output).defects)
    assert len(onnx_result(output).defects) == 2  # in either graph


def edit_graph(output: OutputFolder, edit: Callable[[Any], None]) -> None:
    path = output.path / "onnx/model.onnx"
    model = onnx.load(path, load_external_data=False)
    edit(model.graph)
    onnx.save(model, path)
    output.record("onnx", output.path / "onnx", ())


def node_of(graph: Any, name: str) -> Any:
    return next(node for node in graph.node if node.name == f"/model/layers.1/{name}")


def put_in_order(graph: Any, product: str, order: str) -> None:
    """Put the inputs of a product in an order once more."""
    user = node_of(graph, f"{product}/MatMul")
    x, at = user.input[0], list(graph.node).index(user)
    user.input[0] = "again"
    for place, (operator, inputs, output) in enumerate(
        (("Shape", [x], "sides"), ("Expand", [order, "sides"], "spread"), ("GatherElements", [x, "spread"], "again"))
    ):
        axis: dict[str, Any] = {"axis": -1} if operator == "GatherElements" else {}
        graph.node.insert(at + place, onnx.helper.make_node(operator, inputs, [output], name=output, **axis))


def _bypass(graph: Any) -> None:
    """Take the inputs of gate and up as they come."""
    node_of(graph, "mlp/gate_up_proj/MatMul").input[0] = node_of(graph, "mlp/gate_up_proj/order/GatherElements").input[
        0
    ]


def _cut(graph: Any) -> None:
    """Leave the last inputs of o out."""
    node_of(graph, "attn/o_proj/order/Expand").input[0] = "short"
    graph.initializer.append(onnx.numpy_helper.from_array(np.arange(96), "short"))


def _down_again(graph: Any) -> None:
    """Put down's inputs in an order that its rows before it were put in already."""
    graph.initializer.append(onnx.numpy_helper.from_array(np.arange(256)[::-1].copy(), "turned"))
    put_in_order(graph, "mlp/down_proj", "turned")


def _twice_over(graph: Any) -> None:
    put_in_order(graph, "attn/o_proj", node_of(graph, "attn/o_proj/order/Expand").input[0])


def _of_another(graph: Any) -> None:
    """Spread the order of o's inputs, of the last position, over all positions."""
    first = next(node for node in graph.node if node.op_type == "Shape" and node.input[0] != "attention_mask")
    node_of(graph, "attn/o_proj/order/Expand").input[1] = first.output[0]


@pytest.mark.parametrize(
    ("edit", "where", "said"),
    [
        (_bypass, "model.layers.1.mlp.up_proj.weight", r"1\d\d of 128 columns are multiplied by other inputs"),
        (_cut, "/model/layers.1/attn/o_proj/MatMul", "has 128 columns and takes 96 inputs in the order 'short'"),
        (_down_again, "model.layers.1.mlp.gate_proj.weight", "codes, .* differ"),
        (_twice_over, "again", "puts in order what was put in an order before"),
        (_of_another, "/attn/o_proj/order/GatherElements", "is not along its inputs"),
    ],
)
def test_a_graph_that_takes_inputs_otherwise_is_found(
    output: OutputFolder, edit: Callable[[Any], None], where: str, said: str
) -> None:
    edit_graph(output, edit)
    found = onnx_result(output).defects
    assert any(where in defect.where and re.search(said, defect.what) for defect in found), list(map(str, found))


def test_a_checkpoint_whose_orders_changed_or_went_is_damaged(output: OutputFolder) -> None:
    path = output.checkpoint / PERMUTATIONS
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
    (defect,) = [one for one in next(iter(verify_path(output.path))).defects if one.where == PERMUTATIONS]
    assert "was changed or damaged" in defect.what
    path.unlink()
    with pytest.raises(InputError, match=r"permutations\.safetensors is missing"):
        QuantizedCheckpoint.open(output.checkpoint).permutation("model.layers.0.mlp.down_proj.weight")
