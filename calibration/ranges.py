"""From a histogram of values to the range that 256 integers shall cover: all, all but the rarest, or what keeps the distribution.

Bins are of equal width between the least and the greatest value. Ranges hold zero, so that a zero stays one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BINS = 4096
LEVELS = 256
SHARE = 0.9999  # of values that `percentile` keeps inside
_TRIALS = 64

Counts = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """How many values fell into each of BINS bins of equal width from `low` to `high`."""

    low: float
    high: float
    counts: Counts

    @property
    def width(self) -> float:
        """The width of a bin."""
        return (self.high - self.low) / len(self.counts)


def minmax(seen: Histogram) -> tuple[float, float]:
    """Return the least and the greatest value."""
    return seen.low, seen.high


def percentile(seen: Histogram) -> tuple[float, float]:
    """Return the bounds between which all but a ten-thousandth of the values lie, half of them cut off on either side."""
    shares = np.cumsum(seen.counts) / seen.counts.sum()
    outside = (1 - SHARE) / 2
    first, last = np.searchsorted(shares, [outside, 1 - outside])
    return seen.low + float(first) * seen.width, min(seen.low + float(last + 1) * seen.width, seen.high)


def entropy(seen: Histogram) -> tuple[float, float]:
    """Return the part of the range whose 256 levels keep the most of the distribution: least KL divergence (Migacz 2017).

    Each candidate cuts off at one magnitude; what lies outside is counted at its ends, and each level spreads its count evenly over
    those of its bins that held anything.
    """
    best = (np.inf, seen.low, seen.high)
    for share in np.linspace(1, 1 / _TRIALS, _TRIALS):
        most = share * max(-seen.low, seen.high)
        low, high = max(seen.low, -most), min(seen.high, most)
        first, last = int((low - seen.low) / seen.width), int(np.ceil((high - seen.low) / seen.width))
        if last - first < LEVELS:
            break
        loss = _divergence(seen.counts, first, min(last, len(seen.counts)))
        best = min(best, (loss, low, high))
    return best[1], best[2]


METHODS: Mapping[str, Callable[[Histogram], tuple[float, float]]] = {
    "minmax": minmax,
    "percentile": percentile,
    "entropy": entropy,
}


def spell(low: float, high: float) -> tuple[float, int]:
    """Return the scale and zero code of the range, widened to hold zero; the scale is a float of 8 bits, rounded up.

    So few bits that the last ones of a sum, which are not the same everywhere, decide nothing.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    span = (high - low) or 1.0
    mantissa, exponent = np.frexp(span / (LEVELS - 1))
    scale = float(np.ldexp(np.ceil(mantissa * 256) / 256, exponent))
    return scale, int(np.clip(round(-low / scale), 0, LEVELS - 1))


def _divergence(counts: Counts, first: int, last: int) -> float:
    kept = counts[first:last].copy()
    held = kept > 0
    wanted = kept.copy()
    wanted[0] += counts[:first].sum()
    wanted[-1] += counts[last:].sum()
    level = np.arange(len(kept)) * LEVELS // len(kept)
    sums, bins = np.bincount(level, kept, LEVELS), np.bincount(level, held, LEVELS)
    spread = np.where(held, sums[level] / np.maximum(bins[level], 1), 0)
    wanted, spread = wanted / wanted.sum(), spread / max(spread.sum(), 1)
    # What the levels do not hold at all counts as if a millionth of it were there.
    spread = np.where(wanted > 0, np.maximum(spread, wanted * 1e-6), spread)
    both = wanted > 0
    return float((wanted[both] * np.log(wanted[both] / spread[both])).sum())
