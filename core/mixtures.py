"""llama.cpp's presets: which grid each tensor gets, and what replaces it where a row does not split into blocks.

Facts from `llama-quant.cpp` (llama_tensor_get_type, tensor_type_fallback) as of llama-cpp-python 0.3.36; dense models only.
`tests/core/test_mixtures.py` holds them against llama.cpp's published bits per weight and against llama_model_quantize itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from r1q.core.errors import UsageError
from r1q.core.scheme import GRIDS
from r1q.core.tensors import TensorSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What a mixture looks at besides the tensor: family, depth, heads, whether the head is the embedding, statistics or not."""

    family: str
    layers: int
    heads: int
    kv_heads: int
    tied: bool
    calibrated: bool = False

    @property
    def queries_per_kv(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // self.kv_heads

    @property
    def is_70b(self) -> bool:
        """llama.cpp's «70B» class: 80 layers, and for llama grouped-query attention."""
        return self.layers == 80 and (self.family == "qwen2" or self.kv_heads != self.heads)


def more_bits(index: int, count: int) -> bool:
    """Return whether layer `index` of `count` is among the first or last eighth, or every third between."""
    return index < count // 8 or index >= 7 * count // 8 or (index - count // 8) % 3 == 2


Choice = Callable[[int, ModelShape], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """A preset: the grid of most tensors, and a choice by layer and shape for the kinds that differ."""

    default: str
    choices: Mapping[str, Choice]
    head: str = "q6_k"


def _always(grid: str) -> Choice:
    return lambda layer, shape: grid


def _more(grid: str, otherwise: str) -> Choice:
    return lambda layer, shape: grid if more_bits(layer, shape.layers) else otherwise


def _first(share: int, grid: str, otherwise: str) -> Choice:
    return lambda layer, shape: grid if layer < shape.layers // share else otherwise


def _below(limit: int, grid: str, otherwise: str) -> Choice:
    return lambda layer, shape: grid if layer < limit else otherwise


def _grouped(grid: str, otherwise: str) -> Choice:
    return lambda layer, shape: grid if shape.queries_per_kv >= 4 else otherwise


def _first_if(calibrated: bool, grid: str, otherwise: str) -> Choice:
    return lambda layer, shape: grid if shape.calibrated == calibrated and layer < shape.layers // 8 else otherwise


def _mixtures() -> dict[str, Mixture]:
    def mixture(default: str, head: str = "q6_k", **choices: Choice) -> Mixture:
        return Mixture(default=default, head=head, choices=MappingProxyType(choices))

    return {
        "q4_0": mixture("q4_0", ffn_down=_first_if(True, "q4_1", "q4_0")),
        "q4_1": mixture("q4_1"),
        "q5_0": mixture("q5_0", ffn_down=_first_if(True, "q5_1", "q5_0")),
        "q5_1": mixture("q5_1"),
        "q8_0": mixture("q8_0", head="q8_0"),
        "q2_k": mixture("q2_k", attn_v=_grouped("q4_k", "q3_k"), ffn_down=_always("q3_k"), attn_output=_always("q3_k")),
        "q3_k_s": mixture("q3_k"),
        "q3_k_m": mixture(
            "q3_k", attn_v=_below(2, "q5_k", "q4_k"), ffn_down=_first(16, "q5_k", "q4_k"), attn_output=_always("q4_k")
        ),
        "q3_k_l": mixture("q3_k", attn_v=_always("q5_k"), ffn_down=_always("q5_k"), attn_output=_always("q5_k")),
        "q4_k_s": mixture("q4_k", attn_v=_below(4, "q5_k", "q4_k"), ffn_down=_first(8, "q5_k", "q4_k")),
        "q4_k_m": mixture("q4_k", attn_v=_more("q6_k", "q4_k"), ffn_down=_more("q6_k", "q4_k")),
        "q5_k_s": mixture("q5_k"),
        "q5_k_m": mixture("q5_k", attn_v=_more("q6_k", "q5_k"), ffn_down=_more("q6_k", "q5_k")),
        "q6_k": mixture("q6_k"),
        "iq4_nl": mixture("iq4_nl", attn_v=_grouped("q5_k", "iq4_nl"), ffn_down=_first_if(False, "q5_k", "iq4_nl")),
        "iq4_xs": mixture("iq4_xs", attn_v=_grouped("q5_k", "iq4_xs"), ffn_down=_first_if(False, "q5_k", "iq4_xs")),
    }


MIXTURES: Mapping[str, Mixture] = MappingProxyType(_mixtures())

# What a GGUF file of each preset calls itself: `general.file_type` (llama.cpp's llama_ftype).
FILE_TYPES: Mapping[str, int] = MappingProxyType(
    {
        "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k_s": 11, "q3_k_m": 12,
        "q3_k_l": 13, "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16, "q5_k_m": 17, "q6_k": 18, "iq4_nl": 25, "iq4_xs": 30, "bf16": 32,
    }
)  # fmt: skip

FALLBACKS: Mapping[str, str] = MappingProxyType(
    {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0", "iq4_xs": "iq4_nl"}
)


def mixture_grid(preset: str, tensor: TensorSpec, shape: ModelShape) -> str:
    """Return the grid that llama.cpp's `preset` gives a matrix, before any shape fallback."""
    mixture = MIXTURES[preset]
    if tensor.kind == "output" or (tensor.kind == "token_embd" and shape.tied):
        # A head whose rows do not split into the default grid's blocks goes to 8 bits at once.
        return mixture.head if tensor.columns % GRIDS[mixture.default].block == 0 else "q8_0"
    choice = mixture.choices.get(tensor.kind)
    grid = mixture.default if choice is None or tensor.layer is None else choice(tensor.layer, shape)
    if shape.is_70b and tensor.kind == "attn_v" and grid in ("q3_k", "q4_k"):
        return "q5_k"  # few attn_v weights there (8 query heads share one), so the extra bits are cheap
    return grid


def fallback_grid(grid: str, tensor: TensorSpec) -> str:
    """Return `grid`, or what llama.cpp stores instead when the rows do not split into its blocks.

    Raises `UsageError` where llama.cpp has nothing to offer.
    """
    if tensor.columns % GRIDS[grid].block == 0:
        return grid
    other = FALLBACKS.get(grid)
    if other is None:
        raise UsageError(
            f"{tensor.name}: rows of {tensor.columns} weights do not split into {grid} blocks of {GRIDS[grid].block}; "
            "choose --scheme bf16 or f16, or a recipe that keeps this tensor float"
        )
    return other if tensor.columns % GRIDS[other].block == 0 else "f16"
