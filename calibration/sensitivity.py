"""How much the model's answers feel an error in each weight: the diagonal of the Fisher information, in Kronecker form.

To second order the divergence that small changes ΔW of all matrices cause is ½ Σ ΔW²·F (Martens 2020, eq. 14), F the Fisher
information of the model's own predictions. Its diagonal is taken as a product: F[i, j] = mean g_i² · mean x_j², with x what a layer
reads and g the gradient, at what it returns, of the log-probability of a token drawn from the model's own prediction.

Two walks over the blocks: forward, keeping the hidden states before each block, and backward; one block's weights in memory at a time,
all of its experts among them. An expert's g² is a mean over all tokens, those that were not sent to it as zeros, its x² over its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.overrides import TorchFunctionMode

from r1q.core.errors import InputError
from r1q.models.block import run_block
from r1q.models.forward import TensorReader, embed, load_block
from r1q.models.linear import rms_norm
from r1q.models.rope import rotation

_CHUNK = 128  # positions whose logits exist at once
_ROWS = 8192  # rows of the head that are read at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """`rows` [rows]: mean g²; `columns` [columns]: mean x²; float64. An error ΔW of the matrix costs ½ Σ rows·ΔW²·columns nats."""

    rows: NDArray[np.float64]
    columns: NDArray[np.float64]


def sensitivities(
    source: TensorReader, tokens: NDArray[np.int64], *, seed: int = 0
) -> Iterator[Mapping[str, Sensitivity]]:
    """Yield the sensitivities of the head, of each block from the last to the first, and of the embedding, by own name.

    What no token was sent to has none, nor has a matrix that is no linear layer (attn_k_b of latent attention).

    `tokens` [windows, length]; the hidden states of all blocks are kept, in bfloat16. A tied table is yielded as `token_embd.weight`
    twice, once in each of its uses. Raises `InputError` where a block makes numbers that are not finite.
    """
    config = source.config
    turn = rotation(config, tokens.shape[1])
    hidden, kept = embed(source, tokens), []
    with torch.no_grad():
        for layer in range(config.num_layers):
            kept.append(hidden.to(torch.bfloat16))
            weights = dict(load_block(source, layer))
            hidden = torch.stack([run_block(weights, config, window, turn) for window in hidden])
    if not bool(torch.isfinite(hidden).all()):
        raise InputError("the model makes numbers that are not finite on this text; its weights are broken")
    gradient, found = _head(source, hidden, seed)
    yield found
    for layer in reversed(range(config.num_layers)):
        weights = dict(load_block(source, layer))
        sums = _Sums({id(tensor): name for name, tensor in weights.items()})
        before = kept.pop().to(torch.float32)
        for number, window in enumerate(before):
            gradient[number] = _backward(weights, config, window, turn, gradient[number], sums)
        yield {f"blk.{layer}.{name}": value for name, value in sums.means(tokens.size).items()}
    yield {"token_embd.weight": _embedding(source, gradient)}


def _backward(
    weights: Mapping[str, Tensor], config: Any, window: Tensor, turn: Any, gradient: Tensor, sums: _Sums
) -> Tensor:
    """Return the gradient before a block from that after it, adding up what its linear layers read and receive."""
    leaf = window.clone().requires_grad_()
    with torch.enable_grad(), sums:
        after = run_block(weights, config, leaf, turn)
    (before,) = torch.autograd.grad(after, leaf, gradient)
    return before


class _Sums(TorchFunctionMode):
    """Sums of squares of what each linear layer reads and of the gradients it receives, by the weight it multiplies with."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self._names = names
        self._read: dict[str, Tensor] = {}
        self._tokens: Counter[str] = Counter()
        self._received: dict[str, Tensor] = {}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is F.linear and id(args[1]) in self._names:
            name = self._names[id(args[1])]
            _add(self._read, name, args[0].detach())
            self._tokens[name] += args[0].shape[:-1].numel()
            result.register_hook(lambda gradient: _add(self._received, name, gradient))
        return result

    def means(self, count: int) -> dict[str, Sensitivity]:
        """Return the sensitivities of every layer that was used, per token of `count`."""
        return {
            name: Sensitivity(rows=(self._received[name] / count).numpy(), columns=(read / self._tokens[name]).numpy())
            for name, read in self._read.items()
        }


def _add(sums: dict[str, Tensor], name: str, values: Tensor) -> None:
    squares = values.flatten(0, -2).square().sum(0, dtype=torch.float64)
    sums[name] = sums[name] + squares if name in sums else squares


def _head(source: TensorReader, hidden: Tensor, seed: int) -> tuple[Tensor, Mapping[str, Sensitivity]]:
    """Return the gradient [windows, length, hidden_size] behind the last block, and the head's sensitivity.

    A target is drawn at each position by the Gumbel trick, so that the head can be read in slabs of rows.
    """
    config = source.config
    norm = next(spec for spec in source.tensors if spec.kind == "output_norm")
    gamma = torch.from_numpy(np.array(source.read_rows(norm.name, 0, norm.rows))).reshape(norm.shape)
    name = "token_embd" if config.tied else "output"
    spec = next(spec for spec in source.tensors if spec.kind == name)
    generator = torch.Generator().manual_seed(seed)
    flat = hidden.flatten(0, 1)
    gradient = torch.empty_like(flat)
    rows, columns = torch.zeros(spec.rows, dtype=torch.float64), torch.zeros(spec.columns, dtype=torch.float64)
    for start in range(0, len(flat), _CHUNK):
        leaf = flat[start : start + _CHUNK].clone().requires_grad_()
        with torch.enable_grad():
            normed = rms_norm(leaf, gamma, config.rms_norm_eps)
        given = normed.detach()
        logits = torch.cat([given @ slab.T for slab in _slabs(source, spec)], dim=1)
        noise = torch.empty_like(logits).exponential_(generator=generator)
        target = (logits - noise.log()).argmax(-1, keepdim=True)
        error = -logits.softmax(-1)
        error.scatter_add_(1, target, torch.ones_like(target, dtype=error.dtype))
        rows += error.square().sum(0, dtype=torch.float64)
        columns += given.square().sum(0, dtype=torch.float64)
        back, first = torch.zeros_like(given), 0
        for slab in _slabs(source, spec):
            back += error[:, first : first + len(slab)] @ slab
            first += len(slab)
        (gradient[start : start + _CHUNK],) = torch.autograd.grad(normed, leaf, back)
    found = Sensitivity(rows=_smoothed(rows / len(flat)).numpy(), columns=(columns / len(flat)).numpy())
    return gradient.reshape(hidden.shape), {f"{name}.weight": found}


def _smoothed(rows: Tensor) -> Tensor:
    """Half each token's own weight, half that of the mean: text this short says little of rare tokens."""
    return (rows + rows.mean()) / 2


def _slabs(source: TensorReader, spec: Any) -> Iterator[Tensor]:
    for start in range(0, spec.rows, _ROWS):
        yield torch.from_numpy(np.array(source.read_rows(spec.name, start, min(start + _ROWS, spec.rows))))


def _embedding(source: TensorReader, gradient: Tensor) -> Sensitivity:
    """Return the sensitivity of the table as an embedding: every row as likely as any other."""
    spec = next(spec for spec in source.tensors if spec.kind == "token_embd")
    columns = gradient.flatten(0, 1).square().mean(0, dtype=torch.float64)
    return Sensitivity(rows=np.full(spec.rows, 1 / spec.rows), columns=columns.numpy())
