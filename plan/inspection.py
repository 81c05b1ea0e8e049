"""Inspection: what a checkpoint or artifact is, from its headers and settings files; a value for people and machines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

Shown = int | float | bool | str | None | Mapping[str, object] | Sequence[object]
LONG = 8  # a longer list is shown by its length and first items
_FIRST = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRow:
    """One tensor: its grid or dtype, shape, weights and stored bytes (scales and zeros included).

    `weights` is 0 for what belongs to other tensors (scales, buffers) and None where packing hides the number. `error` is the
    relative root-mean-square error against the source, where a manifest tells it.
    """

    name: str
    grid: str
    shape: tuple[int, ...]
    weights: int | None
    bytes: int
    error: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GridRow:
    """All tensors of one grid. `weights` None: unknown."""

    grid: str
    tensors: int
    weights: int | None
    bytes: int

    @property
    def bits_per_weight(self) -> float | None:
        """Stored bits a weight, None where there is no weight or their number is unknown."""
        return 8 * self.bytes / self.weights if self.weights else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What metadata says of the model. None: it does not say."""

    architecture: str
    context: int | None
    vocabulary: int | None
    sizes: Mapping[str, int]
    tied: bool | None
    chat_template: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What was found at `path`. Texts are as the files spell them: make them printable before a terminal sees them.

    `file_bytes` is the size of the files with weights; `metadata` values are shortened (see `shortened`); `made_by`, `fallbacks`,
    `notes` and `beside` (artifacts next to a checkpoint) are lines.
    """

    path: Path
    format: str
    model: ModelFacts
    tensors: tuple[TensorRow, ...]
    file_bytes: int
    metadata: Mapping[str, Shown]
    made_by: tuple[str, ...] = ()
    fallbacks: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(row.bytes for row in self.tensors)

    @property
    def weights(self) -> int | None:
        """Number of weights, None where packing hides a part of it."""
        return _total(self.tensors)

    @property
    def bits_per_weight(self) -> float | None:
        """True bits per weight: scales, norms and float tensors included, metadata not."""
        return 8 * self.data_bytes / self.weights if self.weights else None

    def grids(self) -> list[GridRow]:
        """Return a row for each grid, the one with most bytes first."""
        by_grid: dict[str, list[TensorRow]] = {}
        for row in self.tensors:
            by_grid.setdefault(row.grid, []).append(row)
        rows = [
            GridRow(grid=grid, tensors=len(found), weights=_total(found), bytes=sum(row.bytes for row in found))
            for grid, found in by_grid.items()
        ]
        return sorted(rows, key=lambda row: -row.bytes)

    def to_dict(self) -> dict[str, object]:
        """Return everything as JSON can hold it; numbers that are none become text."""
        model = asdict(self.model)
        value = {
            "path": str(self.path), "format": self.format, **model, "weights": self.weights,
            "data_bytes": self.data_bytes, "file_bytes": self.file_bytes, "bits_per_weight": self.bits_per_weight,
            "grids": [{**asdict(row), "bits_per_weight": row.bits_per_weight} for row in self.grids()],
            "made_by": self.made_by, "fallbacks": self.fallbacks, "notes": self.notes, "beside": self.beside,
            "metadata": dict(self.metadata), "tensors": [asdict(row) for row in self.tensors],
        }  # fmt: skip
        return {key: plain(item) for key, item in value.items()}


def shortened(values: Sequence[object]) -> Shown:
    """Return a list whole, or its length and first items where it is long."""
    if len(values) <= LONG:
        return list(values)
    return {"count": len(values), "first": list(values[:_FIRST])}


def plain(value: object) -> object:
    """Return `value` with numbers that JSON has no spelling for (NaN, infinities) as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def _total(rows: Sequence[TensorRow]) -> int | None:
    known = [row.weights for row in rows if row.weights is not None]
    return sum(known) if len(known) == len(rows) else None
