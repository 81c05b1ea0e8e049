"""Second moments of what linear layers read: sums of xᵀx over tokens, a tile of tokens at a time, in a fixed order.

Columns are taken in reverse, so that the factor which GPTQ needs is the ordinary lower Cholesky factor (`quantize/gptq/factor.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

# Half of xᵀx is the other half again: only panels on and below the diagonal are multiplied.
_PANEL = 768


def add_second_moment(total: Tensor, inputs: Tensor, dtype: torch.dtype) -> None:
    """Add xᵀx of `inputs` [tokens, columns], columns reversed, to the lower triangle of `total` [columns, columns] (float32).

    Multiplied in `dtype`: in bfloat16 each tile's product is rounded to 8 bits of mantissa, which averages out over the tiles.
    """
    tile = inputs.flip(-1).to(dtype)
    columns = tile.shape[1]
    for start in range(0, columns, _PANEL):
        stop = min(start + _PANEL, columns)
        total[start:stop, :stop] += (tile[:, start:stop].T @ tile[:, :stop]).to(total.dtype)


def add_product(total: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype) -> None:
    """Add leftᵀ·right of [tokens, rows] and [tokens, columns] to `total` [rows, columns] (float32), multiplied in `dtype`."""
    left, right = left.to(dtype), right.to(dtype)
    for start in range(0, left.shape[1], _PANEL):  # a product whole would be a second array of the size of `total`
        here = slice(start, start + _PANEL)
        total[here] += (left[:, here].T @ right).to(total.dtype)
