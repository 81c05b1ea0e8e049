"""Rotary embeddings as llama.cpp stores them: the row order of Llama's q and k, and Llama 3.1's frequency factors.

Hugging Face rotates dimension i of a head with i + d/2; llama.cpp's `llama` architecture rotates 2i with 2i + 1. So within each
head row p·d/2 + i of q_proj and k_proj (weights and biases) becomes row 2i + p. Other architectures keep the order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from r1q.core.tensors import TensorSpec

if TYPE_CHECKING:
    from r1q.models.config import Llama3Scaling, ModelConfig
    from r1q.models.config_moe import Yarn

Number = TypeVar("Number", bound=np.generic)

PERMUTED_FAMILIES = ("llama",)
PERMUTED_KINDS = ("attn_q", "attn_k")


def is_permuted(family: str, tensor: TensorSpec) -> bool:
    """Return whether the rows of `tensor` (the elements of a bias) change order in a GGUF of `family`."""
    return family in PERMUTED_FAMILIES and tensor.kind in PERMUTED_KINDS


def interleave_heads(rows: NDArray[Number], head_dim: int) -> NDArray[Number]:
    """Return `rows` [heads · head_dim, …] with the two halves of each head interleaved.

    >>> interleave_heads(np.arange(8), 4).tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    halves = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def frequency_factors(config: ModelConfig) -> NDArray[np.float32] | None:
    """Return what each of the head_dim/2 frequencies is divided by under Llama 3.1's scaling, or None without it.

    With λ = 2π/frequency, L the original context, l and h the low and high frequency factors: 1 where λ < L/h, `factor` where
    λ > L/l, and between 1 / ((1 − s)/factor + s) with s = (L/λ − l) / (h − l).
    """
    return None if config.rope_scaling is None else _llama3_factors(config, config.rope_scaling).astype(np.float32)


def frequencies(config: ModelConfig) -> NDArray[np.float64]:
    """Return by how many radians each of the head_dim/2 pairs turns from one position to the next, stretched as the config says."""
    plain = config.rope_theta ** -(np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim)
    if config.rope_scaling is not None:
        return np.asarray(plain / _llama3_factors(config, config.rope_scaling))
    return plain if config.yarn is None else _yarn_frequencies(config, config.yarn, plain)


def _llama3_factors(config: ModelConfig, scaling: Llama3Scaling) -> NDArray[np.float64]:
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    wavelengths = 2 * np.pi * config.rope_theta**exponents
    turns = scaling.original_max_position_embeddings / wavelengths
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return np.asarray(1.0 / ((1.0 - blend) / scaling.factor + blend))


def _yarn_frequencies(config: ModelConfig, yarn: Yarn, plain: NDArray[np.float64]) -> NDArray[np.float64]:
    """YaRN (Peng 2023, eq. 23): kept above `beta_fast` turns in the original context, divided below `beta_slow`, a ramp between."""

    def pair_of(turns: float) -> float:
        turned = yarn.original_max_position_embeddings / (2 * np.pi * turns)
        return float(config.head_dim / 2 * np.log(turned) / np.log(config.rope_theta))

    low = max(np.floor(pair_of(yarn.beta_fast)), 0)
    high = min(np.ceil(pair_of(yarn.beta_slow)), config.head_dim - 1)
    ramp = np.clip((np.arange(len(plain)) - low) / (high - low if high != low else 0.001), 0.0, 1.0)
    return np.asarray(plain / yarn.factor * ramp + plain * (1 - ramp))
