"""BalancedSource: a float model whose channels were balanced by powers of two. It computes the same, bit for bit, and codes better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from r1q.core.activations import STAGE_OF, Activations
from r1q.core.files import sha256_file
from r1q.core.qtensor import Floats
from r1q.core.tensors import TensorSpec
from r1q.models.config import ModelConfig
from r1q.models.source import ModelSource

_NORMS = {"attn_norm": "attn_q", "ffn_norm": "ffn_gate"}
_MADE_BY = {
    "attn_v": "attn_output",
    "ffn_up": "ffn_down",
}  # whose rows make, without a norm between, what a later stage reads


class BalancedSource:
    """A `quantize.source.FloatSource` with a config: `source` with the exponents of `activations` folded in."""

    def __init__(self, source: ModelSource, activations: Activations, file: Path) -> None:
        """`file` holds `activations`: it goes with the checkpoint, and its hash into the fingerprint."""
        self._source, self._activations, self._file = source, activations, file
        self._specs = {spec.name: spec for spec in source.tensors}

    @property
    def config(self) -> ModelConfig:
        """The model's config."""
        return self._source.config

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """Every tensor of the model."""
        return self._source.tensors

    def read_rows(self, name: str, start: int, stop: int) -> Floats:
        """Return rows [start, stop) of the balanced tensor in float32; a vector is one row, flat."""
        values, spec = self._source.read_rows(name, start, stop), self._specs[name]
        layer = spec.layer
        if layer is None:
            return values
        if spec.kind in _NORMS:
            return _scaled(values, -self._powers(layer, _NORMS[spec.kind]))
        if spec.kind not in STAGE_OF:
            return values
        if spec.is_matrix:
            values = _scaled(values, self._powers(layer, STAGE_OF[spec.kind]))
        if spec.kind not in _MADE_BY:
            return values
        made = -self._made(layer, spec.kind)
        return _scaled(values, made[start:stop, None] if spec.is_matrix else made)

    def fingerprint(self) -> Mapping[str, str]:
        """Return the source's sums and that of the activations."""
        return {**self._source.fingerprint(), self._file.name: sha256_file(self._file)}

    def sidecars(self) -> Sequence[Path]:
        """Return the files that belong to the model, the activations among them."""
        return [*self._source.sidecars(), self._file]

    def _powers(self, layer: int, stage: str) -> NDArray[np.int64]:
        return np.array(self._activations.exponents[layer, stage], dtype=np.int64)

    def _made(self, layer: int, kind: str) -> NDArray[np.int64]:
        """Return by which power the rows of `kind` are divided: those of its reader's columns, one of each group of heads."""
        powers = self._powers(layer, _MADE_BY[kind])
        if kind != "attn_v":
            return powers
        grouped = powers.reshape(self.config.num_kv_heads, -1, self.config.head_dim)
        return grouped[:, 0].reshape(-1)


def _scaled(values: Floats, powers: NDArray[np.int64]) -> Floats:
    scaled: Floats = np.ldexp(values, powers.astype(np.int32))
    return scaled
