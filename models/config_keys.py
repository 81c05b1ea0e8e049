"""Keys: values of a config.json taken by key and type, so that every complaint names the file, the key and what it holds."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from r1q.core.errors import InputError

_MAX_SIZE = 1 << 31


class Keys:
    """A JSON object whose values are taken by key and type."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self.raw, self.where = raw, where

    def bad(self, key: str, why: str) -> InputError:
        """Return the error for a value that cannot be used."""
        return InputError(f"{self.where}: {key} = {self.raw.get(key)!r} {why}")

    def get(self, key: str) -> Any:
        """Return the value, None when it is absent or null."""
        return self.raw.get(key)

    def size(self, key: str, default: int | None = None) -> int:
        """Return a positive integer of believable size."""
        value = self.raw.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or not 0 < value < _MAX_SIZE:
            raise self.bad(key, "is not a positive integer" if key in self.raw else "is missing")
        return value

    def count(self, key: str) -> int:
        """Return an integer of zero and more, 0 when it is absent."""
        value = self.raw.get(key)
        if value is None:
            return 0
        if type(value) is not int or not 0 <= value < _MAX_SIZE:
            raise self.bad(key, "is not a number of things")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a positive finite number."""
        value = self.raw.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, int | float) and type(value) is not bool and 0 < value <= sys.float_info.max:
            return float(value)
        raise self.bad(key, "is not a positive number" if key in self.raw else "is missing")

    def flag(self, key: str, default: bool = False) -> bool:
        """Return a boolean, `default` when it is absent."""
        value = self.raw.get(key)
        if value is not None and type(value) is not bool:
            raise self.bad(key, "is not true or false")
        return default if value is None else value

    def ids(self, key: str) -> tuple[int, ...]:
        """Return token ids: a number, a list of them, or none."""
        value = self.raw.get(key)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(item) is int and item >= 0 for item in values):
            raise self.bad(key, "is not a token id or a list of them")
        return tuple(values)
