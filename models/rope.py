"""Rotary position embeddings (Su 2021), with Llama 3.1's stretched frequencies.

Pairs are (i, i + head_dim / 2), as Hugging Face stores queries and keys; Su's neighbours (2i, 2i + 1) would need permuted rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from r1q.models.config import Llama3Scaling, ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """By how much each pair of a head turns at each position. Shapes: cosine and sine [length, head_dim]."""

    cosine: Tensor
    sine: Tensor

    def turn(self, heads: Tensor) -> Tensor:
        """Return `heads` [..., length, head_dim] with every pair turned."""
        first, second = heads.chunk(2, dim=-1)
        return heads * self.cosine + torch.cat((-second, first), dim=-1) * self.sine


def rotation(config: ModelConfig, length: int, device: torch.device | str = "cpu") -> Rotation:
    """Return the rotation of positions 0 … length − 1, in float32."""
    positions = torch.arange(length, dtype=torch.float32)
    angles = positions[:, None] * frequencies(config)[None, :]
    angles = torch.cat((angles, angles), dim=-1).to(device)
    return Rotation(cosine=angles.cos(), sine=angles.sin())


def frequencies(config: ModelConfig) -> Tensor:
    """Return the angle per position of each pair, float32 [head_dim / 2]: base^(−2i / head_dim), stretched if the config says so."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    plain = 1.0 / (config.rope_theta**exponents)
    return plain if config.rope_scaling is None else _stretched(plain, config.rope_scaling)


def _stretched(plain: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Return Llama 3.1's frequencies: by how often a pair turns within the original context, kept, divided, or blended."""
    turns = scaling.original_max_position_embeddings * plain / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return (1 - kept) * plain / scaling.factor + kept * plain
