"""Activations: how the inputs of linear layers become 8-bit integers, and by which powers of two channels were balanced beforehand.

One entry serves all layers that read the same values: `attn_q` stands for q, k and v, `ffn_gate` for gate and up. An input x is
spelled as code = round(x / scale) + zero within 0 … 255. The file lies in a checkpoint beside the model's own config.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from r1q.core.errors import InputError
from r1q.core.files import write_json

ACTIVATIONS = "activations.json"
STAGES: Mapping[str, tuple[str, ...]] = {
    "attn_q": ("attn_q", "attn_k", "attn_v"),
    "attn_output": ("attn_output",),
    "ffn_gate": ("ffn_gate", "ffn_up"),
    "ffn_down": ("ffn_down",),
}
STAGE_OF = {kind: stage for stage, kinds in STAGES.items() for kind in kinds}
_FORMAT, _MAX_BYTES, _MAX_EXPONENT = 1, 1 << 28, 126


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """How one input is spelled, and the relative root-mean-square error that this costs what its layers compute.

    `static`: the layers take the integers. Else the error was too large, and they are weight-only.
    """

    scale: float
    zero: int
    error: float
    static: bool

    def __post_init__(self) -> None:
        if not (0 < self.scale < math.inf and 0 <= self.zero <= 255 and 0 <= self.error < math.inf):
            raise ValueError(f"a range of scale {self.scale}, zero {self.zero} and error {self.error}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Activations:
    """Ranges and balancing by `(layer, stage)`. `exponents` [columns of the stage's layers]: column j was multiplied by 2^exponent.

    `record` says what they were found on: the text, the method, the limit of the error.
    """

    ranges: Mapping[tuple[int, str], Range]
    exponents: Mapping[tuple[int, str], tuple[int, ...]]
    record: Mapping[str, object]

    def static(self, layer: int | None, kind: str) -> Range | None:
        """Return how the input of a layer is spelled, None where it stays a float."""
        found = self.ranges.get((-1 if layer is None else layer, STAGE_OF.get(kind, "")))
        return found if found is not None and found.static else None

    def weight_only(self) -> list[str]:
        """Return a line for each input that stays a float: which layers, and what error integers would have made."""
        return [
            f"{', '.join(f'blk.{layer}.{kind}' for kind in STAGES[stage])}: weight-only, 8-bit inputs would err by {found.error:.1%}"
            for (layer, stage), found in self.ranges.items()
            if not found.static
        ]

    def write(self, path: Path) -> None:
        """Write the file, atomically; equal values give equal bytes."""
        entries = [
            {
                "layer": layer, "stage": stage, "scale": found.scale, "zero": found.zero, "error": found.error,
                "static": found.static, "exponents": list(self.exponents[layer, stage]),
            }
            for (layer, stage), found in self.ranges.items()
        ]  # fmt: skip
        write_json(path, {"format": _FORMAT, "record": dict(self.record), "inputs": entries})

    @classmethod
    def read(cls, path: Path) -> Activations:
        """Read what `write` wrote. Raises `InputError` for a file that is damaged."""
        ranges: dict[tuple[int, str], Range] = {}
        exponents: dict[tuple[int, str], tuple[int, ...]] = {}
        try:
            if path.stat().st_size > _MAX_BYTES:
                raise ValueError("too large")
            value = json.loads(path.read_bytes())
            if value["format"] != _FORMAT:
                raise ValueError(f"format {value['format']}")
            for entry in value["inputs"]:
                key = (int(entry["layer"]), str(entry["stage"]))
                powers = tuple(entry["exponents"])
                if key[1] not in STAGES or key in ranges or not all(_is_power(power) for power in powers):
                    raise ValueError(f"an impossible entry {key}")
                ranges[key] = Range(
                    scale=float(entry["scale"]), zero=int(entry["zero"]), error=float(entry["error"]), static=entry["static"] is True
                )  # fmt: skip
                exponents[key] = powers
            return cls(ranges=ranges, exponents=exponents, record=dict(value["record"]))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{path} is damaged ({error}); quantize again") from error


def _is_power(value: object) -> bool:
    return type(value) is int and abs(value) <= _MAX_EXPONENT
