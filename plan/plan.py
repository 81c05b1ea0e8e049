"""Plan: what every tensor becomes and what it will cost, from headers alone."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from r1q.core.errors import ResourceError
from r1q.core.formats import refuse_unfit
from r1q.core.mixtures import ModelShape
from r1q.core.recipe import PlannedTensor, Recipe, resolve
from r1q.models.config import ModelConfig
from r1q.models.source import ModelSource
from r1q.plan.statistics import Statistics, read_statistics

# Metadata of a GGUF file: a vocabulary of 150k tokens and its merges take about 6 MB.
_METADATA_BYTES = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What `recipe` makes of a model: every tensor with its scheme, and the totals; `notes` say what of the source is left out."""

    model: str
    recipe: Recipe
    tensors: tuple[PlannedTensor, ...]
    formats: tuple[str, ...]
    statistics: Statistics | None = None
    notes: tuple[str, ...] = ()

    @property
    def weights(self) -> int:
        """Number of weights in the file."""
        return sum(tensor.spec.size for tensor in self.tensors)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(tensor.bytes for tensor in self.tensors)

    @property
    def block_bytes(self) -> int:
        """Stored bytes of the largest block, whose parts lie beside its file while it is written."""
        blocks = Counter[int]()
        for tensor in self.tensors:
            if tensor.spec.layer is not None:
                blocks[tensor.spec.layer] += tensor.bytes
        return max(blocks.values(), default=0)

    @property
    def bits_per_weight(self) -> float:
        """True bits per weight: scales, norms and float tensors included."""
        return 8 * self.bytes / self.weights

    @property
    def fallbacks(self) -> tuple[PlannedTensor, ...]:
        """Tensors whose rows did not split into the grid that the recipe wanted."""
        return tuple(tensor for tensor in self.tensors if tensor.fell_back)

    def grids(self) -> dict[str, int]:
        """Return how many tensors have each grid, most first."""
        return dict(Counter(str(tensor.scheme) for tensor in self.tensors).most_common())

    def fallback_lines(self) -> list[str]:
        """Return one line for each kind of fallback: how many, from what, to what, why."""
        kinds = Counter((t.wanted, t.scheme.grid, t.spec.columns) for t in self.fallbacks)
        return [
            f"{count} tensors with rows of {columns}: {wanted} blocks do not divide them, stored as {grid}"
            for (wanted, grid, columns), count in kinds.items()
        ]

    def check_disk(self, folder: Path, *, more: int = 0) -> None:
        """Raise `ResourceError` when the disk of `folder` cannot take the checkpoint, a file of each format and `more` bytes."""
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        need, free = (1 + len(self.formats)) * self.bytes + _METADATA_BYTES + more, shutil.disk_usage(existing).free
        if need > free:
            raise ResourceError(
                f"{folder} needs {need / 1e6:.0f} MB and its disk has {free / 1e6:.0f} MB free; free space or choose another -o"
            )


def model_shape(config: ModelConfig, calibrated: bool) -> ModelShape:
    """Return what llama.cpp's mixtures look at."""
    return ModelShape(
        family=config.family,
        layers=config.num_layers,
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        tied=config.tied,
        calibrated=calibrated,
        experts=0 if config.experts is None else config.experts.count,
        first_sparse=next((layer for layer in range(config.num_layers) if config.is_sparse(layer)), 0),
    )


def make_plan(
    source: ModelSource,
    recipe: Recipe,
    formats: Sequence[str],
    imatrix: Path | None = None,
    *,
    calibrated: bool = False,
) -> Plan:
    """Return what `recipe` makes of `source` for `formats`, weighing errors by the file `imatrix` if there is one.

    A `calibrated` run counts as one with an importance matrix in llama.cpp's mixtures, as one with `imatrix` does.

    Raises `UsageError` for a recipe that does not fit the model, or that a format cannot hold; `InputError` for
    statistics of another model.
    """
    statistics = None if imatrix is None else read_statistics(imatrix, source.tensors)
    tensors = resolve(
        recipe, source.tensors, model_shape(source.config, calibrated=calibrated or statistics is not None)
    )
    refuse_unfit(tensors, formats)
    name, notes = source.config.name, tuple(getattr(source, "notes", ()))
    notes += () if statistics is None else statistics.notes
    return Plan(model=name, recipe=recipe, tensors=tensors, formats=tuple(formats), statistics=statistics, notes=notes)
