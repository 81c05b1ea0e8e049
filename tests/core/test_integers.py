"""Integer grids on disk: packing against a slow obvious loop, and steps by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1q.core.grids import pack, unpack
from r1q.core.integers import pack_bits, unpack_bits
from r1q.core.qtensor import QuantizedTensor
from r1q.core.scheme import Scheme


def slow_pack(row: list[int], bits: int) -> bytes:
    whole = sum(code << (bits * index) for index, code in enumerate(row))
    return whole.to_bytes(-(-len(row) * bits // 8), "little")


@settings(deadline=None)
@given(st.sampled_from([2, 3, 4, 8]), st.data())
def test_packing_equals_one_big_integer(bits: int, data: st.DataObject) -> None:
    row = data.draw(st.lists(st.integers(0, (1 << bits) - 1), min_size=1, max_size=70))
    codes = np.array([row, row[::-1]], dtype=np.uint8)
    packed = pack_bits(codes, bits)
    assert [bytes(line) for line in packed] == [slow_pack(row, bits), slow_pack(row[::-1], bits)]
    np.testing.assert_array_equal(unpack_bits(packed, bits, len(row)), codes)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("grid", "group"), [("int2", 64), ("int3", 32), ("int4", 128), ("int8", -1), ("int3", -1)])
def test_a_stored_row_comes_back(grid: str, group: int, symmetric: bool) -> None:
    rng = np.random.default_rng(0)
    scheme = Scheme(grid=grid, group_size=group, symmetric=symmetric)
    groups = 256 // scheme.group(256)
    codes = rng.integers(0, 1 << scheme.facts.bits, (3, 256), dtype=np.uint8)
    params: dict[str, np.ndarray] = {"scales": rng.normal(size=(3, groups)).astype(np.float16)}
    if not symmetric:
        params["zeros"] = rng.integers(0, 1 << scheme.facts.bits, (3, groups), dtype=np.uint8)
    packed = pack(scheme, codes, params)
    assert packed.shape == (3, scheme.row_bytes(256))
    back = unpack(scheme, packed, 256)
    np.testing.assert_array_equal(back.codes, codes)
    for name, value in params.items():
        np.testing.assert_array_equal(back.params[name], value)


def test_values_by_hand() -> None:
    scheme = Scheme(grid="int4", group_size=2, symmetric=False)
    params: dict[str, np.ndarray] = {
        "scales": np.array([[0.5, 2.0]], np.float16),
        "zeros": np.array([[3, 15]], np.uint8),
    }
    tensor = QuantizedTensor(scheme=scheme, codes=np.array([[0, 4, 15, 14]], np.uint8), params=params)
    assert tensor.dequantize().tolist() == [[-1.5, 0.5, 0.0, -2.0]]
    middle = QuantizedTensor(
        scheme=Scheme(grid="int3", group_size=-1),
        codes=np.array([[0, 4, 7]], np.uint8),
        params={"scales": np.array([[2.0]], np.float16)},
    )
    assert middle.dequantize().tolist() == [[-8.0, 0.0, 6.0]]
