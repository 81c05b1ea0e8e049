"""Axes: numbers to places and back to words, linear or by decades."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True, slots=True)
class Scale:
    """Values from `low` to `high` over places from `start` to `stop`; `log`: by their logarithm, and what is not positive is `low`."""

    low: float
    high: float
    start: float
    stop: float
    log: bool

    def place(self, value: float) -> float:
        """Return where a value stands; values beyond the ends stand at the ends."""
        value = min(self.high, max(self.low, value))
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.stop - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        """Return about five round values within the scale, and their words."""
        return self._decades() if self.log else self._round()

    def _round(self) -> list[tuple[float, str]]:
        rough = (self.high - self.low) / 5
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * 0.8)
        places = max(0, -math.floor(math.log10(step) + 1e-9))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [(n * step, f"{n * step:,.{places}f}") for n in range(first, last + 1)]

    def _decades(self) -> list[tuple[float, str]]:
        low, high = math.log10(self.low), math.log10(self.high)
        if high - low < 1.5:
            powers = range(math.floor(low), math.ceil(high) + 1)
            values = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
            return [
                (value, f"{value:g}") for value in values if self.low <= value * 1.0001 and value <= self.high * 1.0001
            ]
        every = max(1, math.ceil((high - low) / 7))
        powers = range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1)
        return [(10.0**power, f"10{str(power).translate(_SUPERSCRIPTS)}") for power in powers if power % every == 0]


def scale_of(values: Sequence[float], start: float, stop: float, *, log: bool, zero: bool = False) -> Scale:
    """Return a scale that holds `values` with some room at both ends; `zero`: and begins at nothing (linear only).

    Raises ValueError without a value, or where a logarithm finds none above nothing.
    """
    known = [value for value in values if not log or value > 0]
    if not known:
        raise ValueError("a scale needs values")
    low, high = min(known), max(known)
    if log:
        room = max(1.15, (high / low) ** 0.08)
        return Scale(low / room, high * room, start, stop, log=True)
    if zero:
        return Scale(0.0, 1.08 * high if high > 0 else 1.0, start, stop, log=False)
    room = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    return Scale(low - room, high + room, start, stop, log=False)
