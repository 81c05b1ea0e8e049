"""Foreign GPTQ folders through the import: the same numbers in our checkpoint and in the GGUF file, and what is refused and why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from r1q.core.artifact import OutputFolder
from r1q.core.checkpoint import PERMUTATIONS, QuantizedCheckpoint
from r1q.core.errors import InputError, UsageError
from r1q.export.gptq import write_gptq
from r1q.models.config import ModelConfig
from r1q.models.gptq_source import GptqSource
from r1q.plan.import_gptq import import_gptq
from r1q.plan.reexport import reexport
from r1q.plan.walk import Exported

MakeModel = Callable[..., Path]
MakeGptq = Callable[..., Path]
Edit = Callable[[dict[str, Any], dict[str, Any]], None]
LAYER = "model.layers.1.self_attn.k_proj"


def imported(folder: Path, formats: tuple[str, ...], output: Path) -> QuantizedCheckpoint:
    for _ in import_gptq(folder, formats, OutputFolder(output)):
        pass
    return QuantizedCheckpoint.open(output / "checkpoint")


def by_activation(tensors: dict[str, Any], quantization: dict[str, Any]) -> None:
    """Shuffle the inputs of one layer as desc_act does: rows of codes stay, each belongs to another group."""
    tensors[f"{LAYER}.g_idx"] = np.random.default_rng(0).permutation(tensors[f"{LAYER}.g_idx"])
    quantization["desc_act"] = True


def asymmetric(tensors: dict[str, Any], quantization: dict[str, Any]) -> None:
    """Give one layer zero points of 8 and 9, turn about."""
    tensors[f"{LAYER}.qzeros"] = np.full_like(tensors[f"{LAYER}.qzeros"], 0x78787878)
    quantization["sym"] = False


def same_rows(checkpoint: QuantizedCheckpoint, source: GptqSource, names: set[str]) -> None:
    for spec in checkpoint.tensors:
        if spec.name in names or not names:
            found, meant = (reader.read_rows(spec.name, 0, spec.rows) for reader in (checkpoint, source))
            np.testing.assert_array_equal(found, meant, err_msg=spec.name)


@pytest.mark.parametrize(
    ("bits", "group", "grid"), [(4, 32, "q4_0"), (4, 128, "q4_0"), (8, 64, "q8_0"), (4, -1, "q4_0")]
)
def test_a_gguf_file_holds_the_folders_numbers(
    make_gptq: MakeGptq, tmp_path: Path, bits: int, group: int, grid: str
) -> None:
    folder = make_gptq(bits=bits, group_size=group)
    source = GptqSource.open(folder)
    *_, exported = reexport(folder, ("gguf",), tmp_path / "out")
    assert isinstance(exported, Exported)
    checkpoint = QuantizedCheckpoint.open(tmp_path / "out/checkpoint")
    same_rows(checkpoint, source, set())
    assert {str(checkpoint.scheme(s.name)) for s in checkpoint.tensors if s.layer is not None and s.is_matrix} == {grid}
    assert str(checkpoint.scheme("model.embed_tokens.weight")) == "f16"
    # Read by llama.cpp's own package, which shares no code with ours.
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(exported.path).tensors}
    for name, ours in (("blk.1.attn_k.weight", f"{LAYER}.weight"), ("token_embd.weight", "model.embed_tokens.weight")):
        values = gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type)
        np.testing.assert_array_equal(values, source.read_rows(ours, 0, len(values)))
    again = [event.what for event in import_gptq(folder, ("gguf",), OutputFolder(tmp_path / "out"))]
    assert again == ["already done"]


def test_for_onnx_layers_keep_their_groups_and_the_ends_take_eight_bits(make_gptq: MakeGptq, tmp_path: Path) -> None:
    folder = make_gptq(bits=4, group_size=128)
    checkpoint, source = imported(folder, ("onnx",), tmp_path / "out"), GptqSource.open(folder)
    coded = {f"{layer}.weight" for layer in source.folder.layers}
    same_rows(checkpoint, source, coded)
    assert {str(checkpoint.scheme(name)) for name in coded} == {"int4 g128"}
    assert {str(checkpoint.scheme(name)) for name in ("model.embed_tokens.weight", "lm_head.weight")} == {"q8_0"}
    config = ModelConfig.read(checkpoint.sidecar)
    assert "quantization_config" not in config.raw
    assert checkpoint.manifest["method"] == "gptq, imported"


def test_what_an_import_makes_goes_back_to_the_same_gptq_tensors(make_gptq: MakeGptq, tmp_path: Path) -> None:
    folder = make_gptq(bits=3, group_size=32)
    checkpoint = imported(folder, ("gptq",), tmp_path / "out")
    again = load_file(write_gptq(checkpoint, tmp_path / "again") / "model.safetensors")
    first = load_file(folder / "model.safetensors")
    assert set(first) == set(again)
    for name, tensor in first.items():
        np.testing.assert_array_equal(again[name], tensor, err_msg=name)


def test_act_order_is_a_stored_permutation_that_only_onnx_can_take(make_gptq: MakeGptq, tmp_path: Path) -> None:
    folder = make_gptq(by_activation, bits=4, group_size=32)
    with pytest.raises(UsageError, match=r"k_proj\.weight: its inputs are coded in order of activation .* --to onnx"):
        imported(folder, ("gguf",), tmp_path / "no")
    assert not (tmp_path / "no").exists()
    checkpoint, source = imported(folder, ("onnx",), tmp_path / "out"), GptqSource.open(folder)
    same_rows(checkpoint, source, {f"{layer}.weight" for layer in source.folder.layers})
    order = checkpoint.permutation(f"{LAYER}.weight")
    assert order is not None
    assert checkpoint.permutation("model.layers.0.mlp.up_proj.weight") is None
    stored = checkpoint.read(f"{LAYER}.weight", 0, 8, in_order=False)
    np.testing.assert_array_equal(stored.dequantize(), source.read_rows(f"{LAYER}.weight", 0, 8)[:, order])
    with pytest.raises(UsageError, match="order of activation"):
        checkpoint.read(f"{LAYER}.weight", 0, 8)
    with pytest.raises(UsageError, match="order of activation"):
        write_gptq(checkpoint, tmp_path / "again")
    save_file({f"{LAYER}.weight": np.zeros(128, np.int32)}, checkpoint.path / PERMUTATIONS)
    with pytest.raises(InputError, match="is no order of 128 inputs"):
        QuantizedCheckpoint.open(checkpoint.path).permutation(f"{LAYER}.weight")


@pytest.mark.parametrize(
    ("group", "formats", "grid"), [(96, ("gguf",), "q4_0"), (96, ("onnx",), "int4 g32"), (48, ("onnx",), "int4 g16")]
)
def test_a_group_size_that_does_not_divide_becomes_smaller_groups_of_one_scale(
    make_gptq: MakeGptq, tmp_path: Path, group: int, formats: tuple[str, ...], grid: str
) -> None:
    def regroup(tensors: dict[str, Any], quantization: dict[str, Any]) -> None:
        quantization["group_size"] = group
        for name in [name for name in tensors if name.endswith(".g_idx")]:
            inputs, stem = len(tensors[name]), name.removesuffix("g_idx")
            tensors[name] = (np.arange(inputs) // group).astype(np.int32)
            for part in ("scales", "qzeros"):
                tensors[stem + part] = tensors[stem + part][: -(-inputs // group)]

    folder = make_gptq(regroup, bits=4, group_size=32)
    checkpoint, source = imported(folder, formats, tmp_path / "out"), GptqSource.open(folder)
    same_rows(checkpoint, source, {f"{layer}.weight" for layer in source.folder.layers})
    assert str(checkpoint.scheme(f"{LAYER}.weight")) == grid
    if group == 48:
        with pytest.raises(UsageError, match="GGUF has no form for int4 in groups of 16"):
            imported(folder, ("gguf",), tmp_path / "no")


def test_zero_points_go_to_onnx_and_not_to_gguf(make_gptq: MakeGptq, tmp_path: Path) -> None:
    folder = make_gptq(asymmetric, bits=4, group_size=32)
    with pytest.raises(UsageError, match=r"int4 in groups of 32 with zero points; .* --to onnx holds this"):
        imported(folder, ("gguf",), tmp_path / "no")
    checkpoint, source = imported(folder, ("onnx",), tmp_path / "out"), GptqSource.open(folder)
    assert str(checkpoint.scheme(f"{LAYER}.weight")) == "int4 g32 asym"
    same_rows(checkpoint, source, {f"{layer}.weight" for layer in source.folder.layers})
    assert set(source.read_layer(f"{LAYER}.weight").zeros.ravel()) == {8, 9}


def test_three_bits_have_no_gguf(make_gptq: MakeGptq, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="GGUF has no form for int3 in groups of 32; it holds symmetric 4 and 8 bits"):
        imported(make_gptq(bits=3, group_size=32), ("gguf",), tmp_path / "no")


def test_scales_that_float16_does_not_hold_are_refused_by_name(make_gptq: MakeGptq, tmp_path: Path) -> None:
    def wide(tensors: dict[str, Any], _: dict[str, Any]) -> None:
        tensors[f"{LAYER}.scales"] = tensors[f"{LAYER}.scales"].astype(np.float32) * np.float32(1.0001)

    with pytest.raises(InputError, match=r"k_proj\.weight: its F32 scales are no float16 numbers"):
        imported(make_gptq(wide, bits=4, group_size=32), ("onnx",), tmp_path / "out")


def test_a_coded_head_of_a_tied_model_is_refused(make_gptq: MakeGptq) -> None:
    def coded_head(tensors: dict[str, Any], quantization: dict[str, Any]) -> None:
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            tensors[f"lm_head.{part}"] = tensors[f"{LAYER}.{part}"]
        quantization["lm_head"] = True

    folder = make_gptq(coded_head, bits=4, group_size=32, model={"tied": True})
    with pytest.raises(InputError, match=r"lm_head is coded, but config\.json ties it"):
        GptqSource.open(folder)
