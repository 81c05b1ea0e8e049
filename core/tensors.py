"""TensorSpec: one tensor of a model by name, role, layer, shape and stored dtype; no weights."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One tensor of a checkpoint.

    `name` is Hugging Face's. `kind` is the role, spelled as GGUF spells it (`token_embd`, `attn_q`, `ffn_down`, `output_norm`, …);
    `layer` is the block's index, None outside the blocks; `part` is `weight` or `bias`; `shape` is [rows, columns] or [length].
    `expert` is the index of a routed expert, whose matrices are tensors of their own: a GGUF file stacks them under one name.
    """

    name: str
    kind: str
    layer: int | None
    part: str
    shape: tuple[int, ...]
    dtype: str
    expert: int | None = None

    @property
    def key(self) -> str:
        """The tensor's name within its block: `attn_q.weight`, `ffn_up_exps.17.weight`."""
        return f"{self.kind}.{self.part}" if self.expert is None else f"{self.kind}.{self.expert}.{self.part}"

    @property
    def gguf_name(self) -> str:
        """The tensor's name in a GGUF file."""
        stem = self.kind if self.layer is None else f"blk.{self.layer}.{self.kind}"
        return f"{stem}.{self.part}"

    @property
    def own_name(self) -> str:
        """The GGUF tensor's name with an expert's number in it, so that no two have the same: `blk.0.ffn_up_exps.17.weight`."""
        return self.gguf_name if self.expert is None else f"blk.{self.layer}.{self.key}"

    @property
    def is_matrix(self) -> bool:
        """Whether this is a two-dimensional weight, which a recipe may quantize."""
        return len(self.shape) == 2 and self.part == "weight"

    @property
    def columns(self) -> int:
        """Length of a row: the number of inputs of a linear layer."""
        return self.shape[-1]

    @property
    def rows(self) -> int:
        """Number of rows; a vector is one row."""
        return math.prod(self.shape[:-1])

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)
