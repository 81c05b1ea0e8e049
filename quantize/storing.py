"""Coded rows as they are stored, in pieces, with the error of each."""

from __future__ import annotations

from dataclasses import dataclass

from r1q.core.grids import Bytes, bytes_to_floats, float_bytes, pack, unpack
from r1q.core.qtensor import Floats, QuantizedTensor
from r1q.core.scheme import Scheme
from r1q.quantize.source import sum_of_squares

# Half a megabyte in float32: what is made of a piece fits a core's cache, and the allocator keeps its arrays (`core/allocator.py`).
# Pieces of 4 MB, whose arrays came fresh from the system each time, took three times as long.
PIECE_WEIGHTS = 1 << 17


@dataclass(frozen=True, slots=True, kw_only=True)
class Slab:
    """Some rows of a tensor as stored bytes, with the sums of squares of their error and of their weights."""

    stored: Bytes
    squared_error: float
    squared_weight: float


def store_rows(weights: Floats, coded: QuantizedTensor | None, scheme: Scheme) -> list[Slab]:
    """Return what `weights` [rows, columns] were `coded` to, None where they stay floats, in pieces as they are stored."""
    found, step = [], max(1, PIECE_WEIGHTS // weights.shape[1])
    for start in range(0, len(weights), step):
        rows = slice(start, min(start + step, len(weights)))
        given = weights[rows]
        stored, values = _store(given, None if coded is None else some_rows(coded, rows), scheme)
        error, weight = sum_of_squares(values - given), sum_of_squares(given)
        found.append(Slab(stored=stored, squared_error=error, squared_weight=weight))
    return found


def values_of(scheme: Scheme, stored: Bytes, columns: int) -> Floats:
    """Return the values [rows, columns] that stored rows stand for."""
    if scheme.facts.family == "float":
        return bytes_to_floats(scheme.grid, stored).reshape(-1, columns)
    return unpack(scheme, stored, columns).dequantize()


def some_rows(coded: QuantizedTensor, rows: slice) -> QuantizedTensor:
    """Return some rows of what was coded, without copies."""
    params = {name: array[rows] for name, array in coded.params.items()}
    return QuantizedTensor(scheme=coded.scheme, codes=coded.codes[rows], params=params)


def _store(weights: Floats, coded: QuantizedTensor | None, scheme: Scheme) -> tuple[Bytes, Floats]:
    """Return the stored bytes of rows, and the values they stand for."""
    if coded is None:
        stored = float_bytes(scheme.grid, weights)
        return stored, values_of(scheme, stored, weights.shape[1])
    return pack(scheme, coded.codes, coded.params), coded.dequantize()
