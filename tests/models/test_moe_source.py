"""Checkpoints with experts: 8-bit floats with block scales, fused experts, layers left out; and bad ones, refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from r1q.core.errors import InputError
from r1q.models.config import ModelConfig
from r1q.models.fp8 import E4M3, dequantize
from r1q.models.source import ModelSource

Tensors = dict[str, torch.Tensor]
BLOCK = (16, 16)
EXPERT = "model.layers.1.mlp.experts.5.up_proj.weight"
KV_B = "model.layers.0.self_attn.kv_b_proj.weight"


@pytest.fixture
def folder(moe_models: SimpleNamespace, tmp_path: Path) -> Path:
    path: Path = moe_models.write_moe_model(tmp_path / "m", "deepseek_v3", num_hidden_layers=2)
    return path


def weights_of(folder: Path) -> Tensors:
    tensors: Tensors = load_file(folder / "model.safetensors")
    return tensors


def store(folder: Path, tensors: Tensors) -> None:
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / "model.safetensors")


def fuse(tensors: Tensors) -> Tensors:
    """Return the experts of the second layer in two stacks."""
    stem = "model.layers.1.mlp.experts."
    parts = {
        p: torch.stack([tensors.pop(f"{stem}{e}.{p}_proj.weight") for e in range(8)]) for p in ("gate", "up", "down")
    }
    both = torch.cat((parts["gate"], parts["up"]), dim=1)
    return tensors | {f"{stem}gate_up_proj": both, f"{stem}down_proj": parts["down"]}


def to_fp8(tensors: Tensors) -> Tensors:
    """Return linear layers as 8-bit floats with a scale for every block, as DeepSeek stores them; a slow loop over blocks."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        if "proj" not in name:
            found[name] = tensor
            continue
        rows, columns = tensor.shape
        scales = torch.zeros(-(-rows // BLOCK[0]), -(-columns // BLOCK[1]))
        codes = torch.zeros(rows, columns, dtype=torch.float8_e4m3fn)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                here = np.s_[i * BLOCK[0] : (i + 1) * BLOCK[0], j * BLOCK[1] : (j + 1) * BLOCK[1]]
                scales[i, j] = tensor[here].abs().max() / 448
                codes[here] = (tensor[here] / scales[i, j]).to(torch.float8_e4m3fn)
        found[name], found[f"{name}_scale_inv"] = codes, scales
    return found


def from_fp8(tensors: Tensors) -> Tensors:
    """Return what the 8-bit tensors stand for, by torch."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float8_e4m3fn:
            scale = tensors[f"{name}_scale_inv"].repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)
            found[name] = tensor.float() * scale[: tensor.shape[0], : tensor.shape[1]]
        elif not name.endswith("_scale_inv"):
            found[name] = tensor
    return found


@pytest.fixture
def fp8(folder: Path, moe_models: SimpleNamespace) -> Path:
    store(folder, to_fp8(weights_of(folder)))
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": BLOCK}
    moe_models.change_config(folder, {"quantization_config": quantization})
    return folder


def test_every_byte_means_what_it_means_to_torch() -> None:
    theirs = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(E4M3, theirs)
    assert np.isnan(E4M3).sum() == 2


def test_dequantized_by_hand_in_any_slab() -> None:
    codes = np.full((5, 3), 0x38, np.uint8)  # 1.0
    scales = np.array([[2.0, 3.0], [5.0, 7.0], [11.0, 13.0]], np.float32)
    whole = [[2, 2, 3], [2, 2, 3], [5, 5, 7], [5, 5, 7], [11, 11, 13]]
    assert dequantize(codes, scales, 0, (2, 2)).tolist() == whole
    assert dequantize(codes[1:4], scales, 1, (2, 2)).tolist() == whole[1:4]


def test_8_bit_floats_are_read_as_what_they_stand_for(fp8: Path) -> None:
    source, wanted = ModelSource.open(fp8), from_fp8(weights_of(fp8))
    assert source.config.fp8_block == BLOCK
    seen = 0
    for spec in source.tensors:
        if spec.name not in wanted:
            continue
        seen += spec.dtype == "F8_E4M3"
        whole = source.read_rows(spec.name, 0, spec.rows).reshape(spec.shape)
        np.testing.assert_array_equal(whole, wanted[spec.name].float().numpy())
        if spec.rows > 20:
            np.testing.assert_array_equal(source.read_rows(spec.name, 3, 20), whole[3:20])
    assert seen == 24 + 3 + 3 + 2 * 4


def test_both_halves_of_kv_b_are_read_in_any_slab(fp8: Path) -> None:
    source, whole = ModelSource.open(fp8), from_fp8(weights_of(fp8))[KV_B].numpy()
    heads = whole.reshape(4, 16 + 12, 32)
    k_b = heads[:, :16].transpose(0, 2, 1).reshape(4 * 32, 16)
    v_b = heads[:, 16:].reshape(4 * 12, 32)
    for half, wanted in (("k", k_b), ("v", v_b)):
        name = KV_B.replace("kv_b", f"{half}_b")
        for start, stop in ((0, len(wanted)), (0, 0), (5, 6), (10, 34), (30, 33), (len(wanted) - 1, len(wanted))):
            found = source.read_rows(name, start, stop)
            np.testing.assert_array_equal(found, wanted[start:stop])
            assert found.shape == (stop - start, wanted.shape[1])
    with pytest.raises(ValueError, match="rows"):
        source.read_rows(name, 0, 49)


def test_fused_experts_are_the_same_experts(folder: Path, tmp_path: Path) -> None:
    split = ModelSource.open(folder)
    wanted = {spec.name: split.read_rows(spec.name, 0, spec.rows) for spec in split.tensors}
    tensors = fuse(weights_of(folder))
    store(folder, tensors)
    fused = ModelSource.open(folder)
    assert [spec.name for spec in fused.tensors] == list(wanted)
    for spec in fused.tensors:
        np.testing.assert_array_equal(fused.read_rows(spec.name, 0, spec.rows), wanted[spec.name])
    np.testing.assert_array_equal(fused.read_rows(EXPERT, 7, 9), wanted[EXPERT][7:9])
    store(folder, tensors | {EXPERT: torch.zeros(48, 64)})
    with pytest.raises(InputError, match=r"experts\.5\.up_proj\.weight is there beside .*gate_up_proj"):
        ModelSource.open(folder)


def test_layers_that_predict_further_tokens_are_left_out_and_told(folder: Path) -> None:
    tensors = weights_of(folder)
    extra = {name.replace("layers.1.", "layers.2."): tensor for name, tensor in tensors.items() if "layers.1." in name}
    store(folder, tensors | extra | {"model.layers.2.eh_proj.weight": torch.zeros(64, 128)})
    source = ModelSource.open(folder)
    assert source.notes == (
        f"{len(extra) + 1} tensors left out (model.layers.2.eh_proj.weight, …): they predict further tokens",
    )
    assert max(spec.layer or 0 for spec in source.tensors) == 1
    store(folder, tensors | {"model.layers.3.eh_proj.weight": torch.zeros(64, 128)})
    with pytest.raises(InputError, match=r"unexpected tensors: model\.layers\.3\.eh_proj\.weight"):
        ModelSource.open(folder)


def test_one_matrix_an_expert_in_the_models_order(folder: Path) -> None:
    specs = [spec for spec in ModelSource.open(folder).tensors if spec.expert is not None]
    assert [spec.expert for spec in specs] == [*range(8)] * 3
    assert {spec.gguf_name for spec in specs} == {f"blk.1.ffn_{part}_exps.weight" for part in ("gate", "up", "down")}
    assert specs[13].key == "ffn_up_exps.5.weight"
    assert specs[13].name == EXPERT


Damage = Callable[[Tensors], Any]
BAD: dict[str, tuple[Damage, str]] = {
    "an expert missing": (lambda t: [t.pop(EXPERT), t.pop(f"{EXPERT}_scale_inv")], rf"lacks tensors: {EXPERT}"),
    "a gap in the experts": (
        lambda t: t.update({n.replace("experts.5.", "experts.8."): t.pop(n) for n in list(t) if "experts.5." in n}),
        r"lacks tensors: model\.layers\.1\.mlp\.experts\.5\.gate_proj\.weight",
    ),
    "one too many": (
        lambda t: t.update({EXPERT.replace(".5.", ".8."): torch.zeros(48, 64)}),
        r"unexpected tensors: model\.layers\.1\.mlp\.experts\.8\.up_proj\.weight",
    ),
    "no scales": (lambda t: t.pop(f"{EXPERT}_scale_inv"), rf"{EXPERT} is stored as F8_E4M3 without {EXPERT}_scale_inv"),
    "scales of another shape": (
        lambda t: t.update({f"{KV_B}_scale_inv": torch.ones(7, 3)}),
        rf"{KV_B}_scale_inv is F32 \[7, 3\]; blocks of 16 × 16 of {KV_B} need F32 \[7, 2\]",
    ),
    "scales of another dtype": (
        lambda t: t.update({f"{KV_B}_scale_inv": torch.ones(7, 2, dtype=torch.bfloat16)}),
        r"_scale_inv is BF16",
    ),
    "scales of nothing": (
        lambda t: t.update({"model.norm.weight_scale_inv": torch.ones(1)}),
        r"model\.norm\.weight_scale_inv scales a tensor that is no 8-bit float",
    ),
    "a vector in 8 bits": (
        lambda t: t.update(
            {"model.norm.weight": torch.ones(64).to(torch.float8_e4m3fn), "model.norm.weight_scale_inv": torch.ones(4)}
        ),
        r"model\.norm\.weight is stored as F8_E4M3 with the shape \[64\], not a matrix",
    ),
    "kv_b missing": (lambda t: [t.pop(KV_B), t.pop(f"{KV_B}_scale_inv")], rf"lacks tensors: {KV_B}"),
    "kv_b of another shape": (
        lambda t: [t.pop(f"{KV_B}_scale_inv"), t.update({KV_B: torch.zeros(100, 32)})],
        rf"{KV_B} has the shape \[100, 32\], config.json says \[112, 32\]",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_by_the_tensors_name(fp8: Path, case: str) -> None:
    damage, message = BAD[case]
    tensors = weights_of(fp8)
    damage(tensors)
    store(fp8, tensors)
    with pytest.raises(InputError, match=message):
        ModelSource.open(fp8)


@pytest.mark.parametrize("what", ["code", "scale"])
def test_what_is_not_a_number_is_refused_by_name(fp8: Path, what: str) -> None:
    tensors = weights_of(fp8)
    if what == "code":
        tensors[KV_B].view(torch.uint8)[3, 4] = 0x7F
    else:
        tensors[f"{KV_B}_scale_inv"][0, 0] = torch.inf
    store(fp8, tensors)
    with pytest.raises(InputError, match=rf"{KV_B} holds NaN or infinite weights"):
        ModelSource.open(fp8).read_rows(KV_B.replace("kv_b", "k_b"), 0, 8)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "8 bits without settings": ("deepseek_v3", {"quantization_config": None}, "has no quantization_config for it"),
    "another quantization": ("deepseek_v3", {"quantization_config": {"quant_method": "awq"}}, "is already quantized"),
    "groups": ("deepseek_v3", {"n_group": 3}, "n_group = 3 does not divide the 8 experts"),
    "too many used": ("deepseek_v3", {"num_experts_per_tok": 5}, "is more than the 4 experts that are eligible"),
    "gating": ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func = 'softmax' is not supported"),
    "method": ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method = 'noaux_tc' is not supported"),
    "every second block": ("deepseek_v2", {"moe_layer_freq": 2}, "moe_layer_freq = 2 is not supported"),
    "halves": ("deepseek_v3", {"rope_interleave": False}, "rope_interleave = False is not supported"),
    "epsilon": ("deepseek_v3", {"rms_norm_eps": 1e-5}, "rms_norm_eps = 1e-05 is not 1e-06"),
    "kv heads": ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads = 2 is not the 4 attention heads"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_blocks_do_not_do_is_refused(
    fp8: Path, moe_models: SimpleNamespace, tmp_path: Path, case: str
) -> None:
    family, changes, message = REFUSED[case]
    path = fp8 if family == "deepseek_v3" else moe_models.write_moe_model(tmp_path / "v2", family, num_hidden_layers=1)
    moe_models.change_config(path, changes)
    with pytest.raises(InputError, match=message):
        ModelSource.open(path)


def test_experts_in_an_architecture_without_are_refused(make_model: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="num_experts = 8 means a mixture of experts"):
        ModelConfig.read(make_model(config={"num_experts": 8}))


def test_an_index_as_large_as_that_of_r1_is_read(folder: Path) -> None:
    """91,991 names and files take 9 MB; here the same with names of another model, all in one file that does not have them."""
    (folder / "model.safetensors").rename(folder / "model-00001-of-000163.safetensors")
    names = (f"model.layers.{n % 61}.mlp.experts.{n // 61}.down_proj.weight_scale_inv" for n in range(91_991))
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-000163.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert (folder / "model.safetensors.index.json").stat().st_size > 9_000_000
    with pytest.raises(InputError, match="places in None"):
        ModelSource.open(folder)


def _asked(monkeypatch: pytest.MonkeyPatch, source: ModelSource, name: str) -> list[tuple[int, int]]:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(
        "os.posix_fadvise", lambda _, start, size, advice: asked.append((start, start + size)), raising=False
    )
    source.expect(name)
    return asked


@pytest.mark.parametrize("fused", [False, True])
def test_what_is_expected_is_just_where_a_tensor_lies(
    folder: Path, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = weights_of(folder)[EXPERT].contiguous().view(torch.uint8).numpy().tobytes()
    if fused:
        store(folder, fuse(weights_of(folder)))
    ((start, stop),) = _asked(monkeypatch, ModelSource.open(folder), EXPERT)
    assert (folder / "model.safetensors").read_bytes()[start:stop] == wanted


def test_of_a_half_the_whole_is_expected(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ModelSource.open(folder)
    halves = [_asked(monkeypatch, source, KV_B.replace("kv_b", half)) for half in ("k_b", "v_b")]
    assert halves[0] == halves[1]
    whole = weights_of(folder)[KV_B]
    assert sum(stop - start for start, stop in halves[0]) == whole.numel() * whole.element_size()


def test_what_is_expected_is_asked_for_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a call for more than about half a megabyte Linux reads no more."""
    from r1q.core.safetensors_file import SafetensorsFile, write_safetensors

    write_safetensors(tmp_path / "x", [("w", "U8", (3, 1 << 20))], [np.zeros((3, 1 << 20), np.uint8)])
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr("os.posix_fadvise", lambda _, start, size, advice: asked.append((start, size)), raising=False)
    with SafetensorsFile.open(tmp_path / "x") as file:
        file.expect("w", 1, 3)
        first = file.tensors["w"].start + (1 << 20)
    assert asked == [(first + piece * (1 << 19), 1 << 19) for piece in range(4)]
    monkeypatch.delattr("os.posix_fadvise")  # macOS, Windows
    with SafetensorsFile.open(tmp_path / "x") as file:
        file.expect("w", 0, 3)
