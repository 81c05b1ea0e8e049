"""Multi-head latent attention (DeepSeek-V2, §2.1): keys and values of all heads are made from one short vector for each token.

    normed ─▶ attn_q_a ─ norm ─▶ attn_q_b ─▶ queries: key_dim numbers as they are, rope_dim turned by position
    normed ─▶ attn_kv_a_mqa ─▶ latent (norm) and rope_dim numbers, turned, that every head's key ends with
    latent ─▶ attn_k_b, attn_v_b ─▶ keys' first part and values of each head

`attn_k_b` [heads · rank, key_dim] holds every head's matrix transposed, as llama.cpp keeps it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from r1q.models.config import ModelConfig
from r1q.models.config_moe import Latent, score_scale
from r1q.models.linear import Weights, linear, rms_norm
from r1q.models.rope import Rotation


def attention_mix(weights: Weights, config: ModelConfig, latent: Latent, normed: Tensor, rotation: Rotation) -> Tensor:
    """Return what attn_output reads: every head's causal mixture of values, [..., length, num_heads · value_dim]."""
    queries, keys, compressed = queries_and_keys(weights, config, latent, normed, rotation)
    values = _heads(linear(weights, "attn_v_b", compressed), config.num_heads)
    mixed = F.scaled_dot_product_attention(
        queries, keys, values, is_causal=True, scale=score_scale(latent, config.yarn)
    )
    return mixed.transpose(-2, -3).flatten(-2)


def mixed_latents(config: ModelConfig, latent: Latent, queries: Tensor, keys: Tensor, compressed: Tensor) -> Tensor:
    """Return every head's causal mixture of latents, [..., heads, length, rank]: what v_b reads where values are made behind it."""
    shared = compressed.unsqueeze(-3).expand(*queries.shape[:-1], latent.rank)
    return F.scaled_dot_product_attention(queries, keys, shared, is_causal=True, scale=score_scale(latent, config.yarn))


def queries_and_keys(
    weights: Weights, config: ModelConfig, latent: Latent, normed: Tensor, rotation: Rotation
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries and keys of all heads, turned, [..., heads, length, key_dim + rope_dim], and the latents [..., length, rank]."""
    queries = _heads(queries_of(weights, config, normed), config.num_heads)
    shared = linear(weights, "attn_kv_a_mqa", normed)
    compressed, ending = latent_of(weights, config, latent, shared), shared[..., latent.rank :]
    plain, turned = queries[..., : latent.key_dim], queries[..., latent.key_dim :]
    queries = torch.cat((plain, rotation.turn_neighbours(turned)), dim=-1)
    ending = rotation.turn_neighbours(ending).unsqueeze(-3)
    keys = keys_of(weights, latent, compressed, config.num_heads)
    keys = torch.cat((keys, ending.expand(*keys.shape[:-1], latent.rope_dim)), dim=-1)
    return queries, keys, compressed


def query_latent(weights: Weights, config: ModelConfig, normed: Tensor) -> Tensor:
    """Return what attn_q_b reads: [..., length, query_rank]."""
    return rms_norm(linear(weights, "attn_q_a", normed), weights["attn_q_a_norm.weight"], config.rms_norm_eps)


def queries_of(weights: Weights, config: ModelConfig, normed: Tensor) -> Tensor:
    """Return the queries of all heads, nothing turned yet: [..., length, num_heads · (key_dim + rope_dim)]."""
    if "attn_q.weight" in weights:
        return linear(weights, "attn_q", normed)
    return linear(weights, "attn_q_b", query_latent(weights, config, normed))


def latent_of(weights: Weights, config: ModelConfig, latent: Latent, shared: Tensor) -> Tensor:
    """Return what attn_k_b and attn_v_b read: [..., length, rank], of what attn_kv_a_mqa made."""
    return rms_norm(shared[..., : latent.rank], weights["attn_kv_a_norm.weight"], config.rms_norm_eps)


def keys_of(weights: Weights, latent: Latent, compressed: Tensor, heads: int) -> Tensor:
    """Return the part of every head's key that does not turn: [..., heads, length, key_dim]."""
    transposed = weights["attn_k_b.weight"].reshape(heads, latent.rank, latent.key_dim)
    product = compressed.unsqueeze(-3).to(transposed.dtype) @ transposed
    return product.to(compressed.dtype)


def _heads(rows: Tensor, count: int) -> Tensor:
    """Return [..., length, count · size] as [..., count, length, size]."""
    return rows.reshape(*rows.shape[:-1], count, -1).transpose(-2, -3)
