"""Round to nearest: each block's scales are searched for its own weights, then every weight takes the nearest code. Needs no data."""

from __future__ import annotations

from r1q.core.qtensor import Floats, QuantizedTensor
from r1q.core.scheme import Scheme


def rtn(weights: Floats, scheme: Scheme, importance: Floats | None = None) -> QuantizedTensor:
    """Quantize rows [rows, columns] under `scheme`, with llama.cpp's own search for the block grids.

    `importance` [columns] weighs the squared errors of the columns, as an imatrix does; without it llama.cpp's plain search is used.
    The integer grids span each group's extremes and take no importance.
    """
    if scheme.facts.family == "int":
        from r1q.quantize.integers import quantize_integers

        return quantize_integers(weights, scheme)
    from r1q.quantize.grids import quantize_rows

    codes, params = quantize_rows(scheme.grid, weights, importance)
    return QuantizedTensor(scheme=scheme, codes=codes, params=params)
