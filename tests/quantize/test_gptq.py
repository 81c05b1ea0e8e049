"""The column loop against its definition: codes by LDLQ and by the classical GPTQ, both in float64, one column at a time.

Both references take the scales that the kernel chose and say, column by column, which code is the nearest to the column's target,
given the errors of the codes before it. The kernel computes the same target in float32; so where two values of the grid are equally
near but for that rounding it may take the other one. `Tied` derives how near, and every test bounds how often.
"""

from __future__ import annotations

import dataclasses
from functools import cache, cached_property
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from r1q.core.grids import pack, steps, unpack
from r1q.core.qtensor import QuantizedTensor
from r1q.core.scheme import GGML_GRIDS, WHOLE_ROW, Scheme
from r1q.quantize import gptq as columns_loop
from r1q.quantize.gptq import Panel, coders, gptq
from r1q.quantize.gptq.factor import Factor, factorize
from r1q.quantize.rtn import rtn

Doubles = NDArray[np.float64]
Floats = NDArray[np.float32]
DAMP = 0.05
UNIT = 2.0**-24  # of rounding in float32
ROWS = 41  # a batch of thirty-two and a part of one


pytestmark = pytest.mark.usefixtures("one_core")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """Weights, the factor of their inputs' second moments, and those, damped, in float64."""

    weights: Floats
    factor: Factor
    moments: Doubles


@cache
def problem(columns: int, seed: int = 0) -> Problem:
    """Return correlated inputs of uneven size: the more correlated, the more is fed from column to column."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((columns, columns)) * 1.5 * np.arange(1, columns + 1)[:, None] ** -0.6
    inputs = rng.standard_normal((2 * columns, columns)) @ (mixing + 0.3 * np.eye(columns))
    inputs *= np.exp(0.5 * rng.standard_normal(columns))
    moments = (inputs.T @ inputs / len(inputs)).astype(np.float32)
    factor = factorize(torch.from_numpy(np.ascontiguousarray(moments[::-1, ::-1])), DAMP)
    assert factor is not None
    damped = moments.astype(np.float64) + np.eye(columns) * DAMP * moments.diagonal().mean(dtype=np.float64)
    weights = (0.05 * rng.standard_normal((ROWS, columns))).astype(np.float32)
    return Problem(weights=weights, factor=factor, moments=damped)


@cache
def elimination(columns: int) -> tuple[Doubles, float]:
    """Return R of H = R·D·Rᵀ in float64, straight from the definition, and how far the kernel's R is from it at most."""
    rest, mix = problem(columns).moments.copy(), np.eye(columns)
    for k in range(columns - 1, 0, -1):
        mix[:k, k] = rest[:k, k] / rest[k, k]
        rest[:k, :k] -= np.outer(mix[:k, k], mix[:k, k]) * rest[k, k]
    off = max(
        float(np.abs(problem(columns).factor.panel(k, k + 1)[:, 0].numpy() - mix[: k + 1, k]).max())
        for k in range(columns)
    )
    return mix, off


@dataclasses.dataclass(frozen=True)
class Values:
    """What each code of each column of a coded matrix stands for, and which codes may be used."""

    tensor: QuantizedTensor

    @cached_property
    def _parts(self) -> tuple[Doubles, list[Doubles], int]:
        own = steps(self.tensor.scheme, self.tensor.params, self.tensor.codes.shape[1])
        bits = self.tensor.scheme.facts.bits
        levels = np.arange(1 << bits, dtype=np.float64) if own.table is None else own.table.astype(np.float64)
        shape = (len(self.tensor.codes), self.tensor.codes.shape[1] // own.group)
        parts = [np.broadcast_to(part, shape).astype(np.float64) for part in (own.scale, own.zero, own.offset)]
        return levels, parts, own.group

    def of(self, column: int) -> Doubles:
        """Return the values [rows, codes] of a column."""
        levels, parts, group = self._parts
        scale, zero, offset = (part[:, column // group, None] for part in parts)
        return np.asarray(scale * (levels - zero) - offset)

    @cached_property
    def first(self) -> int:
        """The lowest code in use: −128 is not."""
        scheme = self.tensor.scheme
        return int(scheme.grid == "q8_0" or (scheme.grid == "int8" and scheme.symmetric))


@dataclasses.dataclass
class Tied:
    """Counts codes that are not the nearest, and refuses those that rounding cannot explain.

    A target in float32 is a sum of `terms` products: its error is at most (terms + 4)·2⁻²⁴ of the sum of their magnitudes, and what
    R is off, times Σ|error|. Dividing by the step and multiplying back costs three roundings of the largest level. A difference of two
    distances is off by twice that.
    """

    off: float
    count: int = 0

    def take(self, found: Values, column: int, targets: Doubles, sizes: Doubles, errors: Doubles) -> Doubles:
        """Return the values [rows] that the kernel chose in `column`."""
        values, codes = found.of(column), found.tensor.codes[:, column].astype(np.intp)
        distance = np.abs(targets[:, None] - values)
        nearest = distance[:, found.first :].argmin(axis=1) + found.first
        rows = np.arange(len(targets))
        rounding = UNIT * ((column + 4) * sizes + 3 * np.abs(values).max(axis=1)) + self.off * errors
        assert (codes >= found.first).all()
        assert (distance[rows, codes] - distance[rows, nearest] <= 2 * rounding).all(), f"column {column}"
        self.count += int((codes != nearest).sum())
        return np.asarray(values[rows, codes])


def ties_of_ldlq(found: QuantizedTensor, given: Problem) -> int:
    mix, off = elimination(given.weights.shape[1])
    weights, tied, values = given.weights.astype(np.float64), Tied(off), Values(found)
    errors = np.zeros_like(weights)
    for k in range(weights.shape[1]):
        targets = weights[:, k] + errors[:, :k] @ mix[:k, k]
        sizes = np.abs(weights[:, k]) + np.abs(errors[:, :k]) @ np.abs(mix[:k, k])
        errors[:, k] = weights[:, k] - tied.take(values, k, targets, sizes, np.abs(errors[:, :k]).sum(axis=1))
    return tied.count


@cache
def inverse_root(columns: int) -> Doubles:
    """Return the upper Cholesky factor of the inverse of H."""
    return np.ascontiguousarray(np.linalg.cholesky(np.linalg.inv(problem(columns).moments)).T)


def ties_of_gptq(found: QuantizedTensor, given: Problem) -> int:
    """Frantar 2022, algorithm 1 without blocks: a column's error, over the factor's diagonal, times its row of the factor."""
    columns = given.weights.shape[1]
    mix, off, upper = *elimination(columns), inverse_root(columns)
    weights, tied, values = given.weights.astype(np.float64), Tied(off), Values(found)
    errors = np.zeros_like(weights)
    for k in range(columns):
        sizes = np.abs(given.weights[:, k]) + np.abs(errors[:, :k]) @ np.abs(mix[:k, k])
        chosen = tied.take(values, k, weights[:, k].copy(), sizes, np.abs(errors[:, :k]).sum(axis=1))
        errors[:, k] = given.weights[:, k] - chosen
        weights[:, k:] -= ((weights[:, k] - chosen) / upper[k, k])[:, None] * upper[k, k:]
    return tied.count


def some_rows(found: QuantizedTensor, given: Problem, every: int) -> tuple[QuantizedTensor, Problem]:
    params = {name: array[::every] for name, array in found.params.items()}
    rows = QuantizedTensor(scheme=found.scheme, codes=found.codes[::every], params=params)
    return rows, dataclasses.replace(given, weights=given.weights[::every])


def integers(bits: int, group: int, symmetric: bool = True) -> Scheme:
    return Scheme(grid=f"int{bits}", group_size=group, symmetric=symmetric)


def columns_of(scheme: Scheme) -> int:
    """Rows that the scheme divides; 576 ends in a narrow panel, and groups of 288 are a panel and a narrow one."""
    return next(columns for columns in (576, 512) if scheme.divides(columns))


GROUPS = (16, 32, 64, 128, 192, 256, 288, WHOLE_ROW)
SCHEMES = (
    *(Scheme(grid=grid) for grid in GGML_GRIDS),
    *(integers(bits, group, sym) for bits in (2, 3, 4, 8) for sym in (True, False) for group in GROUPS),
)


FEW = (
    *(Scheme(grid=grid) for grid in GGML_GRIDS),
    *(integers(bits, group, sym) for bits, group in ((3, 64), (4, WHOLE_ROW), (8, 64)) for sym in (True, False)),
)


def allowed_ties(scheme: Scheme, codes: NDArray[np.uint8]) -> int:
    """One code in ten thousand; in steps of 8 bits, which are sixteen times as fine as those of 4, one in a thousand."""
    return codes.size // (1_000 if scheme.facts.bits == 8 else 10_000)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_codes_are_those_of_ldlq_and_of_classical_gptq(scheme: Scheme) -> None:
    given = problem(columns_of(scheme))
    found = gptq(given.weights, given.factor, scheme, threads=1)
    assert elimination(columns_of(scheme))[1] < 1e-4
    assert ties_of_ldlq(found, given) <= allowed_ties(scheme, found.codes)
    assert ties_of_gptq(*some_rows(found, given, 5)) <= allowed_ties(scheme, found.codes)


@pytest.mark.parametrize("scheme", [Scheme(grid="q5_1"), Scheme(grid="iq4_nl"), integers(3, 16, False)], ids=str)
def test_panels_of_any_width_give_the_same_codes(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding may turn a tie of two codes, or of two scales on trial, from where on a row differs: few rows do."""
    given = problem(576)
    wide = gptq(given.weights, given.factor, scheme, threads=1)
    for width in (32, 64, 128, 192):
        monkeypatch.setattr(columns_loop, "WIDTH", width)
        found = gptq(given.weights, given.factor, scheme, threads=1)
        assert ties_of_ldlq(found, given) <= allowed_ties(scheme, found.codes)
        assert (found.codes == wide.codes).all(axis=1).mean() > 0.9


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [288, WHOLE_ROW])
def test_a_group_coded_panel_by_panel_is_the_group_coded_at_once(
    group: int, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, scheme = problem(576), integers(4, group, symmetric)
    pieces = gptq(given.weights, given.factor, scheme, threads=1)
    monkeypatch.setattr(columns_loop, "WIDTH", 576)
    whole = gptq(given.weights, given.factor, scheme, threads=1)
    assert (pieces.codes == whole.codes).all(axis=1).mean() > 0.9
    same = [pieces.params[name] == whole.params[name] for name in whole.params]
    assert np.logical_and.reduce(same).mean() > 0.95


@pytest.mark.parametrize(
    "scheme", [Scheme(grid="q4_0"), Scheme(grid="q4_k"), Scheme(grid="q6_k"), integers(4, WHOLE_ROW, False)], ids=str
)
def test_threads_and_slabs_of_rows_change_no_byte(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    given = problem(512)
    one = gptq(given.weights, given.factor, scheme, threads=1)
    for threads, rows in ((2, 64), (5, 7), (2, 1), (1, 1000)):
        monkeypatch.setattr(columns_loop, "_ROWS", rows)
        found = gptq(given.weights, given.factor, scheme, threads=threads)
        assert found.codes.tobytes() == one.codes.tobytes()
        assert all(found.params[name].tobytes() == one.params[name].tobytes() for name in one.params)


@pytest.mark.parametrize(
    ("integer", "block"), [(integers(4, 32), Scheme(grid="q4_0")), (integers(8, 32), Scheme(grid="q8_0"))], ids=str
)
def test_integers_in_groups_of_32_are_the_blocks_of_ggml(integer: Scheme, block: Scheme) -> None:
    given = problem(576)
    ours, theirs = (gptq(given.weights, given.factor, scheme, threads=1) for scheme in (integer, block))
    np.testing.assert_array_equal(ours.codes, theirs.codes)
    np.testing.assert_array_equal(ours.params["scales"], theirs.params["d"])


@pytest.mark.parametrize("scheme", [Scheme(grid=grid) for grid in GGML_GRIDS] + [integers(3, 64, False)], ids=str)
def test_larger_inputs_change_no_code(scheme: Scheme) -> None:
    """Four times the inputs: powers of two pass through every operation unrounded."""
    given = problem(512)
    columns = len(given.moments)
    larger = Factor(
        reversed_lower=4 * given.factor.reversed_lower, stiffness=16 * given.factor.stiffness, damp=given.factor.damp
    )
    ours, theirs = (gptq(given.weights, factor, scheme, threads=1) for factor in (given.factor, larger))
    assert ours.codes.shape == (ROWS, columns)
    np.testing.assert_array_equal(ours.codes, theirs.codes)


def losses_of_first_group(tensor: QuantizedTensor, given: Problem, size: int) -> Doubles:
    """Return Σ D_k (t_k − v_k)² over the first group's columns, row by row, in float64."""
    mix, _ = elimination(given.weights.shape[1])
    errors = given.weights[:, :size].astype(np.float64) - tensor.dequantize()[:, :size]
    return np.asarray((np.square(errors @ mix[:size, :size]) * given.factor.stiffness[:size]).sum(axis=1))


@pytest.mark.parametrize("scheme", [Scheme(grid=grid) for grid in GGML_GRIDS] + [integers(4, 64, False)], ids=str)
def test_trying_scales_never_costs_and_sometimes_pays(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the scales on trial the one is kept that costs least on the first group; the searched one alone is among them."""
    given = problem(512)
    size = steps(scheme, gptq(given.weights, given.factor, scheme, threads=1).params, 512).group
    tried = losses_of_first_group(gptq(given.weights, given.factor, scheme, threads=1), given, size)
    monkeypatch.setattr(coders, "TRIES", 0)
    searched = losses_of_first_group(gptq(given.weights, given.factor, scheme, threads=1), given, size)
    assert (tried <= searched * (1 + 1e-4)).all()
    assert (tried < searched * 0.999).any()


def test_a_row_of_zeros_and_rows_of_one_number_are_coded_exactly() -> None:
    given = problem(512)
    weights = np.zeros((3, 512), np.float32)
    weights[1], weights[2, ::2] = 0.5, -0.25
    for scheme in FEW:
        values = gptq(weights, given.factor, scheme, threads=1).dequantize()
        assert np.isfinite(values).all()
        np.testing.assert_array_equal(values[0], 0)


@pytest.mark.parametrize("value", [1e9, -1e25, np.inf, np.nan])
def test_a_weight_that_nothing_fits_is_never_coded_as_something_finite(value: float) -> None:
    """Not even as what the rows before left in memory; the run then refuses the tensor by name."""
    given = problem(512)
    weights = given.weights[:5].copy()
    weights[3, 300] = value
    for scheme in FEW:
        with np.errstate(over="ignore", invalid="ignore"):
            values = gptq(weights, given.factor, scheme, threads=1).dequantize()
            assert not np.isfinite(np.square(values[3] - weights[3])).all(), scheme
        assert np.isfinite(np.delete(values, 3, axis=0)).all(), scheme


def loss_of(values: Floats, given: Problem, moments: Doubles) -> float:
    """Return the sum over rows of E·H·Eᵀ."""
    errors = given.weights.astype(np.float64) - values
    return float((errors @ moments * errors).sum())


@pytest.mark.parametrize("scheme", FEW, ids=str)
def test_correlated_inputs_lose_less_than_by_rounding_with_importance(scheme: Scheme) -> None:
    """Against llama.cpp's own weighted search (integers: the extremes' scale) it is a third less at least, half in most."""
    given = problem(512)
    importance = np.ascontiguousarray(given.moments.diagonal().astype(np.float32))
    coded = loss_of(gptq(given.weights, given.factor, scheme, threads=1).dequantize(), given, given.moments)
    rounded = loss_of(rtn(given.weights, scheme, importance).dequantize(), given, given.moments)
    assert coded < 0.67 * rounded


@pytest.mark.parametrize("scheme", FEW, ids=str)
def test_uncorrelated_inputs_lose_no_more_than_by_rounding_with_importance(scheme: Scheme) -> None:
    """Nothing can be fed on, so only the choice of scales is left: at most one in a hundred worse, each grid for itself."""
    given = problem(512)
    diagonal = np.diag(given.moments.diagonal())
    factor = factorize(torch.from_numpy(diagonal[::-1, ::-1].astype(np.float32)), 1e-6)
    assert factor is not None
    np.testing.assert_array_equal(factor.panel(0, 512).numpy(), np.eye(512, dtype=np.float32))
    importance = np.ascontiguousarray(diagonal.diagonal().astype(np.float32))
    coded = loss_of(gptq(given.weights, factor, scheme, threads=1).dequantize(), given, diagonal)
    assert coded <= 1.01 * loss_of(rtn(given.weights, scheme, importance).dequantize(), given, diagonal)


@pytest.mark.parametrize("scheme", FEW, ids=str)
def test_the_file_holds_what_the_errors_were_measured_against(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed, unpacked and dequantized, a weight is exactly the weight less the error that was fed on."""
    given, fed = problem(512), []
    code_rows = columns_loop.code_rows

    def keeping(coder: Any, work: Panel, codes: Any, entries: Any, missed: Floats, threads: int) -> None:
        code_rows(coder, work, codes, entries, missed, threads)
        fed.append(missed)

    monkeypatch.setattr(columns_loop, "code_rows", keeping)
    found = gptq(given.weights, given.factor, scheme, threads=1)
    stored = pack(scheme, found.codes, found.params)
    assert stored.shape == (ROWS, scheme.row_bytes(512))
    again = unpack(scheme, stored, 512)
    np.testing.assert_array_equal(again.codes, found.codes)
    values = again.dequantize()
    np.testing.assert_array_equal(values, found.dequantize())
    if scheme.group_size != WHOLE_ROW:  # a whole row is coded more than once
        np.testing.assert_array_equal(given.weights - values, np.concatenate(fed, axis=1))
