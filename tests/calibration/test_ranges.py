"""Ranges of 256 integers from histograms: worked by hand, and by trying every range."""

import numpy as np
import pytest

from r1q.calibration.ranges import BINS, Histogram, entropy, minmax, percentile, spell


def histogram(values: np.ndarray) -> Histogram:
    counts, _ = np.histogram(values, BINS, (values.min(), values.max()))
    return Histogram(low=float(values.min()), high=float(values.max()), counts=counts.astype(np.float64))


NORMAL = np.random.default_rng(0).normal(size=200_000)


def test_the_whole_range_and_all_but_the_rarest() -> None:
    seen = histogram(np.concatenate([NORMAL, [40.0]]))
    assert minmax(seen) == (seen.low, 40.0)
    low, high = percentile(seen)
    wanted = np.quantile(NORMAL, [0.00005, 0.99995])
    assert (low, high) == pytest.approx(tuple(wanted), abs=2 * seen.width + 0.05)
    inside = (low <= NORMAL).mean(), (high >= NORMAL).mean()
    assert min(inside) >= 0.99995 - 1e-5


def test_entropy_gives_up_an_outlier_but_not_a_crowd() -> None:
    lone = histogram(np.concatenate([NORMAL, [100.0]]))
    high = entropy(lone)[1]
    assert NORMAL.max() < 1.5 * high
    assert high < 20
    crowd = np.concatenate([NORMAL, np.linspace(90, 100, 40_000)])
    assert entropy(histogram(crowd))[1] > 98


@pytest.mark.parametrize(
    ("low", "high"), [(-1.0, 3.0), (0.5, 2.0), (-4.0, -1.0), (0.0, 0.0), (-1e-20, 1e-20), (-7e4, 3.0)]
)
def test_a_range_is_spelled_with_zero_in_it_and_nothing_outside(low: float, high: float) -> None:
    scale, zero = spell(low, high)
    least, most = (0 - zero) * scale, (255 - zero) * scale
    assert least <= min(low, 0) + scale / 2
    assert most >= max(high, 0) - scale / 2
    span = max(high, 0) - min(low, 0)
    assert scale <= (span / 255 or 1) * (1 + 2**-7)
    assert float(np.float32(scale)) == scale
    assert (scale * 2.0 ** (8 - np.frexp(scale)[1])).is_integer()
