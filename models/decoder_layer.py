"""A decoder block's weights in memory, and what it computes with them but for who sees whom: linear layers, attention, experts.

The same formulas as `models/block.py`, `models/mla.py` and `models/moe.py`, arranged for speed: one product for layers that read the
same, and of latent attention only the latents are kept, one vector for each token that serves all heads as key and as value.
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
from r1q.models import moe
from r1q.models.config_moe import Experts, Latent
from r1q.models.forward import TensorReader
from r1q.models.rope import in_halves

_SLAB_WEIGHTS = 1 << 24

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(queries [n, heads, size], keys [n, kv_heads, size], values [n, kv_heads, width]) -> mixed values [n, heads · width]."""

Turn = tuple[Tensor, Tensor]
"""Cosine and sine [n, 1, size] of n positions; the sine has the minus of the second half in it."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """An RMS norm: weight [size]."""

    weight: Tensor
    epsilon: float

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return `inputs` [..., size] normed."""
        return F.rms_norm(inputs, self.weight.shape, self.weight, self.epsilon)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedAttention:
    """Queries, keys and values of one product; `query_norm` and `key_norm` [head_dim] are there where the family norms heads."""

    heads: int
    kv_heads: int
    qkv: Linear
    query_norm: Norm | None
    key_norm: Norm | None

    def __call__(self, normed: Tensor, turn: Turn, attend: Attend) -> Tensor:
        """Return what the layer behind attention reads."""
        mixed = self.qkv(normed).view(len(normed), self.heads + 2 * self.kv_heads, -1)
        to_turn, values = mixed[:, : self.heads + self.kv_heads], mixed[:, self.heads + self.kv_heads :]
        if self.query_norm is not None and self.key_norm is not None:
            parts = self.query_norm(to_turn[:, : self.heads]), self.key_norm(to_turn[:, self.heads :])
            to_turn = torch.cat(parts, dim=1)
        turned = _turned(to_turn, turn)
        return attend(turned[:, : self.heads], turned[:, self.heads :], values)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttention:
    """Latent attention with its matrices for keys and values moved to the queries and the results (DeepSeek-V2, §2.1.2).

    `made` gives queries, or what `queries` make them of, then the latent and the numbers every head's key ends with.
    `keys` [heads, rank, key_dim], `values` [heads, rank, value_dim].
    """

    latent: Latent
    made: Linear
    query_norm: Norm | None
    queries: Linear | None
    norm: Norm
    keys: Tensor
    values: Tensor

    def __call__(self, normed: Tensor, turn: Turn, attend: Attend) -> Tensor:
        """Return what the layer behind attention reads. Keys are latents with their ending, values latents: one head of each."""
        facts, made = self.latent, self.made(normed)
        kept = facts.rank + facts.rope_dim
        first, latent, ending = torch.split(made, [made.shape[1] - kept, facts.rank, facts.rope_dim], dim=1)
        if self.query_norm is not None and self.queries is not None:
            first = self.queries(self.query_norm(first))
        heads = first.reshape(len(first), len(self.keys), -1)
        plain, to_turn = heads[..., : facts.key_dim], heads[..., facts.key_dim :]
        latent = self.norm(latent)[:, None]
        moved = torch.einsum("nhk,hrk->nhr", plain, self.keys)
        queries = torch.cat((moved, _turned(in_halves(to_turn), turn)), dim=-1)
        keys = torch.cat((latent, _turned(in_halves(ending[:, None]), turn)), dim=-1)
        mixed = attend(queries, keys, latent).view(len(normed), len(self.values), facts.rank)
        return torch.einsum("nhr,hrv->nhv", mixed, self.values).flatten(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedForward:
    """A dense feed-forward layer, or one expert."""

    gate_up: Linear
    down: Linear

    def __call__(self, normed: Tensor) -> Tensor:
        """Return down(silu(gate) · up)."""
        gate, up = self.gate_up(normed).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """Experts, of which each token reads a few: `router` has what `moe.route` looks up, in float32."""

    facts: Experts
    router: dict[str, Tensor]
    experts: tuple[FeedForward, ...]
    shared: FeedForward | None

    def __call__(self, normed: Tensor) -> Tensor:
        """Return the weighted sum of what the chosen experts make of each row, and the shared one."""
        routes = moe.route(self.router, self.facts, normed)
        result = torch.zeros_like(normed) if self.shared is None else self.shared(normed)
        moe.add_chosen(result, routes, normed, lambda expert, rows: self.experts[expert](rows))
        return result


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One decoder block."""

    attn_norm: Norm
    attention: GroupedAttention | LatentAttention
    output: Linear
    ffn_norm: Norm
    feed_forward: FeedForward | Mixture

    def __call__(self, hidden: Tensor, turn: Turn, attend: Attend) -> Tensor:
        """Return the hidden states [n, hidden_size] behind the block."""
        hidden = hidden + self.output(self.attention(self.attn_norm(hidden), turn, attend))
        return hidden + self.feed_forward(self.ffn_norm(hidden))


def _turned(heads: Tensor, turn: Turn) -> Tensor:
    """Return `heads` [n, heads, size] with every pair (i, i + size / 2) turned."""
    return torch.addcmul(heads * turn[0], heads.roll(heads.shape[-1] // 2, -1), turn[1])


class Loader:
    """Reads tensors by their own names into the dtype and device of a decoder, some rows at a time."""

    def __init__(self, source: TensorReader, dtype: torch.dtype, device: torch.device) -> None:
        self._source, self._config, self._dtype, self._device = source, source.config, dtype, device
        self._packs = _packs(dtype, device)
        self._specs = {spec.own_name: spec for spec in source.tensors}

    def layer(self, index: int) -> Layer:
        """Return a block. Raises what the source's `read_rows` raises."""
        name = f"blk.{index}."
        return Layer(
            attn_norm=self.norm(f"{name}attn_norm"),
            attention=self._attention(name),
            output=self.linear(f"{name}attn_output"),
            ffn_norm=self.norm(f"{name}ffn_norm"),
            feed_forward=self._feed_forward(name),
        )

    def matrix(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return one matrix."""
        return self._stacked([self._specs[name]], dtype)

    def norm(self, name: str) -> Norm:
        """Return one norm."""
        return Norm(weight=self.matrix(f"{name}.weight").reshape(-1), epsilon=self._config.rms_norm_eps)

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

    def _attention(self, name: str) -> GroupedAttention | LatentAttention:
        config, latent = self._config, self._config.latent
        if latent is None:
            return GroupedAttention(
                heads=config.num_heads,
                kv_heads=config.num_kv_heads,
                qkv=self.linear(*(f"{name}attn_{part}" for part in "qkv")),
                query_norm=self._norm_if_there(f"{name}attn_q_norm"),
                key_norm=self._norm_if_there(f"{name}attn_k_norm"),
            )
        short = latent.query_rank is not None
        keys, values = (self.matrix(f"{name}attn_{part}_b.weight") for part in "kv")
        return LatentAttention(
            latent=latent,
            made=self.linear(f"{name}{'attn_q_a' if short else 'attn_q'}", f"{name}attn_kv_a_mqa"),
            query_norm=self.norm(f"{name}attn_q_a_norm") if short else None,
            queries=self.linear(f"{name}attn_q_b") if short else None,
            norm=self.norm(f"{name}attn_kv_a_norm"),
            keys=keys.reshape(config.num_heads, latent.rank, latent.key_dim),
            values=values.reshape(config.num_heads, latent.value_dim, latent.rank).transpose(1, 2),
        )

    def _feed_forward(self, name: str) -> FeedForward | Mixture:
        facts = self._config.experts
        if facts is None or f"{name}{moe.ROUTER}" not in self._specs:
            return self._one(f"{name}ffn_gate", f"{name}ffn_up", f"{name}ffn_down")
        router = {
            key: self.matrix(f"{name}{key}", torch.float32)
            for key in (moe.ROUTER, moe.CORRECTION)
            if f"{name}{key}" in self._specs
        }
        return Mixture(
            facts=facts,
            router=router,
            experts=tuple(self._one(*(f"{name}{kind}" for kind in moe.kinds(i))) for i in range(facts.count)),
            shared=self._one(*(f"{name}ffn_{part}_shexp" for part in ("gate", "up", "down")))
            if facts.shared_inner
            else None,
        )

    def _one(self, gate: str, up: str, down: str) -> FeedForward:
        return FeedForward(gate_up=self.linear(gate, up), down=self.linear(down))

    def _norm_if_there(self, name: str) -> Norm | None:
        return self.norm(name) if f"{name}.weight" in self._specs else None

    def _stacked(self, specs: Sequence[TensorSpec], dtype: torch.dtype | None = None) -> Tensor:
        rows = sum(spec.rows for spec in specs)
        shape = (rows, specs[0].columns) if len(specs[0].shape) == 2 else (rows * specs[0].columns,)
        table = torch.empty(shape, dtype=dtype or self._dtype, device=self._device)
        place = 0
        for spec in specs:
            step = max(1, _SLAB_WEIGHTS // spec.columns)
            for start in range(0, spec.rows, step):
                stop = min(start + step, spec.rows)
                values = self._source.read_rows(spec.name, start, stop).reshape(stop - start, spec.columns)
                found = torch.from_numpy(np.require(values, requirements=["C", "W"]))
                table.view(rows, -1)[place : place + stop - start] = found
                place += stop - start
        return table


def _packs(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether oneDNN can pack weights into its own order here, as torch's compiler does for frozen weights.

    One token then costs half: F.linear runs MKL's single-threaded loop in float32, and repacks on every call in bfloat16.
    """
    operators = torch.ops.mkldnn
    if device.type != "cpu" or not torch._C._has_mkldnn or not hasattr(operators, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or bool(operators._is_mkldnn_bf16_supported())
