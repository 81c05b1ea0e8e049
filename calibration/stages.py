"""One decoder block walked stage by stage over all windows: what each stage's linear layers read, then their results, once.

A stage is yielded when the second moments of its inputs are known; whoever consumes it puts the layers' coded weights into the walk,
and the walk goes on with those. So every layer is fitted to inputs that everything before it, coded, has made («true sequential»),
and each layer is run once per stream.

With an exact stream beside the coded one, a stage also says which way its inputs have drifted: the weights W* that come closest to
the float model's results on the coded inputs are W + W·drift·H⁻¹ (the normal equations of min ‖W·x_exact − W*·x_coded‖²); where
the layer adds to the residual stream, the drift of that stream is part of what it should make good, and drift·H⁻¹ is the whole shift.
There tokens count by 1/rms² of the float stream behind the layer (without one, of the coded stream before it): whatever reads the
stream normalizes it, so that an error weighs by its share of the token's size. Else a few tokens hundreds of times as large as the
rest (attention sinks) would have most of the say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from r1q.calibration.expert_stages import Coverage, Routed, routed_experts, shared_stages
from r1q.calibration.moments import add_product, add_second_moment
from r1q.calibration.stage import Stage as Stage
from r1q.calibration.stage import Streams as Streams
from r1q.models import mla, moe
from r1q.models.block import (
    Weights,
    attention_input,
    attention_mix,
    linear,
    mlp_inner,
    mlp_input,
)
from r1q.models.config import ModelConfig
from r1q.models.config_moe import Latent
from r1q.models.rope import Rotation

Reader = Callable[[Weights, ModelConfig, Tensor], Tensor]
Inner = Callable[[Weights, Tensor], Tensor]


@dataclass(slots=True, kw_only=True)
class BlockWalk:
    """A block in work: `exact` weights by `kind.part`, and `coded` ones, which the consumer of `stages` fills stage by stage.

    Matrices of both are in `dtype`, in which they are multiplied; norms and biases are float32 and in both. Statistics are summed
    over tiles of `windows` windows, whose number is part of what decides the last bits of the sums. `allocate` gives room for inputs
    that are kept from a stage's statistics to its results. `coverage` says which tokens experts are calibrated on; theirs are counted
    there. Routed experts are no stages: when these are through, `routed` has their lessons, and adds what they make.
    """

    config: ModelConfig
    rotation: Rotation
    exact: Weights
    coded: MutableMapping[str, Tensor]
    dtype: torch.dtype
    windows: int
    allocate: Callable[[tuple[int, ...], torch.dtype], Tensor]
    coverage: Coverage = field(default_factory=Coverage)
    routed: Routed | None = None

    def stages(self, streams: Streams) -> Iterator[Stage]:
        """Yield the block's stages; when they are through, `streams` holds the hidden states after the block, less routed experts.

        Four in a dense block; latent attention has two more.
        """
        latent, heads = self.config.latent, self.config.num_heads
        if latent is None:
            yield self.reading(streams, attention_input, ("attn_q", "attn_k", "attn_v"), self.config.hidden_size)
        else:
            yield from self._latent(streams, latent)
        mixed = heads * (self.config.head_dim if latent is None else latent.value_dim)
        yield from self.adding(streams, self._mixed, "attn_output", mixed)
        if moe.ROUTER in self.coded:
            self.routed = routed_experts(self, streams)
            yield from shared_stages(self, streams)
        else:
            yield self.reading(streams, mlp_input, ("ffn_gate", "ffn_up"), self.config.hidden_size)
            yield from self.adding(streams, self._inner, "ffn_down", self.config.intermediate_size)

    def _latent(self, streams: Streams, latent: Latent) -> Iterator[Stage]:
        """Yield the stages of layers that make queries, keys and values of latent attention.

        attn_k_b reads another input for every head (the queries that it is multiplied with), which no sum over all of them stands for.
        """
        made = "attn_q" if latent.query_rank is None else "attn_q_a"
        yield self.reading(streams, attention_input, (made, "attn_kv_a_mqa"), self.config.hidden_size)
        if latent.query_rank is not None:
            yield self.reading(streams, self._query_latent, ("attn_q_b",), latent.query_rank)
        yield self.reading(streams, self._key_latent, ("attn_v_b",), latent.rank)
        nothing = streams.zeros(0)
        note = "attn_k_b: has another input for every head, rounded without statistics"
        yield Stage(kinds=("attn_k_b",), tokens=streams.tokens, moment=nothing, plain=True, note=note)

    def _query_latent(self, weights: Weights, config: ModelConfig, hidden: Tensor) -> Tensor:
        return mla.query_latent(weights, config, attention_input(weights, config, hidden))

    def _key_latent(self, weights: Weights, config: ModelConfig, hidden: Tensor) -> Tensor:
        if config.latent is None:
            raise ValueError("attention is not latent")
        shared = linear(weights, "attn_kv_a_mqa", attention_input(weights, config, hidden))
        return mla.latent_of(weights, config, config.latent, shared)

    def reading(self, streams: Streams, read: Reader, kinds: tuple[str, ...], columns: int) -> Stage:
        """Return the statistics of layers that read what `read` makes of the residual stream: [..., columns]."""
        moment = streams.zeros(columns)
        drift = None if streams.exact is None else streams.zeros(columns)
        for coded, exact in self._tiles(streams):
            inputs = read(self.coded, self.config, coded)
            add_second_moment(moment, inputs.flatten(0, 1), self.dtype)
            if exact is not None and drift is not None:
                drifted = read(self.exact, self.config, exact) - inputs
                add_product(drift, drifted.flatten(0, 1), inputs.flatten(0, 1), self.dtype)
                del drifted
            del inputs  # before the next tile's are made beside them
        return Stage(kinds=kinds, tokens=streams.tokens, moment=moment, drift=drift)

    def adding(self, streams: Streams, inner: Inner, kind: str, columns: int) -> Iterator[Stage]:
        """Yield the statistics of a layer that adds to the residual stream, and add what it makes, coded, afterwards."""
        moment = streams.zeros(columns)
        drift = None if streams.exact is None else streams.zeros(columns, self.config.hidden_size)
        kept = self.allocate((*streams.coded.shape[:2], columns), self.dtype)
        for (coded, exact), keep in zip(self._tiles(streams), _parts(kept, self.windows), strict=True):
            inputs = inner(self.coded, coded)
            keep.copy_(inputs)
            if exact is None or drift is None:
                inputs *= _share(coded, self.config)
            else:
                wanted = inner(self.exact, exact)
                missing = exact - coded + linear(self.exact, kind, wanted - inputs, bias=False)
                exact += linear(self.exact, kind, wanted)
                share = _share(exact, self.config)
                inputs *= share
                add_product(drift, (missing * share).flatten(0, 1), inputs.flatten(0, 1), self.dtype)
                del wanted, missing, share
            add_second_moment(moment, inputs.flatten(0, 1), self.dtype)
            del inputs
        yield Stage(kinds=(kind,), tokens=streams.tokens, moment=moment, drift=drift, residual=True)
        for (coded, _), keep in zip(self._tiles(streams), _parts(kept, self.windows), strict=True):
            coded += linear(self.coded, kind, keep.to(coded.dtype))

    def _mixed(self, weights: Weights, hidden: Tensor) -> Tensor:
        return attention_mix(weights, self.config, attention_input(weights, self.config, hidden), self.rotation)

    def _inner(self, weights: Weights, hidden: Tensor) -> Tensor:
        return mlp_inner(weights, mlp_input(weights, self.config, hidden))

    def _tiles(self, streams: Streams) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield some windows at a time of both streams, as views: what is added to them is kept."""
        coded = _parts(streams.coded, self.windows)
        exact = [None] * len(coded) if streams.exact is None else _parts(streams.exact, self.windows)
        yield from zip(coded, exact, strict=True)


def _share(stream: Tensor, config: ModelConfig) -> Tensor:
    """Return 1/rms of each token of a residual stream [..., hidden_size]: [..., 1]."""
    return stream.square().mean(-1, keepdim=True).add_(config.rms_norm_eps).rsqrt_()


def _parts(windows: Tensor, size: int) -> list[Tensor]:
    """Return views of `size` windows each, the last perhaps of fewer."""
    return [windows[start : start + size] for start in range(0, len(windows), size)]
