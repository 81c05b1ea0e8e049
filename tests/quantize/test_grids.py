"""llama.cpp's block searches: our bytes against libggml's own, and what holds for any search without it.

What libggml leaves undefined is not compared: see `casts_are_defined`. Of a NaN scale (weights whose squares overflow) only that it
is NaN is compared: neither C nor IEEE 754 fixes the sign of a NaN that an operation makes.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numba.core import caching
from numpy.typing import NDArray

from r1q.core.blocks import LAYOUTS, pack, steps_of_blocks, unpack
from r1q.core.qtensor import apply_steps
from r1q.core.scheme import GGML_GRIDS, GRIDS
from r1q.quantize.grids import SEARCHES, arithmetic, quantize_rows

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Chunk = Callable[[str, Floats, Floats | None], Bytes]
SIMPLE = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")


def our_bytes(grid: str, weights: Floats, importance: Floats | None) -> Bytes:
    codes, params = quantize_rows(grid, weights, importance)
    return pack(grid, codes, params)


def values_of(grid: str, weights: Floats, importance: Floats | None = None) -> Floats:
    codes, params = quantize_rows(grid, weights, importance)
    return apply_steps(codes, steps_of_blocks(grid, params))


@pytest.fixture(scope="module")
def ggml_bytes() -> Chunk:
    """`ggml_quantize_chunk` of the libggml-base that llama-cpp-python brings."""
    llama_cpp = pytest.importorskip("llama_cpp")
    folder = Path(llama_cpp.__file__).parent / "lib"
    library = next(
        path for path in (folder / name for name in ("libggml-base.so", "libggml-base.dylib")) if path.exists()
    )
    chunk = ctypes.CDLL(str(library)).ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    chunk.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]

    def quantize(grid: str, weights: Floats, importance: Floats | None) -> Bytes:
        weights, facts = np.ascontiguousarray(weights), GRIDS[grid]
        rows, columns = weights.shape
        packed = np.zeros((rows, columns // facts.block * facts.block_bytes), dtype=np.uint8)
        kind = int(gguf.GGMLQuantizationType[grid.upper()])
        weigh = None if importance is None else importance.ctypes.data
        assert chunk(kind, weights.ctypes.data, packed.ctypes.data, 0, rows, columns, weigh) == packed.size
        return packed

    return quantize


def casts_are_defined(grid: str, weights: Floats) -> NDArray[np.bool_]:
    """Which rows the five simple types fit, without importance, in C whose meaning the standard fixes.

    They cast float to int8 or uint8, which C leaves undefined for what has no such integer. That happens where 1 / scale overflows
    (a block below about 1e-37 of magnitude) or the block's extent does (beyond 3.4e38). All other searches round in integer bits.
    """
    blocks = weights.reshape(len(weights), -1, 32)
    low = blocks.min(axis=2) if grid in ("q4_1", "q5_1") else np.zeros(blocks.shape[:2], np.float32)
    steps = {"q4_0": 8, "q5_0": 16, "q8_0": 127, "q4_1": 15, "q5_1": 31}[grid]
    with np.errstate(all="ignore"):
        scale = np.abs(blocks - low[..., None]).max(axis=2) / np.float32(steps)
        inverse = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
        levels = (blocks - low[..., None]) * inverse[..., None]
    return np.asarray(np.isfinite(levels).all(axis=(1, 2)))


def rows_of_many_kinds(columns: int, seed: int) -> dict[str, Floats]:
    """Rows [n, columns] that a search may stumble over, by name."""
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal((4, columns))
    place = np.arange(columns)
    kinds = {
        "normal": 0.02 * normal,
        "heavy tails": rng.standard_t(2, (4, columns)),
        "uneven scales": normal * np.exp(3 * rng.standard_normal((4, columns))),
        "on a coarse grid": np.round(normal * 8) / 8,
        "constant": np.full((1, columns), 0.3),
        "negative constant": np.full((1, columns), -0.3),
        "zero": np.zeros((1, columns)),
        "negative zero": -np.zeros((1, columns)),
        "one outlier": np.where(place == columns // 3, 5.0, 0.0)[None],
        "one outlier in noise": np.where(place == columns // 3, 50.0, normal[:1]),
        "alternating": np.where(place % 2, 0.7, -0.7)[None],
        "sparse": normal * (rng.random((4, columns)) < 0.1),
        "all negative": -np.abs(rng.standard_normal((48, columns))),
        "all positive": np.abs(normal) + 1,
        "large for a half": normal * 1e4,
        "too large for a half": normal * 1e30,
        "squares near the end of float32": np.sqrt(2.5e38 / columns) * np.sign(normal),
        "near the end of float32": np.clip(normal, -1, 1) * 3e38,
        "small": normal * 1e-12,
        "around the smallest group": normal * 1e-15,
        "tiny": normal * 1e-30,
        "subnormal": normal * 1e-39,
        "last bits": normal * 1e-44,
        "one group of zeros": normal * (place // 16 % 3 > 0),
    }
    return {name: np.ascontiguousarray(rows, dtype=np.float32) for name, rows in kinds.items()}


def importances(columns: int, seed: int) -> dict[str, Floats | None]:
    rng = np.random.default_rng(seed)
    kinds = {
        "equal": np.ones(columns),
        "activations": rng.standard_normal(columns) ** 2,
        "zeros": np.zeros(columns),
        "half zeros": (rng.random(columns) < 0.5) * rng.random(columns),
        "huge spread": np.exp(12 * rng.standard_normal(columns)),
        # of a group that lies below zero this leaves sums that cancel to a scale below zero, which wraps in its byte
        "few, huge spread": (rng.random(columns) < 0.2) * 10 ** rng.uniform(-15, 15, columns),
        "the whole of float32": 10 ** rng.uniform(-38, 38, columns),
        "tiny": rng.random(columns) * 1e-30,
    }
    return {"none": None} | {name: array.astype(np.float32) for name, array in kinds.items()}


def without_nan_signs(grid: str, packed: Bytes) -> Bytes:
    """`packed` with every NaN among its halves spelled the same."""
    codes, params = unpack(grid, packed)
    for array in params.values():
        if array.dtype == np.float16:
            array[np.isnan(array)] = np.float16(np.nan)
    return pack(grid, codes, params)


def differing_rows(grid: str, ours: Bytes, theirs: Bytes) -> list[int]:
    if not np.array_equal(ours, theirs):
        ours, theirs = without_nan_signs(grid, ours), without_nan_signs(grid, theirs)
    return np.flatnonzero((ours != theirs).any(axis=1)).tolist()


@pytest.mark.runtime
@pytest.mark.parametrize("blocks", [1, 2, 5])
@pytest.mark.parametrize("grid", GGML_GRIDS)
def test_bytes_are_libggmls(grid: str, blocks: int, ggml_bytes: Chunk) -> None:
    columns = blocks * GRIDS[grid].block
    named = rows_of_many_kinds(columns, blocks)
    weights = np.concatenate(list(named.values()))
    names = [name for name, rows in named.items() for _ in rows]
    for weight_name, importance in importances(columns, blocks + 10).items():
        compared = np.arange(len(weights))
        if grid in SIMPLE and (importance is None or grid == "q8_0"):
            compared = np.flatnonzero(casts_are_defined(grid, weights))
            left_out = {names[row] for row in range(len(weights)) if row not in compared}
            assert left_out <= {"subnormal", "last bits", "near the end of float32"}
        ours = our_bytes(grid, weights[compared], importance)
        different = differing_rows(grid, ours, ggml_bytes(grid, weights[compared], importance))
        assert not different, f"{weight_name} importance: {[names[compared[row]] for row in different]}"


@pytest.mark.runtime
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("grid", GGML_GRIDS)
def test_bytes_of_a_wide_matrix_are_libggmls(grid: str, weighted: bool, ggml_bytes: Chunk) -> None:
    """Enough rows for several slabs and threads, with the outlier columns of a real layer."""
    rng = np.random.default_rng(7)
    weights = (rng.standard_normal((200, 1536)) * 0.03 * np.exp(0.5 * rng.standard_normal((1, 1536)))).astype(
        np.float32
    )
    importance = np.exp(2 * rng.standard_normal(1536)).astype(np.float32) if weighted else None
    assert differing_rows(grid, our_bytes(grid, weights, importance), ggml_bytes(grid, weights, importance)) == []


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@pytest.mark.runtime
@pytest.mark.parametrize("grid", GGML_GRIDS)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_bytes_of_any_floats_are_libggmls(grid: str, ggml_bytes: Chunk, data: st.DataObject) -> None:
    columns = GRIDS[grid].block
    weights = data.draw(arrays(np.float32, (2, columns), elements=finite))
    importance = data.draw(
        st.none() | arrays(np.float32, columns, elements=st.floats(0, width=32, allow_nan=False, allow_infinity=False))
    )
    if grid in SIMPLE and (importance is None or grid == "q8_0"):
        weights = weights[casts_are_defined(grid, weights)]
    assert differing_rows(grid, our_bytes(grid, weights, importance), ggml_bytes(grid, weights, importance)) == []


@pytest.mark.parametrize("grid", SIMPLE)
def test_simple_types_are_ggufs_too(grid: str) -> None:
    weights = np.concatenate([rows_of_many_kinds(96, 4)[name] for name in ("normal", "heavy tails", "alternating")])
    theirs = gguf.quants.quantize(weights, gguf.GGMLQuantizationType[grid.upper()])
    np.testing.assert_array_equal(our_bytes(grid, weights, None), theirs)


def test_a_q4_0_block_by_hand() -> None:
    """The furthest weight is −4 with code 0, so the step is 0.5; 0.75 is half way and goes up; 4 would be 16 and is cut to 15."""
    weights = np.zeros((1, 32), dtype=np.float32)
    weights[0, :5] = [-4.0, 0.5, 0.75, -0.75, 4.0]
    codes, params = quantize_rows("q4_0", weights, None)
    assert params["d"].tolist() == [[0.5]]
    assert codes[0, :6].tolist() == [0, 9, 10, 7, 15, 8]


@pytest.mark.parametrize("grid", GGML_GRIDS)
@pytest.mark.parametrize("weighted", [False, True])
def test_zeros_stay_zeros(grid: str, weighted: bool) -> None:
    importance = np.ones(512, np.float32) if weighted else None
    assert not values_of(grid, np.zeros((2, 512), np.float32), importance).any()


@pytest.mark.parametrize("grid", GGML_GRIDS)
def test_what_is_too_small_for_a_half_reads_back_as_zeros(grid: str) -> None:
    """Also where C leaves the cast undefined."""
    weights = np.concatenate([rows_of_many_kinds(512, 2)[name] for name in ("tiny", "subnormal", "last bits")])
    assert not values_of(grid, weights).any()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("grid", GGML_GRIDS)
def test_doubled_weights_have_the_same_codes_and_doubled_scales(grid: str, weighted: bool) -> None:
    weights = rows_of_many_kinds(512, 6)["heavy tails"]
    importance = np.random.default_rng(1).random(512).astype(np.float32) if weighted else None
    codes, params = quantize_rows(grid, weights, importance)
    codes_twice, params_twice = quantize_rows(grid, 2 * weights, importance)
    np.testing.assert_array_equal(codes_twice, codes)
    for name, array in params.items():
        times = 2 if array.dtype == np.float16 else 1
        np.testing.assert_array_equal(params_twice[name].astype(np.float64), array.astype(np.float64) * times)


@pytest.mark.parametrize("grid", GGML_GRIDS)
def test_errors_are_within_a_step(grid: str) -> None:
    """No weight of an ordinary row lies further from its value than one step of its group (a codebook's widest gap is 24 steps)."""
    weights = rows_of_many_kinds(512, 8)["normal"]
    codes, params = quantize_rows(grid, weights, None)
    steps = steps_of_blocks(grid, params)
    widest = 1 if steps.table is None else np.diff(steps.table).max()
    scale = np.repeat(np.abs(steps.scale), steps.group, axis=1)
    assert (np.abs(apply_steps(codes, steps) - weights) <= scale * widest).all()


@pytest.mark.parametrize("grid", ["q4_0", "q4_k", "iq4_nl"])
def test_importance_moves_the_error_to_where_it_weighs_less(grid: str) -> None:
    rng = np.random.default_rng(3)
    weights = rng.standard_t(3, (64, 512)).astype(np.float32)
    importance = np.exp(2 * rng.standard_normal(512)).astype(np.float32)

    def loss(values: Floats) -> float:
        return float((((values - weights) ** 2) * importance).sum(dtype=np.float64))

    assert loss(values_of(grid, weights, importance)) < 0.95 * loss(values_of(grid, weights))


def test_q8_0_ignores_importance() -> None:
    weights = rows_of_many_kinds(64, 1)["normal"]
    importance = np.arange(64, dtype=np.float32)
    np.testing.assert_array_equal(our_bytes("q8_0", weights, importance), our_bytes("q8_0", weights, None))


@pytest.mark.parametrize("grid", ["q4_k", "q5_0"])
def test_threads_and_neighbouring_rows_change_nothing(grid: str) -> None:
    rng = np.random.default_rng(5)
    weights = rng.standard_normal((400, 1024)).astype(np.float32)
    importance = rng.random(1024).astype(np.float32)
    codes, params = quantize_rows(grid, weights, importance, threads=3)
    alone, lone = quantize_rows(grid, weights, importance, threads=1)
    np.testing.assert_array_equal(codes, alone)
    one, single = quantize_rows(grid, weights[17:18], importance)
    np.testing.assert_array_equal(codes[17:18], one)
    for name, array in params.items():
        np.testing.assert_array_equal(array, lone[name])
        np.testing.assert_array_equal(array[17:18], single[name])


def test_every_block_type_has_a_search() -> None:
    assert set(SEARCHES) == set(LAYOUTS)


def test_wrong_arrays_are_refused() -> None:
    weights = np.zeros((2, 64), np.float32)
    with pytest.raises(ValueError, match="not a ggml block type"):
        quantize_rows("int4", weights, None)
    with pytest.raises(ValueError, match=r"n · 256"):
        quantize_rows("q4_k", weights, None)
    with pytest.raises(ValueError, match="float64"):
        quantize_rows("q4_0", weights.astype(np.float64), None)
    with pytest.raises(ValueError, match="contiguous"):
        quantize_rows("q4_0", np.asfortranarray(weights), None)
    with pytest.raises(ValueError, match="importance is float32"):
        quantize_rows("q4_0", weights, np.zeros(32, np.float32))
    with pytest.raises(ValueError, match="importance is float32"):
        quantize_rows("q4_0", weights, np.zeros(64, np.float64))


def test_no_rows_and_no_columns_are_fine() -> None:
    codes, params = quantize_rows("q4_k", np.zeros((0, 256), np.float32), None)
    assert codes.shape == (0, 256)
    assert params["sc"].shape == (0, 8)
    assert quantize_rows("q4_k", np.zeros((3, 0), np.float32), None)[0].shape == (3, 0)


def test_frozen_and_strided_arrays_are_read_alike() -> None:
    """Weights mapped from a file are read-only; importance may be a column of a table."""
    weights = rows_of_many_kinds(64, 1)["normal"]
    table = np.random.default_rng(2).random((64, 3)).astype(np.float32)
    expected = our_bytes("q4_0", weights, np.ascontiguousarray(table[:, 1]))
    weights.setflags(write=False)
    np.testing.assert_array_equal(our_bytes("q4_0", weights, table[:, 1]), expected)


def test_halves_are_numpys() -> None:
    """Every half, the floats half way between two, their neighbours, and random bit patterns."""
    halves = np.arange(1 << 16, dtype=np.uint16)
    exact = halves.view(np.float16).astype(np.float32)
    number = ~np.isnan(exact)
    back = np.array([arithmetic.half_value(bits) for bits in halves], dtype=np.float32)
    np.testing.assert_array_equal(back[number].view(np.uint32), exact[number].view(np.uint32))
    assert np.isnan(back[~number]).all()
    ordered = np.sort(exact[np.isfinite(exact)])
    between = (ordered[:-1].astype(np.float64) + ordered[1:]).astype(np.float32) / np.float32(2)
    rest = np.random.default_rng(0).integers(0, 1 << 32, 20000, dtype=np.uint32).view(np.float32)
    edges = np.array([65504, 65519.996, 65520, 1e30, np.inf, 2**-25, 2**-24, 1e-45], np.float32)
    values = np.concatenate(
        [exact[number], between, np.nextafter(between, -np.inf), np.nextafter(between, np.inf), rest]
    )
    values = np.concatenate([values[~np.isnan(values)], edges, -edges])
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16).view(np.uint16)
    np.testing.assert_array_equal(np.array([arithmetic.half_bits(value) for value in values]), expected)
    assert arithmetic.half_bits(np.float32(np.nan)) == 0x7E00


def test_integers_are_rounded_as_c_does() -> None:
    halves = np.arange(-300, 300, dtype=np.float32) / 2
    values = np.concatenate([halves, np.nextafter(halves, np.float32(1e9)), np.nextafter(halves, np.float32(-1e9))])
    assert [arithmetic.nearest(value) for value in values] == np.rint(values).astype(int).tolist()
    away = np.sign(values.astype(np.float64)) * np.floor(np.abs(values.astype(np.float64)) + 0.5)
    assert [arithmetic.rounded_away(value) for value in values] == away.astype(int).tolist()
    for nowhere in (np.nan, np.inf, -np.inf, 1e30):
        assert arithmetic.truncated(np.float32(nowhere)) == arithmetic.rounded_away(np.float32(nowhere)) == 0


def test_without_a_folder_for_machine_code_kernels_still_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container with a read-only disk; an empty list of places is how numba finds none."""
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])

    def half(number: float) -> float:
        return number / 2

    assert arithmetic.kernel(half)(3.0) == 1.5


def test_kept_machine_code_is_renewed_when_an_inlined_kernel_changes(tmp_path: Path) -> None:
    """An edit of `arithmetic.py` reaches the kernels of other files, which numba alone would go on taking from its folder."""
    script = (
        "import sys, numpy as np; sys.path.insert(0, sys.argv[1]);"
        "from r1q.quantize.grids import quantize_rows;"
        "print(quantize_rows('q8_0', np.full((1, 32), 2.0, np.float32), None)[0][0, 0])"
    )
    for name in ("core", "quantize"):
        for source in (Path(arithmetic.__file__).parents[2] / name).rglob("*.py"):
            target = tmp_path / "r1q" / name / source.relative_to(Path(arithmetic.__file__).parents[2] / name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    (tmp_path / "r1q" / "__init__.py").touch()

    def first_code() -> int:
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-c", script, str(tmp_path)]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=tmp_path)
        return int(run.stdout)

    assert first_code() == 255
    assert list((tmp_path / "cache").rglob("*bytes_plain*.nbc"))
    changed = tmp_path / "r1q" / "quantize" / "grids" / "arithmetic.py"
    text = changed.read_text()
    assert text.count("    whole = truncated(value)\n") == 1
    changed.write_text(text.replace("    whole = truncated(value)\n", "    whole = truncated(value) - 100\n"))
    assert first_code() != 255
