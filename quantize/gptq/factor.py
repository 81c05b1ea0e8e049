"""From second moments to the factor that GPTQ's column loop runs on: damping, shrinkage, and one Cholesky factorisation.

H = R·D·Rᵀ with R unit upper triangular. Reversing rows and columns of H makes R the ordinary lower Cholesky factor, so neither an
inverse nor a third K × K array is needed.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """H = R·D·Rᵀ: `reversed_lower` [K, K] is √D-scaled R with rows and columns in reverse; `stiffness` [K] is D.

    `damp` is what was added to the diagonal, in shares of its mean.
    """

    reversed_lower: Tensor
    stiffness: Floats
    damp: float

    def panel(self, start: int, stop: int) -> Tensor:
        """Return R[:stop, start:stop], float32, contiguous; ones on the diagonal of its last rows."""
        size = len(self.stiffness)
        rows = self.reversed_lower[size - stop :, size - stop : size - start].flip(0, 1).cpu()
        return (rows / torch.from_numpy(np.sqrt(self.stiffness[start:stop]))).contiguous()

    def solve(self, right: Tensor) -> Tensor:
        """Return `right`·H⁻¹ of rows [rows, K]."""
        return torch.cholesky_solve(right.flip(1).T, self.reversed_lower).T.flip(1)


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


def factorize(moment: Tensor, damp: float = DAMP) -> Factor | None:
    """Factor the second moments [K, K] of reversed columns (lower triangle read); None when no damping makes them positive definite.

    A column that is always 0 gets a diagonal of 1: nothing depends on it. Damping is `damp` times the mean diagonal, doubled up to
    four times; then every diagonal entry is raised to a floor.
    """
    diagonal = moment.diagonal().clone()
    if not bool(torch.isfinite(diagonal).all()):
        return None
    diagonal = torch.where(diagonal > 0, diagonal, torch.ones_like(diagonal))
    mean = float(diagonal.double().mean())
    for times in _RAISED:
        found = _try(moment, diagonal + damp * times * mean)
        if found is not None:
            return Factor(reversed_lower=found, stiffness=_stiffness(found), damp=damp * times)
    floored = diagonal.clamp_min(float(diagonal.max()) * _FLOOR) + damp * _RAISED[-1] * mean
    found = _try(moment, floored)
    return None if found is None else Factor(reversed_lower=found, stiffness=_stiffness(found), damp=damp * _RAISED[-1])


def _try(moment: Tensor, diagonal: Tensor) -> Tensor | None:
    # A transposed row-major copy is column-major, which LAPACK factors in place; its lower triangle is the moment's upper one,
    # so the copy is made from the transpose.
    work = torch.empty_like(moment).mT
    work.copy_(moment)
    work.diagonal().copy_(diagonal)
    info = torch.empty((), dtype=torch.int32, device=moment.device)
    torch.linalg.cholesky_ex(work, out=(work, info))
    return None if int(info) else work


def _stiffness(lower: Tensor) -> Floats:
    return np.ascontiguousarray(lower.diagonal().flip(0).square().cpu().numpy())
