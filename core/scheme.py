"""Scheme: how ONE tensor is spelled, and the table of every grid with its block size, bytes and code width.

Sizes of the block grids are those of llama.cpp's `ggml-common.h`; `tests/core/test_scheme.py` checks them against `gguf`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from r1q.core.errors import UsageError, unknown_name

Family = Literal["float", "ggml", "int"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GridFacts:
    """One row of the grid table. `block` weights along a row share `block_bytes` bytes; a code has `bits` bits."""

    name: str
    family: Family
    block: int
    block_bytes: int
    bits: int


def _table() -> Mapping[str, GridFacts]:
    rows: list[tuple[str, Family, int, int, int]] = [
        ("f32", "float", 1, 4, 32),
        ("f16", "float", 1, 2, 16),
        ("bf16", "float", 1, 2, 16),
        ("q4_0", "ggml", 32, 18, 4),
        ("q4_1", "ggml", 32, 20, 4),
        ("q5_0", "ggml", 32, 22, 5),
        ("q5_1", "ggml", 32, 24, 5),
        ("q8_0", "ggml", 32, 34, 8),
        ("q2_k", "ggml", 256, 84, 2),
        ("q3_k", "ggml", 256, 110, 3),
        ("q4_k", "ggml", 256, 144, 4),
        ("q5_k", "ggml", 256, 176, 5),
        ("q6_k", "ggml", 256, 210, 6),
        ("iq4_nl", "ggml", 32, 18, 4),
        ("iq4_xs", "ggml", 256, 136, 4),
    ]
    facts = [GridFacts(name=n, family=f, block=b, block_bytes=s, bits=w) for n, f, b, s, w in rows]
    facts += [GridFacts(name=f"int{w}", family="int", block=0, block_bytes=0, bits=w) for w in (2, 3, 4, 8)]
    return MappingProxyType({fact.name: fact for fact in facts})


GRIDS: Mapping[str, GridFacts] = _table()
FLOAT_GRIDS = tuple(name for name, facts in GRIDS.items() if facts.family == "float")
GGML_GRIDS = tuple(name for name, facts in GRIDS.items() if facts.family == "ggml")
INT_GRIDS = tuple(name for name, facts in GRIDS.items() if facts.family == "int")
WHOLE_ROW = -1
_MAX_GROUP = 1 << 31


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How one tensor is spelled: a grid and, for the integer grids, a group size (−1: the whole row) and symmetry."""

    grid: str
    group_size: int | None = None
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.grid not in GRIDS:
            raise UsageError(unknown_name("grid", self.grid, GRIDS))
        if self.facts.family == "int":
            if self.group_size is None or (self.group_size != WHOLE_ROW and not 1 <= self.group_size <= _MAX_GROUP):
                raise UsageError(f"{self.grid} needs a group size from 1 to {_MAX_GROUP}, or -1 for the whole row")
        elif self.group_size is not None or not self.symmetric:
            raise UsageError(f"{self.grid} has its own block of {self.facts.block}: leave group size and symmetry out")

    @property
    def facts(self) -> GridFacts:
        """The grid's row of the table."""
        return GRIDS[self.grid]

    def group(self, columns: int) -> int:
        """Return how many columns share a scale in rows of `columns` weights."""
        if self.facts.family != "int":
            return self.facts.block
        return columns if self.group_size == WHOLE_ROW else self.group_size or columns

    def divides(self, columns: int) -> bool:
        """Return whether rows of `columns` weights split into whole blocks."""
        return columns % self.group(columns) == 0

    def row_bytes(self, columns: int) -> int:
        """Return the bytes of one stored row: packed codes, and scales (float16) and zeros (uint8) of integer grids."""
        if self.facts.family != "int":
            return columns // self.facts.block * self.facts.block_bytes
        groups = columns // self.group(columns)
        return -(-columns * self.facts.bits // 8) + groups * (2 if self.symmetric else 3)

    def bits_per_weight(self, columns: int) -> float:
        """Return the true bits a weight costs in rows of `columns`, scales included."""
        return 8 * self.row_bytes(columns) / columns

    def __str__(self) -> str:
        """Return the spelling used in tables: `q4_k`, `int4 g64`, `int4 g128 asym`."""
        if self.facts.family != "int":
            return self.grid
        group = "row" if self.group_size == WHOLE_ROW else f"g{self.group_size}"
        return f"{self.grid} {group}" + ("" if self.symmetric else " asym")
