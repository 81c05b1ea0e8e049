"""Fitting grids to a budget: the knapsack against every combination, files that keep the budget, recipes that read back."""

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from r1q.cli import main as cli
from r1q.core.checkpoint import QuantizedCheckpoint
from r1q.core.errors import ResourceError, UsageError
from r1q.core.recipe import Recipe, resolve
from r1q.core.scheme import Scheme
from r1q.models.source import ModelSource
from r1q.plan.fit import Fitted, choose, fit_recipe
from r1q.plan.fitting import budget_of_bpw, budget_of_size, to_toml, write_fitted
from r1q.plan.holders import onnx_holder
from r1q.plan.plan import model_shape
from r1q.plan.swaps import Option

MakeModel = Callable[..., Path]
TOKENS = np.random.default_rng(5).integers(0, 320, (2, 32))
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_layers": 2, "num_heads": 4}


@pytest.mark.parametrize("seed", range(20))
def test_no_combination_is_better(seed: int) -> None:
    rng = np.random.default_rng(seed)
    schemes = [Scheme(grid=grid) for grid in ("q2_k", "q4_k", "q8_0")]
    options = {
        f"t{n}": tuple(Option(scheme=s, bytes=int(rng.integers(1, 50)), loss=float(rng.random())) for s in schemes)
        for n in range(6)
    }
    room = int(rng.integers(60, 200))
    each = [c for c in itertools.product(*options.values()) if sum(o.bytes for o in c) <= room]
    chosen = choose(options, room)
    if not each:
        assert chosen is None
        return
    assert chosen is not None
    assert sum(option.bytes for option in chosen.values()) <= room
    best = min(sum(option.loss for option in c) for c in each)
    assert sum(option.loss for option in chosen.values()) <= best * 1.0002 + 1e-12


def fitted(source: ModelSource, budget: int) -> Fitted:
    *_, last = fit_recipe(source, TOKENS, name="fit", budget=budget)
    assert isinstance(last, Fitted)
    return last


def test_more_room_loses_less_and_too_little_says_what_would_do(make_model: MakeModel) -> None:
    source = ModelSource.open(make_model("llama", **SIZES))
    weights = sum(spec.size for spec in source.tensors)
    results = [fitted(source, int(weights * bits / 8) + 30_000) for bits in (3, 4.5, 6)]
    assert results[0].loss > results[1].loss > results[2].loss
    with pytest.raises(ResourceError, match=r"no choice of grids makes a file of 0\.1 MB: the smallest has"):
        fitted(source, 100_000)


def test_the_file_has_the_bytes_that_were_predicted(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("llama", **SIZES)
    budget = 700_000
    result = CliRunner().invoke(cli, ["quantize", str(model), "--fit", "700KB", "-o", str(tmp_path / "out"), "-q"])
    assert result.exit_code == 0, result.output
    (file,) = (tmp_path / "out").glob("*.gguf")
    recipe = Recipe.load(str(tmp_path / "out.toml"))
    assert recipe.name == "fit-700KB"
    found = fitted(ModelSource.open(model), budget)
    assert file.stat().st_size <= budget
    assert abs(found.bytes - file.stat().st_size) <= 0.02 * file.stat().st_size  # another text, another choice of grids


def test_a_recipe_reads_back(make_model: MakeModel, tmp_path: Path) -> None:
    source = ModelSource.open(make_model("llama", **SIZES))
    recipe = fitted(source, 700_000).recipe
    path = tmp_path / "r.toml"
    path.write_text(to_toml(recipe))
    read = Recipe.load(str(path))
    assert (read.name, read.rules) == (recipe.name, recipe.rules)


def test_a_recipe_made_before_is_kept_and_another_is_not_overwritten(make_model: MakeModel, tmp_path: Path) -> None:
    model, path, text = str(make_model("llama", **SIZES)), tmp_path / "r.toml", tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 400)
    budget = budget_of_size("700KB")
    assert len(list(write_fitted(model, budget, path, calibration=str(text)))) > 1
    before = path.read_bytes()
    assert list(write_fitted(model, budget, path, calibration=str(text))) == []
    with pytest.raises(UsageError, match="made for something else"):
        list(write_fitted(model, budget_of_bpw(5), path, calibration=str(text)))
    assert path.read_bytes() == before


@pytest.mark.parametrize("kv", ["float", "int8"])
def test_an_onnx_folder_has_the_bytes_that_were_predicted(make_model: MakeModel, tmp_path: Path, kv: str) -> None:
    model, out = make_model("qwen2", **SIZES), tmp_path / "out"
    command = ["quantize", str(model), "--fit", "900KB", "--to", "onnx", "--kv", kv, "-o", str(out)]
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 0, result.output
    recipe = Recipe.load(str(tmp_path / "out.toml"))
    assert recipe.name == "fit-900KB-onnx"
    assert len({str(rule.scheme) for rule in recipe.rules}) > 1
    source = ModelSource.open(model)
    holder = onnx_holder(cache=kv == "int8")
    planned = resolve(recipe, source.tensors, model_shape(source.config, calibrated=True))
    size = sum(file.stat().st_size for file in (out / "onnx").iterdir())
    assert holder.whole_bytes(source, planned, recipe.name) == size
    assert 0.98 * 900_000 < size <= 900_000
    schemes = {rule.tensors: rule.scheme for rule in recipe.rules}
    for layer in range(2):
        assert len({schemes[f"blk.{layer}.attn_{part}.weight"] for part in "qkv"}) == 1  # one product has one form


@pytest.mark.parametrize(
    ("family", "to", "budget"),
    [
        ("qwen3_moe", "gguf", 800_000),
        ("qwen3_moe", "onnx", 1_000_000),
        ("deepseek_v3", "gguf", 600_000),
        ("deepseek_v3", "onnx", 800_000),
    ],
)
def test_experts_of_a_block_share_a_grid_within_the_bytes(
    moe_models: SimpleNamespace, tmp_path: Path, family: str, to: str, budget: int
) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128, "num_hidden_layers": 2}
    sizes |= {"q_lora_rank": 64, "qk_rope_head_dim": 16, "v_head_dim": 32} if family == "deepseek_v3" else {}
    model, out = moe_models.write_moe_model(tmp_path / "m", family, **sizes), tmp_path / "out"
    result = CliRunner().invoke(cli, ["quantize", str(model), "--fit", str(budget), "--to", to, "-o", str(out), "-q"])
    assert result.exit_code == 0, result.output
    files = list((out / "onnx").iterdir()) if to == "onnx" else list(out.glob("*.gguf"))
    size = sum(file.stat().st_size for file in files)
    assert 0.95 * budget < size <= budget
    checkpoint = QuantizedCheckpoint.open(out / "checkpoint")
    grids: dict[object, set[str]] = {}
    for spec in checkpoint.tensors:
        if spec.expert is not None:
            # QMoE has one grid for all of a block's, GGUF one for each of three stacks.
            grids.setdefault(spec.layer if to == "onnx" else spec.gguf_name, set()).add(
                str(checkpoint.scheme(spec.name))
            )
        elif spec.kind == "ffn_gate_inp" or (to == "onnx" and spec.kind in ("attn_k_b", "attn_v_b")):
            assert checkpoint.scheme(spec.name).facts.family == "float"
    assert {len(each) for each in grids.values()} == {1}


def test_what_a_budget_cannot_do_is_said_before_anything_is_read(make_model: MakeModel, tmp_path: Path) -> None:
    model = str(make_model("llama", **SIZES))
    for options, code, says in (
        (["--fit", "100KB", "--to", "onnx"], 5, r"the smallest has 0\.\d MB"),
        (["--fit", "1MB", "--to", "gptq"], 2, "one grid for all layers"),
        (["--fit", "1MB", "--to", "onnx", "--group-size", "32"], 2, "leave --group-size"),
        (["--bits", "4", "--swaps", "3"], 2, "--swaps goes with --fit or --bpw"),
    ):
        result = CliRunner().invoke(cli, ["quantize", model, *options, "-o", str(tmp_path / "o")])
        assert (result.exit_code, re.search(says, result.output) is not None) == (code, True), result.output
