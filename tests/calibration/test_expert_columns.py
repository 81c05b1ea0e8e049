"""Importance matrices of models with experts: what transformers' layers read, llama.cpp's layout, the codes of llama-quantize."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from r1q.calibration.columns import column_sums
from r1q.calibration.imatrix import write_imatrix
from r1q.cli import main
from r1q.core.artifact import OutputFolder
from r1q.core.checkpoint import QuantizedCheckpoint
from r1q.core.errors import InputError
from r1q.core.gguf_file import GgufFile
from r1q.core.imatrix_file import read_imatrix
from r1q.core.importance import row_slabs
from r1q.core.mixtures import FILE_TYPES
from r1q.core.recipe import Recipe
from r1q.core.tensors import TensorSpec
from r1q.models.embedded import open_model
from r1q.models.source import ModelSource
from r1q.plan.plan import make_plan
from r1q.plan.statistics import read_statistics
from r1q.plan.walk import Exported, quantize_model

Sums = dict[str, np.ndarray]
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 2,
}
LATENT = {"q_lora_rank": 256, "kv_lora_rank": 256, "qk_rope_head_dim": 32, "qk_nope_head_dim": 64, "v_head_dim": 64}
MODELS: dict[str, dict[str, Any]] = {
    "deepseek_v3": SIZES | LATENT,
    "plain queries": SIZES | LATENT | {"q_lora_rank": None},
    "qwen3_moe": SIZES,
}
MODULES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_a": "self_attn.q_a_proj", "attn_q_b": "self_attn.q_b_proj", "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "ffn_gate_inp": "mlp.gate",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj", "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 300, (3, 17))


@pytest.fixture(scope="module")
def models(moe_models: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root, made = tmp_path_factory.mktemp("models"), {}

    def folder(case: str) -> Path:
        if case not in made:
            family = case if "_" in case else "deepseek_v3"
            made[case] = moe_models.write_moe_model(root / case.replace(" ", "-"), family, **MODELS[case])
        return Path(made[case])

    return folder


def seen_by_transformers(path: Path, source: ModelSource) -> tuple[Sums, dict[str, list[int]]]:
    """Return Σx² of every matrix and the tokens of every expert, by hooks on transformers' model in float32 and slow loops."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    sums: Sums = {}
    counts: dict[str, list[int]] = {}
    inputs: dict[str, Any] = {}
    latent = source.config.latent

    def watch(name: str, module: str) -> None:
        def hook(_: object, given: tuple[torch.Tensor, ...], made: torch.Tensor) -> None:
            inputs[name] = (given, made)

        model.get_submodule(module).register_forward_hook(hook)

    for spec in source.tensors:
        stem = f"model.layers.{spec.layer}."
        if spec.kind in MODULES and spec.part == "weight":
            watch(spec.gguf_name, stem + MODULES[spec.kind])
        elif spec.kind == "attn_kv_a_norm":
            watch(f"latent.{spec.layer}", f"{stem}self_attn.kv_a_layernorm")
        elif spec.kind == "ffn_gate_exps" and spec.expert == 0:
            watch(f"experts.{spec.layer}", f"{stem}mlp.experts")
    with torch.no_grad():
        result = model(torch.from_numpy(TOKENS), output_attentions=True)
    for name, (given, _) in inputs.items():
        if name.startswith("blk."):
            sums[name] = given[0].reshape(-1, given[0].shape[-1]).square().sum(0).numpy()
    for layer in range(source.config.num_layers):
        if latent is not None:
            shape = (3, 17, source.config.num_heads, -1)
            made = "attn_q_b" if latent.query_rank else "attn_q"
            queries = inputs[f"blk.{layer}.{made}.weight"][1].reshape(shape)[..., : latent.key_dim]
            sums[f"blk.{layer}.attn_k_b.weight"] = queries.square().sum((0, 1)).numpy()
            mixed = result.attentions[layer] @ inputs[f"latent.{layer}"][1][:, None]
            sums[f"blk.{layer}.attn_v_b.weight"] = mixed.square().sum((0, 2)).numpy()
        if f"experts.{layer}" in inputs:
            rows, chosen = inputs[f"experts.{layer}"][0][:2]
            weights = [
                [torch.from_numpy(source.read_rows(f"model.layers.{layer}.mlp.experts.{e}.{part}_proj.weight", 0, 256))
                 for part in ("gate", "up")]
                for e in range(8)
            ]  # fmt: skip
            read, inner, tokens = np.zeros((8, 256)), np.zeros((8, 256)), [0] * 8
            for row, experts in zip(rows, chosen, strict=True):
                for e in experts.tolist():
                    gate, up = (weight @ row for weight in weights[e])
                    read[e] += row.square().numpy()
                    inner[e] += (torch.nn.functional.silu(gate) * up).square().numpy()
                    tokens[e] += 1
            for part, found in (("gate", read), ("up", read), ("down", inner)):
                sums[f"blk.{layer}.ffn_{part}_exps.weight"] = found
                counts[f"blk.{layer}.ffn_{part}_exps.weight"] = tokens
    return sums, counts


@pytest.mark.parametrize("case", MODELS)
def test_sums_are_those_that_hooks_on_transformers_see(case: str, models: Callable[[str], Path]) -> None:
    source = ModelSource.open(models(case))
    counts: dict[str, list[int]] = {}
    found = {name: sums for block in column_sums(source, TOKENS, seen=counts) for name, sums in block.items()}
    expected, tokens = seen_by_transformers(models(case), source)
    assert counts == tokens
    assert found.keys() == expected.keys()
    assert found.keys() == {s.gguf_name for s in source.tensors if s.is_matrix and s.layer is not None}
    for name, sums in expected.items():
        np.testing.assert_allclose(found[name], sums, rtol=1e-3, atol=1e-6 * sums.max(), err_msg=name)


def test_the_file_has_llama_imatrix_s_layout(tmp_path: Path) -> None:
    sums = {"blk.0.ffn_up_exps.weight": np.arange(12.0).reshape(3, 4), "blk.0.attn_k_b.weight": np.ones((2, 4))}
    write_imatrix(
        tmp_path / "i.gguf", sums, {"blk.0.ffn_up_exps.weight": [2, 0, 4], "blk.0.attn_k_b.weight": 6},
        datasets=["a"], chunks=1, chunk_size=6,
    )  # fmt: skip
    file = GgufFile.open(tmp_path / "i.gguf")
    assert {name: tensor.shape for name, tensor in file.tensors.items()} == {
        "blk.0.attn_k_b.weight.in_sum2": (8,),
        "blk.0.attn_k_b.weight.counts": (1,),
        "blk.0.ffn_up_exps.weight.in_sum2": (3, 4),
        "blk.0.ffn_up_exps.weight.counts": (3, 1),
    }
    found = read_imatrix(tmp_path / "i.gguf")
    np.testing.assert_array_equal(
        found.columns["blk.0.ffn_up_exps.weight"], [[0, 0.5, 1, 1.5], [1, 1, 1, 1], [2, 2.25, 2.5, 2.75]]
    )
    assert found.unseen == {"blk.0.ffn_up_exps.weight": 1}


LLAMA_QUANTIZE = """
import ctypes, sys, llama_cpp, numpy
options = llama_cpp.llama_model_quantize_default_params()
options.ftype, options.nthread = int(sys.argv[3]), 2
values = dict(numpy.load(sys.argv[4]))
entries = (llama_cpp.llama_model_imatrix_data * (len(values) + 1))()
for entry, (name, row) in zip(entries, values.items()):
    entry.name, entry.data, entry.size = name.encode(), row.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), row.size
options.imatrix = entries
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(options)))
"""


def written(model: Path, scheme: str, output: Path, imatrix: Path | None = None) -> Path:
    opened = open_model(str(model))
    *_, exported = quantize_model(
        opened, make_plan(opened.source, Recipe.named(scheme), ("gguf",), imatrix), OutputFolder(output)
    )
    assert isinstance(exported, Exported)
    return exported.path


@pytest.mark.runtime
@pytest.mark.parametrize(("case", "presets"), [("deepseek_v3", ["q4_k_m", "q2_k", "q4_0"]), ("qwen3_moe", ["q4_k_m"])])
def test_codes_are_those_of_llama_quantize_with_the_same_matrix(
    case: str, presets: list[str], models: Callable[[str], Path], tmp_path: Path
) -> None:
    """The command makes the matrix, and each expert and head is weighed by its own part of it."""
    model, file = models(case), tmp_path / "stats.gguf"
    run = CliRunner().invoke(
        main, ["calibrate", str(model), "-o", str(file), "--samples", "2", "--seq-len", "48", "-q"]
    )
    assert run.exit_code == 0, run.output
    imatrix = read_imatrix(file)
    assert imatrix.columns["blk.1.ffn_down_exps.weight"].shape == (8, 256)
    np.savez(tmp_path / "stats.npz", **imatrix.columns)  # type: ignore[arg-type]
    whole = written(model, "f32", tmp_path / "f32")
    for preset in presets:
        ours = GgufFile.open(written(model, preset, tmp_path / preset, file))
        target = tmp_path / f"theirs-{preset}.gguf"
        arguments = [str(whole), str(target), str(FILE_TYPES[preset]), str(tmp_path / "stats.npz")]
        subprocess.run([sys.executable, "-c", LLAMA_QUANTIZE, *arguments], check=True, capture_output=True)
        theirs = GgufFile.open(target)
        assert set(ours.tensors) == set(theirs.tensors)
        for name, tensor in ours.tensors.items():
            assert tensor.type == theirs.tensors[name].type, name
            np.testing.assert_array_equal(ours.read_bytes(name), theirs.read_bytes(name), err_msg=name)


def test_the_command_tells_how_many_experts_it_never_saw(models: Callable[[str], Path], tmp_path: Path) -> None:
    run = CliRunner().invoke(
        main,
        ["calibrate", str(models("qwen3_moe")), "-o", str(tmp_path / "s.gguf"), "--samples", "1", "--seq-len", "2"],
    )
    assert run.exit_code == 0, run.output
    unseen = sum(read_imatrix(tmp_path / "s.gguf").unseen[f"blk.{layer}.ffn_down_exps.weight"] for layer in range(2))
    assert 4 <= unseen < 16  # two tokens of three experts each, in both blocks
    assert f"{unseen} of 16 experts were sent no token" in " ".join(run.output.split())


def test_an_expert_without_tokens_is_told(models: Callable[[str], Path], tmp_path: Path) -> None:
    source, name = ModelSource.open(models("qwen3_moe")), "blk.1.ffn_up_exps.weight"
    sums = {name: np.ones((8, 256)), "blk.0.attn_q.weight": np.ones(256)}
    counts: dict[str, int | list[int]] = {name: [0, 3, 0, 1, 1, 1, 1, 1], "blk.0.attn_q.weight": 3}
    write_imatrix(tmp_path / "i.gguf", sums, counts, datasets=[], chunks=1, chunk_size=3)
    plan = make_plan(source, Recipe.named("q4_k"), (), tmp_path / "i.gguf")
    line = f"{name}: 2 of 8 experts saw no token of the importance matrix, their columns weigh alike"
    assert line in plan.notes
    opened = open_model(str(models("qwen3_moe")))
    list(quantize_model(opened, plan, OutputFolder(tmp_path / "out")))
    assert line in str(QuantizedCheckpoint.open(tmp_path / "out" / "checkpoint").manifest["events"])


@pytest.mark.parametrize(
    ("shape", "counts"), [((4, 256), [1] * 4), ((8, 128), [1] * 8), ((256,), 1), ((16, 256), [1] * 16)]
)
def test_a_matrix_of_other_experts_is_refused_by_name(
    models: Callable[[str], Path], tmp_path: Path, shape: tuple[int, ...], counts: list[int] | int
) -> None:
    name = "blk.1.ffn_up_exps.weight"
    write_imatrix(tmp_path / "i.gguf", {name: np.ones(shape)}, {name: counts}, datasets=[], chunks=1, chunk_size=1)
    with pytest.raises(InputError, match=rf"{name} has .* columns, this model's has 256 in each of 8 parts"):
        read_statistics(tmp_path / "i.gguf", ModelSource.open(models("qwen3_moe")).tensors)


def spec(kind: str, shape: tuple[int, int], expert: int | None = None) -> TensorSpec:
    return TensorSpec(name=kind, kind=kind, layer=0, part="weight", shape=shape, dtype="F32", expert=expert)


def test_slabs_never_cross_parts() -> None:
    heads = np.arange(6, dtype=np.float32).reshape(3, 2)
    found = list(row_slabs({"blk.0.attn_k_b.weight": heads}, spec("attn_k_b", (12, 2)), 3))
    assert [(start, stop) for start, stop, _ in found] == [(0, 3), (3, 4), (4, 7), (7, 8), (8, 11), (11, 12)]
    assert [None if mine is None else mine[0] for _, _, mine in found] == [0, 0, 2, 2, 4, 4]
    found = list(row_slabs({"blk.0.ffn_up_exps.weight": heads}, spec("ffn_up_exps", (4, 2), 2), 4))
    assert [(start, stop, [] if mine is None else mine.tolist()) for start, stop, mine in found] == [(0, 4, [4, 5])]
    assert list(row_slabs({}, spec("attn_q", (5, 2)), 4)) == [(0, 4, None), (4, 5, None)]
