"""GPTQ folders of models with experts: a tensor for each expert, kv_b whole and in bfloat16, and the way back through the reader."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file

from r1q.core.artifact import OutputFolder
from r1q.core.checkpoint import QuantizedCheckpoint
from r1q.core.errors import InputError, UsageError
from r1q.core.integers import pack_bits
from r1q.export.gptq import write_gptq
from r1q.export.verified import Verified
from r1q.export.verify import verify_path
from r1q.export.verify_gptq import verify_gptq
from r1q.models.embedded import OpenedModel
from r1q.models.forward import logits
from r1q.models.gptq_source import GptqSource
from r1q.models.source import ModelSource
from r1q.plan.choose import Wish, choose_recipe
from r1q.plan.import_gptq import import_gptq
from r1q.plan.plan import make_plan
from r1q.plan.walk import quantize_model

Make = Callable[..., OutputFolder]
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 2,
}
LATENT = {"q_lora_rank": 64, "kv_lora_rank": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 64}
MODELS: dict[str, dict[str, Any]] = {"deepseek_v3": SIZES | LATENT, "qwen3_moe": SIZES}
STEM = "model.layers.1."
EXPERT, KV_B = f"{STEM}mlp.experts.5.gate_proj", f"{STEM}self_attn.kv_b_proj"


@pytest.fixture(scope="module")
def models(moe_models: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        family: moe_models.write_moe_model(root / family, family, dtype=torch.bfloat16, **sizes)
        for family, sizes in MODELS.items()
    }


@pytest.fixture
def make(models: dict[str, Path], tmp_path: Path) -> Make:
    """Return `make(family, **wish)`: the output folder of the real walk to a GPTQ folder."""

    def quantized(family: str, **wish: Any) -> OutputFolder:
        source = ModelSource.open(models[family])
        asked = Wish(**{"formats": ("gptq",), "bits": 4, "group_size": 32, **wish})
        plan = make_plan(source, choose_recipe(asked, source.tensors).recipe, asked.formats)
        output = OutputFolder(tmp_path / f"out-{len(list(tmp_path.iterdir()))}")
        list(quantize_model(OpenedModel(source), plan, output))
        return output

    return quantized


def weights_of(output: OutputFolder) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(output.path / "gptq" / "model.safetensors")
    return tensors


def verified(output: OutputFolder) -> Verified:
    checkpoint, result = verify_path(output.path)
    assert checkpoint.defects == ()
    return result


def test_experts_have_their_own_words_and_kv_b_is_the_models_own(make: Make, models: dict[str, Path]) -> None:
    output = make("deepseek_v3")
    tensors, given = weights_of(output), load_file(models["deepseek_v3"] / "model.safetensors")
    checkpoint = QuantizedCheckpoint.open(output.checkpoint)
    qweight, scales = tensors[f"{EXPERT}.qweight"].numpy().view(np.uint32), tensors[f"{EXPERT}.scales"].numpy()
    values = checkpoint.read_rows(f"{EXPERT}.weight", 0, 64)
    for out, column in ((0, 0), (63, 127), (17, 40)):
        code = int(qweight[column // 8, out] >> np.uint32(4 * (column % 8))) & 15
        assert np.float32(scales[column // 32, out]) * (code - 8) == values[out, column]
    assert tensors[f"{KV_B}.weight"].dtype == torch.bfloat16
    assert torch.equal(tensors[f"{KV_B}.weight"], given[f"{KV_B}.weight"])
    assert torch.equal(tensors[f"{STEM}mlp.gate.weight"], given[f"{STEM}mlp.gate.weight"])
    correction = tensors[f"{STEM}mlp.gate.e_score_correction_bias"]
    assert correction.dtype == torch.float32
    assert torch.equal(correction, given[f"{STEM}mlp.gate.e_score_correction_bias"].float())
    coded = {name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")}
    assert coded == {f"{STEM}mlp.experts.{n}.{part}_proj" for n in range(8) for part in ("gate", "up", "down")}
    assert {name.removesuffix(".weight") for name in given} - coded <= {
        name.removesuffix(".weight") for name in tensors
    }
    config = json.loads((output.path / "gptq" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"


def test_verify_says_what_is_excepted(make: Make) -> None:
    result = verified(make("deepseek_v3", bits=8))
    assert result.defects == ()
    assert "excepted, in bfloat16: 2 × self_attn.kv_b_proj, 1 × mlp.gate" in result.notes
    result = verified(make("deepseek_v3"))
    assert result.defects == ()
    (line,) = [note for note in result.notes if note.startswith("excepted")]
    for module in ("2 × self_attn.kv_b_proj", "2 × self_attn.o_proj", "1 × mlp.shared_experts.up_proj", "1 × mlp.gate"):
        assert module in line
    (line,) = [note for note in verified(make("qwen3_moe")).notes if note.startswith("excepted")]
    assert line == (
        "excepted, in float16: 2 × self_attn.q_proj, 2 × self_attn.k_proj, 2 × self_attn.v_proj, 2 × self_attn.o_proj, 2 × mlp.gate"
    )


@pytest.mark.parametrize(("family", "bits"), [("deepseek_v3", 4), ("deepseek_v3", 8), ("qwen3_moe", 4)])
def test_the_reader_finds_the_checkpoints_numbers(make: Make, family: str, bits: int) -> None:
    output = make(family, bits=bits)
    checkpoint, source = QuantizedCheckpoint.open(output.checkpoint), GptqSource.open(output.path / "gptq")
    assert [spec.name for spec in source.tensors] == [spec.name for spec in checkpoint.tensors]
    for spec in checkpoint.tensors:
        have, want = (reader.read_rows(spec.name, 0, spec.rows) for reader in (source, checkpoint))
        if family == "qwen3_moe" and spec.expert is None:
            want = want.astype(np.float16).astype(np.float32)  # what is not coded
        if spec.layer is not None:
            np.testing.assert_array_equal(have, want, err_msg=spec.name)
    tokens = np.arange(24)[None]
    (found,) = logits(source, tokens)
    assert found.shape == (24, 320)
    assert np.isfinite(found).all()


def test_several_files_with_an_index(make: Make, tmp_path: Path) -> None:
    output = make("deepseek_v3")
    checkpoint = QuantizedCheckpoint.open(output.checkpoint)
    folder = write_gptq(checkpoint, tmp_path / "sharded", shard_bytes=100_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    for stem in {name.removesuffix(".qweight") for name in index["weight_map"] if name.endswith(".qweight")}:
        assert len({index["weight_map"][f"{stem}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")}) == 1
    whole = weights_of(output)
    parts = {n: t for file in set(index["weight_map"].values()) for n, t in load_file(folder / file).items()}
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    assert verify_gptq(checkpoint, folder).defects == ()
    GptqSource.open(folder)


def swap_heads(tensors: dict[str, torch.Tensor]) -> None:
    heads = tensors[f"{KV_B}.weight"].reshape(4, -1, 64)
    tensors[f"{KV_B}.weight"] = heads[[1, 0, 2, 3]].reshape(-1, 64).contiguous()


def swap_keys(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{KV_B}.weight"][:2] = tensors[f"{KV_B}.weight"][:2].flip(0)


DAMAGE: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], list[str]]] = {
    "heads": (swap_heads, [f"{STEM}self_attn.k_b_proj.weight", f"{STEM}self_attn.v_b_proj.weight"]),
    "keys": (swap_keys, [f"{STEM}self_attn.k_b_proj.weight"]),
    "an expert": (lambda t: t.update({f"{EXPERT}.qweight": t[f"{EXPERT}.qweight"].flip(0)}), [f"{EXPERT}.weight"]),
    "the router": (lambda t: t[f"{STEM}mlp.gate.weight"].add_(1), [f"{STEM}mlp.gate.weight"]),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_what_was_damaged_is_found_by_name(make: Make, case: str) -> None:
    output, (damage, names) = make("deepseek_v3"), DAMAGE[case]
    tensors = weights_of(output)
    damage(tensors)
    save_file(tensors, output.path / "gptq" / "model.safetensors", metadata={"format": "pt"})
    output.record("gptq", output.path / "gptq", ())
    assert [defect.where for defect in verified(output).defects] == names


@pytest.mark.parametrize(
    ("dynamic", "what"),
    [
        ({}, "is missing: some layers are floats"),
        ({"-:.*mlp.gate$": {}}, "does not except model.layers.0.mlp.down_proj"),
    ],
)
def test_exceptions_that_loaders_need_are_checked(make: Make, dynamic: dict[str, object], what: str) -> None:
    output = make("deepseek_v3")
    path = output.path / "gptq" / "config.json"
    config = json.loads(path.read_text())
    assert all(pattern.startswith("-:model\\.layers\\.\\d+\\.") for pattern in config["quantization_config"]["dynamic"])
    config["quantization_config"]["dynamic"] = dynamic
    path.write_text(json.dumps(config))
    output.record("gptq", output.path / "gptq", ())
    (defect,) = verified(output).defects
    assert defect.where == "config.json: quantization_config.dynamic"
    assert defect.what.startswith(what)


def test_an_import_copies_the_experts_codes_into_a_gguf_checkpoint(make: Make, tmp_path: Path) -> None:
    folder = make("deepseek_v3").path / "gptq"
    list(import_gptq(folder, ("gguf",), OutputFolder(tmp_path / "imported")))
    checkpoint, source = QuantizedCheckpoint.open(tmp_path / "imported" / "checkpoint"), GptqSource.open(folder)
    for spec in checkpoint.tensors:
        have, want = (reader.read_rows(spec.name, 0, spec.rows) for reader in (checkpoint, source))
        np.testing.assert_array_equal(have, want, err_msg=spec.name)
    grids = {spec.kind: str(checkpoint.scheme(spec.name)) for spec in checkpoint.tensors}
    assert (grids["ffn_gate_exps"], grids["attn_k_b"], grids["ffn_gate_inp"]) == ("q4_0", "bf16", "f32")


def test_a_coded_kv_b_of_others_is_read_and_becomes_floats(make: Make, tmp_path: Path) -> None:
    """gptqmodel codes kv_b_proj too; its halves are then values without codes of their own."""
    folder = make("deepseek_v3").path / "gptq"
    tensors = {
        name: t.float().numpy() if t.dtype == torch.bfloat16 else t.numpy() for name, t in weights_of_folder(folder)
    }
    random = np.random.default_rng(3)
    for layer in range(2):
        stem = f"model.layers.{layer}.self_attn.kv_b_proj"
        outputs, inputs = tensors.pop(f"{stem}.weight").shape
        codes = random.integers(0, 16, (outputs, inputs)).astype(np.uint8)
        scales = (random.random((inputs // 32, outputs)) + 0.5).astype(np.float16)
        tensors[f"{stem}.qweight"] = np.ascontiguousarray(np.ascontiguousarray(pack_bits(codes, 4)).view(np.int32).T)
        tensors[f"{stem}.qzeros"] = np.full((inputs // 32, outputs // 8), 0x77777777, np.int32)
        tensors[f"{stem}.scales"] = scales
        tensors[f"{stem}.g_idx"] = (np.arange(inputs) // 32).astype(np.int32)
        wanted = (codes.astype(np.float32) - 8) * np.repeat(scales.T.astype(np.float32), 32, axis=1)
    save_numpy(tensors, folder / "model.safetensors")
    source = GptqSource.open(folder)
    heads = wanted.reshape(4, 32 + 64, 64)
    name = f"{STEM}self_attn.k_b_proj.weight"
    np.testing.assert_array_equal(source.read_rows(name, 0, 256), heads[:, :32].swapaxes(1, 2).reshape(256, 32))
    np.testing.assert_array_equal(source.read_rows(name.replace("k_b", "v_b"), 64, 128), heads[1, 32:])
    list(import_gptq(folder, ("gguf",), OutputFolder(tmp_path / "imported")))
    checkpoint = QuantizedCheckpoint.open(tmp_path / "imported" / "checkpoint")
    assert str(checkpoint.scheme(name)) == "f32"
    np.testing.assert_array_equal(checkpoint.read_rows(name, 0, 256), source.read_rows(name, 0, 256))


def weights_of_folder(folder: Path) -> list[tuple[str, torch.Tensor]]:
    return list(load_file(folder / "model.safetensors").items())


def test_a_gap_in_the_experts_of_a_folder_is_refused_by_name(make: Make) -> None:
    folder = make("deepseek_v3").path / "gptq"
    tensors = {name: t for name, t in weights_of_folder(folder) if not name.startswith(EXPERT)}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=rf"lacks tensors: {EXPERT}\.weight"):
        GptqSource.open(folder)


def test_a_checkpoint_with_coded_halves_of_kv_b_is_refused(make: Make, tmp_path: Path) -> None:
    checkpoint = QuantizedCheckpoint.open(make("deepseek_v3", formats=()).checkpoint)
    with pytest.raises(UsageError, match=r"k_b_proj\.weight: kv_b_proj is one matrix in a GPTQ folder"):
        write_gptq(checkpoint, tmp_path / "no")


def test_the_recipe_says_what_stays(models: dict[str, Path]) -> None:
    tensors = ModelSource.open(models["deepseek_v3"]).tensors
    four = choose_recipe(Wish(bits=4, formats=("gptq",)), tensors)
    assert (four.recipe.name, "experts alone" in four.reason) == ("int4-g64-experts", True)
    eight = choose_recipe(Wish(bits=8, formats=("gptq",)), tensors)
    assert eight.reason.endswith("kv_b_proj stays bf16")
    assert {rule.tensors for rule in eight.recipe.rules if rule.scheme.grid == "bf16"} == {
        "blk.*.attn_k_b.weight",
        "blk.*.attn_v_b.weight",
    }
