"""Sums of squared inputs, column by column, of every linear layer of the float model: what an importance matrix holds.

One block in memory at a time, run over all windows before the next is read; of its experts, one (see `expert_columns.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from r1q.calibration.expert_columns import expert_sums, latent_sums
from r1q.core.errors import InputError
from r1q.models.block import (
    Weights,
    attention_input,
    attention_mix,
    attention_output,
    mlp_inner,
    mlp_input,
    mlp_output,
    rms_norm,
)
from r1q.models.config import ModelConfig
from r1q.models.forward import TensorReader, embed, load_block
from r1q.models.rope import Rotation, rotation

Sums = dict[str, NDArray[np.float64]]

READERS: Mapping[str, tuple[str, ...]] = {
    "attention input": ("attn_q", "attn_k", "attn_v"),
    "attention mix": ("attn_output",),
    "mlp input": ("ffn_gate", "ffn_up"),
    "mlp inner": ("ffn_down",),
}


@torch.inference_mode()
def column_sums(
    source: TensorReader,
    tokens: NDArray[np.int64],
    *,
    head: bool = False,
    seen: dict[str, list[int]] | None = None,
) -> Iterator[Sums]:
    """Yield for each block, and at last for the head if asked, Σx² in float64 by GGUF tensor name: [columns], or [parts, columns].

    `tokens` [windows, length]. `seen` is given how many tokens each expert saw, by name.

    Raises `InputError` where a block makes numbers that are not finite.
    """
    hidden = embed(source, tokens)
    turn = rotation(source.config, tokens.shape[1])
    for layer in range(source.config.num_layers):
        weights = load_block(source, layer)
        counts: dict[str, list[int]] = {}
        sums = _block_sums(weights, source.config, layer, hidden, turn, counts)
        if not bool(torch.isfinite(hidden).all()):
            raise InputError(f"block {layer} makes numbers that are not finite on this text; the weights are broken")
        if seen is not None:
            seen.update({f"blk.{layer}.{kind}.weight": tokens_of for kind, tokens_of in counts.items()})
        yield {f"blk.{layer}.{kind}.weight": found for kind, found in sums.items()}
    if head:
        norm = next(spec for spec in source.tensors if spec.kind == "output_norm")
        weight = torch.from_numpy(np.array(source.read_rows(norm.name, 0, norm.rows))).reshape(norm.shape)
        sums = {}
        for window in hidden:
            _add(sums, "head", rms_norm(window, weight, source.config.rms_norm_eps))
        yield {"token_embd.weight" if source.config.tied else "output.weight": sums["head"]}


def _block_sums(
    weights: Weights, config: ModelConfig, layer: int, hidden: Tensor, turn: Rotation, seen: dict[str, list[int]]
) -> Sums:
    """Run a block on `hidden` [windows, length, hidden_size] in place, and return what its matrices read, by kind."""
    read: Sums = {}  # by READERS
    sums: Sums = {}  # by kind
    sparse = config.is_sparse(layer)
    for window in hidden:
        if config.latent is None:
            window += _attention(weights, config, window, turn, read)
        else:
            found, change = latent_sums(weights, config, config.latent, window, turn)
            window += change
            sums = {kind: sums[kind] + one if kind in sums else one for kind, one in found.items()}
        if not sparse:
            window += _mlp(weights, config, window, read)
    if sparse and config.experts is not None:
        sums |= expert_sums(weights, config, config.experts, hidden, seen)
    return {kind: read[name] for name, kinds in READERS.items() if name in read for kind in kinds} | sums


def _attention(weights: Weights, config: ModelConfig, hidden: Tensor, turn: Rotation, sums: Sums) -> Tensor:
    normed = _add(sums, "attention input", attention_input(weights, config, hidden))
    return attention_output(weights, _add(sums, "attention mix", attention_mix(weights, config, normed, turn)))


def _mlp(weights: Weights, config: ModelConfig, hidden: Tensor, sums: Sums) -> Tensor:
    normed = _add(sums, "mlp input", mlp_input(weights, config, hidden))
    return mlp_output(weights, _add(sums, "mlp inner", mlp_inner(weights, normed)))


def _add(sums: Sums, name: str, inputs: Tensor) -> Tensor:
    found = inputs.square().sum(0, dtype=torch.float64).numpy()
    sums[name] = sums[name] + found if name in sums else found
    return inputs
