"""Presets: which grid each tensor gets, and what replaces it where a row does not split into blocks.

llama.cpp's are facts from `llama-quant.cpp` (llama_tensor_get_type, tensor_type_fallback) as of llama-cpp-python 0.3.36.
`tests/core/test_mixtures.py` holds them against llama.cpp's published bits per weight and against llama_model_quantize itself.
Three more are for models with experts, which hold most weights and least of what a thought hangs on: `experts_q4_k` codes routed
experts in 4 bits and everything else in 8 (98.8 % of R1's reasoning score against 96.5 % with everything in 4 bits, by MoE-Quant's
tables), `dq3_k_m` is the 3-bit mix of arXiv 2505.02390 (0.34 % below the 8-bit model), and `ud_q2_k_xl` the dynamic 2.51-bit mix that
Unsloth published of R1 (0.94 %, same source): the counts of each grid that llama.cpp tells of that file leave no other rule.
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
    """What a mixture looks at besides the tensor: family, depth, heads, whether the head is the embedding, statistics or not.

    `experts` are the routed ones of a block (0: none); blocks before `first_sparse` have none.
    """

    family: str
    layers: int
    heads: int
    kv_heads: int
    tied: bool
    calibrated: bool = False
    experts: int = 0
    first_sparse: int = 0

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


def never_coded(spec: TensorSpec) -> bool:
    """Return whether a tensor stays in floats whatever the recipe: norms, biases, routers."""
    return not spec.is_matrix or spec.kind in ROUTERS


Choice = Callable[[int, ModelShape], str]
ROUTERS = ("ffn_gate_inp",)
"""Kinds of matrices that no preset quantizes."""
# Kinds that llama.cpp's rules take for another; `ffn_down_exps` is looked up under its own name first.
_LIKE: Mapping[str, str] = MappingProxyType({"ffn_down_exps": "ffn_down", "ffn_down_shexp": "ffn_down"})
_EXPERTS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
# Of Mixtral's size, llama.cpp gives attention more bits: it is a small part of the weights.
_OF_EIGHT: Mapping[str, str] = MappingProxyType({"attn_v": "q8_0", "attn_k": "q8_0"})
_OUTPUT_OF_EIGHT = ("q2_k", "q3_k_s", "q3_k_m", "iq4_nl", "q4_k_s", "q4_k_m", "iq4_xs")


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


def _every_fifth(layer: int, shape: ModelShape) -> str:
    """Two blocks in 6 bits, then one of five in 4: for R1's 58 blocks with experts, 3.4 %, 20.7 % and 75.9 % in 3 bits."""
    rank = layer - shape.first_sparse
    return "q6_k" if rank < 2 else "q4_k" if rank % 5 == 2 else "q3_k"


def _first_three(layer: int, shape: ModelShape) -> str:
    return "q3_k" if layer - shape.first_sparse < 3 else "q2_k"


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
_SIX_BITS_OF_UD = ("ffn_gate", "ffn_up", "ffn_down", "ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp")
_MORE_OF_DQ3 = ("attn_kv_a_mqa", "attn_k_b", "attn_v_b", "ffn_down", "ffn_down_shexp")
EXPERT_MIXTURES: Mapping[str, Mixture] = MappingProxyType(
    {
        "experts_q4_k": Mixture(default="q8_0", choices=dict.fromkeys(_EXPERTS, _always("q4_k")), head="q8_0"),
        "dq3_k_m": Mixture(
            default="q4_k",
            choices={
                **dict.fromkeys(_EXPERTS, _always("q3_k")),
                **dict.fromkeys(_MORE_OF_DQ3, _always("q6_k")),
                "ffn_down_exps": _every_fifth,
            },
        ),
        "ud_q2_k_xl": Mixture(
            default="q4_k",
            choices={
                **dict.fromkeys(_EXPERTS, _always("q2_k")),
                **dict.fromkeys(_SIX_BITS_OF_UD, _always("q6_k")),
                "ffn_down_exps": _first_three,
            },
        ),
    }
)
"""Presets for models with experts that llama.cpp does not have."""

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
    mixture = EXPERT_MIXTURES.get(preset) or MIXTURES[preset]
    if tensor.kind == "output" or (tensor.kind == "token_embd" and shape.tied):
        # A head whose rows do not split into the default grid's blocks goes to 8 bits at once.
        return mixture.head if tensor.columns % GRIDS[mixture.default].block == 0 else "q8_0"
    if shape.experts == 8 and preset in MIXTURES and tensor.kind in _OF_EIGHT:
        return _OF_EIGHT[tensor.kind]
    if shape.experts == 8 and preset in MIXTURES and tensor.kind == "attn_output":
        return "q5_k" if preset in _OUTPUT_OF_EIGHT else mixture.default
    choice = mixture.choices.get(tensor.kind, mixture.choices.get(_LIKE.get(tensor.kind, tensor.kind)))
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
