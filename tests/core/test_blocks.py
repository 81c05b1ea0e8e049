"""Bytes of every ggml block type: gguf reads them the same, and nothing is lost between bytes and codes."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from r1q.core.blocks import LAYOUTS, pack, steps_of_blocks, unpack
from r1q.core.qtensor import apply_steps
from r1q.core.scheme import GGML_GRIDS, GRIDS

Bytes = NDArray[np.uint8]


def half_places(grid: str) -> list[slice]:
    """Where a block's float16 numbers lie, by ggml-common.h: written out here so that the table under test is not asked."""
    places = {
        "q2_k": [80, 82],
        "q3_k": [108],
        "q6_k": [208],
        "q4_1": [0, 2],
        "q5_1": [0, 2],
        "q4_k": [0, 2],
        "q5_k": [0, 2],
    }
    return [slice(at, at + 2) for at in places.get(grid, [0])]


def random_rows(grid: str, rows: int, blocks: int, seed: int, *, finite: bool) -> Bytes:
    """Rows of random bytes; with `finite`, their float16 numbers are neither infinite nor NaN."""
    rng = np.random.default_rng(seed)
    packed = rng.integers(0, 256, (rows * blocks, GRIDS[grid].block_bytes), dtype=np.uint8)
    if finite:
        for place in half_places(grid):
            packed[:, place.start + 1] &= 0xBF  # without its top exponent bit a half is below 2
    return packed.reshape(rows, -1)


def gguf_values(grid: str, packed: Bytes) -> NDArray[np.float32]:
    kind = gguf.GGMLQuantizationType[grid.upper()]
    return np.asarray(gguf.quants.dequantize(packed, kind), dtype=np.float32)


def test_there_is_a_layout_for_every_block_type() -> None:
    assert set(LAYOUTS) == set(GGML_GRIDS)


@pytest.mark.parametrize("grid", GGML_GRIDS)
def test_every_bit_of_a_block_has_one_place(grid: str) -> None:
    """Setting one bit of a block changes codes or params, and packing gives that bit back: no bit is lost or shared."""
    size = GRIDS[grid].block_bytes
    single = np.zeros((size * 8, size), dtype=np.uint8)
    for bit in range(size * 8):
        single[bit, bit // 8] = 1 << bit % 8
    codes, params = unpack(grid, single)
    np.testing.assert_array_equal(pack(grid, codes, params), single)
    bits = sum(param.entries * param.bits for param in LAYOUTS[grid].params.values())
    assert bits + GRIDS[grid].block * GRIDS[grid].bits == size * 8


@pytest.mark.parametrize("grid", GGML_GRIDS)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 4), blocks=st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_any_bytes_come_back(grid: str, seed: int, rows: int, blocks: int) -> None:
    packed = random_rows(grid, rows, blocks, seed, finite=False)
    codes, params = unpack(grid, packed)
    assert codes.shape == (rows, blocks * GRIDS[grid].block)
    np.testing.assert_array_equal(pack(grid, codes, params), packed)


@pytest.mark.parametrize("grid", GGML_GRIDS)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 4), blocks=st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_any_codes_and_params_come_back(grid: str, seed: int, rows: int, blocks: int) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1 << GRIDS[grid].bits, (rows, blocks * GRIDS[grid].block), dtype=np.uint8)
    params: dict[str, NDArray[Any]] = {}
    for name, param in LAYOUTS[grid].params.items():
        shape = (rows, blocks * param.entries)
        numbers = rng.integers(0, 1 << param.bits, shape)
        params[name] = numbers.astype(f"u{param.dtype.itemsize}").view(param.dtype)
    codes_back, params_back = unpack(grid, pack(grid, codes, params))
    np.testing.assert_array_equal(codes_back, codes)
    assert set(params_back) == set(params)
    for name, array in params.items():
        assert params_back[name].dtype == array.dtype
        assert params_back[name].tobytes() == array.tobytes()


@pytest.mark.parametrize("grid", GGML_GRIDS)
def test_values_are_ggufs_bit_for_bit(grid: str) -> None:
    packed = random_rows(grid, 16, 8, 3, finite=True)
    codes, params = unpack(grid, packed)
    values = apply_steps(codes, steps_of_blocks(grid, params))
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values.view(np.uint32), gguf_values(grid, packed).view(np.uint32))


def test_a_q4_0_block_by_hand() -> None:
    """d = −0.5 is the half 0xB800; byte j holds element j below and element j + 16 above."""
    codes = np.arange(32, dtype=np.uint8).reshape(1, 32) % 16
    codes[0, 16:] = codes[0, 16:][::-1]
    packed = pack("q4_0", codes, {"d": np.array([[-0.5]], dtype=np.float16)})
    assert packed.tobytes() == bytes.fromhex("00b8" + "".join(f"{15 - j:x}{j:x}" for j in range(16)))
    values = apply_steps(codes, steps_of_blocks("q4_0", {"d": np.array([[-0.5]], dtype=np.float16)}))
    assert values[0, :3].tolist() == [4.0, 3.5, 3.0]
    assert values[0, 16:19].tolist() == [-3.5, -3.0, -2.5]


def test_a_q4_k_blocks_scales_by_hand() -> None:
    """The sixth scale 45 = 0b10_1101 is split: 1101 at the low end of byte 9, 10 on top of byte 1 (both of the twelve)."""
    sc, m = np.zeros((1, 8), np.uint8), np.zeros((1, 8), np.uint8)
    sc[0, 5] = 45
    m[0, 2] = 63
    halves = {"d": np.zeros((1, 1), np.float16), "dmin": np.zeros((1, 1), np.float16)}
    packed = pack("q4_k", np.zeros((1, 256), np.uint8), {**halves, "sc": sc, "m": m})
    assert packed[0, 4:16].tolist() == [0, 0b1000_0000, 0, 0, 0, 0, 63, 0, 0, 0b1101, 0, 0]


@pytest.mark.parametrize("grid", GGML_GRIDS)
def test_no_rows_and_no_blocks_are_fine(grid: str) -> None:
    for rows, blocks in ((0, 2), (3, 0)):
        packed = np.zeros((rows, blocks * GRIDS[grid].block_bytes), dtype=np.uint8)
        codes, params = unpack(grid, packed)
        assert codes.shape == (rows, blocks * GRIDS[grid].block)
        assert pack(grid, codes, params).shape == packed.shape


@pytest.mark.parametrize("grid", GGML_GRIDS)
def test_views_pack_like_copies(grid: str) -> None:
    packed = random_rows(grid, 6, 2, 5, finite=False)
    codes, params = unpack(grid, packed)
    every_other = pack(grid, codes[::2], {name: array[::2] for name, array in params.items()})
    np.testing.assert_array_equal(every_other, packed[::2])
    np.testing.assert_array_equal(unpack(grid, packed[::2])[0], codes[::2])


def test_what_does_not_fit_is_refused() -> None:
    codes, params = unpack("q4_k", random_rows("q4_k", 2, 1, 0, finite=True))
    with pytest.raises(ValueError, match="not a ggml block type"):
        pack("q4_2", codes, params)
    with pytest.raises(ValueError, match=r"n · 256"):
        pack("q4_k", codes[:, :255], params)
    with pytest.raises(ValueError, match="have 4 bits"):
        pack("q4_k", codes + np.uint8(16), params)
    with pytest.raises(ValueError, match="stores d, dmin, sc, m"):
        pack("q4_k", codes, {"d": params["d"]})
    with pytest.raises(ValueError, match="sc has 6 bits"):
        pack("q4_k", codes, {**params, "sc": np.full((2, 8), 64, np.uint8)})
    with pytest.raises(ValueError, match="dmin is float16"):
        pack("q4_k", codes, {**params, "dmin": np.zeros((2, 1), np.float32)})
    with pytest.raises(ValueError, match="sc is uint8"):
        pack("q4_k", codes, {**params, "sc": np.zeros((2, 16), np.uint8)})
    with pytest.raises(ValueError, match=r"n · 144"):
        unpack("q4_k", np.zeros((2, 143), np.uint8))
