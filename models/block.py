"""One decoder block, as four small stages between the four points where a linear layer's inputs can be looked at.

    hidden ─ attention_input ─▶ q, k, v ─ attention_mix ─▶ attn_output ─▶ + hidden
           ─ mlp_input ─▶ gate, up ─ mlp_inner ─▶ ffn_down ─▶ + hidden

Every function takes [..., length, features] in float32 and returns the same. `weights` maps `kind.part` (`attn_q.weight`,
`ffn_down.bias`, …) to tensors; an absent bias or head norm is not applied. Latent attention (`models/mla.py`) and experts
(`models/moe.py`) stand in where the config has them.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from r1q.models import mla, moe
from r1q.models.config import ModelConfig
from r1q.models.linear import Weights as Weights
from r1q.models.linear import linear as linear
from r1q.models.linear import rms_norm as rms_norm
from r1q.models.rope import Rotation


def run_block(weights: Weights, config: ModelConfig, hidden: Tensor, rotation: Rotation) -> Tensor:
    """Return the hidden states after the block."""
    return run_mlp(weights, config, run_attention(weights, config, hidden, rotation))


def run_attention(weights: Weights, config: ModelConfig, hidden: Tensor, rotation: Rotation) -> Tensor:
    """Return the hidden states between attention and the feed-forward layer."""
    mixed = attention_mix(weights, config, attention_input(weights, config, hidden), rotation)
    return hidden + attention_output(weights, mixed)


def run_mlp(weights: Weights, config: ModelConfig, hidden: Tensor) -> Tensor:
    """Return the hidden states behind the feed-forward layer, of those before it."""
    normed = mlp_input(weights, config, hidden)
    if config.experts is not None and moe.ROUTER in weights:
        return hidden + moe.mixture(weights, config.experts, normed)
    return hidden + mlp_output(weights, mlp_inner(weights, normed))


def attention_input(weights: Weights, config: ModelConfig, hidden: Tensor) -> Tensor:
    """Return what attn_q, attn_k and attn_v read: [..., length, hidden_size]."""
    return rms_norm(hidden, weights["attn_norm.weight"], config.rms_norm_eps)


def attention_mix(weights: Weights, config: ModelConfig, normed: Tensor, rotation: Rotation) -> Tensor:
    """Return what attn_output reads: every head's causal mixture of values, [..., length, num_heads · head_dim]."""
    if config.latent is not None:
        return mla.attention_mix(weights, config, config.latent, normed, rotation)
    queries = _heads(linear(weights, "attn_q", normed), config.num_heads)
    keys = _heads(linear(weights, "attn_k", normed), config.num_kv_heads)
    values = _heads(linear(weights, "attn_v", normed), config.num_kv_heads)
    if config.qk_norm:
        queries = rms_norm(queries, weights["attn_q_norm.weight"], config.rms_norm_eps)
        keys = rms_norm(keys, weights["attn_k_norm.weight"], config.rms_norm_eps)
    repeats = config.num_heads // config.num_kv_heads
    keys = rotation.turn(keys).repeat_interleave(repeats, dim=-3)
    values = values.repeat_interleave(repeats, dim=-3)
    mixed = F.scaled_dot_product_attention(rotation.turn(queries), keys, values, is_causal=True)
    return mixed.transpose(-2, -3).flatten(-2)


def attention_output(weights: Weights, mixed: Tensor) -> Tensor:
    """Return what attention adds to the hidden states."""
    return linear(weights, "attn_output", mixed)


def mlp_input(weights: Weights, config: ModelConfig, hidden: Tensor) -> Tensor:
    """Return what ffn_gate and ffn_up read: [..., length, hidden_size]."""
    return rms_norm(hidden, weights["ffn_norm.weight"], config.rms_norm_eps)


def mlp_inner(weights: Weights, normed: Tensor) -> Tensor:
    """Return what ffn_down reads: silu(gate) · up, [..., length, intermediate_size]."""
    return F.silu(linear(weights, "ffn_gate", normed)) * linear(weights, "ffn_up", normed)


def mlp_output(weights: Weights, inner: Tensor) -> Tensor:
    """Return what the feed-forward layer adds to the hidden states."""
    return linear(weights, "ffn_down", inner)


def _heads(rows: Tensor, count: int) -> Tensor:
    """Return [..., length, count · head_dim] as [..., count, length, head_dim]."""
    return rows.reshape(*rows.shape[:-1], count, -1).transpose(-2, -3)
