"""The grid table against gguf's own sizes, and what a Scheme accepts."""

import gguf
import pytest

from r1q.core.errors import UsageError
from r1q.core.scheme import GGML_GRIDS, GRIDS, Scheme


@pytest.mark.parametrize("grid", ["f32", "f16", "bf16", *GGML_GRIDS])
def test_block_sizes_are_those_of_gguf(grid: str) -> None:
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[grid.upper()]]
    assert (GRIDS[grid].block, GRIDS[grid].block_bytes) == (block, size)


def test_bits_per_weight_counts_the_scales() -> None:
    assert Scheme(grid="q4_k").bits_per_weight(256) == 4.5
    assert Scheme(grid="int4", group_size=128).bits_per_weight(1024) == 4 + 16 / 128
    assert Scheme(grid="int4", group_size=-1).bits_per_weight(1024) == 4 + 16 / 1024
    assert Scheme(grid="int4", group_size=32, symmetric=False).bits_per_weight(64) == 4 + 24 / 32


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"grid": "q4_x"}, "did you mean"),
        ({"grid": "int4"}, "needs a group size"),
        ({"grid": "int4", "group_size": 0}, "needs a group size"),
        ({"grid": "q4_k", "group_size": 64}, "its own block of 256"),
        ({"grid": "q8_0", "symmetric": False}, "its own block of 32"),
    ],
)
def test_a_scheme_is_born_valid(options: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Scheme(**options)  # type: ignore[arg-type]
