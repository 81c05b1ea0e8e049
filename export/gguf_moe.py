"""Experts and latent attention in a GGUF file: experts stacked, the keys of both, and what llama.cpp would compute otherwise.

Experts of a block are one tensor [experts, rows, columns]; k_b and v_b are [heads, rank, key length] and [heads, value length, rank].
Keys as llama.cpp's converter writes them: latent attention counts as attention with one key/value head of the latent's length.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from r1q.core.errors import InputError, UsageError
from r1q.core.scheme import Scheme
from r1q.core.tensors import TensorSpec

if TYPE_CHECKING:
    from r1q.models.config import ModelConfig

_GATING = {"softmax": 1, "sigmoid": 2}
_YARN_LOG = 0.1  # llama.cpp multiplies by it in the file and divides by it when reading


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """One tensor of a file: its name and shape there, and the checkpoint's tensors that it holds one behind the other."""

    name: str
    shape: tuple[int, ...]
    scheme: Scheme
    specs: tuple[TensorSpec, ...]


def stacked(tensors: Sequence[tuple[TensorSpec, Scheme]], config: ModelConfig) -> tuple[Stack, ...]:
    """Return the tensors of a file in the checkpoint's order, experts one behind the other.

    Raises `UsageError` where a recipe gives the experts of one tensor several grids, `InputError` where experts are missing.
    """
    found = []
    for name, members in itertools.groupby(tensors, key=lambda pair: pair[0].gguf_name):
        specs, schemes = zip(*members, strict=True)
        if len(set(schemes)) > 1:
            one, other = sorted({str(scheme) for scheme in schemes})[:2]
            raise UsageError(f"{name}: a GGUF file has one grid for all experts of a block, not {one} and {other}")
        count = 0 if config.experts is None else config.experts.count
        if specs[0].expert is not None and [spec.expert for spec in specs] != list(range(count)):
            raise InputError(f"{name}: the checkpoint does not hold its {count} experts in order; quantize again")
        found.append(Stack(name=name, shape=_shape(specs, config), scheme=schemes[0], specs=specs))
    return tuple(found)


def _shape(specs: Sequence[TensorSpec], config: ModelConfig) -> tuple[int, ...]:
    first = specs[0]
    if first.expert is not None:
        return (len(specs), *first.shape)
    if config.latent is not None and first.kind in ("attn_k_b", "attn_v_b"):
        return (config.num_heads, first.rows // config.num_heads, first.columns)
    return first.shape


def refuse_otherwise(config: ModelConfig, where: str) -> None:
    """Raise `UsageError` for what llama.cpp computes in another way than this model does."""
    for wrong, why in _differences(config):
        if wrong:
            raise UsageError(f"{where}: llama.cpp {why}; a GGUF file would be another model")


def _differences(config: ModelConfig) -> Iterator[tuple[bool, str]]:
    experts, yarn, sparse = config.experts, config.yarn, [*map(config.is_sparse, range(config.num_layers))]
    if config.latent is None and yarn is not None:
        yield bool(yarn.mscale or yarn.mscale_all_dim), "knows yarn without mscale in this architecture"
    if experts is None:
        return
    yield not any(sparse), "needs at least one block with experts in this architecture"
    if config.latent is None:
        yield not all(sparse), "has experts in every block of qwen3moe, and this model has dense blocks"
        yield not experts.normalized, "always divides the weights of qwen3moe's experts by their sum (norm_topk_prob)"
    else:
        yield sparse != sorted(sparse), "has dense blocks at the beginning alone"
        scored = "scores groups of experts by their two best, and this model by the best"
        yield experts.groups > 1 and experts.group_best != 2, scored
        other = yarn is not None and (not yarn.mscale_all_dim or yarn.mscale != yarn.mscale_all_dim)
        yield other, "knows yarn with mscale equal to mscale_all_dim alone"


def moe_entries(config: ModelConfig) -> Iterator[tuple[str, object, str]]:
    """Yield the keys of experts and latent attention, without the architecture's name before them: key, value, type."""
    experts, latent = config.experts, config.latent
    if experts is None:
        return
    yield "expert_count", experts.count, "u32"
    yield "expert_used_count", experts.used, "u32"
    yield "expert_feed_forward_length", experts.inner, "u32"
    if latent is None:
        return
    yield "expert_group_count", experts.groups, "u32"
    yield "expert_group_used_count", experts.groups_used, "u32"
    yield "expert_shared_count", experts.shared_inner // experts.inner, "u32"
    yield "expert_weights_scale", experts.scale, "f32"
    yield "expert_weights_norm", experts.normalized, "bool"
    yield "expert_gating_func", _GATING[experts.gating], "u32"
    yield "leading_dense_block_count", len(experts.dense), "u32"
    yield "vocab_size", config.vocab_size, "u32"
    # llama.cpp asks for this key but in models of some depths; 0 means queries that are not compressed.
    yield "attention.q_lora_rank", latent.query_rank or 0, "u32"
    yield "attention.kv_lora_rank", latent.rank, "u32"
    yield "attention.key_length", latent.rank + latent.rope_dim, "u32"
    yield "attention.value_length", latent.rank, "u32"
    yield "attention.key_length_mla", latent.key_dim + latent.rope_dim, "u32"
    yield "attention.value_length_mla", latent.value_dim, "u32"
    yield "rope.dimension_count", latent.rope_dim, "u32"
    yield from yarn_entries(config)


def yarn_entries(config: ModelConfig) -> Iterator[tuple[str, object, str]]:
    """Yield the keys of YaRN, without the architecture's name; the 0.1 · ln factor of cosines and sines llama.cpp adds itself."""
    yarn = config.yarn
    if yarn is None:
        return
    yield "rope.scaling.type", "yarn", "str"
    yield "rope.scaling.factor", yarn.factor, "f32"
    yield "rope.scaling.original_context_length", yarn.original_max_position_embeddings, "u32"
    yield "rope.scaling.yarn_beta_fast", yarn.beta_fast, "f32"
    yield "rope.scaling.yarn_beta_slow", yarn.beta_slow, "f32"
    if config.latent is not None:
        yield "rope.scaling.yarn_log_multiplier", _YARN_LOG * (yarn.mscale_all_dim or 0.0), "f32"
