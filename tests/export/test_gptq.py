"""The GPTQ folder: its packing against a slow loop over words, its files, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from r1q.core.checkpoint import QuantizedCheckpoint
from r1q.core.errors import UsageError
from r1q.export.gptq import write_gptq
from r1q.export.verify_gptq import verify_gptq
from r1q.models.source import ModelSource
from r1q.plan.choose import Wish, choose_recipe
from r1q.plan.plan import make_plan
from r1q.plan.walk import versions
from r1q.quantize.run import Request, quantize_checkpoint

MakeModel = Callable[..., Path]
SIZES: dict[str, int] = {"hidden_size": 128, "intermediate_size": 256, "num_layers": 2, "vocab_size": 320}


def quantized(model: Path, folder: Path, **wish: object) -> QuantizedCheckpoint:
    source = ModelSource.open(model)
    choice = choose_recipe(Wish(**{"formats": (), **wish}), source.tensors)  # type: ignore[arg-type]
    plan = make_plan(source, choice.recipe, ())
    request = Request(model=plan.model, recipe=plan.recipe, planned=plan.tensors, method="rtn", versions=versions())
    list(quantize_checkpoint(source, request, folder))
    return QuantizedCheckpoint.open(folder)


def unpack_slowly(tensors: dict[str, np.ndarray], stem: str, bits: int) -> np.ndarray:
    """Return weights [out, in] from a GPTQ v1 layer, one code at a time, as its loaders define it."""
    qweight, qzeros, scales, g_idx = (tensors[stem + part] for part in ("qweight", "qzeros", "scales", "g_idx"))
    inputs, outputs = len(g_idx), qweight.shape[1]

    def field(words: np.ndarray, index: int) -> int:
        stream = int.from_bytes(words.astype("<u4").tobytes(), "little")
        return (stream >> (index * bits)) & ((1 << bits) - 1)

    weights = np.empty((outputs, inputs), np.float32)
    for out in range(outputs):
        for i in range(inputs):
            group = g_idx[i]
            zero = field(qzeros[group], out) + 1
            weights[out, i] = np.float32(scales[group, out]) * (field(qweight[:, out], i) - zero)
    return weights


@pytest.mark.parametrize(("bits", "group"), [(2, 64), (3, 32), (4, 128), (4, 32), (8, 32), (8, -1), (4, -1)])
def test_packed_words_hold_the_checkpoints_weights(
    make_model: MakeModel, tmp_path: Path, bits: int, group: int
) -> None:
    checkpoint = quantized(make_model("qwen2", **SIZES), tmp_path / "checkpoint", bits=bits, group_size=group)
    folder = write_gptq(checkpoint, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"
    have = unpack_slowly(tensors, name.removesuffix("weight"), bits)
    np.testing.assert_array_equal(have, checkpoint.read_rows(name, 0, have.shape[0]))
    verified = verify_gptq(checkpoint, folder)
    assert (verified.defects, verified.tensors) == ((), len(checkpoint.tensors))
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (quantization["bits"], quantization["group_size"]) == (bits, group)
    assert {quantization[key] for key in ("desc_act", "lm_head")} == {False}


def test_symmetric_four_bits_have_the_zero_words_that_loaders_expect(make_model: MakeModel, tmp_path: Path) -> None:
    folder = write_gptq(quantized(make_model("llama", **SIZES), tmp_path / "c", bits=4, group_size=64), tmp_path)
    zeros = load_file(folder / "model.safetensors")["model.layers.0.mlp.up_proj.qzeros"]
    assert set(zeros.ravel().view(np.uint32)) == {0x77777777}


def test_the_models_own_files_are_copied_byte_for_byte(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("qwen2", **SIZES)
    folder = write_gptq(quantized(model, tmp_path / "c", bits=4), tmp_path)
    for path in ModelSource.open(model).sidecars():
        if path.name != "config.json":
            assert (folder / path.name).read_bytes() == path.read_bytes()
    config, before = json.loads((folder / "config.json").read_text()), json.loads((model / "config.json").read_text())
    assert {key: config[key] for key in before if "dtype" not in key} == {
        k: v for k, v in before.items() if "dtype" not in k
    }


def test_biases_and_norms_are_half_floats(make_model: MakeModel, tmp_path: Path) -> None:
    folder = write_gptq(quantized(make_model("qwen2", **SIZES), tmp_path / "c", bits=8), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    rest = {name: tensor.dtype for name, tensor in tensors.items() if name.endswith((".weight", ".bias"))}
    assert rest
    assert set(rest.values()) == {np.dtype(np.float16)}
    assert "model.layers.0.self_attn.q_proj.bias" in rest


def test_what_the_folder_cannot_hold_is_refused_with_the_way_out(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("llama", **SIZES)
    wishes: list[dict[str, object]] = [{"scheme": "q4_1"}, {"bits": 4, "symmetric": False}]
    for number, wish in enumerate(wishes):
        with pytest.raises(UsageError, match="it holds symmetric integers: --bits 4"):
            write_gptq(quantized(model, tmp_path / str(number), **wish), tmp_path / f"out{number}")
        assert not (tmp_path / f"out{number}").exists()
