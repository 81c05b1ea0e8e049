"""How large a student is: widths that fit a budget, and what a teacher cannot give.

Width goes first: feed-forward channels most, hidden channels less, as NVIDIA's Minitron models were cut (Llama 3.1 8B to 4B: 14,336 to
9,216 and 4,096 to 3,072; arXiv 2408.11796, table 2). Depth and heads go only where they are asked to.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from r1q.core.errors import InputError
from r1q.models.config import ModelConfig

_WIDE, _WIDE_STEP, _STEP = 2048, 256, 32
"""Widths stay whole blocks of a quantization grid: of 256 (the K-quants) where they are large, else of 32."""
_HIDDEN_PER_FFN = math.log(3072 / 4096) / math.log(9216 / 14336)
"""The share of hidden channels that stay is that of feed-forward channels to this power, as in Minitron's 8B to 4B."""
DEPTH_WARNING = (
    "fewer layers cost reasoning most: Llama 3.1 8B cut to 4B by depth kept 16.8 of 48.6 points on GSM8K, by width 41.2, after the "
    "same 94 billion tokens (arXiv 2408.11796); 400 billion do not bring arithmetic back (arXiv 2602.01997)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The sizes of a model that pruning changes: channels between blocks, inside the feed-forward layer, kv heads, blocks."""

    hidden: int
    ffn: int
    kv_heads: int
    layers: int

    def parameters(self, config: ModelConfig) -> int:
        """Return the number of weights of a model like `config` in these sizes."""
        keys, queries = self.kv_heads * config.head_dim, self.heads(config) * config.head_dim
        block = 2 * self.hidden * (keys + queries) + 3 * self.hidden * self.ffn + 2 * self.hidden
        block += (queries + 2 * keys) * config.qkv_bias + self.hidden * config.output_bias
        block += (2 * self.ffn + self.hidden) * config.mlp_bias + 2 * config.head_dim * config.qk_norm
        tables = config.vocab_size * self.hidden * (1 if config.tied else 2)
        return self.layers * block + tables + self.hidden

    def heads(self, config: ModelConfig) -> int:
        """Return the number of query heads: as many for each kv head as before."""
        return self.kv_heads * (config.num_heads // config.num_kv_heads)


def sizes_of(config: ModelConfig) -> Sizes:
    """Return the sizes of a dense model. Raises `InputError` for experts and latent attention, which are not pruned."""
    if config.experts is not None or config.latent is not None:
        raise InputError(
            f"{config.name}: models with experts or latent attention are not pruned; take a dense one, such as an R1 distill"
        )
    return Sizes(
        hidden=config.hidden_size, ffn=config.intermediate_size, kv_heads=config.num_kv_heads, layers=config.num_layers
    )


def parse_ratio(text: str) -> float:
    """Return the share that `0.5x` (or `0.5`) names. Raises `InputError` for what is no share between 0 and 1."""
    try:
        ratio = float(text.lower().removesuffix("x"))
    except ValueError:
        raise InputError(f"--to {text}: give a share of the teacher's size, such as 0.5x") from None
    if not 0 < ratio < 1:
        raise InputError(
            f"--to {text}: a student is smaller than its teacher; give a share between 0 and 1, such as 0.5x"
        )
    return ratio


def choose_sizes(config: ModelConfig, ratio: float) -> Sizes:
    """Return the widths of a student with at most `ratio` of the teacher's weights, layers as they are.

    Heads stay too, but where the hidden channels cannot be cut without them (Qwen2, see `check_sizes`).

    Raises `InputError` where the smallest widths are still too large, with what they come to.
    """
    whole = sizes_of(config)
    budget = ratio * whole.parameters(config)
    options = [size for size in _options(config, whole) if not _square(config) or size.hidden == _queries(config, size)]
    fitting = [size for size in options if size.parameters(config) <= budget]
    if not fitting:
        least = min(size.parameters(config) for size in options)
        raise InputError(
            f"--to {ratio:g}x is {budget:,.0f} weights; by width alone {config.name} comes down to {least:,}: "
            "ask for more, or give --kv-heads and --layers"
        )

    def cost(size: Sizes) -> float:
        hidden, ffn = math.log(size.hidden / whole.hidden), math.log(size.ffn / whole.ffn)
        off_budget = math.log(size.parameters(config) / budget)
        return (hidden - _HIDDEN_PER_FFN * ffn) ** 2 + (4 * off_budget) ** 2

    return min(fitting, key=cost)


def check_sizes(config: ModelConfig, sizes: Sizes) -> None:
    """Raise `InputError` where `sizes` are none, are larger than the teacher's, are no whole blocks, or cut nothing."""
    whole = sizes_of(config)
    for name, option in (("hidden", "--hidden"), ("ffn", "--ffn"), ("kv_heads", "--kv-heads"), ("layers", "--layers")):
        asked, has = getattr(sizes, name), getattr(whole, name)
        if asked < 1:
            raise InputError(f"{option} {asked}: a model needs at least one")
        if asked > has:
            raise InputError(f"{option} {asked}: the teacher {config.name} has {has}; a student is no larger")
    for option, width, has in (("--hidden", sizes.hidden, whole.hidden), ("--ffn", sizes.ffn, whole.ffn)):
        if width != has and width % _STEP:
            raise InputError(
                f"{option} {width} is no multiple of {_STEP}, the block of every grid it could be stored in"
            )
    if _square(config) and sizes.hidden != _queries(config, sizes):
        raise InputError(
            f"{sizes.hidden} hidden channels and {sizes.heads(config)} heads of {config.head_dim}: llama.cpp runs Qwen2 models only "
            f"where the heads are as wide as the hidden states; give --hidden {_queries(config, sizes)}, or other --kv-heads"
        )
    if sizes == whole:
        raise InputError(f"these are the sizes of the teacher {config.name}; give --to 0.5x, or smaller sizes")


def _square(config: ModelConfig) -> bool:
    return config.family == "qwen2" and config.num_heads * config.head_dim == config.hidden_size


def _queries(config: ModelConfig, sizes: Sizes) -> int:
    return sizes.heads(config) * config.head_dim


def _options(config: ModelConfig, whole: Sizes) -> Iterator[Sizes]:
    for kv_heads in range(1, whole.kv_heads + 1) if _square(config) else (whole.kv_heads,):
        for hidden in _widths(whole.hidden):
            for ffn in _widths(whole.ffn):
                yield Sizes(hidden=hidden, ffn=ffn, kv_heads=kv_heads, layers=whole.layers)


def _widths(whole: int) -> list[int]:
    """Return the widths a student may have, the teacher's own last."""
    step = _WIDE_STEP if whole >= _WIDE else _STEP
    return [*range(step, whole, step), whole]
