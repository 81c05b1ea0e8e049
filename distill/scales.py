"""A quantized model whose scales, minimums and norms can be trained while every code stays what it is.

A block of codes is worth `step · level − floor`; step and floor are float16 numbers that the file stores, times whole numbers beside
them that stay (with q4_0 one step a block; with q4_k a scale of eight 6-bit steps and one of eight floors). Trained is the relative
change δ of each stored float16 number and of each norm: p · (1 + δ).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from r1q.core.checkpoint import QuantizedCheckpoint
from r1q.core.errors import InputError
from r1q.core.grids import Bytes, bytes_to_floats, float_bytes, pack, steps, unpack
from r1q.core.qtensor import QuantizedTensor
from r1q.core.tensors import TensorSpec
from r1q.distill.network import Network
from r1q.models.config import ModelConfig

_TABLES = ("token_embd", "output")
_ACTIVATIONS = "activations.json"  # beside the config where inputs of linear layers are spelled in 8 bits


@dataclass(frozen=True, slots=True, kw_only=True)
class Coded:
    """A matrix: `level` int8 (int16 where that is too narrow) [rows, columns], `step` and `floor` float32 [rows, groups].

    `stored` names the float16 numbers, [rows, blocks], that step and floor are multiples of: one name, or two.
    """

    level: Tensor
    step: Tensor
    floor: Tensor | None
    stored: Mapping[str, tuple[int, ...]]

    def values(self, changes: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Return the matrix [rows, columns] in `dtype` under relative changes [rows, blocks] by stored name."""
        ends = [_moved(end, changes[name]) for end, name in zip((self.step, self.floor), self.stored, strict=False)]
        return _Values.apply(self.level, dtype, *ends)  # type: ignore[no-any-return, no-untyped-call]


@dataclass(frozen=True, slots=True)
class HealingTensors(Mapping[str, Tensor]):
    """The tensors of a quantized model as its changes make them, at every look anew, matrices in `dtype`.

    `changes` are what is trained, by `tensor name/stored name` for scales and by tensor name for norms.
    """

    fixed: Mapping[str, Tensor]
    coded: Mapping[str, Coded]
    changes: Mapping[str, Tensor]
    dtype: torch.dtype

    def __getitem__(self, name: str) -> Tensor:
        if name in self.coded:
            found = self.coded[name]
            return found.values({part: self.changes[f"{name}/{part}"] for part in found.stored}, self.dtype)
        return self.fixed[name] * (1 + self.changes[name]) if name in self.changes else self.fixed[name]

    def __iter__(self) -> Iterator[str]:
        return iter((*self.fixed, *self.coded))

    def __len__(self) -> int:
        return len(self.fixed) + len(self.coded)


class _Values(torch.autograd.Function):
    """step · level − floor, keeping for the way back the levels alone: a byte a weight."""

    @staticmethod
    def forward(ctx: Any, level: Tensor, dtype: torch.dtype, step: Tensor, floor: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(level)
        ctx.groups = step.shape[1]
        values = level.view(len(level), ctx.groups, -1) * step[..., None]
        if floor is not None:
            values -= floor[..., None]
        return values.view_as(level).to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (level,) = ctx.saved_tensors
        gradient = gradients[0].float().view(len(level), ctx.groups, -1)
        of_floor = -gradient.sum(-1) if len(ctx.needs_input_grad) > 3 else None
        of_step = gradient.mul_(level.view_as(gradient)).sum(-1)
        return (None, None, of_step, of_floor)[: len(ctx.needs_input_grad)]


def _moved(base: Tensor | None, change: Tensor) -> Tensor:
    """Return base · (1 + change): [rows, groups] of numbers of which each change [rows, blocks] moves some neighbours."""
    assert base is not None
    rows, blocks = change.shape
    return (base.view(rows, blocks, -1) * (1 + change)[..., None]).view_as(base)


def load_healing(
    checkpoint: QuantizedCheckpoint, config: ModelConfig, *, matrices: torch.dtype = torch.float32
) -> tuple[Network, dict[str, Tensor]]:
    """Return a quantized model as a network, and its changes, all 0, by name. Embedding and head are not changed.

    Its matrices are made in the dtype `matrices`. Raises `InputError` for a checkpoint without scales to train, with inputs in
    another order, with 8-bit activations or with experts.
    """
    refuse_unhealable(checkpoint)
    fixed: dict[str, Tensor] = {}
    coded: dict[str, Coded] = {}
    changes: dict[str, Tensor] = {}
    for spec in checkpoint.tensors:
        if checkpoint.scheme(spec.name).facts.family != "float" and spec.kind not in _TABLES:
            coded[spec.name] = found = _coded(checkpoint.read(spec.name, 0, spec.rows))
            changes |= {f"{spec.name}/{name}": torch.zeros(shape) for name, shape in found.stored.items()}
            continue
        values = np.array(checkpoint.read_rows(spec.name, 0, spec.rows), dtype=np.float32)
        dtype = matrices if len(spec.shape) > 1 else torch.float32
        fixed[spec.name] = torch.from_numpy(values).reshape(spec.shape).to(dtype)
        if spec.kind.endswith("norm"):
            changes[spec.name] = torch.zeros(spec.shape)
    tensors = HealingTensors(fixed=fixed, coded=coded, changes=changes, dtype=matrices)
    return Network(config=config, specs=checkpoint.tensors, tensors=tensors), changes


def refuse_unhealable(checkpoint: QuantizedCheckpoint) -> None:
    """Raise `InputError` where a checkpoint cannot be healed."""
    if (checkpoint.sidecar / _ACTIVATIONS).is_file():
        raise InputError(
            f"{checkpoint.path} has 8-bit activations, which were measured on these scales; heal a weight-only one"
        )
    for spec in checkpoint.tensors:
        if checkpoint.permutation(spec.name) is not None:
            raise InputError(f"{spec.name}: its inputs are coded in order of activation; heal one without act-order")
        if spec.expert is not None:
            raise InputError(f"{spec.name}: a mixture of experts; only dense models can be healed")
    families = {checkpoint.scheme(spec.name).facts.family for spec in checkpoint.tensors if spec.kind not in _TABLES}
    if families <= {"float"}:
        raise InputError(f"{checkpoint.path} has no codes; there is nothing to heal")


def changed_rows(checkpoint: QuantizedCheckpoint, spec: TensorSpec, changes: Mapping[str, Tensor]) -> Bytes | None:
    """Return the stored bytes [rows, row_bytes] of a tensor under `changes`, as the format rounds them; None where none is of it.

    Raises `InputError` where a changed number does not fit float16.
    """
    name, scheme = spec.name, checkpoint.scheme(spec.name)
    if name in changes:
        values = bytes_to_floats(scheme.grid, checkpoint.packed_rows(name, 0, spec.rows)).reshape(1, -1)
        return float_bytes(scheme.grid, values * (1 + changes[name].detach().numpy().reshape(1, -1)))
    mine = {key.rpartition("/")[2]: change for key, change in changes.items() if key.rpartition("/")[0] == name}
    if not mine:
        return None
    tensor = unpack(scheme, checkpoint.packed_rows(name, 0, spec.rows), spec.columns)
    params = dict(tensor.params)
    for param, change in mine.items():
        with np.errstate(over="ignore"):  # refused by name
            moved = (params[param].astype(np.float32) * (1 + change.detach().numpy())).astype(np.float16)
        if not np.isfinite(moved).all():
            raise InputError(f"{name}: a trained scale does not fit float16; take a lower --lr")
        params[param] = moved
    return pack(scheme, tensor.codes, params)


def _coded(tensor: QuantizedTensor) -> Coded:
    """Take a quantized matrix apart."""
    rows, columns = tensor.codes.shape
    found, params = steps(tensor.scheme, tensor.params, columns), tensor.params
    shape = (rows, columns // found.group)
    wide = tensor.codes.astype(np.float32) if found.table is None else found.table[tensor.codes]
    whole = wide.reshape(*shape, -1) - found.zero[..., None]
    narrow = np.int8 if np.abs(whole).max(initial=0) < 128 else np.int16
    # Minimums are numbers of their own in float16; where they are whole numbers of `dmin`, that is.
    floors = [name for name in ("dmin", "m") if name in params and params[name].dtype == np.float16]
    names = ["scales" if "scales" in params else "d", *floors]
    return Coded(
        level=torch.from_numpy(whole.astype(narrow).reshape(rows, columns)),
        step=torch.from_numpy(np.array(np.broadcast_to(found.scale, shape), dtype=np.float32)),
        floor=torch.from_numpy(np.array(np.broadcast_to(found.offset, shape), dtype=np.float32)) if floors else None,
        stored={name: params[name].shape for name in names},
    )
