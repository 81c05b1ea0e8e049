"""Rounding on the integer grids: bounds, zeros kept, and equality with q4_0 and q8_0 where they are the same grid."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from r1q.core.qtensor import Floats
from r1q.core.scheme import Scheme
from r1q.quantize.integers import quantize_integers

BITS = [2, 3, 4, 8]
ROWS = hnp.arrays(
    np.float32, (2, 64), elements=st.floats(-100, 100, width=32).filter(lambda x: x == 0 or abs(x) > 1e-3)
)


@settings(deadline=None, max_examples=60)
@given(ROWS, st.sampled_from(BITS), st.booleans())
def test_error_is_at_most_one_step_and_zeros_stay(weights: Floats, bits: int, symmetric: bool) -> None:
    scheme = Scheme(grid=f"int{bits}", group_size=32, symmetric=symmetric)
    tensor = quantize_integers(weights, scheme)
    values = tensor.dequantize()
    step = np.abs(tensor.params["scales"].astype(np.float32)).repeat(32, axis=1)
    # Half a step from rounding; half from the zero point or from the clipped end; float16 scales are off by 2^-11 of the range.
    assert (np.abs(values - weights) <= step * 1.0 + np.abs(weights) * 2.0**-9 + 1e-6).all()
    assert (values[weights == 0] == 0).all()


@pytest.mark.parametrize("bits", BITS)
def test_a_weight_of_largest_magnitude_is_kept_to_float16(bits: int) -> None:
    weights = np.zeros((1, 32), np.float32)
    weights[0, 5] = 3.0
    value = quantize_integers(weights, Scheme(grid=f"int{bits}", group_size=32)).dequantize()
    assert value[0, 5] == pytest.approx(3.0, rel=2**-10)


@pytest.mark.parametrize(("bits", "grid"), [(4, "q4_0"), (8, "q8_0")])
def test_groups_of_32_are_llama_cpps_grids_up_to_ties(bits: int, grid: str) -> None:
    from r1q.quantize.grids import quantize_rows

    weights = np.random.default_rng(1).normal(size=(64, 256)).astype(np.float32)
    ours = quantize_integers(weights, Scheme(grid=f"int{bits}", group_size=32))
    codes, params = quantize_rows(grid, weights, None)
    np.testing.assert_array_equal(ours.params["scales"], params["d"])
    # llama.cpp codes with the scale before float16 rounding, so single codes may differ by one.
    assert np.abs(ours.codes.astype(int) - codes.astype(int)).max() <= 1
    assert (ours.codes != codes).mean() < 0.02
