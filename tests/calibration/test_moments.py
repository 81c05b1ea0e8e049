"""Second moments against sums in float64; tolerances are those of the arithmetic, in float32 and in bfloat16."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from r1q.calibration import moments
from r1q.calibration.moments import add_product, add_second_moment

Doubles = NDArray[np.float64]
UNITS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}  # of rounding to nearest
TILES = (31, 64, 1)


def inputs(columns: int, seed: int = 0) -> list[NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((columns, columns)) / np.sqrt(columns) + np.eye(columns)
    return [(rng.standard_normal((tokens, columns)) @ mixing).astype(np.float32) for tokens in TILES]


def tolerance(left: list[NDArray[np.float32]], right: list[NDArray[np.float32]], unit: float) -> Doubles:
    """Bound the error of Σ leftᵀ·right: two inputs rounded, a sum in float32 of at most 64 terms, its rounding, three sums."""
    sizes = sum(np.abs(a).T.astype(np.float64) @ np.abs(b) for a, b in zip(left, right, strict=True))
    return np.asarray(sizes * (1.02 * 3 * unit + (64 + 4) * UNITS[torch.float32]))


@pytest.mark.parametrize("dtype", UNITS, ids=str)
@pytest.mark.parametrize("panel", [768, 16, 7])
def test_the_lower_triangle_is_the_sum_of_products_in_reverse(
    dtype: torch.dtype, panel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moments, "_PANEL", panel)
    tiles = inputs(40)
    total = torch.zeros((40, 40))
    for tile in tiles:
        add_second_moment(total, torch.from_numpy(tile), dtype)
    wanted: Doubles = np.zeros((40, 40))
    for row in np.concatenate(tiles).astype(np.float64):
        wanted += np.outer(row[::-1], row[::-1])
    allowed = tolerance(tiles, tiles, UNITS[dtype])[::-1, ::-1]
    lower = np.tril_indices(40)
    assert total.dtype == torch.float32
    assert (np.abs(total.numpy() - wanted) <= allowed)[lower].all()
    # The bound means something: an input less, or the columns the right way round, is refused.
    assert (np.abs(wanted - np.outer(tiles[0][0][::-1], tiles[0][0][::-1]) - wanted) > allowed)[lower].mean() > 0.3
    assert (np.abs(wanted[::-1, ::-1] - wanted) > allowed)[lower].mean() > 0.9


@pytest.mark.parametrize("dtype", UNITS, ids=str)
@pytest.mark.parametrize("panel", [768, 16])
def test_a_product_is_summed_as_it_stands(dtype: torch.dtype, panel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "_PANEL", panel)
    left, right = inputs(24, seed=1), inputs(40, seed=2)
    total = torch.ones((24, 40))
    for a, b in zip(left, right, strict=True):
        add_product(total, torch.from_numpy(a), torch.from_numpy(b), dtype)
    wanted = 1 + np.concatenate(left).T.astype(np.float64) @ np.concatenate(right)
    assert (np.abs(total.numpy() - wanted) <= tolerance(left, right, UNITS[dtype]) + UNITS[torch.float32]).all()
