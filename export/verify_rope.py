"""Rotary frequencies by transformers' rule, one at a time: what verifiers hold written tables against."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from r1q.models.config import ModelConfig
    from r1q.models.config_moe import Yarn


def plain_frequency(config: ModelConfig, index: int) -> float:
    """Return by how much pair `index` of a head turns from one position to the next, in radians, without any stretching."""
    return float(config.rope_theta ** (-2 * index / config.head_dim))


def turn_scale(config: ModelConfig) -> float:
    """Return what cosines and sines are multiplied by: YaRN's 0.1 · ln factor + 1, or 1; of DeepSeek's two scales one by the other."""
    yarn = config.yarn
    if yarn is None or yarn.factor <= 1:
        return 1.0
    shares = (yarn.mscale, yarn.mscale_all_dim) if yarn.mscale and yarn.mscale_all_dim else (1.0, 0.0)
    turned, attended = (0.1 * (share or 0.0) * math.log(yarn.factor) + 1 for share in shares)
    return turned / attended


def frequency(config: ModelConfig, index: int) -> float:
    """Return by how much pair `index` of a head turns from one position to the next, in radians, stretched as the config says."""
    plain = plain_frequency(config, index)
    if config.yarn is not None:
        return _yarn_frequency(config, config.yarn, index)
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


def _yarn_frequency(config: ModelConfig, yarn: Yarn, index: int) -> float:
    plain, pairs = plain_frequency(config, index), config.head_dim // 2
    # The pair that turns n times in the original context: n = length · theta^(−pair / pairs) / 2π, solved for it.
    first, last = (
        pairs * math.log(yarn.original_max_position_embeddings / (2 * math.pi * n), config.rope_theta)
        for n in (yarn.beta_fast, yarn.beta_slow)
    )
    low, high = max(math.floor(first), 0), min(math.ceil(last), 2 * pairs - 1)
    share = min(max((index - low) / (high - low if high != low else 0.001), 0.0), 1.0)
    return share * plain / yarn.factor + (1 - share) * plain
