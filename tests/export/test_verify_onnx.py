"""Verify on ONNX folders: damage done with the onnx package is found and named, a sound folder has none, three formats agree."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from r1q.core.artifact import OutputFolder
from r1q.core.cache_scales import CACHE_SCALES, CacheScales
from r1q.core.checkpoint import QuantizedCheckpoint
from r1q.core.errors import CheckError, InputError
from r1q.export.onnx import write_onnx
from r1q.export.verified import Defect, Verified, refuse_failed
from r1q.export.verify import verify_path

Made = Callable[..., OutputFolder]
BLOCK = "/model/layers.1"
Q, K = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight"
GATE, UP = "model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight"


def result_of(output: OutputFolder) -> Verified:
    checkpoint, *others = verify_path(output.path)
    assert checkpoint.defects == ()
    return next(result for result in others if result.format == "onnx")


YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"bits": 4}),
        ("qwen2", {"bits": 4, "group_size": 128}),
        ("qwen3", {"bits": 8, "group_size": -1}),
        ("qwen3", {"bits": 2, "group_size": 64, "model": {"tied": True}}),
        ("qwen2", {"bits": 4, "group_size": 64, "symmetric": False}),
        (
            "llama",
            {"scheme": "f32", "model": {"llama3_scaling": True, "config": {"attention_bias": True, "mlp_bias": True}}},
        ),
        ("qwen3", {"scheme": "bf16", "model": {"tied": True}}),
        ("qwen3", {"bits": 4, "group_size": 32, "model": {"config": {"rope_parameters": YARN}}}),
    ],
    ids=lambda value: (
        value if isinstance(value, str) else "-".join(f"{k}={v}" for k, v in value.items() if k != "model")
    ),
)
def test_an_onnx_folder_as_written_has_the_same_weights(made: Made, family: str, options: dict[str, Any]) -> None:
    output = made(family, to="onnx", **options)
    checkpoint, result = verify_path(output.path)
    assert result.defects == ()
    assert result.tensors == checkpoint.tensors + 2  # and two rotary tables
    assert result.files == len(list((output.path / "onnx").iterdir()))


def test_three_formats_of_one_run_hold_the_same_integers(made: Made) -> None:
    output = made("llama", to="gguf,gptq,onnx", bits=4)  # Llama: the rows of q and k lie in another order in a GGUF
    results = {result.format: result for result in verify_path(output.path)}
    assert list(results) == ["checkpoint", "gguf", "gptq", "onnx"]
    assert all(not result.defects for result in results.values())
    assert all("same weights" in results[name].text() for name in ("gguf", "gptq", "onnx"))
    (line,) = [note for note in results["gptq"].notes if note.startswith("embedding and head")]
    assert "8-bit values rounded to float16" in line


Edit = Callable[[Any], None]


def damage(output: OutputFolder, edit: Edit, name: str = "model.onnx") -> None:
    """Change a graph with the onnx package and list its new hash."""
    path = output.path / "onnx" / name
    model = onnx.load(path, load_external_data=False)
    edit(model.graph)
    onnx.save(model, path)
    output.record("onnx", output.path / "onnx", ())


def node(graph: Any, name: str) -> Any:
    return next(node for node in graph.node if node.name == BLOCK + name)


def bytes_of(output: OutputFolder, name: str, at: int, change: Callable[[NDArray[Any]], None]) -> None:
    """Change the stored bytes of input `at` of a node; where they lie is the onnx package's word."""
    path = output.path / "onnx" / "model.onnx"
    graph = onnx.load(path, load_external_data=False).graph
    tensor = next(tensor for tensor in graph.initializer if tensor.name == node(graph, name).input[at])
    facts = {entry.key: entry.value for entry in tensor.external_data}
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    file = path.with_name(facts["location"])
    values = np.memmap(file, dtype, "r+", offset=int(facts["offset"]), shape=tuple(tensor.dims))
    change(values)
    values.flush()
    output.record("onnx", output.path / "onnx", ())


def flip(index: int) -> Callable[[NDArray[Any]], None]:
    def change(values: NDArray[Any]) -> None:
        values.reshape(-1).view(f"u{values.dtype.itemsize}")[index] ^= 1

    return change


def nudge(index: int) -> Callable[[NDArray[Any]], None]:
    def change(values: NDArray[Any]) -> None:
        values.reshape(-1)[index] += np.float32(1e-6)

    return change


@pytest.mark.parametrize(
    ("name", "at", "index", "where", "said"),
    [
        ("/attn/qkv_proj/MatMul", 1, 0, Q, "1 code differs"),
        ("/attn/qkv_proj/MatMul", 1, -1, "model.layers.1.self_attn.v_proj.weight", "1 code differs"),
        ("/attn/qkv_proj/MatMul", 2, 0, Q, "1 scale differs"),
        ("/attn/qkv_proj/MatMul", 5, -1, "model.layers.1.self_attn.v_proj.bias", "1 value differs"),
        ("/attn/o_proj/MatMul", 1, 7, "model.layers.1.self_attn.o_proj.weight", "1 code differs"),
        ("/mlp/gate_up_proj/MatMul", 1, 0, GATE, "1 code differs"),
        ("/mlp/gate_up_proj/MatMul", 2, -1, UP, "1 scale differs"),
        ("/mlp/down_proj/MatMul", 1, 0, "model.layers.1.mlp.down_proj.weight", "1 code differs"),
        ("/input_layernorm/SkipLayerNorm", 2, 3, "model.layers.1.input_layernorm.weight", "1 value differs"),
        ("/attn/GroupQueryAttention", 7, 1 << 6, "rotary cosines (model.rotary.cos)", "1 value differs"),
    ],
)
def test_one_flipped_bit_is_found(made: Made, name: str, at: int, index: int, where: str, said: str) -> None:
    output = made("qwen2", to="onnx", bits=4)
    # The last bit of a cosine is within what its rounding allows.
    bytes_of(output, name, at, flip(index) if at != 7 else nudge(index))
    (defect,) = result_of(output).defects
    assert defect.where == where
    assert defect.what.startswith(said)
    assert defect.difference is not None
    assert defect.difference > 0
    with pytest.raises(CheckError, match="differ"):
        refuse_failed([result_of(output)])


def test_rows_of_q_and_k_that_changed_places_are_found(made: Made) -> None:
    output = made("llama", to="onnx", bits=4)

    def swap(values: NDArray[Any]) -> None:
        half = len(values) // 4  # q is half of q, k and v; k and v a quarter each
        rows = values[:half].copy()
        values[:half], values[2 * half : 3 * half] = values[2 * half : 3 * half], rows

    bytes_of(output, "/attn/qkv_proj/MatMul", 1, swap)
    assert {defect.where for defect in result_of(output).defects} == {Q, K}


def _set(name: str, key: str, value: Any) -> Edit:
    def edit(graph: Any) -> None:
        found = node(graph, name)
        kept = [attribute for attribute in found.attribute if attribute.name != key]
        del found.attribute[:]
        found.attribute.extend(kept if value is None else [*kept, onnx.helper.make_attribute(key, value)])

    return edit


def _swap_outputs(name: str) -> Edit:
    def edit(graph: Any) -> None:
        outputs = node(graph, name).output
        outputs[0], outputs[1] = outputs[1], outputs[0]

    return edit


def _old_stream(graph: Any) -> None:
    """Let the second block add to what the first one started from."""
    node(graph, "/input_layernorm/SkipLayerNorm").input[0] = next(
        one.output[0] for one in graph.node if one.op_type.startswith("Gather") and "input_ids" in one.input
    )


def _other_norm(graph: Any) -> None:
    node(graph, "/input_layernorm/SkipLayerNorm").input[2] = node(
        graph, "/post_attention_layernorm/SkipLayerNorm"
    ).input[2]


def _order_of_inputs(graph: Any) -> None:
    found = node(graph, "/attn/qkv_proj/MatMul")
    found.input.extend([""] * (4 - len(found.input)))
    found.input.append("indices")
    graph.initializer.append(onnx.numpy_helper.from_array(np.arange(64, dtype=np.int32), "indices"))


def _spare(graph: Any) -> None:
    graph.initializer.append(onnx.numpy_helper.from_array(np.arange(4), "spare"))


def _bypass(graph: Any) -> None:
    node(graph, "/mlp/Mul").op_type = "Add"


ATTENTION = "/attn/GroupQueryAttention"
LIES: dict[str, tuple[Edit, str]] = {
    "epsilon": (_set("/input_layernorm/SkipLayerNorm", "epsilon", 1e-5), "epsilon is 1e-05, the model needs 1e-06"),
    "heads": (_set(ATTENTION, "num_heads", 2), "num_heads is 2, the model needs 4"),
    "kv heads": (_set(ATTENTION, "kv_num_heads", 4), "kv_num_heads is 4, the model needs 2"),
    "scale": (_set(ATTENTION, "scale", 0.5), "scale is 0.5, the model needs"),
    "rotary": (_set(ATTENTION, "do_rotary", 0), "do_rotary is 0, the model needs 1"),
    "interleaved": (_set(ATTENTION, "rotary_interleaved", 1), "rotary_interleaved is 1"),
    "window": (_set(ATTENTION, "local_window_size", 8), "local_window_size is 8"),
    "softcap": (_set(ATTENTION, "softcap", 30.0), "softcap is 30"),
    "smooth": (_set(ATTENTION, "smooth_softmax", 1), "has the attribute smooth_softmax 1"),
    "level": (_set("/mlp/down_proj/MatMul", "accuracy_level", None), "accuracy_level is 0, the model needs 4"),
    "alpha": (_set("/mlp/act_fn/QuickGelu", "alpha", 1.702), "alpha is 1.70"),
    "cache": (_swap_outputs(ATTENTION), "keeps keys or values as"),
    "stream": (_old_stream, "does not add a block's branch"),
    "g_idx": (_order_of_inputs, "has a g_idx, 'indices'"),
    "spare": (_spare, "spare: is in the file, but nothing uses it"),
    "operator": (_bypass, "Add does not add a block's branch"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_graph_that_computes_something_else_is_found(made: Made, lie: str) -> None:
    edit, said = LIES[lie]
    output = made("llama", to="onnx", bits=4)
    damage(output, edit)
    defects = result_of(output).defects
    assert any(said in str(defect) for defect in defects), [str(defect) for defect in defects]
    assert len(defects) <= 2  # and not a line for everything that follows from it


@pytest.mark.parametrize(
    ("edit", "wrong"),
    [(_swap_outputs("/mlp/gate_up_proj/Split"), {GATE, UP}), (_other_norm, {"model.layers.1.input_layernorm.weight"})],
    ids=["gate and up", "norms"],
)
def test_weights_in_each_others_place_are_found(made: Made, edit: Edit, wrong: set[str]) -> None:
    output = made("qwen3", to="onnx", bits=4)
    damage(output, edit)
    tensors = [defect for defect in result_of(output).defects if defect.difference is not None]
    assert {defect.where for defect in tensors} == wrong


def test_what_stands_beside_the_graphs_is_checked(made: Made) -> None:
    output = made("llama", to="onnx", bits=4)
    folder = output.path / "onnx"
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"]["decoder"]["head_size"] = 8
    config["search"]["max_length"] = 1 << 20
    (folder / "genai_config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    shutil.copyfile(folder / "model.onnx", folder / "model_all_logits.onnx")
    output.record("onnx", folder, ())
    assert [str(defect) for defect in result_of(output).defects] == [
        "genai_config.json: model.decoder.head_size: is 8, the model's config.json says 64",
        "genai_config.json: search.max_length: is 1048576 of a context of 256",
        "tokenizer.json: is not byte for byte the model's own",
        "model_all_logits.onnx: gives the last position's logits, not every one's",
    ]


def test_scales_of_an_8_bit_cache_are_held_against_their_file(made: Made) -> None:
    output = made("qwen2", to="onnx", bits=4)
    random = np.random.default_rng(0)
    keys, values = (random.uniform(1, 2, (2, 2, 64)).astype(np.float32) for _ in "kv")
    scales = CacheScales.of_ranges(keys, values, record={})
    write_onnx(QuantizedCheckpoint.open(output.checkpoint), output.path, cache=scales)
    output.record("onnx", output.path / "onnx", ())
    (note,) = result_of(output).notes
    assert "is not beside the folder" in note
    scales.write(output.path / CACHE_SCALES)
    assert result_of(output).defects == ()
    bytes_of(output, ATTENTION, 13, flip(5))
    found = [str(defect) for defect in result_of(output).defects]
    assert [line.partition(": 1 value differs")[0] for line in found] == [
        f"{name}: scales of the values of block 1" for name in ("model.onnx", "model_all_logits.onnx")
    ]


def _not_a_number(folder: Path) -> None:
    data = folder / "model.onnx.data"
    values = np.memmap(data, np.float32, "r+")
    values[-1] = np.nan  # of the last float tensor
    values.flush()


def _cut(folder: Path) -> None:
    data = folder / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-8])


def _link(folder: Path) -> None:
    data = folder / "model.onnx.data"
    data.rename(folder.parent / "elsewhere")
    os.symlink(folder.parent / "elsewhere", data)


def _corrupt(folder: Path) -> None:
    graph = folder / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("change", "said"), [(_not_a_number, "nan"), (_cut, "ends at byte"), (_link, "symbolic link"), (_corrupt, "ends")]
)
def test_an_unsafe_folder_is_refused(made: Made, change: Callable[[Path], None], said: str) -> None:
    output = made("llama", to="onnx", bits=4)
    change(output.path / "onnx")
    (defect,) = [defect for defect in result_of(output).defects if defect.unreadable]
    assert said in defect.what
    with pytest.raises(InputError):
        refuse_failed([result_of(output)])


def test_one_folder_or_its_graph_can_be_named_alone(made: Made) -> None:
    output = made("llama", to="onnx", bits=4)
    for path in (output.path / "onnx", output.path / "onnx" / "model.onnx"):
        assert [result.format for result in verify_path(path)] == ["checkpoint", "onnx"]
        refuse_failed(list(verify_path(path)))


def test_a_defect_says_where_and_what(made: Made) -> None:
    output = made("llama", to="onnx", bits=4)
    damage(output, LIES["epsilon"][0], "model_all_logits.onnx")
    (defect,) = result_of(output).defects
    assert defect == Defect(
        where=f"model_all_logits.onnx: {BLOCK}/input_layernorm/SkipLayerNorm",
        what="epsilon is 1e-05, the model needs 1e-06",
    )
