"""What a config.json says of experts, of latent attention, and of YaRN's stretched rotary frequencies.

Keys and their defaults are those of transformers' Qwen3MoeConfig, DeepseekV2Config and DeepseekV3Config; what their code does
otherwise than the blocks here is refused by name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from r1q.models.config_keys import Keys

_MAX_EXPERTS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """The experts of a block: `count` routed ones of width `inner`, `used` by each token; a shared one of `shared_inner` (0: none).

    The router scores experts by `gating`. With `groups` > 1 only the experts of the best `groups_used` groups are eligible, a group
    being as good as the sum of its `group_best` best experts. `corrected`: a bias is added to scores for the choice alone. The scores
    of the chosen ones become weights, divided by their sum if `normalized`, times `scale`. `dense` are the blocks without experts.
    """

    count: int
    used: int
    inner: int
    shared_inner: int = 0
    groups: int = 1
    groups_used: int = 1
    group_best: int = 2
    gating: Literal["softmax", "sigmoid"] = "softmax"
    corrected: bool = False
    normalized: bool = True
    scale: float = 1.0
    dense: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, §2.1): ranks of the compressed queries (None: not compressed) and keys with values.

    A head's query and key have `key_dim` numbers without position and `rope_dim` with it; its value has `value_dim`.
    """

    query_rank: int | None
    rank: int
    key_dim: int
    rope_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Yarn:
    """YaRN (Peng 2023): slow frequencies divided by `factor`, fast ones kept, a ramp between; DeepSeek's two scales of attention."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    mscale: float | None
    mscale_all_dim: float | None

    def magnitude(self, share: float) -> float:
        """Return 0.1 · share · ln factor + 1."""
        return 1.0 if self.factor <= 1 else 0.1 * share * math.log(self.factor) + 1.0

    @property
    def turn_scale(self) -> float:
        """What cosine and sine are multiplied by."""
        if self.mscale and self.mscale_all_dim:
            return self.magnitude(self.mscale) / self.magnitude(self.mscale_all_dim)
        return self.magnitude(1.0)

    @property
    def softmax_scale(self) -> float:
        """What attention scores are multiplied by besides 1/√(head length)."""
        return self.magnitude(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0


def score_scale(latent: Latent, yarn: Yarn | None) -> float:
    """Return what scores of latent attention are multiplied by: 1/√(a head's numbers), and YaRN's stretch."""
    return float((latent.key_dim + latent.rope_dim) ** -0.5 * (1.0 if yarn is None else yarn.softmax_scale))


def read_latent(keys: Keys) -> Latent:
    """Return the latent attention of a DeepSeek config."""
    heads = keys.size("num_attention_heads")
    if keys.size("num_key_value_heads", heads) != heads:
        raise keys.bad("num_key_value_heads", f"is not the {heads} attention heads, as latent attention has them")
    if keys.flag("attention_bias"):
        raise keys.bad("attention_bias", "is not supported in latent attention")
    if not keys.flag("rope_interleave", default=True):
        raise keys.bad("rope_interleave", "is not supported: rotary pairs are neighbours in every DeepSeek checkpoint")
    if keys.number("rms_norm_eps", 1e-6) != 1e-6:
        raise keys.bad("rms_norm_eps", "is not 1e-06, which the norms inside of latent attention always take")
    rope_dim = keys.size("qk_rope_head_dim", 64)
    if rope_dim % 2:
        raise keys.bad("qk_rope_head_dim", "is odd, and rotary embeddings turn pairs")
    absent = "q_lora_rank" not in keys.raw
    return Latent(
        query_rank=None if keys.get("q_lora_rank") is None and not absent else keys.size("q_lora_rank", 1536),
        rank=keys.size("kv_lora_rank", 512),
        key_dim=keys.size("qk_nope_head_dim", 128),
        rope_dim=rope_dim,
        value_dim=keys.size("v_head_dim", 128),
    )


def read_deepseek_experts(keys: Keys, version: int) -> Experts:
    """Return the experts of DeepSeek-V2 (`version` 2: softmax, groups by their best expert) or V3 (sigmoid, corrected)."""
    method, scoring = ("noaux_tc", "sigmoid") if version == 3 else ("greedy", "softmax")
    grouped = version == 3 or keys.get("topk_method") == "group_limited_greedy"
    if keys.get("topk_method") not in (None, method, *(("group_limited_greedy",) if version == 2 else ())):
        raise keys.bad("topk_method", f"is not supported: DeepSeek-V{version} has {method}")
    if keys.get("scoring_func") not in (None, scoring):
        raise keys.bad("scoring_func", f"is not supported: DeepSeek-V{version} has {scoring}")
    if keys.get("moe_layer_freq") not in (None, 1):
        raise keys.bad("moe_layer_freq", "is not supported: every block behind the dense ones has experts")
    normalized = keys.flag("norm_topk_prob", default=version == 3)
    if normalized and version == 2:
        raise keys.bad("norm_topk_prob", "is not supported for DeepSeek-V2, whose checkpoints do not set it")
    inner = keys.size("moe_intermediate_size", 2048 if version == 3 else 1407)
    dense = keys.size("first_k_dense_replace", 3) if version == 3 and "first_k_dense_replace" not in keys.raw else None
    leading = keys.count("first_k_dense_replace") if dense is None else dense
    found = Experts(
        count=keys.size("n_routed_experts", 256 if version == 3 else 64),
        used=keys.size("num_experts_per_tok", 8 if version == 3 else None),
        inner=inner,
        shared_inner=inner * keys.size("n_shared_experts", 1 if version == 3 else 2),
        groups=keys.size("n_group", 8 if version == 3 else 1) if grouped else 1,
        groups_used=keys.size("topk_group", 4 if version == 3 else 1) if grouped else 1,
        group_best=2 if version == 3 else 1,
        gating="sigmoid" if version == 3 else "softmax",
        corrected=version == 3,
        normalized=normalized,
        scale=keys.number("routed_scaling_factor", 2.5 if version == 3 else 1.0),
        dense=frozenset(range(min(leading, keys.size("num_hidden_layers")))),
    )
    _check(keys, found, "n_routed_experts", "n_group")
    return found


def read_qwen_experts(keys: Keys) -> Experts:
    """Return the experts of Qwen3-MoE: softmax over all, no groups, none shared."""
    layers, step = keys.size("num_hidden_layers"), keys.size("decoder_sparse_step", 1)
    name = "num_experts" if keys.get("num_experts") is not None else "num_local_experts"
    found = Experts(
        count=keys.size(name, 128),
        used=keys.size("num_experts_per_tok", 8),
        inner=keys.size("moe_intermediate_size", 768),
        normalized=keys.flag("norm_topk_prob"),
        dense=frozenset(layer for layer in range(layers) if (layer + 1) % step) | set(keys.ids("mlp_only_layers")),
    )
    _check(keys, found, name, name)
    return found


def _check(keys: Keys, experts: Experts, count: str, groups: str) -> None:
    if experts.count > _MAX_EXPERTS:
        raise keys.bad(count, f"is more than {_MAX_EXPERTS}")
    if experts.count % experts.groups or not 1 <= experts.groups_used <= experts.groups:
        raise keys.bad(groups, f"does not divide the {experts.count} experts, or has fewer groups than are taken")
    size = experts.count // experts.groups
    if size < experts.group_best and experts.groups > 1:
        raise keys.bad(groups, f"leaves {size} experts in a group, which is scored by its {experts.group_best} best")
    if experts.used > size * experts.groups_used:
        raise keys.bad(
            "num_experts_per_tok", f"is more than the {size * experts.groups_used} experts that are eligible"
        )


def read_yarn(rope: Keys) -> Yarn:
    """Return YaRN's numbers from a rope object."""
    for key in ("attention_factor", "truncate"):
        if rope.get(key) not in (None, True):
            raise rope.bad(key, "is not supported with yarn")
    mscale, all_dim = (None if not rope.get(key) else rope.number(key) for key in ("mscale", "mscale_all_dim"))
    return Yarn(
        factor=rope.number("factor"),
        original_max_position_embeddings=rope.size("original_max_position_embeddings"),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        mscale=mscale,
        mscale_all_dim=all_dim,
    )
