"""One decoder block walked stage by stage over all windows: what each stage's linear layers read, then their results, once.

A stage is yielded when the second moments of its inputs are known; whoever consumes it puts the layers' coded weights into the walk,
and the walk goes on with those. So every layer is fitted to inputs that everything before it, coded, has made («true sequential»),
and each layer is run once per stream.

With an exact stream beside the coded one, a stage also says which way its inputs have drifted: the weights W* that come closest to
the float model's results on the coded inputs are W + W·drift·H⁻¹ (the normal equations of min ‖W·x_exact − W*·x_coded‖²); where
the layer adds to the residual stream, the drift of that stream is part of what it should make good, and drift·H⁻¹ is the whole shift.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass

import torch
from torch import Tensor

from r1q.calibration.moments import add_product, add_second_moment
from r1q.models.block import (
    Weights,
    attention_input,
    attention_mix,
    linear,
    mlp_inner,
    mlp_input,
)
from r1q.models.config import ModelConfig
from r1q.models.rope import Rotation

Reader = Callable[[Weights, ModelConfig, Tensor], Tensor]
Inner = Callable[[Weights, Tensor], Tensor]


@dataclass(slots=True, kw_only=True)
class Streams:
    """Hidden states [windows, length, hidden_size] in float32: `coded` of the model as quantized so far, `exact` of the float one."""

    coded: Tensor
    exact: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.coded.shape[0] * self.coded.shape[1]

    def zeros(self, columns: int, rows: int | None = None) -> Tensor:
        """Return a sum to be filled, [rows, columns] (square without `rows`), float32."""
        return torch.zeros((columns if rows is None else rows, columns), device=self.coded.device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Linear layers that read one input. `moment` [columns, columns]: the sum over `tokens` of xᵀx, columns reversed, lower triangle.

    `drift` is the sum of (x_exact − x)ᵀx, or, if `residual`, already the sum of (what the layer should add)ᵀx [rows, columns].
    """

    kinds: tuple[str, ...]
    tokens: int
    moment: Tensor
    drift: Tensor | None = None
    residual: bool = False


@dataclass(slots=True, kw_only=True)
class BlockWalk:
    """A block in work: `exact` weights by `kind.part`, and `coded` ones, which the consumer of `stages` fills stage by stage.

    Matrices of both are in `dtype`, in which they are multiplied; norms and biases are float32 and in both. Statistics are summed
    over tiles of `windows` windows, whose number is part of what decides the last bits of the sums. `allocate` gives room for inputs
    that are kept from a stage's statistics to its results.
    """

    config: ModelConfig
    rotation: Rotation
    exact: Weights
    coded: MutableMapping[str, Tensor]
    dtype: torch.dtype
    windows: int
    allocate: Callable[[tuple[int, ...], torch.dtype], Tensor]

    def stages(self, streams: Streams) -> Iterator[Stage]:
        """Yield the block's four stages; when they are through, `streams` holds the hidden states after the block."""
        yield self._reading(streams, attention_input, ("attn_q", "attn_k", "attn_v"))
        yield from self._adding(streams, self._mixed, "attn_output", self.config.num_heads * self.config.head_dim)
        yield self._reading(streams, mlp_input, ("ffn_gate", "ffn_up"))
        yield from self._adding(streams, self._inner, "ffn_down", self.config.intermediate_size)

    def _reading(self, streams: Streams, read: Reader, kinds: tuple[str, ...]) -> Stage:
        """Return the statistics of layers that read a norm of the residual stream."""
        moment = streams.zeros(self.config.hidden_size)
        drift = None if streams.exact is None else streams.zeros(self.config.hidden_size)
        for coded, exact in self._tiles(streams):
            inputs = read(self.coded, self.config, coded)
            add_second_moment(moment, inputs.flatten(0, 1), self.dtype)
            if exact is not None and drift is not None:
                drifted = read(self.exact, self.config, exact) - inputs
                add_product(drift, drifted.flatten(0, 1), inputs.flatten(0, 1), self.dtype)
                del drifted
            del inputs  # before the next tile's are made beside them
        return Stage(kinds=kinds, tokens=streams.tokens, moment=moment, drift=drift)

    def _adding(self, streams: Streams, inner: Inner, kind: str, columns: int) -> Iterator[Stage]:
        """Yield the statistics of a layer that adds to the residual stream, and add what it makes, coded, afterwards."""
        moment = streams.zeros(columns)
        drift = None if streams.exact is None else streams.zeros(columns, self.config.hidden_size)
        kept = self.allocate((*streams.coded.shape[:2], columns), self.dtype)
        for (coded, exact), keep in zip(self._tiles(streams), _parts(kept, self.windows), strict=True):
            inputs = inner(self.coded, coded)
            keep.copy_(inputs)
            add_second_moment(moment, inputs.flatten(0, 1), self.dtype)
            if exact is not None and drift is not None:
                wanted = inner(self.exact, exact)
                missing = exact - coded + linear(self.exact, kind, wanted - inputs, bias=False)
                add_product(drift, missing.flatten(0, 1), inputs.flatten(0, 1), self.dtype)
                exact += linear(self.exact, kind, wanted)
                del wanted, missing
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


def _parts(windows: Tensor, size: int) -> list[Tensor]:
    """Return views of `size` windows each, the last perhaps of fewer."""
    return [windows[start : start + size] for start in range(0, len(windows), size)]
