"""The reader of GPTQ folders: against a loop that reads one code at a time as the loaders define it, our own writer, and damage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import save_file

from r1q.core.errors import InputError
from r1q.core.gptq_folder import GptqFolder, read_settings

Array = NDArray[Any]
LAYER = "model.layers.0.mlp.up_proj"


def put(stream: int, index: int, bits: int, value: int) -> int:
    return stream | (value << (index * bits))


def words_of(values: list[int], bits: int) -> list[int]:
    """Return signed 32-bit words of a stream of fields, low bits first: the definition, one integer wide."""
    stream = 0
    for index, value in enumerate(values):
        stream = put(stream, index, bits, value)
    count = len(values) * bits // 32
    raw = [(stream >> (32 * place)) & 0xFFFFFFFF for place in range(count)]
    return [word - (1 << 32) if word >> 31 else word for word in raw]


def pack(layer: dict[str, Array], bits: int, version: int) -> dict[str, Array]:
    """Return the tensors of a folder for codes [in, out], zeros [groups, out], scales [groups, out], g_idx [in]."""
    codes, zeros = layer["codes"], layer["zeros"]
    stored = (zeros.astype(int) - (version == 1)) & ((1 << bits) - 1)
    return {
        f"{LAYER}.qweight": np.array([words_of(column.tolist(), bits) for column in codes.T], dtype=np.int32).T.copy(),
        f"{LAYER}.qzeros": np.array([words_of(row.tolist(), bits) for row in stored], dtype=np.int32),
        f"{LAYER}.scales": layer["scales"].copy(),
        f"{LAYER}.g_idx": layer["g_idx"].astype(np.int32),
    }


def dequantize_slowly(layer: dict[str, Array]) -> Array:
    inputs, outputs = layer["codes"].shape
    values = np.empty((outputs, inputs), dtype=np.float32)
    for out in range(outputs):
        for i in range(inputs):
            group = int(layer["g_idx"][i])
            step = np.float32(layer["scales"][group, out])
            values[out, i] = step * np.float32(int(layer["codes"][i, out]) - int(layer["zeros"][group, out]))
    return values


def make_layer(
    bits: int, groups: int, *, seed: int = 0, order: bool = False, symmetric: bool = False
) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    inputs, outputs, top = 64, 32, 1 << bits
    g_idx = np.arange(inputs) // (inputs // groups)
    zeros = np.full((groups, outputs), top // 2) if symmetric else rng.integers(1, top, (groups, outputs))
    return {
        "codes": rng.integers(0, top, (inputs, outputs)),
        "zeros": zeros,
        "scales": rng.uniform(0.01, 0.1, (groups, outputs)).astype(np.float16),
        "g_idx": rng.permutation(g_idx) if order else g_idx,
    }


def write(folder: Path, tensors: dict[str, Array], **stated: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False, **stated}
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("form", "version"), [("gptq", 1), ("gptq_v2", 2)])
@pytest.mark.parametrize("order", [False, True])
def test_codes_and_values_are_those_of_the_slow_loop(
    tmp_path: Path, bits: int, groups: int, form: str, version: int, order: bool
) -> None:
    layer = make_layer(bits, groups, order=order)
    group_size = -1 if groups == 1 else 64 // groups
    folder = write(tmp_path, pack(layer, bits, version), bits=bits, group_size=group_size, checkpoint_format=form)
    opened = GptqFolder.open(folder)
    found = opened.read_layer(LAYER)
    np.testing.assert_array_equal(found.codes, layer["codes"].T)
    np.testing.assert_array_equal(found.zeros, layer["zeros"].T)
    np.testing.assert_array_equal(found.dequantize(), dequantize_slowly(layer))
    assert (found.g_idx is not None) == (order and groups > 1)
    permutation = opened.permutation(LAYER)
    if permutation is not None:
        assert (np.diff(layer["g_idx"][permutation]) >= 0).all()
        assert sorted(permutation.tolist()) == list(range(64))


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    groups=st.sampled_from([1, 2, 8]),
    seed=st.integers(0, 999),
    version=st.sampled_from([1, 2]),
)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_layer_comes_back(tmp_path: Path, bits: int, groups: int, seed: int, version: int) -> None:
    layer = make_layer(bits, groups, seed=seed, order=seed % 2 == 0)
    form = ("gptq", "gptq_v2")[version - 1]
    folder = write(tmp_path, pack(layer, bits, version), bits=bits, group_size=64 // groups, checkpoint_format=form)
    np.testing.assert_array_equal(GptqFolder.open(folder).read_layer(LAYER).dequantize(), dequantize_slowly(layer))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_zero_point_of_0_in_version_1_is_read_where_gptqmodel_wrote_it(tmp_path: Path, bits: int) -> None:
    """gptqmodel subtracts 1 from every field with one subtraction of the word: a 0 borrows from its neighbour."""
    layer = make_layer(bits, 2)
    layer["zeros"][0, 3] = layer["zeros"][1, 0] = 0
    tensors = pack(layer, bits, 2)
    ones = sum(1 << place for place in range(0, 32, bits))
    tensors[f"{LAYER}.qzeros"] = (tensors[f"{LAYER}.qzeros"].view(np.uint32) - np.uint32(ones)).view(np.int32)
    folder = write(tmp_path, tensors, bits=bits, checkpoint_format="gptq", meta={"quantizer": ["gptqmodel:7.7.0"]})
    np.testing.assert_array_equal(GptqFolder.open(folder).read_layer(LAYER).zeros, layer["zeros"].T)
    write(tmp_path, tensors, bits=bits, checkpoint_format="gptq", meta={"quantizer": ["auto-gptq:0.7.1"]})
    with pytest.raises(InputError, match=r"up_proj\.qzeros has a zero point of 0 .* gptq_v2"):
        GptqFolder.open(folder).read_layer(LAYER)


def test_layers_of_other_bits_and_groups_are_read_where_dynamic_says_so(tmp_path: Path) -> None:
    wide, narrow = make_layer(8, 4), make_layer(4, 2)
    other = "model.layers.1.mlp.up_proj"
    tensors = pack(narrow, 4, 1) | {name.replace(LAYER, other): tensor for name, tensor in pack(wide, 8, 1).items()}
    patterns = {"+:.*layers\\.1\\..*": {"bits": 8, "group_size": 16}, "-:(a+)+$": {}}
    folder = GptqFolder.open(write(tmp_path, tensors, dynamic=patterns))
    np.testing.assert_array_equal(folder.read_layer(other).dequantize(), dequantize_slowly(wide))
    np.testing.assert_array_equal(folder.read_layer(LAYER).dequantize(), dequantize_slowly(narrow))
    write(tmp_path, tensors)
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.qweight .* not 4 bits"):
        GptqFolder.open(tmp_path)


def test_shards_biases_and_a_missing_g_idx(tmp_path: Path) -> None:
    layer = make_layer(4, 2, symmetric=True)
    tensors = {name: tensor for name, tensor in pack(layer, 4, 1).items() if not name.endswith("g_idx")}
    bias = np.linspace(-1, 1, 32).astype(np.float16)
    write(tmp_path, tensors, sym=True)
    (tmp_path / "model.safetensors").unlink()
    first = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items() if "qzeros" not in name}
    second = {
        f"{LAYER}.qzeros": tensors[f"{LAYER}.qzeros"],
        f"{LAYER}.bias": bias,
        "model.norm.weight": np.ones(4, np.float32),
    }
    save_file(first, tmp_path / "model-1.safetensors")
    save_file(second, tmp_path / "model-2.safetensors")
    where = dict.fromkeys(first, "model-1.safetensors") | dict.fromkeys(second, "model-2.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    folder = GptqFolder.open(tmp_path)
    found = folder.read_layer(LAYER)
    np.testing.assert_array_equal(found.dequantize(), dequantize_slowly(layer))
    assert found.symmetric
    assert found.bias is not None
    np.testing.assert_array_equal(found.bias, bias.astype(np.float32))
    assert set(folder.floats) == {f"{LAYER}.bias", "model.norm.weight"}
    np.testing.assert_array_equal(folder.read_float("model.norm.weight"), np.ones(4, np.float32))


def test_autogptqs_own_file_names_are_read(tmp_path: Path) -> None:
    layer = make_layer(4, 2)
    write(tmp_path, pack(layer, 4, 1))
    (tmp_path / "model.safetensors").rename(tmp_path / "gptq_model-4bit-32g.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert read_settings(tmp_path) is None
    (tmp_path / "quantize_config.json").write_text(
        json.dumps({"bits": 4, "group_size": 32, "sym": False, "desc_act": True})
    )
    np.testing.assert_array_equal(GptqFolder.open(tmp_path).read_layer(LAYER).dequantize(), dequantize_slowly(layer))


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"bits": 5}, "bits = '5' is not supported"),
        ({"bits": True}, "bits"),
        ({"group_size": 0}, "group_size"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format = 'marlin' .* gptq and gptq_v2"),
        ({"checkpoint_format": ["gptq"]}, "checkpoint_format"),
        ({"pack_dtype": "int16"}, "pack_dtype"),
        ({"dynamic": [1]}, "dynamic"),
        ({"sym": "yes"}, "sym"),
        ({"group_size": 16}, r"up_proj\.scales has 2 groups; 64 inputs in groups of 16 are 4"),
        ({"bits": 8}, "not 8 bits"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(tmp_path: Path, stated: dict[str, Any], message: str) -> None:
    folder = write(tmp_path, pack(make_layer(4, 2), 4, 1), **stated)
    with pytest.raises(InputError, match=message):
        GptqFolder.open(folder)


DAMAGES: dict[str, tuple[str, Array | None, str]] = {
    "no scales": ("scales", None, r"up_proj\.scales is missing"),
    "no words": ("qweight", None, r"up_proj\.(qzeros|scales|g_idx) belongs to a layer without a qweight"),
    "words of another type": ("qweight", np.zeros((8, 32), np.int64), "I64"),
    "a vector of words": ("qweight", np.zeros(8, np.int32), "not a matrix"),
    "scales of another width": ("scales", np.ones((2, 31), np.float16), "do not fit 32 outputs"),
    "zeros of another width": ("qzeros", np.zeros((2, 3), np.int32), "do not fit 32 outputs"),
    "no inputs": ("g_idx", np.zeros(0, np.int32), "g_idx is I32"),
    "other inputs": ("g_idx", np.zeros(63, np.int32), "for 63 inputs"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_headers_that_do_not_go_together_are_refused_by_name(tmp_path: Path, name: str) -> None:
    part, tensor, message = DAMAGES[name]
    tensors = pack(make_layer(4, 2), 4, 1)
    tensors.pop(f"{LAYER}.{part}")
    if tensor is not None:
        tensors[f"{LAYER}.{part}"] = tensor
    with pytest.raises(InputError, match=message):
        GptqFolder.open(write(tmp_path, tensors))


def test_numbers_out_of_bounds_are_refused_by_name(tmp_path: Path) -> None:
    layer = make_layer(4, 2, symmetric=True)
    for part, value, message in (
        ("g_idx", -1, r"g_idx names group -1 of 2"),
        ("g_idx", 2, r"g_idx names group 2 of 2"),
        ("scales", np.nan, r"scales holds NaN"),
    ):
        tensors = pack(layer, 4, 1)
        tensors[f"{LAYER}.{part}"].flat[3] = value
        with pytest.raises(InputError, match=message):
            GptqFolder.open(write(tmp_path, tensors, sym=True)).read_layer(LAYER)
    with pytest.raises(InputError, match="perhaps its checkpoint_format is gptq_v2"):
        GptqFolder.open(write(tmp_path, pack(layer, 4, 2), sym=True)).read_layer(LAYER)
    layer["g_idx"][0] = 1
    uneven = GptqFolder.open(write(tmp_path, pack(layer, 4, 1), sym=True))
    np.testing.assert_array_equal(uneven.read_layer(LAYER).dequantize(), dequantize_slowly(layer))
    order = uneven.permutation(LAYER)
    assert order is not None
    assert layer["g_idx"][order].tolist() == [0] * 31 + [1] * 33


def test_a_shorter_last_group_is_no_permutation(tmp_path: Path) -> None:
    layer = make_layer(4, 2)
    layer["g_idx"] = np.arange(64) // 48
    folder = GptqFolder.open(write(tmp_path, pack(layer, 4, 1), group_size=48))
    np.testing.assert_array_equal(folder.read_layer(LAYER).dequantize(), dequantize_slowly(layer))
    assert folder.permutation(LAYER) is None
    assert folder.groups(LAYER).tolist() == [0] * 48 + [1] * 16


def test_what_is_no_gptq_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no GPTQ folder"):
        GptqFolder.open(write(tmp_path, pack(make_layer(4, 2), 4, 1), quant_method="awq"))
    with pytest.raises(InputError, match="no layer has a qweight"):
        GptqFolder.open(write(tmp_path, {"model.norm.weight": np.ones(4, np.float32)}))
    with pytest.raises(InputError, match="neither a GPTQ layer's part nor float"):
        GptqFolder.open(write(tmp_path, {**pack(make_layer(4, 2), 4, 1), "extra": np.zeros(3, np.int32)}))
