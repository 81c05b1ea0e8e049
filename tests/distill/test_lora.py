"""Merged adapters against PEFT's own merge of the same folder, and what is refused.

Tolerance: both sides add s · Σ_k B[i,k] A[k,j] to W[i,j] in float32, with r ≤ 8 terms of order one, in another order: at most
(r + 2) roundings of numbers below 16, each 2⁻²⁴ of it.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from r1q.cli import main
from r1q.core.checkpoint import QuantizedCheckpoint
from r1q.core.errors import InputError, UsageError
from r1q.core.safetensors_file import SafetensorsFile, write_safetensors
from r1q.distill.lora import SETTINGS, WEIGHTS, AdaptedSource, Adapter, adapted
from r1q.models.embedded import OpenedModel, open_model
from r1q.models.source import ModelSource
from r1q.plan.job import Job, open_job, plan_job, run_job

MakeModel = Callable[..., Path]
TOLERANCE = 10 * 16 * 2.0**-24
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Q0 = "model.layers.0.self_attn.q_proj.weight"


def save_adapter(model: Path, folder: Path, **settings: Any) -> Mapping[str, np.ndarray[Any, Any]]:
    """Write an adapter with random halves as PEFT does, and return the weights of PEFT's own merge."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    wrapped = peft.get_peft_model(
        base, peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, **settings})
    )
    with torch.no_grad():
        for name, value in wrapped.named_parameters():
            if "lora_" in name:
                value.normal_(0, 0.5)
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    return {name: value.numpy() for name, value in wrapped.merge_and_unload().state_dict().items()}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks transformers for it
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"target_modules": list(LINEAR)}),
        ("qwen2", {"target_modules": ["q_proj", "down_proj", "lm_head"], "use_rslora": True}),
        (
            "qwen2",
            {
                "target_modules": "all-linear",
                "rank_pattern": {"k_proj": 2, "layers.1.mlp.up_proj": 8},
                "alpha_pattern": {"^model.layers.0.self_attn.o_proj": 3, "k_proj": 5},
            },
        ),
    ],
    ids=["every linear layer", "rank-stabilized, untied head", "patterns"],
)
def test_the_merge_is_pefts(make_model: MakeModel, tmp_path: Path, family: str, settings: Mapping[str, Any]) -> None:
    model = make_model(family, dtype="F32")
    merged = save_adapter(model, tmp_path / "tuned", **settings)
    source = ModelSource.open(model)
    opened = adapted(OpenedModel(source), tmp_path / "tuned")
    changed = set()
    for spec in source.tensors:
        found = opened.source.read_rows(spec.name, 0, spec.rows).reshape(spec.shape)
        assert np.abs(found - merged[spec.name]).max() <= TOLERANCE, spec.name
        if not np.array_equal(found, source.read_rows(spec.name, 0, spec.rows).reshape(spec.shape)):
            changed.add(spec.name)
    adapter = Adapter.open(tmp_path / "tuned", source.tensors)
    assert changed == set(adapter.updates)
    assert Q0 in changed
    assert opened.origin == {"adapter": "tuned"}
    assert opened.source.config.name == f"{model.name}-tuned"


def small_adapter(folder: Path, changes: Mapping[str, Any] | None = None, rank: int = 2, dtype: str = "F32") -> Path:
    """Write by hand an adapter of one matrix [64, 64] of the tiny model."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **(changes or {})}
    (folder / SETTINGS).write_text(json.dumps(settings))
    rng = np.random.default_rng(3)
    stem = f"base_model.model.{Q0.removesuffix('.weight')}"
    halves = {"lora_A": rng.integers(-4, 5, (rank, 64)), "lora_B": rng.integers(-4, 5, (64, rank))}
    values = [half.astype(np.float32) for half in halves.values()]
    stored = values if dtype == "F32" else [(value.view(np.uint32) >> 16).astype(np.uint16) for value in values]
    entries = [(f"{stem}.{half}.weight", dtype, value.shape) for half, value in halves.items()]
    write_safetensors(folder / WEIGHTS, entries, stored)
    return folder


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_rows_are_the_same_bits_however_they_are_cut(make_model: MakeModel, tmp_path: Path, dtype: str) -> None:
    source = ModelSource.open(make_model())
    folder = small_adapter(tmp_path / "small", dtype=dtype)
    merged = AdaptedSource(source, Adapter.open(folder, source.tensors))
    file = SafetensorsFile.open(small_adapter(tmp_path / "same") / WEIGHTS)
    a, b = (file.read(name) for name in file.tensors)
    expected = source.read_rows(Q0, 0, 64) + np.float32(2) * (
        b @ a
    )  # small integers: the product is exact in any order
    np.testing.assert_array_equal(merged.read_rows(Q0, 0, 64), expected)
    cut = np.concatenate([merged.read_rows(Q0, 0, 1), merged.read_rows(Q0, 1, 50), merged.read_rows(Q0, 50, 64)])
    np.testing.assert_array_equal(cut, expected)
    assert merged.read_rows(Q0, 5, 5).shape == (0, 64)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"use_dora": True}, "use_dora is set: DoRA"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is set"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed the base weights"),
        ({"use_of_tomorrow": True}, "does not know what it changes"),
        ({"r": 3}, r"A \[2, 64\] and B \[64, 2\]"),
        ({"r": "2"}, "the rank of"),
        ({"lora_alpha": float("nan")}, "not a number"),
        ({"rank_pattern": {"(a+)+b": 2}}, "only names of modules"),
    ],
)
def test_what_is_no_plain_lora_is_refused(
    make_model: MakeModel, tmp_path: Path, changes: Mapping[str, Any], reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        Adapter.open(small_adapter(tmp_path / "bad", changes), ModelSource.open(make_model()).tensors)


def test_an_adapter_of_another_model_is_refused_with_tensor_and_shapes(make_model: MakeModel, tmp_path: Path) -> None:
    folder = small_adapter(tmp_path / "other")
    wide = ModelSource.open(make_model(hidden_size=96))
    with pytest.raises(InputError, match=r"q_proj.*\[96, 96\].*belongs to another model"):
        Adapter.open(folder, wide.tensors)
    without = tuple(spec for spec in wide.tensors if spec.name != Q0)
    with pytest.raises(InputError, match=r"layers\.0\.self_attn\.q_proj\.weight, which this model does not have"):
        Adapter.open(folder, without)


def test_the_command_refuses_an_adapter_of_another_model(make_model: MakeModel, tmp_path: Path) -> None:
    command = ["quantize", str(make_model(hidden_size=96)), "--lora", str(small_adapter(tmp_path / "other"))]
    done = CliRunner().invoke(main, [*command, "--scheme", "q8_0", "-o", str(tmp_path / "out")])
    assert (done.exit_code, "belongs to another model" in done.output) == (3, True), done.output
    assert not (tmp_path / "out").exists()


def test_pickled_links_and_halves_are_refused(make_model: MakeModel, tmp_path: Path) -> None:
    tensors = ModelSource.open(make_model()).tensors
    folder = small_adapter(tmp_path / "pickled")
    (folder / WEIGHTS).rename(tmp_path / "away.safetensors")
    (folder / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match="pickled"):
        Adapter.open(folder, tensors)
    os.symlink(tmp_path / "away.safetensors", folder / WEIGHTS)
    with pytest.raises(InputError, match="leaves the folder"):
        Adapter.open(folder, tensors)
    half = small_adapter(tmp_path / "half")
    name = f"base_model.model.{Q0.removesuffix('.weight')}.lora_A.weight"
    write_safetensors(half / WEIGHTS, [(name, "F32", (2, 64))], [np.zeros((2, 64), np.float32)])
    with pytest.raises(InputError, match="only half"):
        Adapter.open(half, tensors)
    with pytest.raises(InputError, match="has no adapter_config"):
        Adapter.open(tmp_path, tensors)


def test_quantize_takes_the_merged_weights_and_resume_refuses_another_adapter(
    make_model: MakeModel, tmp_path: Path
) -> None:
    model, folder = make_model(), small_adapter(tmp_path / "tuned")
    job = Job(model=str(model), scheme="f32", formats=(), output=tmp_path / "out", lora=folder)
    opened = open_job(job)
    list(run_job(opened, plan_job(opened)))
    checkpoint = QuantizedCheckpoint.open(tmp_path / "out" / "checkpoint")
    assert checkpoint.manifest["origin"] == {"adapter": "tuned"}
    merged = adapted(open_model(str(model)), folder).source
    for spec in merged.tensors:
        want = merged.read_rows(spec.name, 0, spec.rows).reshape(spec.rows, spec.columns)
        np.testing.assert_array_equal(checkpoint.read_rows(spec.name, 0, spec.rows).reshape(want.shape), want)
    small_adapter(folder, {"lora_alpha": 5})
    again = open_job(job)
    with pytest.raises(UsageError):
        list(run_job(again, plan_job(again)))
    plain = open_job(dataclasses.replace(job, lora=None))
    with pytest.raises(UsageError):
        list(run_job(plain, plan_job(plain)))
