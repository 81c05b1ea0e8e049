"""From options to a recipe: defaults, group sizes, and options that contradict each other."""

import pytest

from r1q.core.errors import UsageError
from r1q.core.formats import parse_formats, refuse_unfit
from r1q.core.mixtures import ModelShape
from r1q.core.recipe import resolve
from r1q.core.scheme import Scheme
from r1q.core.tensors import TensorSpec
from r1q.plan.choose import Wish, choose_recipe

SHAPE = ModelShape(family="llama", layers=1, heads=4, kv_heads=4, tied=False)


def tensors(columns: int) -> list[TensorSpec]:
    def matrix(kind: str, layer: int | None, columns: int) -> TensorSpec:
        return TensorSpec(
            name=f"n.{kind}.weight", kind=kind, layer=layer, part="weight", shape=(64, columns), dtype="BF16"
        )

    return [
        matrix("token_embd", None, columns),
        matrix("attn_q", 0, columns),
        matrix("ffn_down", 0, 1536),
        matrix("output", None, columns),
    ]


def schemes(wish: Wish, columns: int = 576) -> list[str]:
    choice = choose_recipe(wish, tensors(columns))
    return [str(planned.scheme) for planned in resolve(choice.recipe, tensors(columns), SHAPE)]


@pytest.mark.parametrize(
    ("bits", "preset"), [(None, "q4_k_m"), (2, "q2_k"), (3, "q3_k_m"), (4, "q4_k_m"), (6, "q6_k"), (8, "q8_0")]
)
def test_bits_for_gguf_alone_mean_the_usual_preset(bits: int | None, preset: str) -> None:
    choice = choose_recipe(Wish(bits=bits), tensors(512))
    assert choice.recipe.name == preset
    assert choice.reason.startswith(f"{preset}: ")


def test_the_default_group_is_the_largest_that_divides_every_row() -> None:
    assert schemes(Wish(bits=4, formats=("gptq",))) == ["q8_0", "int4 g64", "int4 g64", "q8_0"]
    assert schemes(Wish(bits=4, formats=("gptq",)), 512) == ["q8_0", "int4 g128", "int4 g128", "q8_0"]
    assert schemes(Wish(bits=3, formats=("gptq",)), 100) == ["f16", "int3 row", "int3 row", "f16"]


def test_gguf_beside_gptq_takes_the_group_that_both_hold() -> None:
    wish = Wish(bits=4, formats=("gguf", "gptq"))
    assert schemes(wish) == ["q8_0", "q4_0", "q4_0", "q8_0"]
    refuse_unfit(resolve(choose_recipe(wish, tensors(576)).recipe, tensors(576), SHAPE), wish.formats)


def test_a_head_in_four_bits_is_the_embeddings_where_they_are_one() -> None:
    wish = Wish(bits=4, head_bits=4)
    assert schemes(wish) == ["q8_0", "q4_0", "q4_0", "q4_0"]
    choice = choose_recipe(wish, tensors(576)[:-1])
    tied = resolve(choice.recipe, tensors(576)[:-1], SHAPE)
    assert [str(planned.scheme) for planned in tied] == ["q4_0", "q4_0", "q4_0"]
    assert choice.recipe.name == "int4-g32-head4"


def test_a_group_that_does_not_divide_is_refused_with_those_that_would() -> None:
    with pytest.raises(
        UsageError, match=r"n\.attn_q\.weight: rows of 576 .* groups of 128; group sizes that do: 64, 32, or -1"
    ):
        schemes(Wish(bits=4, group_size=128, formats=("gptq",)))


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        (Wish(bits=4, scheme="q4_0"), "not both"),
        (Wish(scheme="q4_0", group_size=32), "go with --bits"),
        (Wish(bits=7), "no preset has 7 bits"),
        (Wish(bits=5, group_size=32), "no 5-bit integer grid"),
    ],
)
def test_contradictions_are_refused(wish: Wish, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        choose_recipe(wish, tensors(512))


@pytest.mark.parametrize(
    ("wish", "formats", "says"),
    [
        (Wish(bits=4, group_size=64), ("gguf",), "GGUF has no form for int4 g64.*--group-size 32.*--to gptq"),
        (Wish(bits=4, symmetric=False, formats=("gptq",)), ("gptq",), "no form for int4 g64 asym"),
        (Wish(scheme="q4_k_m"), ("gptq",), "GPTQ folder has no form for q"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_with_what_works(wish: Wish, formats: tuple[str, ...], says: str) -> None:
    recipe = choose_recipe(wish, tensors(576)).recipe
    with pytest.raises(UsageError, match=says):
        refuse_unfit(resolve(recipe, tensors(576), SHAPE), formats)


def test_one_grid_a_gptq_folder() -> None:
    from r1q.core.recipe import Recipe, Rule

    recipe = Recipe(name="x", base=Scheme(grid="q4_0"), rules=(Rule(tensors="*ffn_down*", scheme=Scheme(grid="q8_0")),))
    with pytest.raises(UsageError, match=r"one grid for all layers, not int4 g32 .*beside int8 g32"):
        refuse_unfit(resolve(recipe, tensors(576), SHAPE), ("gptq",))


def test_formats_are_a_list() -> None:
    assert parse_formats("gguf, GPTQ,gguf") == ("gguf", "gptq")
    assert parse_formats("checkpoint") == ()
    for text, says in [("ggfu", "did you mean gguf"), ("onxx", "did you mean onnx"), (",", "needs a format")]:
        with pytest.raises(UsageError, match=says):
            parse_formats(text)
