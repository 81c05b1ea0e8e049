"""Checkpoints with experts that are not whole, through the command line: one line, exit code 3, the tensor's name, nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from r1q.cli import main

Tensors = dict[str, torch.Tensor]
BLOCK = 16
EXPERT = "model.layers.1.mlp.experts.5.up_proj.weight"
KV_B = "model.layers.0.self_attn.kv_b_proj.weight"


@pytest.fixture(scope="module")
def sound(moe_models: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with all experts in 8-bit floats, scales of one for every block of 16 × 16."""
    folder: Path = moe_models.write_moe_model(
        tmp_path_factory.mktemp("sound") / "Tiny", "deepseek_v3", num_hidden_layers=2
    )
    tensors: Tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if "proj" in name:
            tensors[f"{name}_scale_inv"] = torch.ones([-(-side // BLOCK) for side in tensor.shape])
            tensors[name] = tensor.to(torch.float8_e4m3fn)
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    quantization = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK] * 2,
    }
    moe_models.change_config(folder, {"quantization_config": quantization})
    return folder


def gap(tensors: Tensors) -> None:
    for name in [name for name in tensors if ".experts.5." in name]:
        tensors[name.replace(".experts.5.", ".experts.8.")] = tensors.pop(name)


def all_lost(tensors: Tensors) -> None:
    for name in [name for name in tensors if ".experts." in name]:
        del tensors[name]


def nan_code(tensors: Tensors) -> None:
    tensors[EXPERT].view(torch.uint8)[3, 4] = 0x7F


BAD: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "all experts missing": (all_lost, "lacks tensors: model.layers.1.mlp.experts.0.gate_proj.weight"),
    "a matrix of an expert missing": (lambda t: [t.pop(EXPERT), t.pop(f"{EXPERT}_scale_inv")], f"lacks tensors: {EXPERT}"),
    "a gap in the experts": (gap, "lacks tensors: model.layers.1.mlp.experts.5.gate_proj.weight"),
    "no scales": (lambda t: t.pop(f"{EXPERT}_scale_inv"), f"{EXPERT} is stored as F8_E4M3 without {EXPERT}_scale_inv"),
    "scales of another shape": (
        lambda t: t.update({f"{KV_B}_scale_inv": torch.ones(7, 3)}),
        f"{KV_B}_scale_inv is F32 [7, 3]; blocks of 16 × 16 of {KV_B} need F32 [7, 2]",
    ),
    "a scale that is no number": (
        lambda t: t[f"{KV_B}_scale_inv"].fill_(torch.nan), f"{KV_B} holds NaN or infinite weights",
    ),
    "a code that is no number": (nan_code, f"{EXPERT} holds NaN or infinite weights"),
}  # fmt: skip


def test_the_sound_one_is_quantized(sound: Path, tmp_path: Path) -> None:
    """Else the cases below could be refused for another reason."""
    run = CliRunner().invoke(main, [*command("quantize", sound, tmp_path)])
    assert run.exit_code == 0, run.output


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("name", ["plan", "quantize"])
def test_what_is_not_whole_is_refused_by_name(case: str, name: str, sound: Path, tmp_path: Path) -> None:
    damage, message = BAD[case]
    folder = shutil.copytree(sound, tmp_path / "Tiny")
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    weights_alone = "no number" in case  # which plan does not read
    run = CliRunner().invoke(main, command(name, folder, tmp_path))
    if weights_alone and name == "plan":
        assert run.exit_code == 0
        return
    assert run.exit_code == 3, run.output
    (line,) = [line for line in run.stderr.splitlines() if line]
    assert message in line
    assert not list(tmp_path.glob("out/*.gguf"))
    assert not list(tmp_path.glob("out/checkpoint/manifest.json"))


def command(name: str, folder: Path, out: Path) -> list[str]:
    more = ["-o", str(out / "out"), "-q", "--to", "checkpoint"] if name == "quantize" else []
    return [name, str(folder), "--scheme", "bf16", *more]


def test_a_shard_that_lacks_what_the_index_promises_is_named(sound: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sound, tmp_path / "Tiny")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
    lost = {name: tensor for name, tensor in tensors.items() if name != EXPERT}
    save_file(lost, folder / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    run = CliRunner().invoke(main, command("plan", folder, tmp_path))
    assert run.exit_code == 3
    assert f"lacks {EXPERT}" in run.stderr
