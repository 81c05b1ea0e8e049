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
from torch import Tensor

from r1q.core.blocks import LAYOUTS
from r1q.core.qtensor import Codes, Floats, QuantizedTensor
from r1q.core.scheme import Scheme
from r1q.quantize.gptq.factor import Factor

WIDTH = 256
"""Columns of a panel, at most: inside it errors are fed on column by column, from panel to panel by matrix products."""
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
    width = _width(scheme, columns)
    code = _code_wide if width > WIDTH else _code_narrow
    for start in range(0, columns, width):
        here = slice(start, min(start + width, columns))
        # Contiguous, as every kernel is then compiled for one memory layout.
        part = np.empty((rows, here.stop - start), np.uint8)
        entries = _empty_params(scheme, rows, here.stop - start)
        missed = code(weights[:, here], errors[:, :start], factor, scheme, part, entries, threads)
        codes[:, here], errors[:, here] = part, torch.from_numpy(missed)
        for name, array in params.items():
            _columns(array, here, columns)[:] = entries[name]
    return QuantizedTensor(scheme=scheme, codes=codes, params=_typed(scheme, params))


def _code_narrow(
    weights: Floats, errors: Tensor, factor: Factor, scheme: Scheme, codes: Codes, entries: Arrays, threads: int
) -> Floats:
    """Code the columns behind those that have `errors`, and return theirs."""
    from r1q.quantize.gptq import coders

    missed = np.empty(weights.shape, np.float32)
    work = panel_of(weights, weights, errors, factor, errors.shape[1])
    code_rows(partial(coders.CODERS[scheme.grid], scheme), work, codes, entries, missed, threads)
    return missed


def _code_wide(
    weights: Floats, errors: Tensor, factor: Factor, scheme: Scheme, codes: Codes, entries: Arrays, threads: int
) -> Floats:
    """Do the same for one group of columns that is wider than a panel."""
    from r1q.quantize.gptq.wide_groups import code_wide_group

    with np.errstate(over="ignore", invalid="ignore"):  # weights that nothing fits come out infinite
        coded = code_wide_group(weights, errors, factor, scheme, threads)
        codes[:] = coded.codes
        entries["scales"][:] = coded.step.astype(np.float16).view(np.uint16)
        if not scheme.symmetric:
            zero = np.divide(coded.floor, coded.step, out=np.zeros_like(coded.step), where=coded.step != 0)
            entries["zeros"][:] = np.rint(zero)
    return coded.errors


def panel_of(weights: Floats, targets: Floats, errors: Tensor, factor: Factor, start: int, first: int = 0) -> Panel:
    """Return the columns from `start` on in work: their targets moved by the `errors` of columns from `first` on."""
    stop = start + weights.shape[1]
    panel = factor.panel(start, stop)
    moved = torch.from_numpy(np.array(targets))
    if errors.shape[1]:
        moved += errors @ panel[first : first + errors.shape[1]]
    return Panel(
        targets=moved.numpy(),
        weights=np.ascontiguousarray(weights),
        mix=panel[start:].numpy(),
        stiffness=np.ascontiguousarray(factor.stiffness[start:stop]),
    )


def code_rows(coder: Coder, work: Panel, codes: Codes, entries: Arrays, missed: Floats, threads: int) -> None:
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
    return group * max(1, WIDTH // group)


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


def _columns(array: NDArray[np.generic], here: slice, columns: int) -> NDArray[np.generic]:
    """Return the entries of a stored field that belong to the columns `here`."""
    each = array.shape[1]
    return array[:, here.start * each // columns : here.stop * each // columns]


def _typed(scheme: Scheme, params: Arrays) -> Arrays:
    return {name: array.view(np.float16) if array.dtype == np.uint16 else array for name, array in params.items()}
