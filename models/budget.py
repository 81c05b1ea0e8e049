"""What the work of a chat template costs, counted before it is done.

A `Budget` is spent in units of about one character. The functions here know what operators and methods of strings will make, so
that a few characters of a template cannot make gigabytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from string import Formatter
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.runtime import Undefined
from jinja2.utils import Namespace

_ITEM_UNITS = 16  # weighing an item takes the time of many characters
_MAX_BITS = 4096
_MAX_WIDTH = 100


class Budget:
    """Units of work left to one rendering. `step` is what an iteration or a call costs, whatever it does."""

    def __init__(self, units: int, step: int) -> None:
        self.units, self.step = units, step

    def charge(self, units: int) -> None:
        """Take `units` away; raise `SecurityError` when they are not there."""
        self.units -= units
        if self.units < 0:
            raise SecurityError("it does more work than a chat template may")

    def weigh(self, value: object) -> None:
        """Charge for `value`: its characters, and everything inside of it."""
        if isinstance(value, str):
            self.charge(len(value))
        elif isinstance(value, Namespace):
            self.weigh(value._Namespace__attrs)  # printing a namespace prints what it holds
        elif isinstance(value, Undefined) or not isinstance(value, Collection):
            self.charge(1)
        else:
            self.charge(_ITEM_UNITS * (1 + len(value)))
            for item in value:
                self.weigh(item)
                if isinstance(value, Mapping):
                    self.weigh(value[item])


def charge_product(budget: Budget, operator: str, left: Any, right: Any) -> None:
    """Charge for a repetition; refuse numbers of more than `_MAX_BITS` bits."""
    for sequence, times in ((left, right), (right, left)):
        if isinstance(sequence, Collection) and isinstance(times, int):
            budget.charge(len(sequence) * max(0, times))
            return
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > _MAX_BITS:
            raise SecurityError("it computes with enormous numbers")


def joinable(budget: Budget, separator: str, items: Iterable[Any]) -> list[str]:
    """Return `items` as texts, after charging for what joining them makes."""
    texts = []
    for item in items:
        budget.charge(len(separator) + 1)
        budget.weigh(item)
        texts.append(str(item))
    return texts


def charge_replacing(budget: Budget, text: str, old: object, new: object) -> None:
    """Charge for the most that replacing `old` by `new` in `text` can make."""
    if isinstance(old, str) and isinstance(new, str):
        budget.charge(len(text) + (len(text) // max(1, len(old)) + 1) * len(new))


_Arguments = tuple[Any, ...]


def _before_join(budget: Budget, text: str, args: _Arguments, kwargs: Mapping[str, Any]) -> _Arguments:
    del kwargs
    return tuple(joinable(budget, text, items) for items in args)


def _before_replace(budget: Budget, text: str, args: _Arguments, kwargs: Mapping[str, Any]) -> _Arguments:
    del kwargs
    charge_replacing(budget, text, *args[:2])
    return args


def _before_format(budget: Budget, text: str, args: _Arguments, kwargs: Mapping[str, Any]) -> _Arguments:
    """Charge every field for all arguments; refuse widths from arguments, and wide ones."""
    for _, field, spelling, _ in Formatter().parse(text):
        if field is not None:
            budget.weigh(args)
            budget.weigh(kwargs)
        if spelling and ("{" in spelling or any(int(width) > _MAX_WIDTH for width in re.findall(r"\d+", spelling))):
            raise SecurityError(f"it formats with the width {spelling!r}")
    return args


# What a method of a string is charged for before it is called; each returns the arguments to call it with.
STRING_METHODS: Mapping[str, Callable[[Budget, str, _Arguments, Mapping[str, Any]], _Arguments]] = {
    "join": _before_join,
    "replace": _before_replace,
    "format": _before_format,
    "format_map": _before_format,
}
