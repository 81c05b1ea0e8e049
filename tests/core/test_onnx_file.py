"""ONNX folders: parsed as the onnx package parses them, and every way to lie in one is an `InputError` by name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from r1q.core.errors import InputError
from r1q.core.onnx_file import OnnxFolder
from r1q.core.onnx_graph import OnnxGraph, OnnxTensor, parse_graph

ROWS, COLUMNS = 6, 64
DATA = "model.onnx.data"
Edit = Callable[[Any], None]


def external(name: str, kind: int, shape: tuple[int, ...], offset: int, nbytes: int, location: str = DATA) -> Any:
    tensor = TensorProto(name=name, data_type=kind, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, "offset": offset, "length": nbytes}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def small_model() -> Any:
    """Return a graph with a quantized matrix, its tied twin, inline tensors and every kind of attribute."""
    codes, scales = ROWS * COLUMNS // 2, ROWS * 2 * 4
    facts: dict[str, Any] = {"K": COLUMNS, "N": ROWS, "bits": 4, "block_size": 32, "accuracy_level": 4}
    nodes = [
        helper.make_node("Constant", [], ["one"], "c", value=numpy_helper.from_array(np.array([1]), "one")),
        helper.make_node("MatMulNBits", ["x", "B", "S"], ["y"], "/mm", domain="com.microsoft", **facts),
        helper.make_node("Add", ["y", "bias"], ["z"], "/add"),
        helper.make_node(
            "Odd", ["z", "", "one"], ["logits"], "/odd", domain="com.microsoft",
            text="ä", ratio=0.25, ratios=[0.5, -1.0], sides=[-1, 1 << 40], texts=["a", "b"],
        ),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", None, COLUMNS])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)],
        [
            external("B", TensorProto.UINT8, (ROWS, 2, 16), 0, codes),
            external("S", TensorProto.FLOAT, (ROWS, 2), codes, scales),
            external("tied", TensorProto.UINT8, (ROWS, 32), 0, codes),
            numpy_helper.from_array(np.arange(ROWS, dtype=np.float32), "bias"),
        ],
        value_info=[helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", None, ROWS])],
    )
    imports = [helper.make_opsetid("", 22), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10, producer_name="a test")


def small_data() -> bytes:
    codes = np.arange(ROWS * COLUMNS // 2, dtype=np.uint8)
    return codes.tobytes() + np.linspace(0.01, 0.1, ROWS * 2, dtype=np.float32).tobytes()


def write(folder: Path, model: Any = None, data: bytes | None = None, config: object = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "model.onnx").write_bytes((model or small_model()).SerializeToString())
    (folder / DATA).write_bytes(small_data() if data is None else data)
    if config is not None:
        (folder / "genai_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


def assert_same_graph(ours: OnnxGraph, theirs: Any) -> None:
    """Hold our reading against the onnx package's own."""
    assert ours.ir_version == theirs.ir_version
    assert dict(ours.opsets) == {entry.domain: entry.version for entry in theirs.opset_import}
    assert len(ours.nodes) == len(theirs.graph.node)
    for node, other in zip(ours.nodes, theirs.graph.node, strict=True):
        assert (node.name, node.op_type, node.domain) == (other.name, other.op_type, other.domain)
        assert (node.inputs, node.outputs) == (tuple(other.input), tuple(other.output))
        assert set(node.attributes) == {attribute.name for attribute in other.attribute}
        for attribute in other.attribute:
            assert_same_attribute(node.attributes[attribute.name], helper.get_attribute_value(attribute))
    assert list(ours.initializers) == [tensor.name for tensor in theirs.graph.initializer]
    for tensor in theirs.graph.initializer:
        read = ours.initializers[tensor.name]
        assert read.shape == tuple(tensor.dims)
        assert (read.location is not None) == (tensor.data_location == TensorProto.EXTERNAL)
        facts = {entry.key: entry.value for entry in tensor.external_data}
        assert (read.location, str(read.offset)) == (facts.get("location"), facts.get("offset", "0"))
    for values, others in ((ours.inputs, theirs.graph.input), (ours.outputs, theirs.graph.output)):
        assert list(values) == [value.name for value in others]
        for value in others:
            stated = value.type.tensor_type
            sides = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param for d in stated.shape.dim)
            assert values[value.name].shape == (sides if stated.HasField("shape") else None)
            assert values[value.name].dtype == str(helper.tensor_dtype_to_np_dtype(stated.elem_type))


def assert_same_attribute(ours: object, theirs: Any) -> None:
    if isinstance(ours, OnnxTensor):
        np.testing.assert_array_equal(ours.array(ours.inline), numpy_helper.to_array(theirs))
    elif isinstance(theirs, bytes):
        assert ours == theirs.decode()
    elif isinstance(theirs, list):
        assert ours == tuple(value.decode() if isinstance(value, bytes) else value for value in theirs)
    else:
        assert ours == theirs


def test_a_folder_is_read_as_the_onnx_package_reads_it(tmp_path: Path) -> None:
    folder = OnnxFolder.open(write(tmp_path / "m"))
    assert_same_graph(folder.graph, onnx.load(tmp_path / "m" / "model.onnx", load_external_data=False))
    whole = onnx.load(tmp_path / "m" / "model.onnx")
    for tensor in whole.graph.initializer:
        read = folder.read(folder.graph.initializers[tensor.name])
        np.testing.assert_array_equal(read, numpy_helper.to_array(tensor))
        assert not read.flags.writeable
    sizes = [(tmp_path / "m" / name).stat().st_size for name in ("model.onnx", DATA)]
    assert folder.nbytes == sum(sizes)
    assert folder.graph.producer == "a test"


def test_four_bit_tensors_come_as_their_bytes(tmp_path: Path) -> None:
    model = small_model()
    model.graph.initializer.append(external("nibbles", TensorProto.UINT4, (3, 3), 7, 5, "four.data"))
    (write(tmp_path / "m", model) / "four.data").write_bytes(bytes(range(12)))
    folder = OnnxFolder.open(tmp_path / "m")
    assert folder.read(folder.graph.initializers["nibbles"]).tolist() == [7, 8, 9, 10, 11]


def test_the_graphs_that_the_configuration_names_are_read_too(tmp_path: Path) -> None:
    config = {"model": {"decoder": {"filename": "d.onnx"}, "embedding": {"filename": "e.onnx"}, "context_length": 7}}
    folder = write(tmp_path / "m", config=config)
    for name in ("d.onnx", "e.onnx", "model_all_logits.onnx"):
        (folder / name).write_bytes(small_model().SerializeToString())
    opened = OnnxFolder.open(folder)
    assert list(opened.graphs) == ["d.onnx", "e.onnx", "model_all_logits.onnx"]
    assert opened.main == "d.onnx"
    assert opened.config["model"]["context_length"] == 7
    assert OnnxFolder.open(folder / "model.onnx").main == "model.onnx"
    (folder / "e.onnx").unlink()
    with pytest.raises(InputError, match=r"e\.onnx: is missing"):
        OnnxFolder.open(folder)


def _initializer(model: Any, name: str) -> Any:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def _fact(name: str, key: str, value: str) -> Edit:
    def edit(model: Any) -> None:
        entry = next(entry for entry in _initializer(model, name).external_data if entry.key == key)
        entry.value = value

    return edit


def _node(**facts: Any) -> Edit:
    return lambda model: model.graph.node.append(helper.make_node(**facts))


def _subgraph(model: Any) -> None:
    body = helper.make_graph([], "body", [], [])
    model.graph.node.append(helper.make_node("If", ["one"], ["w"], "/if", then_branch=body, else_branch=body))


def _sparse(model: Any) -> None:
    model.graph.sparse_initializer.add()


def _function(model: Any) -> None:
    model.functions.append(helper.make_function("com.microsoft", "F", [], [], [], []))


def _edit(model_edit: str) -> Edit:
    """Return an edit spelled as a statement on `model`, for those that are one assignment or call."""
    return lambda model: exec(model_edit, {"model": model, "helper": helper, "B": _initializer(model, "B")})


LIES: dict[str, tuple[Edit, str]] = {
    "parent": (_fact("S", "location", "../" + DATA), "tensor 'S' lies in"),
    "absolute": (_fact("S", "location", "/etc/passwd"), "not a file of the folder"),
    "backslash": (_fact("S", "location", "..\\" + DATA), "not a file of the folder"),
    "null": (_fact("S", "location", DATA + "\0"), "not a file of the folder"),
    "stream": (_fact("S", "location", DATA + ":x"), "not a file of the folder"),
    "memory": (_fact("S", "location", "*/_ORT_MEM_ADDR_/*"), "not a file of the folder"),
    "dot": (_fact("S", "location", "."), "not a file of the folder"),
    "no location": (_fact("S", "location", ""), "not a file of the folder"),
    "missing": (_fact("S", "location", "other.data"), r"other\.data: is missing"),
    "beyond": (_fact("S", "offset", "196"), "ends at byte 244 of a file of 240"),
    "huge": (_fact("S", "offset", "9" * 18), "ends at byte"),
    "wide": (_fact("S", "offset", "9" * 30), "is no number of bytes"),
    "negative": (_fact("S", "offset", "-4"), "is no number of bytes"),
    "blank": (_fact("S", "offset", " 192"), "is no number of bytes"),
    "digits": (_fact("S", "offset", "１92"), "is no number of bytes"),
    "length": (_fact("S", "length", "44"), "needs 48 bytes and claims 44"),
    "overlap": (_fact("S", "offset", "188"), "tensors .* overlap"),
    "other key": (_edit("B.external_data.add(key='basepath', value='/')"), "is described by"),
    "twice": (_edit("B.external_data.add(key='offset', value='0')"), "is described by"),
    "both": (_edit("B.raw_data = b'x'"), "does not say clearly"),
    "neither": (_edit("B.data_location = 0"), "does not say clearly"),
    "string": (_edit("model.graph.initializer.add(name='s', data_type=8, dims=[1], string_data=[b'x'])"), "strings as"),
    "complex": (_edit("model.graph.initializer.add(name='s', data_type=14, dims=[1])"), "element type 14"),
    "shape": (_edit("B.dims[0] = -1"), "impossible shape"),
    "wide shape": (_edit("B.dims[:] = [1 << 40, 1 << 40, 0]"), "impossible shape"),
    "axes": (_edit("B.dims[:] = [1] * 9"), "impossible shape"),
    "inline size": (_edit("model.graph.initializer[3].dims[0] = 5"), "needs 20 bytes and has 24"),
    "inline fit": (_edit("model.graph.initializer.add(name='n', data_type=3, dims=[1], int32_data=[300])"), "do not fit"),
    "inline kind": (_edit("model.graph.initializer.add(name='n', data_type=3, dims=[1], int64_data=[3])"), "int64_data"),
    "name": (_edit("B.name = 'S'"), "two initializers are named 'S'"),
    "no name": (_edit("B.name = ''"), "has no name"),
    "shadow": (_edit("model.graph.input[0].name = 'S'"), "an initializer and an input"),
    "undefined": (_edit("model.graph.node[1].input[0] = 'nothing'"), "uses 'nothing' before"),
    "order": (_edit("model.graph.node.insert(0, model.graph.node.pop())"), "before anything made it"),
    "made twice": (_edit("model.graph.node[2].output[0] = 'y'"), "made already"),
    "no output": (_edit("model.graph.output[0].name = 'gone'"), "nothing makes the output 'gone'"),
    "attribute twice": (_edit("model.graph.node[1].attribute.append(model.graph.node[1].attribute[0])"), "twice"),
    "attribute kind": (_edit("model.graph.node[1].attribute[0].f = 1.0"), "and the values"),
    "attribute nan": (_edit("model.graph.node[3].attribute.append(helper.make_attribute('n', float('nan')))"), "finite"),
    "attribute file": (_edit("a = model.graph.node[0].attribute[0]; a.t.CopyFrom(B)"), "only initializers may"),
    "domain": (_node(op_type="Evil", inputs=["y"], outputs=["w"], domain="my.ops"), r"operator of 'my\.ops'"),
    "context": (_node(op_type="EPContext", inputs=[], outputs=["w"], domain="com.microsoft"), "a file of code"),
    "subgraph": (_subgraph, "a subgraph"),
    "sparse": (_sparse, "a sparse initializer"),
    "function": (_function, "functions of its own"),
    "training": (_edit("model.training_info.add()"), "a training graph"),
    "sequence": (_edit("model.graph.input[0].type.sequence_type.SetInParent()"), "sequence type"),
    "opset": (_edit("model.opset_import.append(model.opset_import[0])"), "imported twice"),
    "no opset": (_edit("model.opset_import.pop(0)"), "no opset"),
    "ir": (_edit("model.ir_version = 3"), "IR version 3"),
    "no graph": (_edit("model.ClearField('graph')"), "no graph"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_every_lie_is_refused_by_name(tmp_path: Path, lie: str) -> None:
    edit, said = LIES[lie]
    model = small_model()
    edit(model)
    with pytest.raises(InputError, match=said) as caught:
        OnnxFolder.open(write(tmp_path / "m", model))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["model.onnx", DATA, "genai_config.json"])
@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_links_are_refused(tmp_path: Path, name: str, link: Callable[[Path, Path], None]) -> None:
    folder = write(tmp_path / "m", config={})
    (folder / name).rename(tmp_path / "elsewhere")
    link(tmp_path / "elsewhere", folder / name)
    with pytest.raises(InputError, match=f"{name}: is a .* link"):
        OnnxFolder.open(folder)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "m")
    (folder / DATA).unlink()
    os.mkfifo(folder / DATA)
    with pytest.raises(InputError, match="not a regular file"):
        OnnxFolder.open(folder)
    with pytest.raises(InputError, match="no such folder"):
        OnnxFolder.open(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"has no model\.onnx"):
        OnnxFolder.open(tmp_path)


def test_oversized_files_are_refused_before_they_are_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "m")
    with (folder / "model.onnx").open("r+b") as file:
        file.truncate(1 << 33)  # sparse: 8 GB on paper
    with pytest.raises(InputError, match="67108864 is the most"):
        OnnxFolder.open(folder)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        ("[" * 100_000, "not valid JSON"),
        ('{"a": NaN}', "not valid JSON"),
        ('{"a": 1, "a": 2}', "occurs twice"),
        ({"model": {"decoder": {"filename": "../model.onnx"}}}, "filename is"),
        ({"model": {"decoder": {"filename": 7}}}, "filename is"),
        ({"model": {"vision": [{"adapter_filename": "/x"}]}}, "adapter_filename is"),
        ({"model": {"decoder": {"session_options": {"custom_ops_library": "x.so"}}}}, "custom_ops_library"),
        ({"model": {"decoder": {"filename": "none.onnx"}}}, r"has no none\.onnx"),
        (" " * ((1 << 20) + 1), "1048576 is the most"),
    ],
)
def test_configurations_that_reach_out_are_refused(tmp_path: Path, config: object, said: str) -> None:
    with pytest.raises(InputError, match=said):
        OnnxFolder.open(write(tmp_path / "m", config=config))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_none_are_found(tmp_path: Path, bad: float) -> None:
    data = bytearray(small_data())
    scales = np.frombuffer(data, dtype=np.float32, offset=192)
    scales[5] = bad
    folder = write(tmp_path / "m", data=bytes(data))
    with pytest.raises(InputError, match=rf"tensor 'S' holds {bad} at \[2, 1\]"):
        OnnxFolder.open(folder)
    opened = OnnxFolder.open(folder, finite=False)
    opened.check_finite([opened.graph.initializers["bias"]])
    model = small_model()
    model.graph.initializer.append(external("half", TensorProto.BFLOAT16, (3,), 0, 6, "half"))
    (write(folder, model) / "half").write_bytes(np.array([0, 0x3F80, 0x7FC0], dtype="<u2").tobytes())
    with pytest.raises(InputError, match=r"tensor 'half' holds nan at \[2\]"):
        OnnxFolder.open(folder)


def _mutated(data: bytes, cuts: list[tuple[int, int, bytes]]) -> bytes:
    for at, length, piece in cuts:
        at %= len(data) + 1
        data = data[:at] + piece + data[at + length :]
    return data


@settings(max_examples=1500, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.tuples(st.integers(0, 1 << 16), st.integers(0, 3) | st.integers(0, 400), st.binary(max_size=4)),
        min_size=1,
        max_size=4,
    )
)
def test_no_malformed_graph_raises_anything_else(cuts: list[tuple[int, int, bytes]]) -> None:
    data = _mutated(small_model().SerializeToString(), cuts)
    try:
        graph = parse_graph(Path("m.onnx"), data)
    except InputError:
        return
    theirs = onnx.ModelProto()
    theirs.ParseFromString(data)  # what we take, protobuf takes, and sees the same
    assert [node.op_type for node in graph.nodes] == [node.op_type for node in theirs.graph.node]
    assert [(t.name, list(t.shape)) for t in graph.initializers.values()] == [
        (t.name, list(t.dims)) for t in theirs.graph.initializer
    ]


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.integers(0, 4096), st.integers(0, 3), st.binary(max_size=3)), min_size=1, max_size=3))
def test_no_malformed_folder_raises_anything_else(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[tuple[int, int, bytes]]
) -> None:
    folder = write(
        tmp_path_factory.getbasetemp() / "mutated", config={"model": {"decoder": {"filename": "model.onnx"}}}
    )
    for name in ("model.onnx", "genai_config.json"):
        (folder / name).write_bytes(_mutated((folder / name).read_bytes(), cuts))
        try:
            opened = OnnxFolder.open(folder)
        except InputError:
            continue
        for tensor in opened.graph.initializers.values():
            opened.read(tensor)
