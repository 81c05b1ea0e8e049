"""Recipes: names, TOML, rules, and every way to get one wrong."""

from pathlib import Path

import pytest

from r1q.core.errors import InputError, UsageError
from r1q.core.mixtures import ModelShape
from r1q.core.recipe import Recipe, resolve
from r1q.core.scheme import Scheme
from r1q.core.tensors import TensorSpec

SHAPE = ModelShape(family="qwen2", layers=2, heads=4, kv_heads=2, tied=False)


def matrix(kind: str, layer: int, columns: int = 512) -> TensorSpec:
    name = f"model.layers.{layer}.{kind}.weight"
    return TensorSpec(name=name, kind=kind, layer=layer, part="weight", shape=(64, columns), dtype="BF16")


def grids(recipe: Recipe, *specs: TensorSpec) -> list[str]:
    return [tensor.scheme.grid for tensor in resolve(recipe, specs, SHAPE)]


def test_a_preset_is_a_mixture_and_a_grid_is_pure() -> None:
    tensors = [matrix("attn_q", 1), matrix("attn_v", 1)]
    assert grids(Recipe.named("q4_k_m"), *tensors) == ["q4_k", "q6_k"]
    assert grids(Recipe.named("q4_k"), *tensors) == ["q4_k", "q4_k"]


def test_unknown_names_are_answered_with_near_ones() -> None:
    with pytest.raises(UsageError, match="no preset or grid named 'q4_km'; did you mean q4_k_m"):
        Recipe.named("q4_km")


def test_the_first_matching_rule_wins_over_the_base(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'base = "q4_k_m"\n'
        '[[rules]]\ntensors = "blk.0.ffn_down.weight"\ngrid = "q8_0"\n'
        '[[rules]]\ntensors = "model.layers.*.ffn_down.weight"\ngrid = "bf16"\n'
    )
    recipe = Recipe.load(str(path))
    assert recipe.name == "mine"
    assert grids(recipe, matrix("ffn_down", 0), matrix("ffn_down", 1), matrix("ffn_up", 1)) == ["q8_0", "bf16", "q4_k"]
    assert Recipe.from_dict(recipe.to_dict(), default_name="x", where="x") == recipe


def test_vectors_stay_float32() -> None:
    norm = TensorSpec(name="n", kind="attn_norm", layer=0, part="weight", shape=(512,), dtype="BF16")
    bias = TensorSpec(name="b", kind="attn_q", layer=0, part="bias", shape=(512,), dtype="BF16")
    assert grids(Recipe.named("q4_0"), norm, bias) == ["f32", "f32"]
    assert resolve(Recipe.named("bf16"), [norm], SHAPE)[0].scheme == Scheme(grid="f32")


def test_a_rule_for_no_tensor_is_refused() -> None:
    recipe = Recipe.from_dict(
        {"base": "q4_0", "rules": [{"tensors": "*.ffn_dwn.*", "grid": "q8_0"}]}, default_name="r", where="r.toml"
    )
    with pytest.raises(UsageError, match=r"'\*\.ffn_dwn\.\*' matches no matrix"):
        resolve(recipe, [matrix("ffn_down", 0)], SHAPE)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("base = ", "not a readable TOML"),
        ('name = "x"', "base is missing"),
        ('base = "q4_0"\ncolour = 3', "unknown key 'colour'"),
        ('base = "q4_0"\n[[rules]]\ntensors = "*"', "a rule is"),
        ('base = "q4_0"\n[[rules]]\ntensors = "*"\ngrid = "q9"', "no grid named 'q9'"),
        ('base = "q4_0"\n[[rules]]\ntensors = 3\ngrid = "q8_0"', "are strings"),
        ('base = "q4_0"\nrules = 3', "must be"),
        ('base = "q4_0"\nname = "a/b"', "name must be"),
    ],
)
def test_a_bad_recipe_file_says_what_is_wrong(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=says):
        Recipe.load(str(path))


def test_a_missing_recipe_file_names_the_presets(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="presets are q4_0"):
        Recipe.load(str(tmp_path / "none.toml"))
