"""A quantized model whose scales, minimums and norms can be trained while every code stays what it is.

A stored float16 number p and integers u that the codes fix make a value: `value = Σ p · u` (with q4_0 one p a block, the scale; with
q4_k two, the scale of scales and that of minimums). Trained is the relative change δ of each p and each norm: p · (1 + δ).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from r1q.core.checkpoint import QuantizedCheckpoint
from r1q.core.errors import InputError
from r1q.core.grids import Bytes, bytes_to_floats, float_bytes, pack, unpack
from r1q.core.qtensor import QuantizedTensor
from r1q.core.tensors import TensorSpec
from r1q.distill.network import Network
from r1q.models.config import ModelConfig

Params = Mapping[str, NDArray[np.generic]]
_SCALES = ("scales", "d", "dmin", "m")
_TABLES = ("token_embd", "output")
_ACTIVATIONS = "activations.json"  # beside the config where inputs of linear layers are spelled in 8 bits


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One stored number a block, `base` [rows, blocks], and what it multiplies: `units` int16 [rows, columns]."""

    base: Tensor
    units: Tensor

    def value(self, change: Tensor) -> Tensor:
        """Return base · (1 + change) · units: [rows, columns], float32."""
        rows, columns = self.units.shape
        grouped = self.units.view(rows, self.base.shape[1], -1)
        return ((self.base * (1 + change))[..., None] * grouped).view(rows, columns)


@dataclass(frozen=True, slots=True)
class HealingTensors(Mapping[str, Tensor]):
    """The tensors of a quantized model as its changes make them, at every look anew.

    `changes` are what is trained, by `tensor name/param` for scales and by tensor name for norms.
    """

    fixed: Mapping[str, Tensor]
    terms: Mapping[str, Mapping[str, Term]]
    changes: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        if name in self.terms:
            values = [term.value(self.changes[f"{name}/{param}"]) for param, term in self.terms[name].items()]
            return values[0] if len(values) == 1 else torch.stack(values).sum(0)
        return self.fixed[name] * (1 + self.changes[name]) if name in self.changes else self.fixed[name]

    def __iter__(self) -> Iterator[str]:
        return iter((*self.fixed, *self.terms))

    def __len__(self) -> int:
        return len(self.fixed) + len(self.terms)


def load_healing(checkpoint: QuantizedCheckpoint, config: ModelConfig) -> tuple[Network, dict[str, Tensor]]:
    """Return a quantized model as a network, and its changes, all 0, by name. Embedding and head are not changed.

    Raises `InputError` for a checkpoint without scales to train, or with inputs in another order or 8-bit activations.
    """
    if (checkpoint.sidecar / _ACTIVATIONS).is_file():
        raise InputError(
            f"{checkpoint.path} has 8-bit activations, which were measured on these scales; heal a weight-only one"
        )
    fixed: dict[str, Tensor] = {}
    terms: dict[str, Mapping[str, Term]] = {}
    changes: dict[str, Tensor] = {}
    for spec in checkpoint.tensors:
        if checkpoint.permutation(spec.name) is not None:
            raise InputError(f"{spec.name}: its inputs are coded in order of activation; heal one without act-order")
        if checkpoint.scheme(spec.name).facts.family != "float" and spec.kind not in _TABLES:
            terms[spec.name] = _terms(checkpoint.read(spec.name, 0, spec.rows))
            changes |= {f"{spec.name}/{name}": torch.zeros_like(term.base) for name, term in terms[spec.name].items()}
            continue
        values = np.array(checkpoint.read_rows(spec.name, 0, spec.rows), dtype=np.float32)
        fixed[spec.name] = torch.from_numpy(values).reshape(spec.shape)
        if spec.kind.endswith("norm"):
            changes[spec.name] = torch.zeros(spec.shape)
    if not terms:
        raise InputError(f"{checkpoint.path} has no codes; there is nothing to heal")
    tensors = HealingTensors(fixed=fixed, terms=terms, changes=changes)
    return Network(config=config, specs=checkpoint.tensors, tensors=tensors), changes


def changed_rows(checkpoint: QuantizedCheckpoint, spec: TensorSpec, changes: Mapping[str, Tensor]) -> Bytes | None:
    """Return the stored bytes [rows, row_bytes] of a tensor under `changes`, as the format rounds them; None where none is of it.

    Raises `InputError` where a changed number does not fit float16.
    """
    name, scheme = spec.name, checkpoint.scheme(spec.name)
    stored = checkpoint.packed_rows(name, 0, spec.rows)
    if name in changes:
        values = bytes_to_floats(scheme.grid, stored).reshape(1, -1)
        return float_bytes(scheme.grid, values * (1 + changes[name].detach().numpy().reshape(1, -1)))
    mine = {key.rpartition("/")[2]: change for key, change in changes.items() if key.rpartition("/")[0] == name}
    if not mine:
        return None
    tensor = unpack(scheme, stored, spec.columns)
    params = dict(tensor.params)
    for param, change in mine.items():
        with np.errstate(over="ignore"):  # refused by name
            moved = (params[param].astype(np.float32) * (1 + change.detach().numpy())).astype(np.float16)
        if not np.isfinite(moved).all():
            raise InputError(f"{name}: a trained scale does not fit float16; take a lower --lr")
        params[param] = moved
    return pack(scheme, tensor.codes, params)


def _terms(tensor: QuantizedTensor) -> dict[str, Term]:
    """Return the float16 numbers of a tensor with what each multiplies: its values where that one is 1 and the others 0."""
    present = [name for name in _SCALES if name in tensor.params and tensor.params[name].dtype == np.float16]
    found = {}
    for name in present:
        alone = {
            other: np.full_like(value, 1.0 if other == name else 0.0) if other in present else value
            for other, value in tensor.params.items()
        }
        units = QuantizedTensor(scheme=tensor.scheme, codes=tensor.codes, params=alone).dequantize()
        whole = units.astype(np.int16)
        assert np.array_equal(whole, units), "codes and what the grid stores beside them are whole numbers"
        base = torch.from_numpy(tensor.params[name].astype(np.float32))
        found[name] = Term(base=base, units=torch.from_numpy(whole))
    return found
