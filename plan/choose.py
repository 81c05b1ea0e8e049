"""From `--bits`, `--scheme`, `--group-size` and `--to` to one recipe, with the reason in a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from r1q.core.errors import UsageError
from r1q.core.mixtures import ROUTERS
from r1q.core.recipe import BITS_PRESETS, KV_B_HALVES, Recipe, integer_recipe
from r1q.core.scheme import GRIDS, INT_GRIDS, WHOLE_ROW
from r1q.core.tensors import TensorSpec

INTEGER_BITS = tuple(GRIDS[name].bits for name in INT_GRIDS)
DEFAULT_BITS = 4
HEAD_BITS = (4, 8)
W8A8 = "w8a8"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What the options say. `formats` empty means the checkpoint alone."""

    bits: int | None = None
    scheme: str | None = None
    group_size: int | None = None
    symmetric: bool = True
    head_bits: int | None = None
    formats: tuple[str, ...] = ("gguf",)

    @property
    def integers(self) -> bool:
        """Whether the options mean an integer grid and not one of GGUF's own presets."""
        asked = self.group_size is not None or self.head_bits is not None or not self.symmetric
        return asked or self.formats != ("gguf",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A recipe and why it was chosen, as the first line of output says it."""

    recipe: Recipe
    reason: str


def choose_recipe(wish: Wish, tensors: Sequence[TensorSpec]) -> Choice:
    """Return the recipe that the options mean for a model with `tensors`.

    Raises `UsageError` when options contradict each other or a name is unknown.
    """
    if wish.bits is not None and wish.scheme is not None:
        raise UsageError("give --bits or --scheme, not both: --scheme already says the bits")
    if wish.scheme is not None and wish.scheme.lower() == W8A8:
        return _with_activations(wish, tensors)
    if wish.scheme is not None:
        if wish.group_size is not None or wish.head_bits is not None or not wish.symmetric:
            raise UsageError("--group-size, --head-bits and --asymmetric go with --bits; a --scheme has its own")
        recipe = Recipe.load(wish.scheme)
        return Choice(recipe=recipe, reason=f"{recipe.name}, as --scheme says")
    return _integers(wish, tensors) if wish.integers else _preset(wish, tensors)


def _with_activations(wish: Wish, tensors: Sequence[TensorSpec]) -> Choice:
    if not set(wish.formats) <= {"onnx"}:
        other = next(name for name in wish.formats if name != "onnx")
        raise UsageError(
            f"{W8A8} goes to ONNX alone: a {other} file has no place for the ranges of activations; --to onnx, "
            "or --scheme q8_0 (GGUF), --bits 8 --to gptq"
        )
    if wish.group_size is not None or wish.head_bits is not None or not wish.symmetric:
        raise UsageError(f"--group-size, --head-bits and --asymmetric go with --bits; {W8A8} has one scale a row")
    recipe = replace(integer_recipe(8, WHOLE_ROW, True, tensors), name=W8A8)
    reason = f"{W8A8} ({recipe.base}): 8-bit weights and 8-bit inputs, as --scheme says; embedding and head in 8 bits"
    return Choice(recipe=recipe, reason=reason)


def _preset(wish: Wish, tensors: Sequence[TensorSpec]) -> Choice:
    bits = DEFAULT_BITS if wish.bits is None else wish.bits
    if bits == 4 and any(spec.expert is not None for spec in tensors):
        reason = f"experts_q4_k: {_asked(wish)} for a model with experts means them in 4 bits and the rest, which thinks, in 8"
        return Choice(recipe=Recipe.named("experts_q4_k"), reason=reason)
    if bits not in BITS_PRESETS:
        raise UsageError(f"no preset has {bits} bits; --bits takes {', '.join(map(str, BITS_PRESETS))}")
    preset = BITS_PRESETS[bits]
    reason = f"{preset}: {_asked(wish)} in a GGUF file means llama.cpp's usual {bits}-bit preset"
    return Choice(recipe=Recipe.named(preset), reason=reason)


def _integers(wish: Wish, tensors: Sequence[TensorSpec]) -> Choice:
    bits = DEFAULT_BITS if wish.bits is None else wish.bits
    if bits not in INTEGER_BITS:
        raise UsageError(f"there is no {bits}-bit integer grid; --bits takes {', '.join(map(str, INTEGER_BITS))} here")
    group_size = 32 if wish.group_size is None and "gguf" in wish.formats else wish.group_size
    head_bits = 8 if wish.head_bits is None else wish.head_bits
    if head_bits not in HEAD_BITS:
        raise UsageError(f"a head of {head_bits} bits is none of {', '.join(map(str, HEAD_BITS))}")
    kept = _kept(bits, wish, tensors)
    finer = _finer(bits, wish, tensors)
    recipe = integer_recipe(bits, group_size, wish.symmetric, tensors, head_bits=head_bits, kept=kept, finer=finer)
    if wish.group_size is not None:
        why = f"groups of {wish.group_size} as asked" if wish.group_size > 0 else "one group a row as asked"
    elif group_size == 32:
        why = "groups of 32, which GGUF and GPTQ both hold"
    else:
        why = "the largest usual group that divides every row"
    ends = "embedding and head in 8 bits" if head_bits == 8 else f"head in {head_bits} bits"
    if set(kept) - set(KV_B_HALVES):
        ends += "; experts alone, what thinks stays bf16"
    else:
        ends += f"; experts alone have {bits} bits, what thinks has 8" if finer else ""
        ends += "; kv_b_proj stays bf16" if kept else ""
    reason = f"{recipe.name} ({recipe.base}): {_asked(wish)}, {why}; {ends}"
    return Choice(recipe=recipe, reason=reason)


def _kept(bits: int, wish: Wish, tensors: Sequence[TensorSpec]) -> tuple[str, ...]:
    """Return the kinds inside of the blocks that stay float in a GPTQ folder: kv_b, and below 8 bits all that is no expert.

    With everything in 4 bits R1 keeps 96.5 % of its reasoning, with experts alone 98.8 % (MoE-Quant's tables).
    """
    halves = KV_B_HALVES if {"gptq", "onnx"} & set(wish.formats) else ()
    thinking = _thinking(tensors) if "gptq" in wish.formats and bits < 8 else ()
    return tuple(kind for kind in _inside(tensors) if kind in halves or kind in thinking)


def _finer(bits: int, wish: Wish, tensors: Sequence[TensorSpec]) -> tuple[str, ...]:
    """Return the kinds that have 8 bits beside experts of fewer, where each product may have a grid of its own."""
    if "gptq" in wish.formats or bits >= 8:
        return ()
    kept = _kept(bits, wish, tensors)
    return tuple(kind for kind in _thinking(tensors) if kind not in kept)


def _thinking(tensors: Sequence[TensorSpec]) -> tuple[str, ...]:
    """Return the kinds inside of the blocks that are no expert's, nor a router; none where no block has experts."""
    sparse = any(spec.expert is not None for spec in tensors)
    return tuple(kind for kind in _inside(tensors) if kind not in ROUTERS) if sparse else ()


def _inside(tensors: Sequence[TensorSpec]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(s.kind for s in tensors if s.is_matrix and s.layer is not None and s.expert is None))


def _asked(wish: Wish) -> str:
    return f"{DEFAULT_BITS} bits (the default)" if wish.bits is None else f"--bits {wish.bits}"
