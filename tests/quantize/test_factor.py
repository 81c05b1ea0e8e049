"""The factor against numpy in float64: H = R·D·Rᵀ, panels, solving, damping, dead columns, and what cannot be factored."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from r1q.quantize.gptq import factor as factoring
from r1q.quantize.gptq.factor import Factor, factorize, shrink

Doubles = NDArray[np.float64]
UNIT = 2.0**-24  # of rounding in float32


pytestmark = pytest.mark.usefixtures("one_core")


def second_moments(columns: int, seed: int = 0) -> Doubles:
    """Return XᵀX / T of correlated inputs, as float32 holds it."""
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((3 * columns, columns)) @ (
        np.eye(columns) + rng.standard_normal((columns, columns)) / np.sqrt(columns)
    )
    return np.asarray(inputs.T @ inputs / len(inputs), np.float32).astype(np.float64)


def reversed_lower_triangle(moments: Doubles) -> torch.Tensor:
    """Return what calibration sums: columns reversed; what is above the diagonal is not to be read."""
    lower = torch.from_numpy(moments[::-1, ::-1].astype(np.float32)).tril()
    return lower + torch.full_like(lower, 1e30).triu(1)


def factored(moments: Doubles, damp: float = 0.05) -> Factor:
    found = factorize(reversed_lower_triangle(moments), damp)
    assert found is not None
    return found


def parts(found: Factor) -> tuple[Doubles, Doubles]:
    """Return R and D of a factor in float64."""
    size = len(found.stiffness)
    return found.panel(0, size).numpy().astype(np.float64), found.stiffness.astype(np.float64)


def damped(moments: Doubles, damp: float) -> Doubles:
    return np.asarray(moments + damp * moments.diagonal().mean() * np.eye(len(moments)))


@pytest.mark.parametrize("columns", [1, 7, 64, 300])
@pytest.mark.parametrize("panel", [512, 64, 17])
def test_r_d_r_is_the_damped_moments(columns: int, panel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Higham 2002, theorem 10.3: |H − LLᵀ| ≤ (K + 1)·u·|L||Lᵀ|, whose entries are at most √(H_ii·H_jj)·(1 + (K + 1)·u)."""
    monkeypatch.setattr(factoring, "_PANEL", panel)
    moments = second_moments(columns)
    mix, stiffness = parts(factored(moments))
    np.testing.assert_array_equal(np.tril(mix), np.eye(columns))
    wanted = damped(moments, 0.05)
    # Taking R and D apart and putting them together again costs a few roundings more; the diagonal's damping is rounded once.
    tolerance = 2 * (columns + 8) * UNIT * np.sqrt(np.outer(wanted.diagonal(), wanted.diagonal()))
    assert (np.abs((mix * stiffness) @ mix.T - wanted) <= tolerance).all()


def test_panels_are_columns_of_r_down_to_their_own_rows() -> None:
    found = factored(second_moments(96))
    whole = found.panel(0, 96)
    for start, stop in ((0, 32), (32, 96), (95, 96)):
        panel = found.panel(start, stop)
        assert panel.is_contiguous()
        assert panel.shape == (stop, stop - start)
        np.testing.assert_array_equal(panel.numpy(), whole[:stop, start:stop].numpy())
        assert not whole[stop:, start:stop].any()


def test_solving_divides_by_the_damped_moments() -> None:
    moments = second_moments(128)
    right = np.random.default_rng(1).standard_normal((5, 128))
    solved = factored(moments).solve(torch.from_numpy(right.astype(np.float32))).numpy()
    wanted = damped(moments, 0.05)
    exact = np.linalg.solve(wanted, right.T).T
    # Two triangular solves and the factor are each off by at most K·u, which the condition number then magnifies.
    tolerance = 3 * 128 * UNIT * np.linalg.cond(wanted) * np.linalg.norm(exact, axis=1, keepdims=True)
    assert (np.abs(solved - exact) <= tolerance).all()
    assert np.abs(solved - exact).max() < 1e-4


def test_a_dead_column_is_coupled_with_nothing_and_changes_nothing() -> None:
    """Above all not the damping, however small the moments of the others are."""
    moments = second_moments(64) * 1e-6
    moments[10], moments[:, 10] = 0, 0
    others = np.delete(np.arange(64), 10)
    mix, stiffness = parts(factored(moments))
    assert not mix[10, 11:].any()
    assert not mix[:10, 10].any()
    assert stiffness[10] == pytest.approx(1.05 * moments.diagonal()[others].mean())
    alone, apart = parts(factored(moments[np.ix_(others, others)]))
    np.testing.assert_allclose(mix[np.ix_(others, others)], alone, atol=1e-5)
    np.testing.assert_allclose(stiffness[others], apart, rtol=1e-5)


def test_inputs_that_are_always_zero_are_all_alike() -> None:
    mix, stiffness = parts(factored(np.zeros((8, 8))))
    np.testing.assert_array_equal(mix, np.eye(8))
    np.testing.assert_allclose(stiffness, 1.05, rtol=1e-6)


@pytest.mark.parametrize(
    ("coupling", "share"),
    [(0.9, 1), (1.04, 1), (1.08, 2), (1.15, 4), (1.3, 8), (1.7, 16)],
    ids=lambda value: str(value),
)
def test_damping_is_doubled_until_the_moments_are_positive_definite(coupling: float, share: int) -> None:
    """Pairs of columns whose smallest eigenvalue is 1 − coupling; 0.05, 0.1, 0.2, 0.4 or 0.8 of the mean lifts it above 0."""
    moments = np.kron(np.eye(3), np.array([[1.0, coupling], [coupling, 1.0]]))
    found = factored(moments)
    assert found.damp == pytest.approx(0.05 * share)
    mix, stiffness = parts(found)
    np.testing.assert_allclose((mix * stiffness) @ mix.T, damped(moments, 0.05 * share), atol=1e-6)


def test_at_last_the_smallest_diagonals_are_raised_to_a_floor() -> None:
    """A coupling that a diagonal of 10⁻¹² is too small for, by an amount that this little damping cannot lift."""
    moments = np.diag([1.0, 1e-12, 1.0])
    moments[0, 1] = moments[1, 0] = 3e-4
    found = factored(moments, 1e-9)
    assert found.damp == pytest.approx(16e-9)
    mix, stiffness = parts(found)
    wanted = moments.copy()
    wanted[1, 1] = 1e-6
    np.testing.assert_allclose((mix * stiffness) @ mix.T, damped(wanted, 16e-9), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("coupling", [1.9, 50.0])
def test_what_no_damping_mends_is_no_factor(coupling: float) -> None:
    assert factorize(reversed_lower_triangle(np.array([[1.0, coupling], [coupling, 1.0]])), 0.05) is None


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("where", [(2, 2), (1, 3)])
def test_numbers_that_are_not_finite_are_no_factor(value: float, where: tuple[int, int]) -> None:
    moments = second_moments(8)
    moments[where] = moments[where[::-1]] = value
    assert factorize(reversed_lower_triangle(moments), 0.05) is None


def test_the_moments_themselves_are_kept_when_asked_for() -> None:
    """Damped, whole, in reverse; with a damping that had to be raised, too."""
    for moments, damp in ((second_moments(40), 0.05), (np.array([[1.0, 1.3], [1.3, 1.0]]), 0.4)):
        found = factorize(reversed_lower_triangle(moments), 0.05, keep=True)
        assert found is not None
        assert found.moment is not None
        np.testing.assert_allclose(found.moment.numpy()[::-1, ::-1], damped(moments, damp), rtol=1e-6, atol=1e-7)


def test_shrinking_keeps_the_diagonal_and_fades_with_more_tokens() -> None:
    moments = torch.from_numpy(second_moments(64).astype(np.float32))
    for tokens, share in ((8, 0.5), (64, 1 / 9), (1 << 20, 64 / (64 + 8 * 2**20))):
        shrunk = moments.clone()
        assert shrink(shrunk, tokens) == pytest.approx(share)
        torch.testing.assert_close(shrunk.diagonal(), moments.diagonal(), rtol=0, atol=0)
        off = ~torch.eye(64, dtype=torch.bool)
        torch.testing.assert_close(shrunk[off], moments[off] * (1 - share))
    assert shrink(moments.clone(), 1 << 20) < 1e-5


def test_shrinking_brings_moments_of_few_tokens_nearer_to_the_truth() -> None:
    """Half as many tokens as columns, of independent inputs: what is off the diagonal is noise, and the worse half of it goes."""
    rng = np.random.default_rng(3)
    inputs = rng.standard_normal((32, 64)).astype(np.float32)
    moments = torch.from_numpy(inputs.T @ inputs / 32)
    before = torch.linalg.norm(moments - torch.eye(64))
    shrink(moments, 32)
    assert torch.linalg.norm(moments - torch.eye(64)) < 0.9 * before
