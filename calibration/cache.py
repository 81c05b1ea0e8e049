"""How large the keys and values of a model get on a text, channel by channel: what a cache of integers must be able to hold.

A key is kept turned by its position, and calibration windows reach the first few hundred positions only, where slow pairs have hardly
turned. What a pair can become is known without them: (a, b) turned by θ is r·cos(φ + θ), r·sin(φ + θ), and θ runs from 0 to the last
position's angle. So each token counts with the most that its key can be at any position. Measured at 8,192 tokens (SmolLM2-135M, int4,
32 windows of 512): a divergence of 0.0015 from the float cache, and of 0.81 with the greatest magnitudes seen in the windows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from r1q.core.errors import InputError
from r1q.models.block import Weights, attention_input, linear, rms_norm, run_block
from r1q.models.config import ModelConfig
from r1q.models.forward import TensorReader, embed, load_block
from r1q.models.rope import frequencies, rotation

Floats = NDArray[np.float32]


@torch.inference_mode()
def cache_ranges(source: TensorReader, tokens: NDArray[np.int64], positions: int) -> Iterator[tuple[Floats, Floats]]:
    """Yield for each block the greatest magnitudes of keys, at any of the first `positions`, and of values: [kv_heads, head_dim] each.

    `tokens` [windows, length]. Raises `InputError` where a block makes numbers that are not finite.
    """
    config = source.config
    hidden = embed(source, tokens)
    turn = rotation(config, tokens.shape[1])
    angles = frequencies(config) * (positions - 1)
    for layer in range(config.num_layers):
        weights = load_block(source, layer)
        keys = values = torch.zeros(config.num_kv_heads, config.head_dim)
        for window in hidden:
            key, value = _keys_and_values(weights, config, attention_input(weights, config, window))
            keys = torch.maximum(keys, turned_range(key, angles).amax(0))
            values = torch.maximum(values, value.abs().amax(0))
            window.copy_(run_block(weights, config, window, turn))
        if not bool(torch.isfinite(hidden).all()):
            raise InputError(f"block {layer} makes numbers that are not finite on this text; the weights are broken")
        yield keys.numpy(), values.numpy()


def turned_range(keys: Tensor, angles: Tensor) -> Tensor:
    """Return the most that each number of `keys` [..., head_dim] can be while its pair turns from 0 to `angles` [head_dim/2]."""
    first, second = keys.chunk(2, dim=-1)
    radius, start = torch.hypot(first, second), torch.atan2(second, first)

    def most(start: Tensor) -> Tensor:
        """Return the greatest |cos| between `start` and `start + angles`: 1 where a multiple of π lies between them."""
        reached = torch.floor((start + angles) / math.pi) >= torch.ceil(start / math.pi)
        ends = torch.maximum(torch.cos(start).abs(), torch.cos(start + angles).abs())
        return torch.where(reached, torch.ones_like(ends), ends)

    return torch.cat((radius * most(start), radius * most(start - math.pi / 2)), dim=-1)


def _keys_and_values(weights: Weights, config: ModelConfig, normed: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys before they are turned, and values, [length, kv_heads, head_dim] each."""
    shape = (len(normed), config.num_kv_heads, config.head_dim)
    keys, values = (linear(weights, kind, normed).reshape(shape) for kind in ("attn_k", "attn_v"))
    return (rms_norm(keys, weights["attn_k_norm.weight"], config.rms_norm_eps) if config.qk_norm else keys), values
