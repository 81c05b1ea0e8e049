"""The ONNX folder: logits in onnxruntime against our own forward pass of the same codes, for every family, grid and bias."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest

from r1q.core.checkpoint import QuantizedCheckpoint
from r1q.core.errors import UsageError
from r1q.export.onnx import DATA, EVERY, GRAPH, write_onnx
from r1q.models.config import ModelConfig
from r1q.models.forward import Configured, logits
from r1q.models.source import ModelSource
from r1q.plan.choose import Wish, choose_recipe
from r1q.plan.plan import make_plan
from r1q.plan.walk import versions
from r1q.quantize.run import Request, quantize_checkpoint

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
ort = pytest.importorskip("onnxruntime")

MakeModel = Callable[..., Path]
TOKENS = np.random.default_rng(7).integers(0, 320, (1, 24))
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_layers": 2}


def quantized(model: Path, folder: Path, **wish: object) -> QuantizedCheckpoint:
    source = ModelSource.open(model)
    choice = choose_recipe(Wish(**{"formats": ("onnx",), **wish}), source.tensors)  # type: ignore[arg-type]
    plan = make_plan(source, choice.recipe, ())
    request = Request(model=plan.model, recipe=plan.recipe, planned=plan.tensors, method="rtn", versions=versions())
    list(quantize_checkpoint(source, request, folder))
    return QuantizedCheckpoint.open(folder)


def expected(checkpoint: QuantizedCheckpoint) -> np.ndarray:
    config = ModelConfig.read(checkpoint.sidecar)
    return next(logits(Configured(config, checkpoint), TOKENS))


def run(graph: Path, past: int = 0, cache: Mapping[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
    """Return every output of `graph` for the tokens from `past` on."""
    session = ort.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    feed = {"input_ids": TOKENS[:, past:], "attention_mask": np.ones(TOKENS.shape, np.int64)}
    for value in session.get_inputs():
        if value.name.startswith("past_key_values"):
            present = value.name.replace("past_key_values", "present")
            empty = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
            feed[value.name] = empty if cache is None else cache[present][:, :, :past]
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 8}
MODELS: dict[str, dict[str, object]] = {
    "llama": {"family": "llama"},
    "llama tied, long rope": {"family": "llama", "tied": True, "llama3_scaling": True},
    "llama with every bias": {"family": "llama", "config": {"attention_bias": True, "mlp_bias": True}},
    "qwen2": {"family": "qwen2"},
    "qwen3 tied": {"family": "qwen3", "tied": True},
    "qwen3 with yarn": {"family": "qwen3", "config": {"rope_parameters": YARN}},
}


@pytest.mark.parametrize("name", MODELS)
def test_float_activations_give_the_logits_of_the_same_codes(make_model: MakeModel, tmp_path: Path, name: str) -> None:
    options: dict[str, object] = {**SIZES, **MODELS[name]}
    checkpoint = quantized(make_model(**options), tmp_path / "c", bits=4, group_size=32)
    folder = write_onnx(checkpoint, tmp_path, accuracy_level=1)
    wanted = expected(checkpoint)
    tolerance = 2e-5 * float(np.abs(wanted).max())  # float32 sums of a few hundred terms, in another order
    every = run(folder / EVERY)
    np.testing.assert_allclose(every["logits"][0], wanted, atol=tolerance)
    np.testing.assert_allclose(run(folder / GRAPH)["logits"][0], wanted[-1:], atol=tolerance)
    # A second half after a first one that is in the cache.
    np.testing.assert_allclose(run(folder / EVERY, past=9, cache=every)["logits"][0], wanted[9:], atol=tolerance)


GRIDS: dict[str, dict[str, object]] = {
    "2 bits": {"bits": 2, "group_size": 64},
    "8 bits": {"bits": 8, "group_size": 32},
    "one group a row": {"bits": 4, "group_size": -1},
    "groups of 16": {"bits": 4, "group_size": 16},
    "an odd number of groups, asymmetric": {"bits": 4, "group_size": 128, "symmetric": False},
    "asymmetric": {"bits": 4, "group_size": 32, "symmetric": False},
    "two bits, asymmetric": {"bits": 2, "group_size": 32, "symmetric": False},
    "floats": {"scheme": "f32"},
    "bfloat16": {"scheme": "bf16"},
}


@pytest.mark.parametrize("name", GRIDS)
def test_every_grid_that_the_format_holds(make_model: MakeModel, tmp_path: Path, name: str) -> None:
    model = make_model("qwen2", **SIZES | {"intermediate_size": 384})
    checkpoint = quantized(model, tmp_path / "c", **GRIDS[name])
    wanted = expected(checkpoint)
    found = run(write_onnx(checkpoint, tmp_path, accuracy_level=1) / EVERY)["logits"][0]
    np.testing.assert_allclose(found, wanted, atol=2e-5 * float(np.abs(wanted).max()))


def test_layers_of_different_grids_stand_alone(make_model: MakeModel, tmp_path: Path) -> None:
    recipe = tmp_path / "mix.toml"
    recipe.write_text(
        'base = "int4"\ngroup_size = 32\nsymmetric = true\n'
        '[[rules]]\ntensors = "*.attn_v.weight"\ngrid = "int8"\ngroup_size = 64\n'
        '[[rules]]\ntensors = "blk.1.ffn_up.weight"\ngrid = "f16"\n'
        '[[rules]]\ntensors = "token_embd.weight"\ngrid = "int4"\ngroup_size = 32\nsymmetric = false\n'
    )
    checkpoint = quantized(make_model("llama", **SIZES, tied=True), tmp_path / "c", scheme=str(recipe))
    wanted = expected(checkpoint)
    folder = write_onnx(checkpoint, tmp_path, accuracy_level=1)
    found = run(folder / EVERY)["logits"][0]
    np.testing.assert_allclose(found, wanted, atol=2e-5 * float(np.abs(wanted).max()))
    nodes = [node.name for node in onnx.load(folder / GRAPH, load_external_data=False).graph.node]
    assert "/model/layers.0/mlp/gate_up_proj/MatMul" in nodes
    assert "/model/layers.1/mlp/up_proj/MatMul" in nodes
    assert "/model/layers.0/attn/v_proj/MatMul" in nodes


def test_the_fast_kernels_are_asked_for(make_model: MakeModel, tmp_path: Path) -> None:
    """int8 activations in every product, no g_idx, no zero points where they are the middle code; KL stays that of rounding."""
    checkpoint = quantized(make_model("llama", **SIZES), tmp_path / "c", bits=4, group_size=32)
    folder = write_onnx(checkpoint, tmp_path)
    products = [n for n in onnx.load(folder / GRAPH, load_external_data=False).graph.node if n.op_type == "MatMulNBits"]
    assert len(products) == 4 * 2 + 1
    for node in products:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert attributes["accuracy_level"] == 4
        assert len(node.input) == 3
    wanted, found = expected(checkpoint), run(folder / EVERY)["logits"][0]
    difference = np.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted**2))
    assert 1e-5 < difference < 0.05


def test_a_tied_head_is_stored_once(make_model: MakeModel, tmp_path: Path) -> None:
    checkpoint = quantized(make_model("llama", **SIZES, tied=True), tmp_path / "c", bits=4, group_size=32)
    folder = write_onnx(checkpoint, tmp_path)
    places = [
        {entry.key: entry.value for entry in tensor.external_data}
        for tensor in onnx.load(folder / GRAPH, load_external_data=False).graph.initializer
        if tensor.name.startswith("model.embed_tokens.") and tensor.dims[-1] > 4
    ]
    assert len(places) == 2
    assert places[0] == places[1]
    assert places[0]["location"] == DATA


def test_equal_checkpoints_give_equal_bytes(make_model: MakeModel, tmp_path: Path) -> None:
    checkpoint = quantized(make_model("qwen2", **SIZES), tmp_path / "c", bits=4)
    one, two = write_onnx(checkpoint, tmp_path / "one"), write_onnx(checkpoint, tmp_path / "two")
    assert {p.name: p.read_bytes() for p in one.iterdir()} == {p.name: p.read_bytes() for p in two.iterdir()}


def test_genai_config_has_a_length_that_fits_and_r1s_tokens(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("qwen2", **SIZES, config={"max_position_embeddings": 131072})
    folder = write_onnx(quantized(model, tmp_path / "c", bits=4), tmp_path)
    found = json.loads((folder / "genai_config.json").read_text())
    assert found["search"]["max_length"] == 4096
    assert found["search"]["temperature"] == 0.6
    assert found["search"]["past_present_share_buffer"] is True
    assert found["model"]["context_length"] == 32768
    assert found["model"]["type"] == "qwen2"


def test_what_the_format_cannot_hold_is_refused_with_what_works(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("llama", hidden_size=256, intermediate_size=256)
    checkpoint = quantized(model, tmp_path / "c", scheme="q4_k_m")
    with pytest.raises(UsageError, match=r"no kernel for q4_k; .*--bits 4"):
        write_onnx(checkpoint, tmp_path)
    assert not (tmp_path / "onnx").exists()
    with pytest.raises(UsageError, match=r"int3"):
        write_onnx(quantized(model, tmp_path / "three", bits=3, group_size=32), tmp_path)
