"""The whole model in memory with a key/value cache: tokens in, last hidden states or logits out, for sessions that generate.

What a block computes is in `models/decoder_layer.py`, who sees whom is here: attention of a single new token takes the heads of a
group as if they were its queries, so that no key is ever repeated. Everything but a router and the sums inside a norm is computed in
one dtype; in bfloat16 that is what transformers computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from r1q.models.config_moe import score_scale
from r1q.models.decoder_layer import Linear, Loader
from r1q.models.forward import TensorReader
from r1q.models.rope import rotation

CHUNK = 2048  # tokens whose hidden states are alive at once

# (layer, queries [n, heads, size], keys [n, kv_heads, size], values [n, kv_heads, width]) -> mixed values [n, heads · width]
See = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """Keys and values of every layer, each [sequences, kv_heads, context, size]; how far they are filled the owner knows.

    With latent attention there is one head, whose values, the latents, are the first part of its keys and lie where these do.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


class Decoder:
    """A model ready to run on one device in one dtype, for positions below `context`."""

    def __init__(self, source: TensorReader, *, dtype: torch.dtype, device: torch.device, context: int) -> None:
        """Read every weight of `source`, one tensor at a time. Raises what its `read_rows` raises."""
        self.config, self.context, self.dtype, self.device = source.config, context, dtype, device
        load, latent = Loader(source, dtype, device), self.config.latent
        self.embedding = load.matrix("token_embd.weight")
        self.vocab_size = len(self.embedding)
        self.layers = tuple(load.layer(index) for index in range(self.config.num_layers))
        self.norm = load.norm("output_norm")
        # A tied head is not packed: it would lie in memory twice.
        tied = Linear(weight=self.embedding, bias=None, packed=False)
        self.head = tied if self.config.tied else load.linear("output")
        self._scale = None if latent is None else score_scale(latent, self.config.yarn)
        turn = rotation(self.config, context, device)
        half = self.config.head_dim // 2
        # The minus of the second half lies in the sine, so that turning is two products of rolled pairs.
        sign = torch.ones(self.config.head_dim, device=device)
        sign[:half] = -1
        self._cosine = turn.cosine.to(dtype)[:, None]
        self._sine = (turn.sine * sign).to(dtype)[:, None]

    def new_cache(self, sequences: int) -> Cache:
        """Return an empty cache for `sequences` sequences of `context` tokens."""
        latent, (heads, size) = self.config.latent, self.config.cached_heads

        def zeros() -> Tensor:
            # Not whatever was there: masked places are multiplied by 0, and 0 · NaN is NaN.
            return torch.zeros((sequences, heads, self.context, size), dtype=self.dtype, device=self.device)

        keys = tuple(zeros() for _ in self.layers)
        values = tuple(zeros() if latent is None else these[..., : latent.rank] for these in keys)
        return Cache(keys=keys, values=values)

    @torch.inference_mode()
    def extend(self, cache: Cache, sequence: int, held: int, tokens: Sequence[int]) -> Tensor:
        """Append `tokens` behind the `held` ones of `sequence`; return their hidden states [tokens, hidden_size], normed.

        The hidden states of at most the last `CHUNK` tokens are returned.
        """
        for start in range(0, len(tokens), CHUNK):
            part = tokens[start : start + CHUNK]
            first = held + start
            hidden = self._run(part, slice(first, first + len(part)), _extend(cache, self._scale, sequence, first))
        return hidden

    @torch.inference_mode()
    def step(self, cache: Cache, held: Sequence[int], sequences: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Append one token to each of `sequences`, which hold `held` tokens; return hidden states [sequences, hidden_size]."""
        if len(tokens) == 1:
            return self.extend(cache, sequences[0], held[0], tokens)
        places = torch.tensor(held, device=self.device)
        return self._run(tokens, places, _step(cache, self._scale, held, sequences, places))

    @torch.inference_mode()
    def score(self, tokens: Sequence[int], first: int = 0) -> Tensor:
        """Return the hidden states [tokens − first, hidden_size], normed, of a text from position `first` on, without a cache."""
        hidden = self._run(tokens, slice(0, len(tokens)), _causal(self._scale))
        return hidden[first:]

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [n, vocab_size] of normed hidden states [n, hidden_size]."""
        return self.head(hidden)

    def _run(self, tokens: Sequence[int], places: slice | Tensor, see: See) -> Tensor:
        turn = self._cosine[places], self._sine[places]
        hidden = F.embedding(torch.tensor(tokens, device=self.device), self.embedding)
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, turn, partial(see, index))
        return self.norm(hidden)


def _extend(cache: Cache, scale: float | None, sequence: int, held: int) -> See:
    """Return attention of new tokens of one sequence on what it holds and on each other."""

    def attend(index: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        stop = held + len(queries)
        all_keys, all_values = cache.keys[index][sequence], cache.values[index][sequence]
        all_keys[:, held:stop] = keys.transpose(0, 1)
        all_values[:, held:stop] = values.transpose(0, 1)
        return _mix(queries, all_keys[:, :stop], all_values[:, :stop], scale)

    return attend


def _causal(scale: float | None) -> See:
    """Return attention of the tokens of a whole text on each other."""
    return lambda _, queries, keys, values: _mix(queries, keys.transpose(0, 1), values.transpose(0, 1), scale)


def _mix(queries: Tensor, keys: Tensor, values: Tensor, scale: float | None) -> Tensor:
    """Return [n, heads · width]: what the last n tokens see, their scores times `scale` (None: 1/√size).

    Shapes: queries [n, heads, size], keys [kv_heads, all, size], values [kv_heads, all, width].
    """
    (count, _, size), (kv_heads, length, _) = queries.shape, keys.shape
    grouped = queries.reshape(count, kv_heads, -1, size)
    if count == 1:
        mixed = F.scaled_dot_product_attention(grouped, keys[None], values[None], scale=scale)
        return mixed.reshape(1, -1)
    repeats = grouped.shape[2]
    wide = (kv_heads, repeats, length, -1)
    # A view with stride 0 along the repeats: every head of a group reads the same keys.
    keys, values = keys[:, None].expand(wide), values[:, None].expand(wide)
    seen = None if length == count else _seen(count, length, queries.device)
    grouped = grouped.permute(1, 2, 0, 3)
    mixed = F.scaled_dot_product_attention(grouped, keys, values, seen, is_causal=seen is None, scale=scale)
    return mixed.permute(2, 0, 1, 3).reshape(count, -1)


def _seen(count: int, length: int, device: torch.device) -> Tensor:
    """Return which of `length` tokens each of the last `count` sees: bool [count, length]."""
    return torch.ones(count, length, dtype=torch.bool, device=device).tril(length - count)


def _step(cache: Cache, scale: float | None, held: Sequence[int], sequences: Sequence[int], places: Tensor) -> See:
    """Return attention of one new token of each sequence on what it holds: at once for neighbours, else one by one."""
    if list(sequences) != list(range(sequences[0], sequences[0] + len(sequences))):
        return _step_apart(cache, scale, held, sequences)
    rows = slice(sequences[0], sequences[0] + len(sequences))
    number = torch.arange(rows.start, rows.stop, device=places.device)
    length = max(held) + 1
    ragged = min(held) != max(held)
    seen = (torch.arange(length, device=places.device) <= places[:, None])[:, None, None] if ragged else None

    def attend(index: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        cache.keys[index][number, :, places] = keys
        cache.values[index][number, :, places] = values
        all_keys, all_values = cache.keys[index][rows, :, :length], cache.values[index][rows, :, :length]
        grouped = queries.reshape(len(queries), keys.shape[1], -1, keys.shape[2])
        mixed = F.scaled_dot_product_attention(grouped, all_keys, all_values, seen, scale=scale)
        return mixed.reshape(len(queries), -1)

    return attend


def _step_apart(cache: Cache, scale: float | None, held: Sequence[int], sequences: Sequence[int]) -> See:
    def attend(index: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        mixed = []
        for row, (sequence, place) in enumerate(zip(sequences, held, strict=True)):
            all_keys, all_values = cache.keys[index][sequence], cache.values[index][sequence]
            all_keys[:, place], all_values[:, place] = keys[row], values[row]
            stop = place + 1
            mixed.append(_mix(queries[row : row + 1], all_keys[:, :stop], all_values[:, :stop], scale))
        return torch.cat(mixed)

    return attend
