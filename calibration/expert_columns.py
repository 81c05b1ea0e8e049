"""Column sums of what has parts in a GGUF file, heads of latent attention and experts: a row for each, as llama-imatrix has them.

llama.cpp multiplies k_b with each head's queries, and v_b with each head's mixture of latents; an expert sees the tokens that the
router sends to it. Experts are read once, for the tokens of all windows.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from r1q.models import mla, moe
from r1q.models.block import attention_input, mlp_input
from r1q.models.config import ModelConfig
from r1q.models.config_moe import Experts, Latent
from r1q.models.linear import Weights, linear
from r1q.models.rope import Rotation

Sums = dict[str, NDArray[np.float64]]
_WINDOWS = 8  # that the shared expert takes at once


def latent_sums(
    weights: Weights, config: ModelConfig, latent: Latent, hidden: Tensor, rotation: Rotation
) -> tuple[Sums, Tensor]:
    """Return Σx² by kind of what attention's matrices read in one window `hidden` [length, hidden_size], and what it adds to it."""
    normed = attention_input(weights, config, hidden)
    queries, keys, compressed = mla.queries_and_keys(weights, config, latent, normed, rotation)
    mixed = mla.mixed_latents(config, latent, queries, keys, compressed)
    values = weights["attn_v_b.weight"].reshape(config.num_heads, latent.value_dim, latent.rank)
    joined = (mixed @ values.transpose(-1, -2)).transpose(-2, -3).flatten(-2)
    made = "attn_q" if latent.query_rank is None else "attn_q_a"
    sums = {
        **dict.fromkeys((made, "attn_kv_a_mqa"), _squares(normed)),
        "attn_k_b": _squares(queries[..., : latent.key_dim]),
        "attn_v_b": _squares(mixed),
        "attn_output": _squares(joined),
    }
    if latent.query_rank is not None:
        sums["attn_q_b"] = _squares(mla.query_latent(weights, config, normed))
    return sums, linear(weights, "attn_output", joined)


def expert_sums(
    weights: Weights, config: ModelConfig, experts: Experts, hidden: Tensor, seen: dict[str, list[int]]
) -> Sums:
    """Return Σx² by kind of what a block's router and experts read, and add what they make to `hidden` [windows, length, hidden_size].

    `seen` is given the tokens of each expert, by kind.
    """
    normed = mlp_input(weights, config, hidden).flatten(0, 1)
    routes = moe.route(weights, experts, normed)
    flat = hidden.view(-1, hidden.shape[-1])
    sums: Sums = {"ffn_gate_inp": _squares(normed)}
    if experts.shared_inner:
        sums |= dict.fromkeys(("ffn_gate_shexp", "ffn_up_shexp"), sums["ffn_gate_inp"])
        sums["ffn_down_shexp"] = np.zeros(experts.shared_inner)
        step = _WINDOWS * hidden.shape[1]
        for start in range(0, len(normed), step):
            inner = moe.shared_inner(weights, normed[start : start + step])
            sums["ffn_down_shexp"] += _squares(inner)
            flat[start : start + step] += linear(weights, "ffn_down_shexp", inner)
    read, made = np.zeros((experts.count, config.hidden_size)), np.zeros((experts.count, experts.inner))
    counts = []
    for expert in range(experts.count):
        tokens, share = routes.of(expert)
        counts.append(len(tokens))
        if len(tokens):
            rows = normed[tokens]
            inner = moe.expert_inner(weights, expert, rows)
            read[expert], made[expert] = _squares(rows), _squares(inner)
            flat.index_add_(0, tokens, share[:, None] * linear(weights, f"ffn_down_exps.{expert}", inner))
    kinds = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
    seen.update(dict.fromkeys(kinds, counts))
    return sums | {"ffn_gate_exps": read, "ffn_up_exps": read, "ffn_down_exps": made}


def _squares(inputs: Tensor) -> NDArray[np.float64]:
    """Return Σx² over the tokens of [..., tokens, columns]."""
    found: NDArray[np.float64] = inputs.square().sum(-2, dtype=torch.float64).numpy()
    return found
