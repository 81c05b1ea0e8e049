"""What the linear layers of a float model read on a text: balanced between channels first, then fitted into 8 bits.

A channel that is large in the inputs and small in the weights is halved in the one and doubled in the other, until both share the
burden: s = max|x|^α / max|w|^(1−α) as in SmoothQuant (Xiao 2023, eq. 4), rounded to a power of two, so that folding it into the
layers around changes no result by a bit. Each block is walked once, for extremes and results; methods that need histograms of what is
balanced walk it again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from r1q.calibration.ranges import BINS, LEVELS, METHODS, Histogram, minmax, spell
from r1q.core.activations import STAGES, Range
from r1q.core.errors import InputError
from r1q.models.block import Weights, attention_input, attention_mix, mlp_inner, mlp_input, mlp_output
from r1q.models.block import attention_output as attended
from r1q.models.config import ModelConfig
from r1q.models.forward import TensorReader, embed, load_block
from r1q.models.rope import Rotation, rotation

# SmolLM2-135M, minmax: perplexity against weight-only and layers of 210 left so: +0.3 % (37) with 0.07, +3.3 % (24) with 0.1.
ALPHA = 0.5
LIMIT = 0.07
_TRIED = 1024  # tokens whose products are compared
_MOST = 20  # no channel is moved by more than 2^20

Inputs = Mapping[str, Tensor]
Exponents = Mapping[str, NDArray[np.int64]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """How ranges are found: `name` of `calibration.ranges.METHODS`; `alpha` of the balancing; the largest error of a static range.

    Measured (SmolLM2-135M, the same 22 inputs left as floats, divergence from weight-only): minmax 0.031, percentile 0.045, entropy
    0.053, although cutting off makes the smaller errors in each product: once channels are balanced, what is rare is what matters.
    """

    name: str = "minmax"
    alpha: float = ALPHA
    limit: float = LIMIT


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """What the stages of a block read: the least and the greatest value of each channel, [2, columns], and some rows as they were."""

    extremes: Inputs
    rows: Inputs


@torch.inference_mode()
def block_activations(
    source: TensorReader, tokens: NDArray[np.int64], method: Method
) -> Iterator[tuple[dict[str, Range], dict[str, tuple[int, ...]]]]:
    """Yield for each block the ranges and the exponents of its four inputs, by stage (`core.activations.STAGES`).

    `tokens` [windows, length]. Raises `InputError` where a block makes numbers that are not finite.
    """
    config = source.config
    hidden = embed(source, tokens)
    turn = rotation(config, tokens.shape[1])
    for layer in range(config.num_layers):
        weights = load_block(source, layer)
        counted = METHODS[method.name] is not minmax  # ends alone are known after one walk
        seen = _watch(_walk(weights, config, hidden, turn, store=not counted), hidden)
        if not all(bool(torch.isfinite(found).all()) for found in (hidden, *seen.extremes.values())):
            raise InputError(f"block {layer} makes numbers that are not finite on this text; the weights are broken")
        exponents = _balance(weights, config, seen.extremes, method.alpha)
        histograms = _ends(seen.extremes, exponents)
        if counted:
            histograms = _count(_walk(weights, config, hidden, turn, store=True), histograms, exponents)
        rows = _balanced(seen.rows, exponents)
        ranges = {
            stage: _fit(weights, stage, rows[stage], exponents[stage], histograms[stage], method) for stage in STAGES
        }
        yield ranges, {stage: tuple(found.tolist()) for stage, found in exponents.items()}


def _walk(weights: Weights, config: ModelConfig, hidden: Tensor, turn: Rotation, *, store: bool) -> Iterator[Inputs]:
    """Yield for each window what each stage reads, [length, columns]; with `store`, `hidden` is left as the block makes it."""
    for window in hidden[:, None]:  # one more axis: torch's attention makes no matrix of scores where it has four
        normed = attention_input(weights, config, window)
        mixed = attention_mix(weights, config, normed, turn)
        between = window + attended(weights, mixed)
        middle = mlp_input(weights, config, between)
        inner = mlp_inner(weights, middle)
        if store:
            torch.add(between, mlp_output(weights, inner), out=window)
        read = {"attn_q": normed, "attn_output": mixed, "ffn_gate": middle, "ffn_down": inner}
        yield {stage: inputs.flatten(0, 1) for stage, inputs in read.items()}


def _watch(walk: Iterator[Inputs], hidden: Tensor) -> _Seen:
    """Return what is seen on a walk over `hidden`; rows are of all windows, at other positions in each."""
    extremes: dict[str, Tensor] = {}
    kept: dict[str, list[Tensor]] = {stage: [] for stage in STAGES}
    step = max(1, hidden.shape[0] * hidden.shape[1] // _TRIED)
    for number, window in enumerate(walk):
        for stage, inputs in window.items():
            low, high = torch.aminmax(inputs, dim=0)
            before = extremes.get(stage)
            if before is not None:
                low, high = torch.minimum(before[0], low), torch.maximum(before[1], high)
            extremes[stage] = torch.stack((low, high))
            kept[stage].append(inputs[number % step :: step].clone())
    return _Seen(extremes=extremes, rows={stage: torch.cat(found) for stage, found in kept.items()})


def _balance(weights: Weights, config: ModelConfig, extremes: Inputs, alpha: float) -> dict[str, NDArray[np.int64]]:
    """Return by which power of two each channel's weights are multiplied and its inputs divided."""
    found = {}
    for stage, bounds in extremes.items():
        inputs = bounds.abs().amax(0)
        columns = torch.stack([weights[f"{kind}.weight"].abs().amax(0) for kind in STAGES[stage]]).amax(0)
        if stage == "attn_output":
            # One value feeds all the query heads of its group: they are balanced as one.
            inputs, columns = (_shared(part, config) for part in (inputs, columns))
        powers = alpha * torch.log2(inputs) - (1 - alpha) * torch.log2(columns)
        powers = torch.where((inputs > 0) & (columns > 0), powers, 0.0)
        powers = (powers - powers.median()).round().clamp(-_MOST, _MOST)
        found[stage] = powers.numpy().astype(np.int64)
    return found


def _shared(channels: Tensor, config: ModelConfig) -> Tensor:
    """Return `channels` [num_heads · head_dim] with the greatest of each group of heads in all of them."""
    grouped = channels.reshape(config.num_kv_heads, -1, config.head_dim)
    return grouped.amax(1, keepdim=True).expand(grouped.shape).reshape(-1)


def _balanced(inputs: Inputs, exponents: Exponents) -> dict[str, Tensor]:
    return {stage: torch.ldexp(found, torch.from_numpy(-exponents[stage])) for stage, found in inputs.items()}


def _ends(extremes: Inputs, exponents: Exponents) -> dict[str, Histogram]:
    """Return a histogram of each stage's balanced inputs in which nothing is counted yet."""
    scaled = _balanced(extremes, exponents)
    return {
        stage: Histogram(low=float(found[0].min()), high=float(found[1].max()), counts=np.zeros(BINS))
        for stage, found in scaled.items()
    }


def _count(walk: Iterator[Inputs], ends: Mapping[str, Histogram], exponents: Exponents) -> dict[str, Histogram]:
    """Return the histograms of all balanced inputs of a walk."""
    counts = {stage: np.zeros(BINS) for stage in ends}
    for window in walk:
        for stage, inputs in _balanced(window, exponents).items():
            counts[stage] += torch.histc(inputs, BINS, ends[stage].low, ends[stage].high).numpy()
    return {stage: replace(found, counts=counts[stage]) for stage, found in ends.items()}


def _fit(
    weights: Weights, stage: str, inputs: Tensor, exponents: NDArray[np.int64], seen: Histogram, method: Method
) -> Range:
    """Return the range of a stage, and whether its integers are good enough for what is made of `inputs` [tokens, columns]."""
    matrices = [torch.ldexp(weights[f"{kind}.weight"], torch.from_numpy(exponents)) for kind in STAGES[stage]]
    scale, zero = spell(*METHODS[method.name](seen))
    codes = (inputs / scale).round_().add_(zero).clamp_(0, LEVELS - 1)
    error = _worst(codes.sub_(zero).mul_(scale).sub_(inputs), inputs, matrices)
    return Range(scale=scale, zero=zero, error=float(f"{error:.3g}"), static=error <= method.limit)


def _worst(lost: Tensor, inputs: Tensor, matrices: Sequence[Tensor]) -> float:
    """Return the relative error of the products with the matrices W: that of all tokens together or of a usual one, the larger.

    √(Σ‖lost·Wᵀ‖² / Σ‖x·Wᵀ‖²) is decided by the few tokens whose values are huge: it grows where those are cut off.
    √mean(‖lost·Wᵀ‖² / ‖x·Wᵀ‖²) counts each token alike: it grows where a step that is made for the huge ones drowns all others.
    """
    worst = 0.0
    for matrix in matrices:
        wrong, right = ((part @ matrix.T).square().sum(-1) for part in (lost, inputs))
        together = wrong.sum() / right.sum().clamp_min(1e-30)
        usual = (wrong / right.clamp_min(1e-30)).mean()
        worst = max(worst, float(torch.maximum(together, usual).sqrt()))
    return worst
