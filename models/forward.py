"""The float32 forward pass over many windows, one decoder block in memory at a time.

Each block's weights are read once and run over every window before the next block is read; the embedding is gathered only for
tokens that occur; the head is applied in slabs of rows. Memory holds the hidden states of all windows, one block, and the logits
of a few windows, whatever the number of layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from r1q.core.errors import InputError
from r1q.core.tensors import TensorSpec
from r1q.models.block import Weights, rms_norm, run_attention, run_block, run_mlp
from r1q.models.block_weights import BlockWeights
from r1q.models.config import ModelConfig
from r1q.models.rope import Rotation, rotation

Tokens = NDArray[np.int64]
Floats = NDArray[np.float32]
Device = torch.device | str

_SLAB_BYTES = 64 << 20
_EMBEDDING_ROWS = 1024


class RowReader(Protocol):
    """Weights by name, some rows at a time; a vector is one row."""

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """Every tensor of the model."""

    def read_rows(self, name: str, start: int, stop: int) -> Floats:
        """Return rows [start, stop) in float32."""


class TensorReader(RowReader, Protocol):
    """A model to run: its weights and its config. `ModelSource` is one."""

    @property
    def config(self) -> ModelConfig:
        """The model's config."""


@dataclass(frozen=True, slots=True)
class Configured:
    """Weights that carry no config of their own (a QuantizedCheckpoint), with the config they belong to."""

    config: ModelConfig
    weights: RowReader

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """Every tensor of the model."""
        return self.weights.tensors

    def read_rows(self, name: str, start: int, stop: int) -> Floats:
        """Return rows [start, stop) in float32."""
        return self.weights.read_rows(name, start, stop)


def logits(
    source: TensorReader,
    tokens: Tokens,
    *,
    first: int = 0,
    device: Device = "cpu",
    memory: int = 1 << 30,
    rounded: bool = False,
) -> Iterator[Floats]:
    """Yield for each window of `tokens` [windows, length] the logits [length − first, vocab_size] of positions `first` on.

    `memory` bounds the bytes of logits held at once (at least one window's): fewer bytes read the head more often. `rounded` rounds
    the hidden states to bfloat16 after every block: the noise of a model that computes in 16 bits.
    Raises `InputError` for a token outside the vocabulary, and where a block or the head makes numbers that are not finite.
    """
    if tokens.ndim != 2 or not 0 <= first <= tokens.shape[1]:
        raise ValueError(f"tokens of shape {tokens.shape} with first = {first}")
    hidden = _through_blocks(source, tokens, device, rounded=rounded)
    window_bytes = 4 * (tokens.shape[1] - first) * source.config.vocab_size
    count = max(1, memory // max(1, window_bytes))
    for start in range(0, len(tokens), count):
        yield from _apply_head(source, hidden[start : start + count, first:]).numpy()


def final_states(source: TensorReader, tokens: Tokens, device: Device = "cpu") -> Floats:
    """Return what the head reads of `tokens` [windows, length]: [windows, length, hidden_size]. Raises as `logits` does."""
    hidden = _through_blocks(source, tokens, device)
    with torch.inference_mode():
        for window in hidden:
            window.copy_(rms_norm(window, _last_norm(source, hidden.device), source.config.rms_norm_eps))
    states: Floats = hidden.numpy(force=True)
    return states


def _through_blocks(source: TensorReader, tokens: Tokens, device: Device, *, rounded: bool = False) -> Tensor:
    """Return the hidden states [windows, length, hidden_size] behind the last block."""
    hidden = embed(source, tokens, device)
    turn = rotation(source.config, tokens.shape[1], device)
    for layer in range(source.config.num_layers):
        weights = load_block(source, layer, device)
        _run_block_in_place(weights, source.config, hidden, turn, layer)
        del weights  # before the next block is read: one block at a time
        if rounded:
            hidden = hidden.bfloat16().float()
    return hidden


@torch.inference_mode()
def embed(source: RowReader, tokens: Tokens, device: Device = "cpu") -> Tensor:
    """Return the embeddings [windows, length, hidden_size] of `tokens`; only stretches of rows that occur are read."""
    spec = _by_kind(source, "token_embd")
    used = np.unique(tokens)
    if len(used) and not 0 <= used[0] <= used[-1] < spec.rows:
        bad = used[0] if used[0] < 0 else used[-1]
        raise InputError(
            f"token {bad} is outside the model's vocabulary of {spec.rows}; take the tokenizer that belongs to the model"
        )
    table = torch.empty((len(used), spec.columns), device=device)
    for group in np.split(np.arange(len(used)), np.flatnonzero(np.diff(used // _EMBEDDING_ROWS)) + 1):
        if len(group):
            low, high = int(used[group[0]]), int(used[group[-1]]) + 1
            rows = source.read_rows(spec.name, low, high)
            table[group[0] : group[-1] + 1] = _tensor(rows[used[group] - low], device)
    places = torch.from_numpy(np.searchsorted(used, tokens)).to(device)
    return table[places]


def load_block(source: RowReader, layer: int, device: Device = "cpu") -> Weights:
    """Return the weights of block `layer` by `kind.part`, in float32; a routed expert's are read when they are looked up."""

    def read(spec: TensorSpec) -> Tensor:
        return _tensor(source.read_rows(spec.name, 0, spec.rows), device).reshape(spec.shape)

    return BlockWeights({spec.key: spec for spec in source.tensors if spec.layer == layer}, read)


@torch.inference_mode()
def _run_block_in_place(weights: Weights, config: ModelConfig, hidden: Tensor, turn: Rotation, layer: int) -> None:
    sparse = config.is_sparse(layer)
    for window in hidden:
        window.copy_((run_attention if sparse else run_block)(weights, config, window, turn))
    if sparse:  # over all windows at once: each expert is read once
        hidden.copy_(run_mlp(weights, config, hidden))
    for window in hidden:
        _require_finite(window, f"block {layer}")


@torch.inference_mode()
def _apply_head(source: TensorReader, hidden: Tensor) -> Tensor:
    """Return the logits [windows, positions, vocab_size], on the CPU, of the last block's hidden states."""
    normed = rms_norm(hidden, _last_norm(source, hidden.device), source.config.rms_norm_eps)
    head = _by_kind(source, "token_embd" if source.config.tied else "output")
    result = torch.empty((*hidden.shape[:-1], head.rows))
    slab_rows = max(1, _SLAB_BYTES // (4 * head.columns))
    for start in range(0, head.rows, slab_rows):
        stop = min(start + slab_rows, head.rows)
        result[..., start:stop] = normed @ _tensor(source.read_rows(head.name, start, stop), hidden.device).T
    _require_finite(result, head.name)
    return result


def _last_norm(source: RowReader, device: Device) -> Tensor:
    norm = _by_kind(source, "output_norm")
    return _tensor(source.read_rows(norm.name, 0, norm.rows), device).reshape(norm.shape)


def _require_finite(values: Tensor, where: str) -> None:
    if not torch.isfinite(values).all():
        raise InputError(f"{where} made numbers that are not finite; the weights are broken, or too large for float32")


def _by_kind(source: RowReader, kind: str) -> TensorSpec:
    return next(spec for spec in source.tensors if spec.kind == kind)


def _tensor(rows: Floats, device: Device) -> Tensor:
    # torch wants to own writable memory; rows fresh from a file are not copied.
    return torch.from_numpy(np.require(rows, dtype=np.float32, requirements=["C", "W"])).to(device)
