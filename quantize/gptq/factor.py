"""From second moments to the factor that GPTQ's column loop runs on: damping, shrinkage, and one Cholesky factorisation in place.

H = R·D·Rᵀ with R unit upper triangular. Reversing rows and columns of H makes R the ordinary lower Cholesky factor, so no inverse is
needed, and the factor takes the place of the moments: one K × K array in all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float32]

DAMP = 0.05
_RAISED = (1.0, 2.0, 4.0, 8.0, 16.0)
_FLOOR = 1e-6
_PANEL = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """H = R·D·Rᵀ: `reversed_lower` [K, K] is √D-scaled R with rows and columns in reverse; `stiffness` [K] is D.

    `damp` is what was added to the diagonal, in shares of its mean; `moment` is H so damped, whole, rows and columns in reverse, if it
    was kept.
    """

    reversed_lower: Tensor
    stiffness: Floats
    damp: float
    moment: Tensor | None = None

    def panel(self, start: int, stop: int) -> Tensor:
        """Return R[:stop, start:stop], float32, contiguous; ones on the diagonal of its last rows."""
        size = len(self.stiffness)
        rows = self.reversed_lower[size - stop :, size - stop : size - start].flip(0, 1).cpu()
        return (rows / torch.from_numpy(np.sqrt(self.stiffness[start:stop]))).contiguous()

    def solve(self, right: Tensor) -> Tensor:
        """Return `right`·H⁻¹ of rows [rows, K]."""
        # Not torch.cholesky_solve, which copies the factor.
        lower = self.reversed_lower
        half = torch.linalg.solve_triangular(lower.mT, right.flip(1), upper=True, left=False)
        whole: Tensor = torch.linalg.solve_triangular(lower, half, upper=False, left=False)
        return whole.flip(1)


def shrink(moment: Tensor, tokens: int) -> float:
    """Shrink off-diagonal second moments [K, K] in place toward 0 where `tokens` are few for K columns; return by which share.

    With K columns and T tokens an off-diagonal entry carries noise of the order 1/√T of the diagonal, K of them a row: the share
    K / (K + 8·T) is what is left of them off the diagonal when T is small, and it vanishes as T grows (a fixed-intensity form of
    Ledoit and Wolf 2004).
    """
    share = len(moment) / (len(moment) + 8.0 * tokens)
    diagonal = moment.diagonal().clone()
    moment.mul_(1.0 - share)
    moment.diagonal().copy_(diagonal)
    return share


def factorize(moment: Tensor, damp: float = DAMP, *, keep: bool = False) -> Factor | None:
    """Factor the second moments [K, K] of reversed columns (lower triangle read) in place: `moment` becomes the factor.

    None when no damping makes them positive definite; `moment` is of no use then. A column that is always 0 gets the mean diagonal of
    the others: nothing depends on it. Damping is `damp` times that mean, doubled up to four times; then every diagonal entry is
    raised to a floor. `keep` makes a copy for who needs H itself besides.
    """
    diagonal = moment.diagonal().clone()
    if not bool(torch.isfinite(diagonal).all()):
        return None
    alive = diagonal > 0
    mean = float(diagonal[alive].double().mean()) if bool(alive.any()) else 1.0
    diagonal = torch.where(alive, diagonal, mean)
    _mirror(moment, moment.mT)  # the upper triangle keeps what the lower one was
    floored = diagonal.clamp_min(float(diagonal.max()) * _FLOOR)
    tries = [(diagonal, damp * times) for times in _RAISED] + [(floored, damp * _RAISED[-1])]
    for number, (raised, share) in enumerate(tries):
        if number:
            _mirror(moment.mT, moment)
        moment.diagonal().copy_(raised + share * mean)
        kept = _whole(moment) if keep else None
        if _factor_in_place(moment):
            lower = moment.tril_()
            stiffness = np.ascontiguousarray(lower.diagonal().flip(0).square().cpu().numpy())
            return Factor(reversed_lower=lower, stiffness=stiffness, damp=share, moment=kept)
    return None


def _mirror(source: Tensor, out: Tensor) -> None:
    """Copy the strictly lower triangle of `source` [K, K] to that of `out`, which may be its transpose."""
    for start in range(0, len(source), _PANEL):
        stop = start + _PANEL
        corner = source[start:stop, start:stop].tril(-1)
        out[start:stop, start:stop] = out[start:stop, start:stop].triu() + corner
        out[stop:, start:stop] = source[stop:, start:stop]


def _whole(moment: Tensor) -> Tensor:
    """Return a copy of which both triangles are the lower one."""
    copy = moment.clone()
    _mirror(copy, copy.mT)
    return copy


def _factor_in_place(work: Tensor) -> bool:
    """Turn the lower triangle of `work` [K, K] into its Cholesky factor, a panel of columns at a time; False where there is none.

    The strictly upper triangle stays as it is. LAPACK's own routine costs a second K × K array through torch, and is no faster.
    """
    for start in range(0, len(work), _PANEL):
        stop = min(start + _PANEL, len(work))
        block = work[start:stop, start:stop]
        above = block.triu(1)
        work[start:, start:stop].addmm_(work[start:, :start], work[start:stop, :start].mT, alpha=-1)
        corner, info = torch.linalg.cholesky_ex(block)
        block.copy_(corner.tril() + above)
        if int(info):
            return False
        below = work[stop:, start:stop]
        below.copy_(torch.linalg.solve_triangular(corner.mT, below, upper=True, left=False))
    return True
