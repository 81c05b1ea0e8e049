"""One matrix of a calibrated run: its stage factored; rows read in slabs, moved against the drift, coded by GPTQ, refined, packed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from r1q.calibration.stages import Stage
from r1q.core.errors import InputError
from r1q.core.qtensor import Floats, QuantizedTensor
from r1q.core.recipe import PlannedTensor
from r1q.core.scheme import Scheme
from r1q.core.tensors import TensorSpec
from r1q.quantize.block_file import refuse_unfit
from r1q.quantize.computing import engine_dtype
from r1q.quantize.engine import Engine
from r1q.quantize.gptq import gptq
from r1q.quantize.gptq.factor import Factor, factorize, shrink
from r1q.quantize.parts import Parts
from r1q.quantize.refine import refine
from r1q.quantize.rtn import rtn
from r1q.quantize.run import SLAB_WEIGHTS
from r1q.quantize.source import FloatSource
from r1q.quantize.storing import Slab, some_rows, store_rows, values_of

# A slab is moved and refined this many weights at a time, which decides last bits.
PART_WEIGHTS = 1 << 22
# Grids that look at no statistics: nothing is lost where there are none.
_EIGHT_BITS = tuple(Scheme(grid=grid) for grid in ("q8_0", "f32", "f16", "bf16"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What a matrix is fitted to: its stage, the stage's factor (None: not to be had), importance [columns] (None: all alike)."""

    stage: Stage
    factor: Factor | None
    importance: Floats | None


def fit_stage(stage: Stage, layer: int, schemes: Sequence[Scheme], engine: Engine) -> tuple[Fit, list[str]]:
    """Return the factor of a stage's second moments, which it takes the place of; and a line where it was had otherwise than asked.

    Raises `InputError` where the stage's inputs are not finite.
    """
    told = [f"blk.{layer}.{stage.note}"] if stage.note and not all(s in _EIGHT_BITS for s in schemes) else []
    where = f"blk.{layer}.{'/'.join(stage.kinds)}"
    if stage.plain:
        return Fit(stage=stage, factor=None, importance=_importance(stage, where)), told
    importance = (stage.moment.diagonal().flip(0) / stage.tokens).cpu().numpy().astype(np.float32)
    moment = stage.moment.div_(stage.tokens)
    shrink(moment, stage.tokens)
    factor = factorize(moment, engine.damp, keep=engine.passes > 0)
    if factor is None:
        _refuse_infinite(importance, where)
        told.append(f"{where}: second moments are not positive definite, rounded by importance instead")
    elif factor.damp != engine.damp:
        told.append(f"{where}: damping raised from {engine.damp:g} to {factor.damp:g}")
    return Fit(stage=stage, factor=factor, importance=importance), told


def _importance(stage: Stage, where: str) -> Floats | None:
    """Return the importance that a stage without second moments comes with."""
    if stage.importance is None:
        return None
    importance: Floats = stage.importance.cpu().numpy().astype(np.float32)
    _refuse_infinite(importance, where)
    # Where no token has made anything of these columns, all count alike.
    return importance if importance.any() else np.ones_like(importance)


def _refuse_infinite(importance: Floats, where: str) -> None:
    if not np.isfinite(importance).all():
        raise InputError(f"{where}: its inputs are not finite on the calibration text; the weights are broken")


def row_slabs(spec: TensorSpec, engine: Engine) -> list[slice]:
    """Return the rows of a matrix that are coded together: each slab by itself, in any order, wherever."""
    return list(_slices(0, spec.rows, engine.slab // spec.columns))


def code_rows(source: FloatSource, planned: PlannedTensor, fit: Fit, slab: slice, engine: Engine) -> list[Slab]:
    """Return the rows `slab` of a matrix coded, in pieces as they are stored.

    Raises `InputError` where a value does not fit the grid.
    """
    spec, scheme = planned.spec, planned.scheme
    weights = np.ascontiguousarray(source.read_rows(spec.name, slab.start, slab.stop)).reshape(-1, spec.columns)
    with np.errstate(over="ignore", invalid="ignore"):  # a scale beyond float16 shows in the error
        found = store_rows(weights, _code(weights, scheme, fit, slab, engine), scheme)
    refuse_unfit(planned, sum(piece.squared_error for piece in found))  # before what reads its results is blamed
    return found


def read_matrix(source: FloatSource, spec: TensorSpec, engine: Engine, dtype: torch.dtype | None = None) -> Tensor:
    """Return a float matrix, in the engine's dtype unless another is given, on its device."""
    dtype = dtype or engine_dtype(engine)
    values = torch.empty(spec.shape, dtype=dtype, device=engine.device)
    for rows in _slices(0, spec.rows, SLAB_WEIGHTS // spec.columns):
        read = np.require(source.read_rows(spec.name, rows.start, rows.stop), requirements=["C", "W"])
        values[rows] = torch.from_numpy(read).to(dtype)
    return values


def coded_matrix(parts: Parts, planned: PlannedTensor, engine: Engine) -> Tensor:
    """Return the values [rows, columns] of a matrix that is in parts, in the engine's dtype and on its device."""
    spec, start = planned.spec, 0
    values = torch.empty(spec.shape, dtype=engine_dtype(engine), device=engine.device)
    for slab in parts.slabs(planned, row_slabs(spec, engine)):
        stop = start + len(slab.stored)
        values[start:stop] = torch.from_numpy(values_of(planned.scheme, slab.stored, spec.columns)).to(values.dtype)
        start = stop
    return values


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
        better = refine(some_rows(coded, rows), wanted[rows], factor, passes=engine.passes, threads=engine.threads)
        coded.codes[rows] = better.codes
        for name, array in coded.params.items():
            array[rows] = better.params[name]


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
