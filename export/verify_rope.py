"""Rotary frequencies by transformers' rule, one at a time: what verifiers hold written tables against."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from r1q.models.config import ModelConfig


def plain_frequency(config: ModelConfig, index: int) -> float:
    """Return by how much pair `index` of a head turns from one position to the next, in radians, without any stretching."""
    return float(config.rope_theta ** (-2 * index / config.head_dim))


def frequency(config: ModelConfig, index: int) -> float:
    """Return by how much pair `index` of a head turns from one position to the next, in radians, stretched as Llama 3.1 does."""
    plain = plain_frequency(config, index)
    scaling = config.rope_scaling
    if scaling is None:
        return plain
    wavelength, length = 2 * math.pi / plain, scaling.original_max_position_embeddings
    if wavelength < length / scaling.high_freq_factor:
        return plain
    if wavelength > length / scaling.low_freq_factor:
        return plain / scaling.factor
    smooth = (length / wavelength - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return (1 - smooth) * plain / scaling.factor + smooth * plain
