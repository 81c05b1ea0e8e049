"""The whole model in memory with a key/value cache: tokens in, last hidden states or logits out, for sessions that generate.

The same formulas as `models/block.py`, arranged for speed: one product for queries, keys and values, one for gate and up, and
attention of a single new token with the heads of a group as if they were its queries, so that no key is ever repeated.
Everything but the sums inside a norm is computed in one dtype; in bfloat16 that is what transformers computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from r1q.core.tensors import TensorSpec
from r1q.models.config import ModelConfig
from r1q.models.forward import TensorReader
from r1q.models.rope import rotation

_SLAB_WEIGHTS = 1 << 24
CHUNK = 2048  # tokens whose hidden states are alive at once

# (layer, queries [n, heads, head_dim], keys, values [n, kv_heads, head_dim]) -> mixed values [n, heads · head_dim]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """A linear layer, or several that read the same inputs, one under the other: weight [outputs, inputs], `packed` or plain."""

    weight: Tensor
    bias: Tensor | None
    packed: bool

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return inputs · weightᵀ + bias for inputs [n, inputs]."""
        if self.packed:
            product: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, "none", [], "")
            return product
        return F.linear(inputs, self.weight, self.bias)


def _packs(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether oneDNN can pack weights into its own order here, as torch's compiler does for frozen weights.

    One token then costs half: F.linear runs MKL's single-threaded loop in float32, and repacks on every call in bfloat16.
    """
    operators = torch.ops.mkldnn
    if device.type != "cpu" or not torch._C._has_mkldnn or not hasattr(operators, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or bool(operators._is_mkldnn_bf16_supported())


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One decoder block. `query_norm` and `key_norm` [head_dim] are there where the family norms heads."""

    attn_norm: Tensor
    qkv: Linear
    query_norm: Tensor | None
    key_norm: Tensor | None
    output: Linear
    ffn_norm: Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """Keys and values of every layer, each [sequences, kv_heads, context, head_dim]; how far they are filled the owner knows."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


class Decoder:
    """A model ready to run on one device in one dtype, for positions below `context`."""

    def __init__(self, source: TensorReader, *, dtype: torch.dtype, device: torch.device, context: int) -> None:
        """Read every weight of `source`, one tensor at a time. Raises what its `read_rows` raises."""
        self.config, self.context, self.dtype, self.device = source.config, context, dtype, device
        load = _Loader(source, dtype, device)
        self.embedding = load.matrix("token_embd.weight")
        self.vocab_size = len(self.embedding)
        self.layers = tuple(_layer(load, index) for index in range(self.config.num_layers))
        self.norm = load.vector("output_norm.weight")
        # A tied head is not packed: it would lie in memory twice.
        tied = Linear(weight=self.embedding, bias=None, packed=False)
        self.head = tied if self.config.tied else load.linear("output")
        turn = rotation(self.config, context, device)
        half = self.config.head_dim // 2
        # The minus of the second half lies in the sine, so that turning is two products of rolled pairs.
        sign = torch.ones(self.config.head_dim, device=device)
        sign[:half] = -1
        self._cosine = turn.cosine.to(dtype)[:, None]
        self._sine = (turn.sine * sign).to(dtype)[:, None]

    def new_cache(self, sequences: int) -> Cache:
        """Return an empty cache for `sequences` sequences of `context` tokens."""
        config = self.config
        shape = (sequences, config.num_kv_heads, self.context, config.head_dim)
        # Zeros, not whatever was there: masked places are multiplied by 0, and 0 · NaN is NaN.
        tensors = [torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2 * config.num_layers)]
        return Cache(keys=tuple(tensors[0::2]), values=tuple(tensors[1::2]))

    @torch.inference_mode()
    def extend(self, cache: Cache, sequence: int, held: int, tokens: Sequence[int]) -> Tensor:
        """Append `tokens` behind the `held` ones of `sequence`; return their hidden states [tokens, hidden_size], normed.

        The hidden states of at most the last `CHUNK` tokens are returned.
        """
        for start in range(0, len(tokens), CHUNK):
            part = tokens[start : start + CHUNK]
            first = held + start
            hidden = self._run(part, slice(first, first + len(part)), _extend(cache, self.config, sequence, first))
        return hidden

    @torch.inference_mode()
    def step(self, cache: Cache, held: Sequence[int], sequences: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Append one token to each of `sequences`, which hold `held` tokens; return hidden states [sequences, hidden_size]."""
        if len(tokens) == 1:
            return self.extend(cache, sequences[0], held[0], tokens)
        places = torch.tensor(held, device=self.device)
        return self._run(tokens, places, _step(cache, held, sequences, places))

    @torch.inference_mode()
    def score(self, tokens: Sequence[int], first: int = 0) -> Tensor:
        """Return the hidden states [tokens − first, hidden_size], normed, of a text from position `first` on, without a cache."""
        hidden = self._run(tokens, slice(0, len(tokens)), _causal(self.config))
        return hidden[first:]

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [n, vocab_size] of normed hidden states [n, hidden_size]."""
        return self.head(hidden)

    def _run(self, tokens: Sequence[int], places: slice | Tensor, attend: Attend) -> Tensor:
        config = self.config
        cosine, sine = self._cosine[places], self._sine[places]
        hidden = F.embedding(torch.tensor(tokens, device=self.device), self.embedding)
        for index, layer in enumerate(self.layers):
            mixed = self._attention(index, layer, hidden, (cosine, sine), attend)
            hidden = hidden + layer.output(mixed)
            normed = F.rms_norm(hidden, layer.ffn_norm.shape, layer.ffn_norm, config.rms_norm_eps)
            gate, up = layer.gate_up(normed).chunk(2, dim=-1)
            hidden = hidden + layer.down(F.silu(gate) * up)
        return F.rms_norm(hidden, self.norm.shape, self.norm, config.rms_norm_eps)

    def _attention(
        self, index: int, layer: Layer, hidden: Tensor, turn: tuple[Tensor, Tensor], attend: Attend
    ) -> Tensor:
        config = self.config
        normed = F.rms_norm(hidden, layer.attn_norm.shape, layer.attn_norm, config.rms_norm_eps)
        heads, kv_heads, size = config.num_heads, config.num_kv_heads, config.head_dim
        mixed = layer.qkv(normed).view(len(hidden), heads + 2 * kv_heads, size)
        turned, values = mixed[:, : heads + kv_heads], mixed[:, heads + kv_heads :]
        if layer.query_norm is not None and layer.key_norm is not None:
            queries, keys = turned[:, :heads], turned[:, heads:]
            queries = F.rms_norm(queries, layer.query_norm.shape, layer.query_norm, config.rms_norm_eps)
            keys = F.rms_norm(keys, layer.key_norm.shape, layer.key_norm, config.rms_norm_eps)
            turned = torch.cat((queries, keys), dim=1)
        turned = torch.addcmul(turned * turn[0], turned.roll(size // 2, -1), turn[1])
        return attend(index, turned[:, :heads], turned[:, heads:], values)


def _extend(cache: Cache, config: ModelConfig, sequence: int, held: int) -> Attend:
    """Return attention of new tokens of one sequence on what it holds and on each other."""

    def attend(index: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        stop = held + len(queries)
        all_keys, all_values = cache.keys[index][sequence], cache.values[index][sequence]
        all_keys[:, held:stop] = keys.transpose(0, 1)
        all_values[:, held:stop] = values.transpose(0, 1)
        return _mix(queries, all_keys[:, :stop], all_values[:, :stop])

    return attend


def _causal(config: ModelConfig) -> Attend:
    """Return attention of the tokens of a whole text on each other."""
    return lambda _, queries, keys, values: _mix(queries, keys.transpose(0, 1), values.transpose(0, 1))


def _mix(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Return [n, heads · head_dim]: what the last n tokens see. Shapes: queries [n, heads, size], the others [kv_heads, all, size]."""
    (count, _, size), (kv_heads, length, _) = queries.shape, keys.shape
    grouped = queries.reshape(count, kv_heads, -1, size)
    if count == 1:
        mixed = F.scaled_dot_product_attention(grouped, keys[None], values[None])
        return mixed.reshape(1, -1)
    repeats = grouped.shape[2]
    wide = (kv_heads, repeats, length, size)
    # A view with stride 0 along the repeats: every head of a group reads the same keys.
    keys, values = keys[:, None].expand(wide), values[:, None].expand(wide)
    seen = None if length == count else _seen(count, length, queries.device)
    mixed = F.scaled_dot_product_attention(grouped.permute(1, 2, 0, 3), keys, values, seen, is_causal=seen is None)
    return mixed.permute(2, 0, 1, 3).reshape(count, -1)


def _seen(count: int, length: int, device: torch.device) -> Tensor:
    """Return which of `length` tokens each of the last `count` sees: bool [count, length]."""
    return torch.ones(count, length, dtype=torch.bool, device=device).tril(length - count)


def _step(cache: Cache, held: Sequence[int], sequences: Sequence[int], places: Tensor) -> Attend:
    """Return attention of one new token of each sequence on what it holds: at once for neighbours, else one by one."""
    if list(sequences) != list(range(sequences[0], sequences[0] + len(sequences))):
        return _step_apart(cache, held, sequences)
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
        return F.scaled_dot_product_attention(grouped, all_keys, all_values, seen).reshape(len(queries), -1)

    return attend


def _step_apart(cache: Cache, held: Sequence[int], sequences: Sequence[int]) -> Attend:
    def attend(index: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        mixed = torch.empty(len(queries), queries.shape[1] * queries.shape[2], dtype=queries.dtype, device=keys.device)
        for row, (sequence, place) in enumerate(zip(sequences, held, strict=True)):
            all_keys, all_values = cache.keys[index][sequence], cache.values[index][sequence]
            all_keys[:, place], all_values[:, place] = keys[row], values[row]
            mixed[row] = _mix(queries[row : row + 1], all_keys[:, : place + 1], all_values[:, : place + 1])[0]
        return mixed

    return attend


def _layer(load: _Loader, index: int) -> Layer:
    name = f"blk.{index}."
    return Layer(
        attn_norm=load.vector(f"{name}attn_norm.weight"),
        qkv=load.linear(*(f"{name}attn_{part}" for part in "qkv")),
        query_norm=load.vector_if_there(f"{name}attn_q_norm.weight"),
        key_norm=load.vector_if_there(f"{name}attn_k_norm.weight"),
        output=load.linear(f"{name}attn_output"),
        ffn_norm=load.vector(f"{name}ffn_norm.weight"),
        gate_up=load.linear(f"{name}ffn_gate", f"{name}ffn_up"),
        down=load.linear(f"{name}ffn_down"),
    )


class _Loader:
    """Reads tensors by their GGUF names into the dtype and device of a decoder, some rows at a time."""

    def __init__(self, source: TensorReader, dtype: torch.dtype, device: torch.device) -> None:
        self._source, self._dtype, self._device = source, dtype, device
        self._packs = _packs(dtype, device)
        self._specs = {spec.gguf_name: spec for spec in source.tensors}

    def matrix(self, name: str) -> Tensor:
        """Return one matrix."""
        return self._stacked([self._specs[name]])

    def vector(self, name: str) -> Tensor:
        """Return one vector."""
        return self._stacked([self._specs[name]]).reshape(-1)

    def vector_if_there(self, name: str) -> Tensor | None:
        """Return one vector, None where the model has none of that name."""
        return self.vector(name) if name in self._specs else None

    def linear(self, *names: str) -> Linear:
        """Return linear layers that read the same inputs as one; where some have a bias, the others' is 0."""
        weights = [self._specs[f"{name}.weight"] for name in names]
        biases = [self._specs.get(f"{name}.bias") for name in names]
        weight = self._stacked(weights)
        if self._packs:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
        if not any(biases):
            return Linear(weight=weight, bias=None, packed=self._packs)
        bias = torch.zeros(sum(spec.rows for spec in weights), dtype=self._dtype, device=self._device)
        ends = np.cumsum([0, *(spec.rows for spec in weights)]).tolist()
        for spec, (start, stop) in zip(biases, pairwise(ends), strict=True):
            if spec is not None:
                bias[start:stop] = self._stacked([spec]).reshape(-1)
        return Linear(weight=weight, bias=bias, packed=self._packs)

    def _stacked(self, specs: Sequence[TensorSpec]) -> Tensor:
        rows = sum(spec.rows for spec in specs)
        table = torch.empty((rows, specs[0].columns), dtype=self._dtype, device=self._device)
        place = 0
        for spec in specs:
            step = max(1, _SLAB_WEIGHTS // spec.columns)
            for start in range(0, spec.rows, step):
                stop = min(start + step, spec.rows)
                values = self._source.read_rows(spec.name, start, stop).reshape(stop - start, spec.columns)
                table[place : place + stop - start] = torch.from_numpy(np.require(values, requirements=["C", "W"]))
                place += stop - start
        return table
