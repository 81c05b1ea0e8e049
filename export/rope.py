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
    from r1q.models.config import ModelConfig

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
    scaling = config.rope_scaling
    if scaling is None:
        return None
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    wavelengths = 2 * np.pi * config.rope_theta**exponents
    turns = scaling.original_max_position_embeddings / wavelengths
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return np.asarray(1.0 / ((1.0 - blend) / scaling.factor + blend), dtype=np.float32)
