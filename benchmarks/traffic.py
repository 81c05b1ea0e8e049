"""Traffic: the bytes that one token moves and the memory a model needs, from shapes alone. What decoding is bound by.

One decoded token reads every matrix once, but for the embedding table, of which it reads one row; a table that is also the head is
read whole. It reads the keys and values of every token before it. Of a mixture of experts it reads those that the router takes.
"""

from __future__ import annotations

from dataclasses import dataclass

from r1q.models.config import ModelConfig

MICRO_BATCH = 512  # tokens that runtimes take through a block at once
CACHE_BYTES = {"f16": 2, "f32": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What one token touches: `weight_bytes` read each time, `cache_values` keys and values kept for each position.

    `touched_weights` is how many weights those bytes are; `width`, `inner` and `vocab` are the sizes of hidden states, of the
    feed-forward layer and of a row of logits.
    """

    weight_bytes: int
    touched_weights: int
    cache_values: int
    width: int
    inner: int
    vocab: int

    def token_bytes(self, depth: float, *, cache: str = "f16", compute_bytes: int | None = None) -> float:
        """Return the bytes that the token after `depth` others touches.

        `compute_bytes` a weight for a runtime that keeps floats in memory, whatever the file has.
        """
        weights = self.weight_bytes if compute_bytes is None else compute_bytes * self.touched_weights
        return weights + depth * self.cache_values * CACHE_BYTES[cache]

    def cache_bytes(self, context: int, cache: str = "f16") -> int:
        """Return the bytes of keys and values of `context` tokens."""
        return context * self.cache_values * CACHE_BYTES[cache]

    def activation_bytes(self) -> int:
        """Return what a batch takes beside weights and cache, about: hidden states, the feed-forward layer, a row of logits."""
        return 4 * (MICRO_BATCH * (4 * self.width + 3 * self.inner) + self.vocab)


def cache_values(config: ModelConfig) -> int:
    """Return how many numbers are kept for each position: keys and values, or the latents that both are made of."""
    heads, size = config.cached_heads
    return config.num_layers * heads * size * (2 if config.latent is None else 1)


def utilization(token_bytes: float, tokens_per_second: float, bandwidth: float) -> float:
    """Return the share of the memory's bandwidth that decoding uses (MBU): bytes a token × tokens/s over bytes/s."""
    return token_bytes * tokens_per_second / bandwidth
