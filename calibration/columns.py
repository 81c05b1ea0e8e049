"""Sums of squared inputs, column by column, of every linear layer of the float model: what an importance matrix holds.

One block in memory at a time, run over all windows before the next is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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
def column_sums(source: TensorReader, tokens: NDArray[np.int64], *, head: bool = False) -> Iterator[Sums]:
    """Yield for each block, and at last for the head if asked, Σx² [columns] in float64 by GGUF tensor name.

    `tokens` [windows, length]. Raises `InputError` where a block makes numbers that are not finite.
    """
    hidden = embed(source, tokens)
    turn = rotation(source.config, tokens.shape[1])
    for layer in range(source.config.num_layers):
        weights = load_block(source, layer)
        sums: Sums = {}
        for window in hidden:
            window.copy_(_block(weights, source.config, window, turn, sums))
        if not bool(torch.isfinite(hidden).all()):
            raise InputError(f"block {layer} makes numbers that are not finite on this text; the weights are broken")
        yield {f"blk.{layer}.{kind}.weight": sums[read] for read, kinds in READERS.items() for kind in kinds}
    if head:
        norm = next(spec for spec in source.tensors if spec.kind == "output_norm")
        weight = torch.from_numpy(np.array(source.read_rows(norm.name, 0, norm.rows))).reshape(norm.shape)
        sums = {}
        for window in hidden:
            _add(sums, "head", rms_norm(window, weight, source.config.rms_norm_eps))
        yield {"token_embd.weight" if source.config.tied else "output.weight": sums["head"]}


def _block(weights: Weights, config: ModelConfig, hidden: Tensor, turn: Rotation, sums: Sums) -> Tensor:
    """Return the hidden states after a block, as `models.block.run_block` does, adding up what its linear layers read."""
    normed = _add(sums, "attention input", attention_input(weights, config, hidden))
    mixed = _add(sums, "attention mix", attention_mix(weights, config, normed, turn))
    hidden = hidden + attention_output(weights, mixed)
    normed = _add(sums, "mlp input", mlp_input(weights, config, hidden))
    return hidden + mlp_output(weights, _add(sums, "mlp inner", mlp_inner(weights, normed)))


def _add(sums: Sums, name: str, inputs: Tensor) -> Tensor:
    found = inputs.square().sum(0, dtype=torch.float64).numpy()
    sums[name] = sums[name] + found if name in sums else found
    return inputs
