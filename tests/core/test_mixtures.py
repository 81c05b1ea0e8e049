"""llama.cpp's mixtures: published bits per weight to four decimals, and the tables its users know by heart."""

import pytest

from r1q.core.errors import UsageError
from r1q.core.mixtures import MIXTURES, ModelShape, fallback_grid, mixture_grid, more_bits
from r1q.core.recipe import PlannedTensor, Recipe, resolve
from r1q.core.tensors import TensorSpec

# Bits per weight of Llama-3.1-8B in llama.cpp's tools/quantize/README.md.
PUBLISHED = {
    "iq4_xs": 4.4597, "iq4_nl": 4.6818, "q2_k": 3.1593, "q3_k_s": 3.6429, "q3_k_m": 3.9960, "q3_k_l": 4.2979,
    "q4_k_s": 4.6672, "q4_k_m": 4.8944, "q5_k_s": 5.5704, "q5_k_m": 5.7036, "q6_k": 6.5633, "q8_0": 8.5008, "f16": 16.0005,
}  # fmt: skip


def dense(
    vocabulary: int, hidden: int, feed_forward: int, layers: int, heads: int, kv_heads: int,
    *, tied: bool = False, biases: bool = False, qk_norms: bool = False, head_dim: int = 0, family: str = "llama",
) -> tuple[list[TensorSpec], ModelShape]:  # fmt: skip
    """Return the tensors of a dense decoder by arithmetic alone, and its shape."""
    head_dim = head_dim or hidden // heads
    specs: list[TensorSpec] = []

    def add(kind: str, layer: int | None, *shape: int, part: str = "weight") -> None:
        name = f"{layer}.{kind}.{part}"
        specs.append(TensorSpec(name=name, kind=kind, layer=layer, part=part, shape=shape, dtype="BF16"))

    add("token_embd", None, vocabulary, hidden)
    for layer in range(layers):
        for kind, rows, columns in [
            ("attn_q", heads * head_dim, hidden), ("attn_k", kv_heads * head_dim, hidden),
            ("attn_v", kv_heads * head_dim, hidden), ("attn_output", hidden, heads * head_dim),
            ("ffn_gate", feed_forward, hidden), ("ffn_up", feed_forward, hidden), ("ffn_down", hidden, feed_forward),
        ]:  # fmt: skip
            add(kind, layer, rows, columns)
            if biases and kind in ("attn_q", "attn_k", "attn_v"):
                add(kind, layer, rows, part="bias")
        add("attn_norm", layer, hidden)
        add("ffn_norm", layer, hidden)
        if qk_norms:
            add("attn_q_norm", layer, head_dim)
            add("attn_k_norm", layer, head_dim)
    add("output_norm", None, hidden)
    if not tied:
        add("output", None, vocabulary, hidden)
    return specs, ModelShape(family=family, layers=layers, heads=heads, kv_heads=kv_heads, tied=tied)


def bits_per_weight(planned: tuple[PlannedTensor, ...], extra_weights: int = 0) -> float:
    bytes_ = sum(tensor.bytes for tensor in planned) + 4 * extra_weights
    return 8 * bytes_ / (sum(tensor.spec.size for tensor in planned) + extra_weights)


@pytest.mark.parametrize("preset", PUBLISHED)
def test_published_bits_per_weight_to_four_decimals(preset: str) -> None:
    # The 64 rope factors that llama.cpp adds for Llama-3.1 count in its figure.
    specs, shape = dense(128256, 4096, 14336, 32, 32, 8)
    planned = resolve(Recipe.named(preset), specs, shape)
    assert round(bits_per_weight(planned, extra_weights=64), 4) == PUBLISHED[preset]


def test_qwen3_4b_q4_k_m_has_the_published_type_counts() -> None:
    specs, shape = dense(151936, 2560, 9728, 36, 32, 8, tied=True, qk_norms=True, head_dim=128, family="qwen3")
    planned = resolve(Recipe.named("q4_k_m"), specs, shape)
    grids = [tensor.scheme.grid for tensor in planned]
    assert {grid: grids.count(grid) for grid in set(grids)} == {"q4_k": 216, "q6_k": 37, "f32": 145}


# What `llama-quantize --dry-run` says of these shapes: MiB and bits per weight, both to two decimals, from llama.cpp as of
# llama-cpp-python 0.3.36; benchmarks/peers/llama_cpp_sizes asked it.
WIDTHS = ["q2_k", "q3_k_m", "iq4_xs", "q4_k_s", "q4_k_m", "q5_k_m", "q6_k", "q8_0"]
MODELS = {
    "SmolLM2-135M": (
        dense(49152, 576, 1536, 30, 9, 3, tied=True),
        [82.41, 87.48, 85.38, 95.61, 98.87, 105.21, 130.27, 136.40],
        [5.14, 5.46, 5.32, 5.96, 6.17, 6.56, 8.12, 8.51],
    ),
    "Qwen2.5-0.5B": (
        dense(151936, 896, 4864, 24, 14, 2, tied=True, biases=True, family="qwen2"),
        [317.25, 333.33, 329.49, 361.94, 373.71, 394.95, 476.64, 500.79],
        [5.39, 5.66, 5.59, 6.15, 6.35, 6.71, 8.09, 8.50],
    ),
    "DeepSeek-R1-Distill-Qwen-1.5B": (
        dense(151936, 1536, 8960, 28, 12, 2, biases=True, family="qwen2"),
        [712.33, 875.96, 972.95, 1016.27, 1059.89, 1220.27, 1390.67, 1801.09],
        [3.36, 4.13, 4.59, 4.80, 5.00, 5.76, 6.56, 8.50],
    ),
    "DeepSeek-R1-Distill-Qwen-7B": (
        dense(152064, 3584, 18944, 28, 28, 4, biases=True, family="qwen2"),
        [2870.55, 3626.29, 4047.72, 4245.58, 4460.45, 5186.92, 5958.79, 7717.68],
        [3.16, 3.99, 4.46, 4.68, 4.91, 5.71, 6.56, 8.50],
    ),
    "DeepSeek-R1-Distill-Llama-8B": (
        dense(128256, 4096, 14336, 32, 32, 8),
        [3024.38, 3825.27, 4269.15, 4467.80, 4685.30, 5459.93, 6282.97, 8137.64],
        [3.16, 4.00, 4.46, 4.67, 4.89, 5.70, 6.56, 8.50],
    ),
}


@pytest.mark.parametrize("preset", WIDTHS)
@pytest.mark.parametrize("model", MODELS)
def test_sizes_of_five_models_as_llama_quantize_says(model: str, preset: str) -> None:
    (specs, shape), mebibytes, bits = MODELS[model]
    planned, index = resolve(Recipe.named(preset), specs, shape), WIDTHS.index(preset)
    assert round(sum(tensor.bytes for tensor in planned) / 2**20, 2) == mebibytes[index]
    assert round(bits_per_weight(planned), 2) == bits[index]
    # Rows of 576 and 896 weights fill no super-block of 256; those of the larger models all do.
    narrow = model in ("SmolLM2-135M", "Qwen2.5-0.5B")
    assert any(tensor.fell_back for tensor in planned) == (narrow and preset != "q8_0")


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (28, [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 25, 26, 27]),
        (32, [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]),
        (61, [*range(7), *range(9, 53, 3), *range(53, 61)]),
    ],
)
def test_more_bits_go_to_the_layers_that_llama_cpp_names(layers: int, expected: list[int]) -> None:
    assert [index for index in range(layers) if more_bits(index, layers)] == expected


def test_seventy_billion_gives_attention_values_five_bits() -> None:
    value = TensorSpec(name="v", kind="attn_v", layer=40, part="weight", shape=(1024, 8192), dtype="BF16")
    small = ModelShape(family="llama", layers=32, heads=64, kv_heads=8, tied=False)
    large = ModelShape(family="llama", layers=80, heads=64, kv_heads=8, tied=False)
    assert (mixture_grid("q4_k_s", value, small), mixture_grid("q4_k_s", value, large)) == ("q4_k", "q5_k")


def test_a_head_with_odd_rows_goes_to_eight_bits() -> None:
    head = TensorSpec(name="h", kind="output", layer=None, part="weight", shape=(1000, 576), dtype="BF16")
    shape = ModelShape(family="llama", layers=4, heads=9, kv_heads=3, tied=False)
    assert mixture_grid("q4_k_m", head, shape) == "q8_0"
    assert mixture_grid("q4_0", head, shape) == "q6_k"
    assert fallback_grid("q6_k", head) == "q8_0"


def test_rows_that_nothing_divides_become_half_floats_or_are_refused() -> None:
    odd = TensorSpec(name="w", kind="ffn_down", layer=0, part="weight", shape=(8, 100), dtype="BF16")
    assert fallback_grid("q4_k", odd) == "f16"
    with pytest.raises(UsageError, match="w: rows of 100 weights do not split into q8_0 blocks of 32"):
        fallback_grid("q8_0", odd)


def test_statistics_change_what_llama_cpp_changes() -> None:
    down = TensorSpec(name="d", kind="ffn_down", layer=0, part="weight", shape=(512, 1024), dtype="BF16")
    for preset, plain, calibrated in [("q4_0", "q4_0", "q4_1"), ("q5_0", "q5_0", "q5_1"), ("iq4_xs", "q5_k", "iq4_xs")]:
        for has, grid in [(False, plain), (True, calibrated)]:
            shape = ModelShape(family="qwen2", layers=16, heads=8, kv_heads=8, tied=False, calibrated=has)
            assert mixture_grid(preset, down, shape) == grid


def test_every_preset_names_a_file_type() -> None:
    from r1q.core.mixtures import FILE_TYPES

    assert set(MIXTURES) <= set(FILE_TYPES)
