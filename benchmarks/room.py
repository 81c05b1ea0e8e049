"""Room: how large a file may be on a device, beside the cache of its context and the activations."""

from __future__ import annotations

from r1q.benchmarks.profiles import Profile
from r1q.benchmarks.traffic import Traffic, cache_values
from r1q.core.errors import ResourceError
from r1q.models.config import ModelConfig

CONTEXT = 4096  # or the model's, where that is less


def room_for_file(profile: Profile, config: ModelConfig) -> int:
    """Return the bytes left for a model's file on `profile` beside a float16 cache of 4096 tokens. Raises `ResourceError` for none."""
    traffic = Traffic(
        weight_bytes=0,
        touched_weights=0,
        cache_values=cache_values(config),
        width=config.hidden_size,
        inner=config.intermediate_size,
        vocab=config.vocab_size,
    )
    context = min(CONTEXT, config.max_position_embeddings)
    taken = traffic.cache_bytes(context) + traffic.activation_bytes()
    if taken >= profile.usable:
        raise ResourceError(
            f"the cache of {context} tokens and activations take {taken / 1e9:.1f} GB, and {profile.name} gives "
            f"{profile.usable / 1e9:.1f} GB to a program; take a smaller model"
        )
    return profile.usable - taken
