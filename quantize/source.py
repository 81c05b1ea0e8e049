"""Where float weights come from, as the run loop sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

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


def sum_of_squares(values: Floats) -> float:
    """Return Σx², the same on any number of threads."""
    # Not a BLAS product: its sum would depend on the number of threads, and the manifest holds it.
    return float(np.square(values, dtype=np.float64).sum())
