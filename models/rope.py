"""Rotary position embeddings (Su 2021), with Llama 3.1's and YaRN's stretched frequencies.

Pairs are (i, i + head_dim / 2), as Hugging Face stores queries and keys; Su's neighbours (2i, 2i + 1), which DeepSeek keeps, are
brought into that order first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from r1q.models.config import Llama3Scaling, ModelConfig
from r1q.models.config_moe import Yarn


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """By how much each pair of a head turns at each position. Shapes: cosine and sine [length, head_dim]."""

    cosine: Tensor
    sine: Tensor

    def turn(self, heads: Tensor) -> Tensor:
        """Return `heads` [..., length, head_dim] with every pair turned."""
        first, second = heads.chunk(2, dim=-1)
        return heads * self.cosine + torch.cat((-second, first), dim=-1) * self.sine

    def turn_neighbours(self, heads: Tensor) -> Tensor:
        """Return `heads` [..., length, head_dim] with every pair (2i, 2i + 1) turned, the pairs' first halves before the second."""
        return self.turn(in_halves(heads))


def in_halves(heads: Tensor) -> Tensor:
    """Return `heads` [..., head_dim] with pairs (2i, 2i + 1) as pairs (i, i + head_dim / 2)."""
    return torch.cat((heads[..., 0::2], heads[..., 1::2]), dim=-1)


def rotation(config: ModelConfig, length: int, device: torch.device | str = "cpu") -> Rotation:
    """Return the rotation of positions 0 … length − 1, in float32."""
    positions = torch.arange(length, dtype=torch.float32)
    angles = positions[:, None] * frequencies(config)[None, :]
    angles = torch.cat((angles, angles), dim=-1).to(device)
    scale = 1.0 if config.yarn is None else config.yarn.turn_scale
    return Rotation(cosine=angles.cos() * scale, sine=angles.sin() * scale)


def frequencies(config: ModelConfig) -> Tensor:
    """Return the angle per position of each pair, float32 [head_dim / 2]: base^(−2i / head_dim), stretched if the config says so."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    plain = 1.0 / (config.rope_theta**exponents)
    if config.yarn is not None:
        return _ramped(plain, config.yarn, config.rope_theta)
    return plain if config.rope_scaling is None else _stretched(plain, config.rope_scaling)


def _ramped(plain: Tensor, yarn: Yarn, theta: float) -> Tensor:
    """Return YaRN's frequencies: of pairs that turn `beta_fast` times in the original context kept, of slow ones divided."""
    pairs = len(plain)

    def pair_of(turns: float) -> float:
        return pairs * math.log(yarn.original_max_position_embeddings / (turns * 2 * math.pi)) / math.log(theta)

    low, high = max(math.floor(pair_of(yarn.beta_fast)), 0), min(math.ceil(pair_of(yarn.beta_slow)), 2 * pairs - 1)
    ramp = (torch.arange(pairs, dtype=torch.float32) - low) / (high - low if high != low else 0.001)
    divided = ramp.clamp(0.0, 1.0)
    return plain / yarn.factor * divided + plain * (1 - divided)


def _stretched(plain: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Return Llama 3.1's frequencies: by how often a pair turns within the original context, kept, divided, or blended."""
    turns = scaling.original_max_position_embeddings * plain / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return (1 - kept) * plain / scaling.factor + kept * plain
