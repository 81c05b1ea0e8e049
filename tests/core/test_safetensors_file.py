"""Safetensors: our bytes open in the real package, its bytes open here, and every way to lie in a header is refused by name."""

from __future__ import annotations

import contextlib
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from r1q.core.errors import InputError, ResourceError
from r1q.core.safetensors_file import (
    MAX_HEADER_BYTES,
    NUMPY_DTYPES,
    SafetensorsFile,
    write_safetensors,
    writing_safetensors,
)

TENSORS: dict[str, np.ndarray[Any, Any]] = {
    "bytes": np.arange(7, dtype=np.uint8),
    "a/b.weight": np.arange(12, dtype=np.float32).reshape(3, 4) - 5,
    "half": np.linspace(-2, 2, 6, dtype=np.float16).reshape(2, 3),
    "scalar": np.array(3.5, dtype=np.float64),
    "none of it": np.zeros((0, 5), dtype=np.int64),
    "näme": np.array([[[-1], [2]]], dtype=np.int16),
}
SPELLED = {np.dtype(t): name for name, t in NUMPY_DTYPES.items() if not name.startswith(("F8", "BF"))}


def write(path: Path, tensors: dict[str, np.ndarray[Any, Any]], metadata: dict[str, str] | None = None) -> Path:
    entries = [(name, SPELLED[array.dtype], array.shape) for name, array in tensors.items()]
    write_safetensors(path, entries, tensors.values(), metadata)
    return path


def raw_file(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def test_the_real_package_reads_what_we_write(tmp_path: Path) -> None:
    path = write(tmp_path / "ours.safetensors", TENSORS, {"made by": "a test", "ü": "ö"})
    loaded = load_file(path)
    assert loaded.keys() == TENSORS.keys()
    for name, array in TENSORS.items():
        assert loaded[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded[name], array)
    with safe_open(path, framework="np") as file:
        assert file.metadata() == {"made by": "a test", "ü": "ö"}


def test_we_read_what_the_real_package_writes(tmp_path: Path) -> None:
    path = tmp_path / "theirs.safetensors"
    save_file(TENSORS, path, {"format": "np"})
    with SafetensorsFile.open(path) as file:
        assert file.metadata == {"format": "np"}
        assert file.tensors.keys() == TENSORS.keys()
        for name, array in TENSORS.items():
            assert file.tensors[name].shape == array.shape
            read = file.read(name)
            assert read.dtype == array.dtype
            np.testing.assert_array_equal(read, array)


def test_bfloat16_comes_as_its_bits(tmp_path: Path) -> None:
    path = tmp_path / "bf16.safetensors"
    write_safetensors(path, [("x", "BF16", (2, 2))], [np.array([0x3F80, 0xC000, 0x4049, 0x0000], dtype=np.uint16)])
    file = SafetensorsFile.open(path)
    assert file.read("x").dtype == np.uint16
    assert file.read_rows("x", 1, 2).tolist() == [[0x4049, 0]]
    torch = pytest.importorskip("torch")
    with safe_open(path, framework="pt") as theirs:
        assert theirs.get_tensor("x").equal(torch.tensor([[1.0, -2.0], [3.140625, 0.0]], dtype=torch.bfloat16))


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (0, 1), (1, 3), (0, 3), (3, 3)])
def test_rows_are_slices_of_the_whole(tmp_path: Path, start: int, stop: int) -> None:
    file = SafetensorsFile.open(write(tmp_path / "x.safetensors", TENSORS))
    np.testing.assert_array_equal(file.read_rows("a/b.weight", start, stop), TENSORS["a/b.weight"][start:stop])


@pytest.mark.parametrize(("name", "start", "stop"), [("half", 1, 3), ("half", -1, 1), ("half", 2, 1), ("scalar", 0, 1)])
def test_rows_that_are_not_there_are_our_mistake(tmp_path: Path, name: str, start: int, stop: int) -> None:
    file = SafetensorsFile.open(write(tmp_path / "x.safetensors", TENSORS))
    with pytest.raises(ValueError, match=f"rows {start}:{stop} of {name}"):
        file.read_rows(name, start, stop)


def test_equal_content_gives_equal_bytes_with_an_aligned_header(tmp_path: Path) -> None:
    first, second = (write(tmp_path / name, TENSORS).read_bytes() for name in "ab")
    assert first == second
    assert struct.unpack("<Q", first[:8])[0] % 8 == 0


def test_chunks_may_be_cut_anywhere(tmp_path: Path) -> None:
    data = np.arange(10, dtype=np.float32).tobytes()
    chunks: list[bytes | bytearray | memoryview] = [data[:3], bytearray(data[3:4]), b"", memoryview(data)[4:]]
    write_safetensors(tmp_path / "x", [("a", "F32", (4,)), ("b", "F32", (6,))], chunks)
    assert load_file(tmp_path / "x")["b"].tolist() == [4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize(("size", "message"), [(15, "1 bytes fewer than the 16"), (17, "more data than the 16")])
def test_a_wrong_amount_of_data_leaves_no_file(tmp_path: Path, size: int, message: str) -> None:
    (tmp_path / "x").write_bytes(b"before")
    with pytest.raises(ValueError, match=message):
        write_safetensors(tmp_path / "x", [("a", "F32", (4,))], [bytes(size)])
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x", b"before")]


@pytest.mark.parametrize("names", [("a", "a"), ("a", "__metadata__")])
def test_names_are_written_once(tmp_path: Path, names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="two tensors named"):
        write_safetensors(tmp_path / "x", [(name, "U8", (1,)) for name in names], [b"ab"], {"k": "v"})


def entry(start: int, stop: int, **changes: object) -> dict[str, object]:
    return {"dtype": "U8", "shape": [stop - start], "data_offsets": [start, stop], **changes}


DEFECTS: dict[str, tuple[object, bytes, str]] = {
    "not JSON": (b"{nonsense", b"", "not valid JSON"),
    "not an object": (b"[1, 2]", b"", "not a JSON object"),
    "spaces first": (b' {"a": 1}', b"", "not a JSON object"),
    "not UTF-8": (b'{"\xff": 1}', b"", "not valid JSON"),
    "two objects": (b"{}{}", b"", "not valid JSON"),
    "nested too deeply": (b'{"a":' + b"[" * 100_000, b"", "not valid JSON"),
    "a name twice": (b'{"a": 1, "b": 2, "a": 3}', b"", "'a' occurs twice"),
    "a key twice": (b'{"a": {"dtype": "U8", "dtype": "F32"}}', b"", "'dtype' occurs twice"),
    "metadata not text": ({"__metadata__": {"a": 1}}, b"", "__metadata__ does not map"),
    "metadata a list": ({"__metadata__": ["a"]}, b"", "__metadata__ does not map"),
    "tensor not an object": ({"a": 3}, b"", "tensor a needs exactly"),
    "no dtype": ({"a": {"shape": [1], "data_offsets": [0, 1]}}, b"x", "tensor a needs exactly"),
    "a key too many": ({"a": entry(0, 1, extra=1)}, b"x", "tensor a needs exactly"),
    "unknown dtype": ({"a": entry(0, 1, dtype="F12")}, b"x", "tensor a has the unknown dtype 'F12'"),
    "dtype not text": ({"a": entry(0, 1, dtype=["U8"])}, b"x", "tensor a has the unknown dtype"),
    "negative size": ({"a": entry(0, 1, shape=[-1, -1])}, b"x", "tensor a has the shape"),
    "shape of floats": ({"a": entry(0, 1, shape=[1.0])}, b"x", "tensor a has the shape"),
    "shape of truths": ({"a": entry(0, 1, shape=[True])}, b"x", "tensor a has the shape"),
    "shape not a list": ({"a": entry(0, 1, shape=1)}, b"x", "tensor a has the shape"),
    "too many axes": ({"a": entry(0, 1, shape=[1] * 99)}, b"x", "tensor a has the shape"),
    "enormous axis": ({"a": entry(0, 1, shape=[2**64])}, b"x", "tensor a has the shape"),
    "product beyond 64 bits": ({"a": entry(0, 1, shape=[2**40, 2**40])}, b"x", "tensor a, U8"),
    "offsets reversed": ({"a": entry(0, 1, data_offsets=[1, 0])}, b"x", "tensor a has the offsets"),
    "offsets negative": ({"a": entry(0, 1, data_offsets=[-1, 0])}, b"x", "tensor a has the offsets"),
    "three offsets": ({"a": entry(0, 1, data_offsets=[0, 1, 1])}, b"x", "tensor a has the offsets"),
    "beyond the file": ({"a": entry(0, 9)}, b"x", "tensor a ends at byte"),
    "too few bytes": ({"a": entry(0, 1, shape=[2])}, b"x", "tensor a, U8 [2], needs 2 bytes and has 1"),
    "too many bytes": ({"a": entry(0, 2, shape=[1])}, b"xy", "tensor a, U8 [1], needs 1 bytes and has 2"),
    "wrong width": ({"a": entry(0, 4, dtype="F64", shape=[1])}, b"wxyz", "tensor a, F64 [1], needs 8 bytes and has 4"),
    "overlap": ({"a": entry(0, 2), "b": entry(1, 3)}, b"xyz", "tensor b overlaps"),
    "same bytes twice": ({"a": entry(0, 2), "b": entry(0, 2)}, b"xy", "tensor b overlaps"),
    "a hole": ({"a": entry(0, 1), "b": entry(2, 3)}, b"xyz", "tensor b leaves a hole"),
    "a hole at the start": ({"a": entry(1, 2)}, b"xy", "tensor a leaves a hole"),
    "bytes after the end": ({"a": entry(0, 1)}, b"xy", "1 bytes after the last tensor"),
    "data of nobody": ({}, b"xy", "2 bytes after the last tensor"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_lying_header_is_refused_with_file_and_tensor(tmp_path: Path, name: str) -> None:
    header, data, message = DEFECTS[name]
    path = raw_file(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(InputError) as refused:
        SafetensorsFile.open(path)
    assert message in str(refused.value)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", DEFECTS)
def test_the_real_package_does_not_accept_what_we_refuse(tmp_path: Path, name: str) -> None:
    """Where the format's own reader is laxer than ours, the case is named here, so that strictness is a decision."""
    ours_only = {"a key too many", "too many axes"}
    header, data, _ = DEFECTS[name]
    path = raw_file(tmp_path / "bad.safetensors", header, data)
    accepted = True
    try:
        with safe_open(path, framework="np"):
            pass
    except SafetensorError:
        accepted = False
    assert accepted == (name in ours_only)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "only 0 bytes"),
        (b"\x01\x02", "only 2 bytes"),
        (struct.pack("<Q", 3) + b"{}", "claims 3 bytes of a file of 10"),
        (struct.pack("<Q", 2**63) + b"{}", "the format's limit"),
        (struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}", "the format's limit"),
        (struct.pack("<Q", 0), "not a JSON object"),
    ],
    ids=["empty", "two bytes", "header past the end", "huge header", "just over the cap", "no header"],
)
def test_a_file_that_is_too_short_or_claims_too_much_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        SafetensorsFile.open(path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = write(tmp_path / "x", TENSORS).read_bytes()
    path = tmp_path / "cut"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError):
            SafetensorsFile.open(path)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(InputError, match=f"cannot read {path}"):
            SafetensorsFile.open(path)


def test_a_file_cut_while_open_is_an_error_and_not_a_crash(tmp_path: Path) -> None:
    path = write(tmp_path / "x", {"a": np.ones((1000, 1000), dtype=np.float32)})
    file = SafetensorsFile.open(path)
    with path.open("r+b") as handle:
        handle.truncate(4096)
    with pytest.raises(InputError, match="the data of a ends early"):
        file.read("a")


def test_unknown_tensors_and_closed_files_are_errors(tmp_path: Path) -> None:
    with (
        SafetensorsFile.open(write(tmp_path / "x", TENSORS)) as file,
        pytest.raises(InputError, match="has no tensor named y"),
    ):
        file.read("y")
    with pytest.raises(ValueError, match="closed file"):
        file.read("half")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_header_of_json_is_read_rightly_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    """Whatever opens has tensors that tile the data; whatever does not raises InputError and nothing else."""
    number = st.one_of(st.integers(-2, 12), st.just(2**64), st.floats(0, 4), st.booleans(), st.none())
    facts = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["U8", "BF16", "F64", "X", 3]),
            "shape": st.lists(number, max_size=3),
            "data_offsets": st.lists(number, max_size=3),
        }
    )
    tensors = st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), st.one_of(facts, st.none(), number))
    path = raw_file(tmp_path / "any", data.draw(tensors), bytes(data.draw(st.integers(0, 12))))
    try:
        file = SafetensorsFile.open(path)
    except InputError:
        return
    end = path.stat().st_size
    start = 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]
    assert sum(e.stop - e.start for e in file.tensors.values()) == end - start
    for name, e in file.tensors.items():
        assert math.prod(e.shape) * NUMPY_DTYPES[e.dtype].itemsize == e.stop - e.start == file.read(name).nbytes


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 400), value=st.integers(0, 255))
def test_a_flipped_byte_is_refused_or_harmless(tmp_path: Path, position: int, value: int) -> None:
    content = bytearray(write(tmp_path / "x", TENSORS).read_bytes())
    content[position % len(content)] = value
    path = tmp_path / "flipped"
    path.write_bytes(content)
    try:
        file = SafetensorsFile.open(path)
    except InputError:
        return
    for name in file.tensors:
        file.read(name)


def test_threads_may_share_a_file(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    rows = np.arange(200_000, dtype=np.int64).reshape(1000, 200)
    file = SafetensorsFile.open(write(tmp_path / "x", {"rows": rows}))
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda row: file.read_rows("rows", row, row + 1), range(1000)))
    np.testing.assert_array_equal(np.concatenate(read), rows)


def test_an_error_of_whoever_makes_the_data_is_not_taken_for_one_of_writing(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError, match="far away"), writing_safetensors(tmp_path / "x", [("a", "U8", (2,))]):
        raise ConnectionError("far away")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no disk here is always full")
def test_a_full_disk_is_told_even_when_the_last_bytes_do_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a file's buffer holds is written when it is closed."""

    @contextlib.contextmanager
    def full(path: Path) -> Iterator[Path]:
        yield Path("/dev/full")

    monkeypatch.setattr("r1q.core.safetensors_file.replacing", full)
    with pytest.raises(ResourceError, match=r"the disk is full while writing .*x; free space"):
        write_safetensors(tmp_path / "x", [("a", "U8", (2,))], [b"ab"])
    with pytest.raises(ResourceError, match="the disk is full"):
        write_safetensors(tmp_path / "x", [("a", "U8", (1 << 20,))], [bytes(1 << 20)])
