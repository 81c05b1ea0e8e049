"""Engine: everything about a calibrated run, besides model, recipe and text, that decides a byte of its result.

It is written to job.json before the first weight is read; a run that is resumed takes it from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Literal

Seen = Literal["routed", "all", "hybrid"]
SEEN: tuple[Seen, ...] = ("routed", "all", "hybrid")
Effort = Literal["fast", "default", "high"]
EFFORTS: tuple[Effort, ...] = ("fast", "default", "high")
_FREE, _HEAL = "spill", "heal"


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """How a calibrated run computes.

    `effort`: `fast` fits each layer to the coded model's own inputs; `default` also makes good what earlier layers have shifted, with
    the float model running beside; `high` refines too. `passes`: how often a coded matrix is refined as a whole. `damp`:
    share of the mean diagonal added to second moments. `pull`: share of the least-squares shift that is taken (all of it overfits the
    calibration text). `compute`: dtype of matrix products. `tile`: tokens summed at once. `slab`: weights of a matrix coded at once.
    `threads` and `isa`: cores and instruction set. `experts`: which tokens routed experts are calibrated on (their own, all, or their
    own filled up), and `few`: how many an expert must have seen to be coded by second moments. `heal`: steps of training of scales and
    norms behind the codes. All of these decide last bits. `spill`: whether hidden states lie in files instead of memory, which decides
    none.
    """

    effort: Effort
    threads: int
    isa: str
    compute: Literal["float32", "bfloat16"]
    device: str = "cpu"
    damp: float = 0.05
    pull: float = 0.5
    tile: int = 2048
    passes: int = 0
    slab: int = 1 << 24
    experts: Seen = "routed"
    few: int = 128
    heal: int = 0
    spill: bool = False

    @property
    def exact_stream(self) -> bool:
        """Whether the float model runs beside the coded one."""
        return self.effort != "fast"

    def to_dict(self) -> dict[str, object]:
        """Return the engine as job.json holds it: without `spill`, which decides no byte, so that a resumed run is free in it.

        `heal` is there where it is not 0.
        """
        return {name: value for name, value in asdict(self).items() if name != _FREE and (name != _HEAL or value)}

    @classmethod
    def from_dict(cls, value: Mapping[str, object]) -> Engine:
        """Read an engine back. Raises `TypeError` or `ValueError` for what is not one."""
        value = {_HEAL: 0, **value}
        types = {
            "threads": int,
            "damp": float,
            "pull": float,
            "tile": int,
            "passes": int,
            "slab": int,
            "few": int,
            _HEAL: int,
        }
        names = [field.name for field in fields(cls) if field.name != _FREE]
        if set(value) != set(names) or not all(isinstance(value[name], types.get(name, str)) for name in names):
            raise ValueError("not the engine of a calibrated run")
        return cls(**value)  # type: ignore[arg-type]  # every field was just checked
