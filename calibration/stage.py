"""A stage of a block: what linear layers read, summed up; and the streams of hidden states that it is made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True, kw_only=True)
class Streams:
    """Hidden states [windows, length, hidden_size] in float32: `coded` of the model as quantized so far, `exact` of the float one."""

    coded: Tensor
    exact: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.coded.shape[0] * self.coded.shape[1]

    def zeros(self, columns: int, rows: int | None = None) -> Tensor:
        """Return a sum to be filled, [rows, columns] (square without `rows`), float32."""
        return torch.zeros((columns if rows is None else rows, columns), device=self.coded.device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Linear layers that read one input. `moment` [columns, columns]: the sum over `tokens` of xᵀx, columns reversed, lower triangle.

    `drift` is the sum of (x_exact − x)ᵀx, or, if `residual`, already the sum of (what the layer should add)ᵀx [rows, columns]; of such
    a layer both sums weigh a token by 1/rms² of the residual stream (`stages`).
    A `plain` stage has no moments to go by: its layers are rounded by `importance` (mean squares [columns]; None: all columns alike).
    `note` says what was done otherwise than asked.
    """

    kinds: tuple[str, ...]
    tokens: int
    moment: Tensor
    drift: Tensor | None = None
    residual: bool = False
    plain: bool = False
    importance: Tensor | None = None
    note: str = ""
