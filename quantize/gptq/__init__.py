"""GPTQ on every grid: weights and a factored Hessian in, codes and stored scales out, rows independent of each other.

Grids are fitted to the weights as the errors of earlier columns have moved them, with what the file will store rounded inside the
fit, and every column's error is fed to the columns after it (Frantar 2022, in the form of LDLQ: see `lane_coding`).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from r1q.core.blocks import LAYOUTS
from r1q.core.qtensor import Codes, Floats, QuantizedTensor
from r1q.core.scheme import Scheme
from r1q.quantize.gptq.factor import Factor

_WIDTH = 256
_ROWS = 64
Arrays = dict[str, NDArray[np.generic]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One block of columns in work: `targets` and `weights` [rows, columns], R's square and D of these columns."""

    targets: Floats
    weights: Floats
    mix: Floats
    stiffness: Floats


Coder = Callable[[Panel, Codes, Arrays, Floats], None]


def gptq(weights: Floats, factor: Factor, scheme: Scheme, *, threads: int) -> QuantizedTensor:
    """Quantize rows [rows, columns] under `scheme` so that E·H·Eᵀ of the error E is small.

    Shapes: `factor` is of the inputs' second moments [columns, columns].
    """
    rows, columns = weights.shape
    codes = np.empty((rows, columns), np.uint8)
    params = _empty_params(scheme, rows, columns)
    errors = torch.zeros((rows, columns))
    source = torch.from_numpy(weights)
    width, coder = _width(scheme, columns), _coder(scheme)
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        panel = factor.panel(start, stop)
        targets = source[:, start:stop].contiguous()
        if start:
            targets += errors[:, :start] @ panel[:start]
        work = Panel(
            targets=targets.numpy(),
            weights=np.ascontiguousarray(weights[:, start:stop]),
            mix=panel[start:].numpy(),
            stiffness=np.ascontiguousarray(factor.stiffness[start:stop]),
        )
        missed = np.empty((rows, stop - start), np.float32)
        entries = {name: _columns(array, start, stop, columns) for name, array in params.items()}
        _code_rows(coder, work, codes[:, start:stop], entries, missed, threads)
        errors[:, start:stop] = torch.from_numpy(missed)
    return QuantizedTensor(scheme=scheme, codes=codes, params=_typed(scheme, params))


def _code_rows(coder: Coder, work: Panel, codes: Codes, entries: Arrays, missed: Floats, threads: int) -> None:
    """Code slabs of rows on threads of our own; rows are independent, so neither slabs nor threads change a byte."""

    def one(first: int) -> None:
        here = slice(first, first + _ROWS)
        part = Panel(targets=work.targets[here], weights=work.weights[here], mix=work.mix, stiffness=work.stiffness)
        coder(part, codes[here], {name: array[here] for name, array in entries.items()}, missed[here])

    with ThreadPoolExecutor(max(1, threads)) as pool:
        for _ in pool.map(one, range(0, len(codes), _ROWS)):
            pass


def _width(scheme: Scheme, columns: int) -> int:
    group = scheme.group(columns)
    return group * max(1, _WIDTH // group)


def _empty_params(scheme: Scheme, rows: int, columns: int) -> Arrays:
    groups = columns // scheme.group(columns)
    if scheme.facts.family == "int":
        found: Arrays = {"scales": np.empty((rows, groups), np.uint16)}
        if not scheme.symmetric:
            found["zeros"] = np.empty((rows, groups), np.uint8)
        return found
    layout = LAYOUTS[scheme.grid].params
    return {
        name: np.empty((rows, groups * p.entries), np.uint16 if p.dtype == np.float16 else p.dtype)
        for name, p in layout.items()
    }


def _columns(array: NDArray[np.generic], start: int, stop: int, columns: int) -> NDArray[np.generic]:
    """Return the entries of a stored field that belong to columns [start, stop)."""
    each = array.shape[1]
    return array[:, start * each // columns : stop * each // columns]


def _typed(scheme: Scheme, params: Arrays) -> Arrays:
    return {name: array.view(np.float16) if array.dtype == np.uint16 else array for name, array in params.items()}


def _coder(scheme: Scheme) -> Coder:
    from r1q.quantize.gptq import coders

    return partial(coders.CODERS[scheme.grid], scheme)
