"""One matrix of a calibrated run: read in slabs of rows, moved against the drift, coded by GPTQ, packed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from r1q.calibration.stages import Stage
from r1q.core.grids import Bytes, bytes_to_floats, float_bytes, pack
from r1q.core.qtensor import Floats
from r1q.core.recipe import PlannedTensor
from r1q.quantize.engine import Engine
from r1q.quantize.gptq import gptq
from r1q.quantize.gptq.factor import Factor
from r1q.quantize.rtn import rtn
from r1q.quantize.run import Slab
from r1q.quantize.source import FloatSource, sum_of_squares

# Rows are coded in slabs of about this many weights: 64 MB in float32, of which some five are alive. It decides last bits.
SLAB_WEIGHTS = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What a matrix is fitted to: its stage, the stage's factor (None: not to be had), importance [columns]."""

    stage: Stage
    factor: Factor | None
    importance: Floats


def code_matrix(source: FloatSource, planned: PlannedTensor, fit: Fit, engine: Engine) -> tuple[Slab, Tensor]:
    """Return a matrix coded, and its values [rows, columns] for the forward pass, in the engine's dtype and on its device."""
    spec = planned.spec
    dtype = getattr(torch, engine.compute)
    values = torch.empty(spec.shape, dtype=dtype, device=engine.device)
    stored = np.empty((spec.rows, planned.scheme.row_bytes(spec.columns)), np.uint8)
    squared_error = squared_weight = 0.0
    step = max(1, SLAB_WEIGHTS // spec.columns)
    for start in range(0, spec.rows, step):
        here = slice(start, min(start + step, spec.rows))
        weights = np.ascontiguousarray(source.read_rows(spec.name, here.start, here.stop)).reshape(-1, spec.columns)
        with np.errstate(over="ignore", invalid="ignore"):  # a scale beyond float16 shows in the error
            stored[here], found = _code(weights, planned, fit, here, engine)
            squared_error += sum_of_squares(found - weights)
        squared_weight += sum_of_squares(weights)
        values[here] = torch.from_numpy(found).to(engine.device, dtype)
    coded = Slab(stored=stored, squared_error=squared_error, squared_weight=squared_weight)
    return coded, values


def _code(weights: Floats, planned: PlannedTensor, fit: Fit, rows: slice, engine: Engine) -> tuple[Bytes, Floats]:
    scheme = planned.scheme
    if scheme.facts.family == "float":
        stored = float_bytes(scheme.grid, weights)
        return stored, bytes_to_floats(scheme.grid, stored).reshape(weights.shape)
    if fit.factor is None:
        tensor = rtn(weights, scheme, fit.importance)
    else:
        tensor = gptq(_moved(weights, fit, rows, engine), fit.factor, scheme, threads=engine.threads)
    return pack(scheme, tensor.codes, tensor.params), tensor.dequantize()


def _moved(weights: Floats, fit: Fit, rows: slice, engine: Engine) -> Floats:
    """Return the weights moved toward what makes good the drift of their inputs, by the engine's share of the way."""
    if fit.factor is None or fit.stage.drift is None or not engine.pull:
        return weights
    given = torch.from_numpy(weights).to(engine.device)
    pull = fit.stage.drift[rows] if fit.stage.residual else given @ fit.stage.drift
    moved = given + fit.factor.solve(pull * (engine.pull / fit.stage.tokens))
    return np.ascontiguousarray(moved.cpu().numpy())
