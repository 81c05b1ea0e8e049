"""CacheScales: what a step of a cache of 8-bit integers is worth, channel by channel, and the file that keeps it beside a checkpoint.

A key or value x of a channel is kept as round(x / scale) within ±127. The scales are found once, on text; a later export of the same
checkpoint on the same text reads them from the file, and so writes the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from r1q.core.errors import InputError
from r1q.core.files import write_json

CACHE_SCALES = "kv-int8.json"
_FORMAT, _STEPS, _MAX_BYTES = 1, 127, 1 << 28
_LEAST = 1e-6  # of a block's greatest range: a channel that stayed at zero still has a step

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheScales:
    """Steps of keys (as they are kept, turned by their position) and of values, both float32 [layers, kv_heads, head_dim].

    `record` says what they were found on: the checkpoint's manifest, the text, the rule.
    """

    keys: Floats
    values: Floats
    record: Mapping[str, object]

    @classmethod
    def of_ranges(cls, keys: Floats, values: Floats, record: Mapping[str, object]) -> CacheScales:
        """Return the steps for greatest magnitudes [layers, kv_heads, head_dim]."""
        return cls(keys=_steps(keys), values=_steps(values), record=record)

    @classmethod
    def read(cls, path: Path, shape: tuple[int, int, int]) -> CacheScales:
        """Read what `write` wrote for a model of (layers, kv_heads, head_dim). Raises `InputError` for a file that is damaged."""
        try:
            if path.stat().st_size > _MAX_BYTES:
                raise ValueError("too large")
            value = json.loads(path.read_bytes())
            if value["format"] != _FORMAT:
                raise ValueError(f"format {value['format']}")
            keys, values = (np.asarray(value[part], dtype=np.float32) for part in ("keys", "values"))
            if not all(
                found.shape == shape and np.isfinite(found).all() and (found > 0).all() for found in (keys, values)
            ):
                raise ValueError(f"scales that are no positive numbers {list(shape)}")
            return cls(keys=keys, values=values, record=dict(value["record"]))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{path} is damaged ({error}); delete it, and it is made again") from error

    def write(self, path: Path) -> None:
        """Write the scales, atomically; floats are spelled so that they are read back bit by bit."""
        listed = {
            part: found.astype(np.float64).tolist() for part, found in (("keys", self.keys), ("values", self.values))
        }
        write_json(path, {"format": _FORMAT, "record": dict(self.record), **listed})


def _steps(ranges: Floats) -> Floats:
    most = ranges.max(axis=(1, 2), keepdims=True)
    floor = np.where(most > 0, most, 1.0) * _LEAST
    steps: Floats = (np.maximum(ranges, floor) / _STEPS).astype(np.float32)
    return steps
