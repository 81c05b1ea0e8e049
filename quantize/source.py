"""Where float weights come from, as the run loop sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from r1q.core.qtensor import Floats


class FloatSource(Protocol):
    """Float weights by name: `models.source.ModelSource`, or anything that reads rows by name."""

    def read_rows(self, name: str, start: int, stop: int) -> Floats:
        """Return rows [stop − start, columns] in float32; a vector is one row, returned flat."""
        ...

    def fingerprint(self) -> Mapping[str, str]:
        """Return sha256 sums by which this source is told from another."""
        ...

    def sidecars(self) -> Sequence[Path]:
        """Return the files beside the weights that a finished model needs."""
        ...


@runtime_checkable
class ReadsAhead(Protocol):
    """A source that can have a tensor read from the disk before it is asked for."""

    def expect(self, name: str) -> None:
        """Have the system read the tensor `name` into its memory meanwhile."""


def expect(source: FloatSource, name: str) -> None:
    """Tell a source which tensor is asked for soon, if it makes anything of that."""
    if isinstance(source, ReadsAhead):
        source.expect(name)


def sum_of_squares(values: Floats) -> float:
    """Return Σx², the same on any number of threads."""
    # Not a BLAS product: its sum would depend on the number of threads, and the manifest holds it.
    return float(np.square(values, dtype=np.float64).sum())
