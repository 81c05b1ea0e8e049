"""Latent attention as grouped-query attention with one head of keys and values (DeepSeek-V2, §2.1.2).

A head's score of a token is q·(K·c) = (Kᵀ·q)·c, with c the token's latent: with each head's key matrix moved to its queries, latents
are the keys of all heads, and their values too, once each head's value matrix is moved behind the mixture. Before the latent stand the
numbers that turn with the position, which GroupQueryAttention turns: its rotary tables are as wide as they. The values' copy of these
is mixed as well, and left out of the result.
"""

from __future__ import annotations

from r1q.export.onnx_nodes import MICROSOFT, Nodes
from r1q.models.config import ModelConfig
from r1q.models.config_moe import Latent, score_scale


def latent_attention(
    nodes: Nodes, config: ModelConfig, latent: Latent, layer: int, x: str, lengths: tuple[str, str]
) -> str:
    """Return what the layer behind attention reads: [batch, length, heads · value_dim]."""
    name, block, heads = f"/model/layers.{layer}/attn", f"model.layers.{layer}.self_attn", config.num_heads
    first, compressed, ending = _made(nodes, config, latent, layer, x)
    if latent.query_rank is not None:
        gamma = nodes.weights.vectors[f"{block}.q_a_layernorm.weight"]
        first = nodes.normalize(f"{name}/q_a_norm/LayerNorm", first, gamma, config.rms_norm_eps)
        first = nodes.linear(f"{name}/q_b_proj", f"model.layers.{layer}.attn.q_b_proj", first)
    gamma = nodes.weights.vectors[f"{block}.kv_a_layernorm.weight"]
    compressed = nodes.normalize(f"{name}/kv_a_norm/LayerNorm", compressed, gamma, config.rms_norm_eps)
    size = latent.key_dim + latent.rope_dim
    apart = nodes.add("Reshape", f"{name}/q/Reshape_1", [first, nodes.integers(0, 0, heads, size)])
    plain, turning = nodes.split(f"{name}/q/Split", apart, (latent.key_dim, latent.rope_dim))
    keys, values = nodes.weights.latents[layer]
    moved = _by_head(nodes, f"{name}/k_b", plain, keys)
    queries = nodes.add("Concat", f"{name}/q/Concat", [turning, moved], axis=-1)
    kept = latent.rope_dim + latent.rank
    queries = nodes.add("Reshape", f"{name}/q/Reshape_2", [queries, nodes.integers(0, 0, heads * kept)])
    entry = nodes.add("Concat", f"{name}/kv/Concat", [ending, compressed], axis=-1)
    mixed = nodes.attend(
        layer, [queries, entry, entry], lengths, num_heads=heads, kv_num_heads=1, scale=score_scale(latent, config.yarn),
        rotary_interleaved=1,
    )  # fmt: skip
    apart = nodes.add("Reshape", f"{name}/mixed/Reshape_1", [mixed, nodes.integers(0, 0, heads, kept)])
    _, latents = nodes.split(f"{name}/mixed/Split", apart, (latent.rope_dim, latent.rank))
    made = _by_head(nodes, f"{name}/v_b", latents, values)
    return nodes.add("Reshape", f"{name}/mixed/Reshape_2", [made, nodes.integers(0, 0, heads * latent.value_dim)])


def _made(nodes: Nodes, config: ModelConfig, latent: Latent, layer: int, x: str) -> list[str]:
    """Return queries (or what they are made of), the latent, and the numbers that turn, of one product or of two."""
    name, stem = f"/model/layers.{layer}/attn", f"model.layers.{layer}.attn"
    query = "q_proj" if latent.query_rank is None else "q_a_proj"
    width = latent.query_rank or config.num_heads * (latent.key_dim + latent.rope_dim)
    ends = (latent.rank, latent.rope_dim)
    if f"{stem}.{query}_kv_a" in nodes.weights.linears:
        both = nodes.linear(f"{name}/{query}_kv_a", f"{stem}.{query}_kv_a", x)
        return nodes.split(f"{name}/{query}_kv_a/Split", both, (width, *ends))
    first = nodes.linear(f"{name}/{query}", f"{stem}.{query}", x)
    shared = nodes.linear(f"{name}/kv_a_proj", f"{stem}.kv_a_proj_with_mqa", x)
    return [first, *nodes.split(f"{name}/kv_a_proj/Split", shared, ends)]


def _by_head(nodes: Nodes, name: str, x: str, matrices: str) -> str:
    """Multiply every head of `x` [batch, length, heads, inputs] by its own of `matrices` [heads, outputs, inputs], transposed."""
    first = nodes.add("Transpose", f"{name}/Transpose_1", [x], perm=[0, 2, 1, 3])
    product = nodes.add("FusedMatMul", f"{name}/MatMul", [first, matrices], domain=MICROSOFT, transB=1)
    return nodes.add("Transpose", f"{name}/Transpose_2", [product], perm=[0, 2, 1, 3])
