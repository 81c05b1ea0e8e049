"""The factor against numpy's float64 Cholesky, on sizes that are no whole panels; and that it needs no second K × K array."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from r1q.quantize.gptq.factor import Factor, factorize

ROOT = Path(__file__).resolve().parents[2]
Matrix = np.ndarray[tuple[int, int], np.dtype[np.float64]]


def moments(size: int, lowest: float = 0.08, seed: int = 0) -> Matrix:
    """Return a symmetric matrix whose least eigenvalue is near `lowest`."""
    inputs = np.random.default_rng(seed).standard_normal((2 * size, size))
    # The least eigenvalue of such a product is near (1 − √½)² (Marchenko and Pastur 1967).
    found: Matrix = inputs.T @ inputs / (2 * size) + (lowest - (1 - 0.5**0.5) ** 2) * np.eye(size)
    return found


def lower_half(matrix: Matrix) -> torch.Tensor:
    """Return what the engine has summed up: the lower triangle, and nothing to rely on above it."""
    work = matrix.astype(np.float32)
    work[np.triu_indices(len(work), 1)] = np.nan
    return torch.from_numpy(work)


def expected(matrix: Matrix, damp: float) -> Matrix:
    damped = matrix.astype(np.float32).astype(np.float64) + damp * matrix.diagonal().mean() * np.eye(len(matrix))
    return np.linalg.cholesky(damped)


@pytest.mark.parametrize("size", [1, 65, 512, 1100])
def test_the_factor_is_that_of_the_damped_moments_and_takes_their_place(size: int) -> None:
    matrix = moments(size)
    work = lower_half(matrix)
    factor = factorize(work, 0.05)
    assert isinstance(factor, Factor)
    assert factor.damp == 0.05
    assert factor.reversed_lower.data_ptr() == work.data_ptr()
    wanted = expected(matrix, 0.05)
    # float32 rounds at 2^-24 = 6e-8; a condition of 23 and sums over 1,100 columns cost at most 50 times that.
    np.testing.assert_allclose(factor.reversed_lower.numpy(), wanted, atol=3e-6)
    np.testing.assert_allclose(factor.stiffness, np.square(wanted.diagonal()[::-1]), rtol=1e-5)


@pytest.mark.parametrize(("lowest", "damp"), [(-0.07, 0.1), (-0.25, 0.4)])
def test_a_failed_attempt_leaves_the_moments_whole_for_the_next(lowest: float, damp: float) -> None:
    # Damping, in shares of a mean diagonal of 1 − 0.09 + lowest, is doubled until it outweighs −lowest.
    matrix = moments(1100, lowest)
    factor = factorize(lower_half(matrix), 0.05)
    assert factor is not None
    assert factor.damp == pytest.approx(damp)
    reference = expected(matrix, damp)
    assert np.abs(factor.reversed_lower.numpy() - reference).max() < 1e-3 * np.abs(reference).max()
    assert np.isfinite(factor.reversed_lower.numpy()).all()


def test_no_damping_mends_what_is_far_from_positive() -> None:
    assert factorize(lower_half(moments(70) + 100 - 100 * np.eye(70)), 0.05) is None
    broken = moments(70)
    broken[3, 3] = np.inf
    assert factorize(lower_half(broken), 0.05) is None


def test_solving_divides_by_the_moments_in_their_own_order() -> None:
    matrix = moments(700, seed=1)
    factor = factorize(lower_half(matrix), 0.05)
    assert factor is not None
    right = np.random.default_rng(2).standard_normal((5, 700))
    lower = expected(matrix, 0.05)
    damped = (lower @ lower.T)[::-1, ::-1]
    found = factor.solve(torch.from_numpy(right.astype(np.float32))).numpy()
    np.testing.assert_allclose(found, right @ np.linalg.inv(damped), atol=1e-4)


MEMORY = """
import torch
from pathlib import Path
from r1q.quantize.gptq.factor import factorize
def most():
    return int(next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM")).split()[1]) * 1024
def moments(size):
    return torch.full((size, size), 0.5).fill_diagonal_(2.0)
small = factorize(moments(1200)); small.solve(torch.ones(32, 1200)); small.panel(0, 256)
del small
size = 4096
work = moments(size)
before = most()
factor = factorize(work)
factor.solve(torch.ones(32, size))
factor.panel(size - 256, size)
print((most() - before) / (4 * size * size))
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="peak memory is read from /proc")
def test_factoring_and_solving_need_no_second_square_array() -> None:
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.5
