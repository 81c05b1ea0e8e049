"""One matrix of a calibrated run: read in slabs of rows, moved against the drift, coded by GPTQ, refined, packed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from r1q.calibration.stages import Stage
from r1q.core.grids import Bytes, bytes_to_floats, float_bytes, pack
from r1q.core.qtensor import Floats, QuantizedTensor
from r1q.core.recipe import PlannedTensor
from r1q.core.scheme import Scheme
from r1q.quantize.engine import Engine
from r1q.quantize.gptq import gptq
from r1q.quantize.gptq.factor import Factor
from r1q.quantize.refine import refine
from r1q.quantize.rtn import rtn
from r1q.quantize.run import Slab, refuse_unfit
from r1q.quantize.source import FloatSource, sum_of_squares

# What is done to a slab besides coding takes this many weights at a time; the first of them decides last bits.
PART_WEIGHTS = 1 << 22
STORED_WEIGHTS = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What a matrix is fitted to: its stage, the stage's factor (None: not to be had), importance [columns] (None: all alike)."""

    stage: Stage
    factor: Factor | None
    importance: Floats | None


def code_matrix(source: FloatSource, planned: PlannedTensor, fit: Fit, engine: Engine) -> tuple[Slab, Tensor]:
    """Return a matrix coded, and its values [rows, columns] for the forward pass, in the engine's dtype and on its device.

    Raises `InputError` where a value does not fit the grid.
    """
    spec, scheme = planned.spec, planned.scheme
    dtype = getattr(torch, engine.compute)
    values = torch.empty(spec.shape, dtype=dtype, device=engine.device)
    stored = np.empty((spec.rows, scheme.row_bytes(spec.columns)), np.uint8)
    squared_error = squared_weight = 0.0
    for slab in _slices(0, spec.rows, engine.slab // spec.columns):
        weights = np.ascontiguousarray(source.read_rows(spec.name, slab.start, slab.stop)).reshape(-1, spec.columns)
        with np.errstate(over="ignore", invalid="ignore"):  # a scale beyond float16 shows in the error
            coded = _code(weights, scheme, fit, slab, engine)
            for rows in _slices(slab.start, slab.stop, STORED_WEIGHTS // spec.columns):
                here = slice(rows.start - slab.start, rows.stop - slab.start)
                stored[rows], found = _store(weights[here], coded, scheme, here)
                squared_error += sum_of_squares(found - weights[here])
                squared_weight += sum_of_squares(weights[here])
                values[rows] = torch.from_numpy(found).to(engine.device, dtype)
    refuse_unfit(planned, squared_error)  # before what reads its results is blamed
    result = Slab(stored=stored, squared_error=squared_error, squared_weight=squared_weight)
    return result, values


def _slices(start: int, stop: int, step: int) -> Iterator[slice]:
    step = max(1, step)
    return (slice(first, min(first + step, stop)) for first in range(start, stop, step))


def _code(weights: Floats, scheme: Scheme, fit: Fit, rows: slice, engine: Engine) -> QuantizedTensor | None:
    """Return rows of a matrix coded, None where they stay floats."""
    if scheme.facts.family == "float":
        return None
    if fit.factor is None:
        return rtn(weights, scheme, fit.importance)
    wanted = _moved(weights, fit, rows, engine)
    coded = gptq(wanted, fit.factor, scheme, threads=engine.threads)
    if engine.passes:
        _refine(coded, wanted, fit.factor, engine)
    return coded


def _refine(coded: QuantizedTensor, wanted: Floats, factor: Factor, engine: Engine) -> None:
    """Refine what was coded, in place, some rows at a time."""
    for rows in _slices(0, len(wanted), PART_WEIGHTS // wanted.shape[1]):
        better = refine(_part(coded, rows), wanted[rows], factor, passes=engine.passes, threads=engine.threads)
        coded.codes[rows] = better.codes
        for name, array in coded.params.items():
            array[rows] = better.params[name]


def _part(coded: QuantizedTensor, rows: slice) -> QuantizedTensor:
    params = {name: array[rows] for name, array in coded.params.items()}
    return QuantizedTensor(scheme=coded.scheme, codes=coded.codes[rows], params=params)


def _store(weights: Floats, coded: QuantizedTensor | None, scheme: Scheme, rows: slice) -> tuple[Bytes, Floats]:
    """Return the stored bytes of some `rows` of what was coded, and the values they stand for."""
    if coded is None:
        stored = float_bytes(scheme.grid, weights)
        return stored, bytes_to_floats(scheme.grid, stored).reshape(weights.shape)
    part = _part(coded, rows)
    return pack(scheme, part.codes, part.params), part.dequantize()


def _moved(weights: Floats, fit: Fit, rows: slice, engine: Engine) -> Floats:
    """Return the weights moved toward what makes good the drift of their inputs, by the engine's share of the way."""
    factor, drift = fit.factor, fit.stage.drift
    if factor is None or drift is None or not engine.pull:
        return weights
    moved = np.empty_like(weights)
    for here in _slices(0, len(weights), PART_WEIGHTS // weights.shape[1]):
        given = torch.from_numpy(weights[here]).to(engine.device)
        pull = drift[rows.start + here.start : rows.start + here.stop] if fit.stage.residual else given @ drift
        moved[here] = (given + factor.solve(pull * (engine.pull / fit.stage.tokens))).cpu().numpy()
    return moved
