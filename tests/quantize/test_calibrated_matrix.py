"""One matrix of a calibrated run: how far it is moved against drift, in which slabs, and what is stored of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from r1q.calibration.stages import Stage
from r1q.core.grids import bytes_to_floats, unpack
from r1q.core.recipe import PlannedTensor
from r1q.core.scheme import Scheme
from r1q.core.tensors import TensorSpec
from r1q.quantize import matrix, storing
from r1q.quantize.engine import Engine
from r1q.quantize.gptq import gptq
from r1q.quantize.gptq.factor import factorize
from r1q.quantize.matrix import Fit, code_rows, coded_matrix, row_slabs
from r1q.quantize.parts import Parts
from r1q.quantize.rtn import rtn

Doubles = NDArray[np.float64]
Floats = NDArray[np.float32]
ROWS, COLUMNS, TOKENS = 10, 64, 400
ENGINE = Engine(effort="default", threads=1, isa="here", compute="float32")
Q8 = Scheme(grid="q8_0")


pytestmark = pytest.mark.usefixtures("one_core")


@dataclasses.dataclass(frozen=True)
class Source:
    """Weights, and a note of which rows were asked for."""

    weights: Floats
    asked: list[tuple[int, int]] = dataclasses.field(default_factory=list)

    def read_rows(self, name: str, start: int, stop: int) -> Floats:
        assert name == "w"
        self.asked.append((start, stop))
        return self.weights[start:stop]

    def fingerprint(self) -> Mapping[str, str]:
        return {}

    def sidecars(self) -> Sequence[Path]:
        return []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Weights, inputs as the coded model sees them, and what the layer should add for each token, all in float64."""

    weights: Doubles
    inputs: Doubles
    exact: Doubles
    missing: Doubles

    def fit(self, *, residual: bool, damp: float) -> Fit:
        """Return the statistics as the stages sum them, and the factor of moments a token."""
        moments = torch.from_numpy((self.inputs.T @ self.inputs)[::-1, ::-1].astype(np.float32))
        drift = (self.missing if residual else self.exact - self.inputs).T @ self.inputs
        stage = Stage(
            kinds=("x",),
            tokens=TOKENS,
            moment=moments,
            drift=torch.from_numpy(drift.astype(np.float32)),
            residual=residual,
        )
        factor = factorize(moments / TOKENS, damp)
        importance = np.square(self.inputs).mean(axis=0).astype(np.float32)
        return Fit(stage=stage, factor=factor, importance=importance)


@pytest.fixture(scope="module")
def case() -> Case:
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((ROWS, COLUMNS)).astype(np.float32).astype(np.float64)
    inputs = rng.standard_normal((TOKENS, COLUMNS)) @ (np.eye(COLUMNS) + 0.3 * rng.standard_normal((COLUMNS, COLUMNS)))
    exact = inputs + 0.2 * rng.standard_normal((TOKENS, COLUMNS)) + 0.1 * np.roll(inputs, 1, axis=1)
    missing = (exact - inputs) @ weights.T + 0.3 * inputs[:, :ROWS] + 0.1 * rng.standard_normal((TOKENS, ROWS))
    return Case(weights=weights, inputs=inputs, exact=exact, missing=missing)


def planned(scheme: Scheme = Q8) -> PlannedTensor:
    spec = TensorSpec(name="w", kind="ffn_down", layer=0, part="weight", shape=(ROWS, COLUMNS), dtype="F32")
    return PlannedTensor(spec=spec, scheme=scheme, wanted=scheme.grid)


def coded(case: Case, fit: Fit, engine: Engine = ENGINE, scheme: Scheme = Q8) -> tuple[Floats, Source]:
    """Return the values of the matrix coded, after comparing what is stored with what the forward pass gets."""
    source = Source(case.weights.astype(np.float32))
    pieces = [
        piece
        for rows in row_slabs(planned(scheme).spec, engine)
        for piece in code_rows(source, planned(scheme), fit, rows, engine)
    ]
    values = unpack(scheme, np.concatenate([piece.stored for piece in pieces]), COLUMNS).dequantize()
    error = np.square(values.astype(np.float64) - case.weights).sum()
    assert sum(piece.squared_error for piece in pieces) == pytest.approx(error, rel=1e-4)
    assert sum(piece.squared_weight for piece in pieces) == pytest.approx(np.square(case.weights).sum())
    return values, source


@pytest.mark.parametrize("residual", [False, True])
def test_with_all_of_the_pull_the_layer_makes_what_the_float_model_makes(case: Case, residual: bool) -> None:
    """Least squares on the inputs themselves, by numpy: min ‖wanted − inputs·W*ᵀ‖². In 8 bits, so that little else moves a weight."""
    wanted = case.exact @ case.weights.T if not residual else case.inputs @ case.weights.T + case.missing
    best = np.linalg.lstsq(case.inputs, wanted)[0].T
    values, _ = coded(case, case.fit(residual=residual, damp=1e-7), dataclasses.replace(ENGINE, pull=1.0))
    step = np.abs(best).max() / 127
    assert np.abs(best - case.weights).max() > 10 * step
    # GPTQ moves a weight by more than half a step where others make it good.
    assert np.abs(values - best).max() < 3 * step
    lost = np.linalg.norm(wanted - case.inputs @ values.T)
    assert lost < 1.005 * np.linalg.norm(wanted - case.inputs @ best.T)
    assert lost < 0.9 * np.linalg.norm(wanted - case.inputs @ case.weights.T)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("pull", [0.0, 0.5, 1.0])
def test_the_pull_is_a_share_of_the_damped_shift(case: Case, residual: bool, pull: float) -> None:
    fit = case.fit(residual=residual, damp=0.05)
    moments = case.inputs.T @ case.inputs / TOKENS
    damped = moments + 0.05 * moments.diagonal().mean() * np.eye(COLUMNS)
    away = case.missing if residual else (case.exact - case.inputs) @ case.weights.T
    moved = case.weights + pull * np.linalg.solve(damped, (away.T @ case.inputs / TOKENS).T).T
    assert fit.factor is not None
    engine = dataclasses.replace(ENGINE, pull=pull)
    found = matrix._moved(case.weights.astype(np.float32), fit, slice(0, ROWS), engine)
    np.testing.assert_allclose(found, moved, atol=1e-5)
    wanted = gptq(moved.astype(np.float32), fit.factor, Q8, threads=1).dequantize()
    # The shift in float32 may turn a scale by a bit, or a tie, and the other values of the row follow.
    np.testing.assert_allclose(coded(case, fit, engine)[0], wanted, atol=2.5 * np.abs(moved).max() / 127)


@pytest.mark.parametrize("residual", [False, True])
def test_slabs_of_rows_are_rows_of_the_whole(case: Case, residual: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = case.fit(residual=residual, damp=0.05)
    whole, source = coded(case, fit)
    assert source.asked == [(0, ROWS)]
    slabs, source = coded(case, fit, dataclasses.replace(ENGINE, slab=3 * COLUMNS))
    assert source.asked == [(0, 3), (3, 6), (6, 9), (9, 10)]
    monkeypatch.setattr(matrix, "PART_WEIGHTS", 2 * COLUMNS)
    monkeypatch.setattr(storing, "PIECE_WEIGHTS", 1)
    parts, _ = coded(case, fit, dataclasses.replace(ENGINE, slab=7 * COLUMNS))
    for found in (slabs, parts):
        np.testing.assert_allclose(found, whole, atol=2.5 * np.abs(whole).max() / 127)


def test_without_drift_or_with_effort_fast_weights_are_coded_where_they_are(case: Case) -> None:
    fit = case.fit(residual=False, damp=0.05)
    still = dataclasses.replace(fit, stage=dataclasses.replace(fit.stage, drift=None))
    assert fit.factor is not None
    wanted = gptq(case.weights.astype(np.float32), fit.factor, Q8, threads=1).dequantize()
    np.testing.assert_array_equal(coded(case, still)[0], wanted)
    np.testing.assert_array_equal(coded(case, fit, dataclasses.replace(ENGINE, pull=0.0))[0], wanted)


def test_without_a_factor_the_weights_are_rounded_by_importance(case: Case) -> None:
    fit = dataclasses.replace(case.fit(residual=False, damp=0.05), factor=None)
    scheme = Scheme(grid="q4_0")
    wanted = rtn(case.weights.astype(np.float32), scheme, fit.importance).dequantize()
    np.testing.assert_array_equal(coded(case, fit, scheme=scheme)[0], wanted)


@pytest.mark.parametrize("grid", ["f32", "f16", "bf16"])
def test_a_matrix_kept_in_float_is_not_moved(case: Case, grid: str) -> None:
    source, fit = Source(case.weights.astype(np.float32)), case.fit(residual=True, damp=0.05)
    (piece,) = code_rows(source, planned(Scheme(grid=grid)), fit, slice(0, ROWS), ENGINE)
    stored = bytes_to_floats(grid, piece.stored)
    unit = {"f32": 0.0, "f16": 2.0**-11, "bf16": 2.0**-8}[grid]
    assert (np.abs(stored - case.weights) <= unit * np.abs(case.weights)).all()


@pytest.mark.parametrize("grid", ["q8_0", "q4_0", "bf16", "f32"])
def test_the_forward_pass_gets_what_is_stored_in_the_dtype_that_it_computes_in(
    case: Case, grid: str, tmp_path: Path
) -> None:
    """Written in parts of three rows, and read back whole; the values beside by gguf's own reader."""
    source, fit = Source(case.weights.astype(np.float32)), case.fit(residual=True, damp=0.05)
    asked, parts = planned(Scheme(grid=grid)), Parts(tmp_path / "parts")
    engine = dataclasses.replace(ENGINE, slab=3 * COLUMNS)
    stored = []
    for rows in row_slabs(asked.spec, engine):
        found = code_rows(source, asked, fit, rows, engine)
        parts.write(asked, rows, found, ("a line",))
        stored += [piece.stored for piece in found]
    kind = gguf.GGMLQuantizationType[grid.upper()]
    wanted = torch.from_numpy(gguf.dequantize(np.concatenate(stored), kind).astype(np.float32))
    assert torch.equal(coded_matrix(parts, asked, engine), wanted)
    narrow = coded_matrix(parts, asked, dataclasses.replace(engine, compute="bfloat16"))
    assert narrow.dtype == torch.bfloat16
    assert torch.equal(narrow, wanted.bfloat16())
