"""Importance matrices: both forms give numbers worked out by hand, and every defect is refused by name."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from r1q.core.errors import InputError
from r1q.core.imatrix_file import Imatrix, read_imatrix

Pair = tuple[list[list[float]], list[list[float]]]
GOLDEN = Path(__file__).with_name("golden")
QUERIES, DOWN = "blk.0.attn_q.weight", "blk.11.ffn_down.weight"


def write_gguf(
    path: Path, entries: dict[str, Pair], *, kind: str = "imatrix", chunks: int | None = 7, dtype: type = np.float32
) -> Path:
    """Write (sums [experts, columns], counts [experts, 1]) by name with the gguf package, in llama-imatrix's layout."""
    writer = gguf.GGUFWriter(path, "")
    writer.add_type(kind)
    writer.add_array("imatrix.datasets", ["calibration.txt"])
    if chunks is not None:
        writer.add_uint32("imatrix.chunk_count", chunks)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, (sums, counts) in entries.items():
        writer.add_tensor(f"{name}.in_sum2", np.array(sums, dtype=dtype))
        writer.add_tensor(f"{name}.counts", np.array(counts, dtype=dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def legacy_entry(name: bytes, calls: int, values: bytes, columns: int | None = None) -> bytes:
    count = len(values) // 4 if columns is None else columns
    return struct.pack("<i", len(name)) + name + struct.pack("<ii", calls, count) + values


def legacy(*entries: bytes, count: int | None = None, tail: bytes = b"") -> bytes:
    return struct.pack("<i", len(entries) if count is None else count) + b"".join(entries) + tail


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def values_of(found: Imatrix) -> dict[str, list[float]]:
    assert all(values.dtype == np.float32 and values.ndim == 1 for values in found.columns.values())
    return {name: values.tolist() for name, values in found.columns.items()}


def test_both_forms_of_llama_imatrix_itself_say_the_same() -> None:
    """Most inputs come out of a norm with weights of one: their mean square is 1, less its epsilon."""
    new, old = (read_imatrix(GOLDEN / f"tiny.imatrix.{form}") for form in ("gguf", "dat"))
    parts = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    names = {f"blk.{block}.{part}.weight" for block in range(2) for part in parts} | {"output.weight"}
    assert new.columns.keys() == old.columns.keys() == names
    assert (new.chunks, old.chunks) == (3, 3)
    for name, values in new.columns.items():
        assert len(values) == (128 if "ffn_down" in name else 64)
        np.testing.assert_allclose(values, old.columns[name], rtol=3e-7)  # the older form rounds twice more
        if "attn_output" not in name and "ffn_down" not in name:
            assert 0.999 < values.mean() < 1.00001


def test_gguf_gives_sums_divided_by_counts(tmp_path: Path) -> None:
    entries: dict[str, Pair] = {QUERIES: ([[8.0, 2.0, 0.0]], [[4.0]]), DOWN: ([[3.0]], [[512.0]])}
    found = read_imatrix(write_gguf(tmp_path / "a.gguf", entries))
    assert values_of(found) == {QUERIES: [2.0, 0.5, 0.0], DOWN: [3 / 512]}
    assert found.chunks == 7


def test_an_entry_without_tokens_weighs_its_columns_alike(tmp_path: Path) -> None:
    found = read_imatrix(write_gguf(tmp_path / "a.gguf", {QUERIES: ([[5.0, 9.0]], [[0.0]])}))
    assert values_of(found) == {QUERIES: [1.0, 1.0]}


def test_gguf_without_a_number_of_chunks_says_none(tmp_path: Path) -> None:
    assert read_imatrix(write_gguf(tmp_path / "a.gguf", {"a": ([[1.0]], [[1.0]])}, chunks=None)).chunks == 0


def test_division_is_that_of_float32(tmp_path: Path) -> None:
    """As llama.cpp divides: 1/3 and a sum of more digits than float32 has, each rounded once."""
    found = read_imatrix(write_gguf(tmp_path / "a.gguf", {"a": ([[1.0, 16777216.0, 1e-44]], [[3.0]])}))
    exact = [float(np.float32(1 / 3)), float(np.float32(16777216 / 3)), float(np.float32(float(np.float32(1e-44)) / 3))]
    assert found.columns["a"].tolist() == exact


@pytest.mark.parametrize(
    ("tail", "chunks"),
    [(b"", 0), (struct.pack("<i", 9), 9), (struct.pack("<ii", 9, 4) + b"text", 9)],
    ids=["nothing after the entries", "chunks", "chunks and the name of the text"],
)
def test_the_older_form_gives_values_divided_by_calls(tmp_path: Path, tail: bytes, chunks: int) -> None:
    entries = [legacy_entry(QUERIES.encode(), 4, floats(8, 2, 0)), legacy_entry(DOWN.encode(), 1, floats(0.25))]
    found = read_imatrix(write(tmp_path / "a.dat", legacy(*entries, tail=tail)))
    assert values_of(found) == {QUERIES: [2.0, 0.5, 0.0], DOWN: [0.25]}
    assert found.chunks == chunks


def test_the_older_form_with_no_calls_is_taken_as_it_is(tmp_path: Path) -> None:
    found = read_imatrix(write(tmp_path / "a.dat", legacy(legacy_entry(b"a", 0, floats(8, 2)))))
    assert values_of(found) == {"a": [8.0, 2.0]}


def one(sums: list[float], count: float) -> dict[str, Pair]:
    return {QUERIES: ([sums], [[count]])}


REFUSED_GGUF: dict[str, tuple[dict[str, Pair], str]] = {
    "no entries": ({}, "holds no importance"),
    "too many counts": ({QUERIES: ([[1.0, 2.0]], [[1.0], [1.0]])}, "has 1 rows of sums and 2 counts"),
    "too few counts": ({QUERIES: ([[1.0], [2.0]], [[1.0]])}, "has 2 rows of sums and 1 counts"),
    "NaN": (one([1.0, float("nan")], 1), "holds NaN, infinite or negative"),
    "infinite": (one([1.0, float("inf")], 1), "holds NaN, infinite or negative"),
    "negative": (one([1.0, -1.0], 1), "holds NaN, infinite or negative"),
    "count NaN": (one([1.0], float("nan")), "has seen nan tokens"),
    "count infinite": (one([1.0], float("inf")), "has seen inf tokens"),
    "count negative": (one([1.0], -3.0), "has seen -3 tokens"),
    "count broken": (one([1.0], 0.4), "has seen 0.4 tokens"),
}


@pytest.mark.parametrize("name", REFUSED_GGUF)
def test_gguf_with_a_defect_is_refused_by_name(tmp_path: Path, name: str) -> None:
    entries, message = REFUSED_GGUF[name]
    path = write_gguf(tmp_path / "bad.gguf", entries)
    with pytest.raises(InputError) as refused:
        read_imatrix(path)
    assert message in str(refused.value)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not entries or QUERIES in str(refused.value)


def test_another_kind_of_gguf_is_refused(tmp_path: Path, tiny_gguf: Path) -> None:
    with pytest.raises(InputError, match="of another kind"):
        read_imatrix(write_gguf(tmp_path / "a.gguf", one([1.0], 1), kind="model"))
    with pytest.raises(InputError, match="of another kind"):
        read_imatrix(tiny_gguf)


def test_numbers_that_are_not_float32_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{QUERIES} lacks its sums or its counts, or they are not float32"):
        read_imatrix(write_gguf(tmp_path / "a.gguf", one([1.0, 2.0], 1), dtype=np.float64))


@pytest.mark.parametrize("missing", [b".in_sum2", b".counts"])
def test_sums_without_counts_and_counts_without_sums_are_refused(tmp_path: Path, missing: bytes) -> None:
    path = write_gguf(tmp_path / "a.gguf", one([1.0, 2.0], 1))
    path.write_bytes(path.read_bytes().replace(missing, missing[:-1] + b"x"))
    with pytest.raises(InputError, match=f"{QUERIES} lacks its sums or its counts"):
        read_imatrix(path)


def test_a_number_of_chunks_that_is_none_is_refused(tmp_path: Path) -> None:
    """Stored as a signed number: llama.cpp aborts on one, and -1 windows of text is no count."""
    path = write_gguf(tmp_path / "a.gguf", one([1.0], 1), chunks=(1 << 32) - 1)
    unsigned, signed = (b"imatrix.chunk_count" + struct.pack("<I", kind) for kind in (4, 5))
    assert path.read_bytes().count(unsigned) == 1
    path.write_bytes(path.read_bytes().replace(unsigned, signed))
    with pytest.raises(InputError, match=r"imatrix\.chunk_count is i32, not u32"):
        read_imatrix(path)


GOOD = legacy_entry(b"a", 1, floats(1))
REFUSED_LEGACY: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "ends early"),
    "three bytes": (b"\1\0\0", "ends early"),
    "no entries": (legacy(), "number of entries is 0"),
    "negative entries": (legacy(GOOD, count=-1), "number of entries is -1"),
    "enormous entries": (legacy(GOOD, count=(1 << 31) - 1), "number of entries is 2147483647"),
    "fewer entries than said": (legacy(GOOD, count=2), "ends early"),
    "nameless": (legacy(legacy_entry(b"", 1, floats(1))), "length of a name is 0"),
    "enormous name": (legacy(struct.pack("<i", 1 << 30)), "length of a name is 1073741824"),
    "negative name": (legacy(struct.pack("<i", -1)), "length of a name is -1"),
    "name ends early": (legacy(struct.pack("<i", 9) + b"blk"), "ends early"),
    "name not text": (legacy(legacy_entry(b"\xff\xfe", 1, floats(1))), "a name is not text"),
    "negative calls": (legacy(legacy_entry(b"a", -1, floats(1))), "calls of a is -1"),
    "no columns": (legacy(legacy_entry(b"a", 1, b"")), "columns of a is 0"),
    "negative columns": (legacy(legacy_entry(b"a", 1, floats(1), -5)), "columns of a is -5"),
    "enormous columns": (legacy(legacy_entry(b"a", 1, floats(1), 1 << 30)), "columns of a is 1073741824"),
    "fewer values than columns": (legacy(legacy_entry(b"a", 1, floats(1), 2)), "ends early"),
    "twice": (legacy(GOOD, GOOD), "a tensor occurs twice"),
    "negative chunks": (legacy(GOOD, tail=struct.pack("<i", -1)), "number of chunks is -1"),
    "NaN": (legacy(legacy_entry(b"a", 1, floats(1, float("nan")))), "a holds NaN, infinite or negative"),
    "signalling NaN": (legacy(legacy_entry(b"a", 2, b"\x01\x00\x80\x7f")), "a holds NaN, infinite or negative"),
    "infinite": (legacy(legacy_entry(b"a", 1, floats(float("inf")))), "a holds NaN, infinite or negative"),
    "negative": (legacy(legacy_entry(b"a", 1, floats(-1))), "a holds NaN, infinite or negative"),
}


@pytest.mark.parametrize("name", REFUSED_LEGACY)
def test_the_older_form_with_a_defect_is_refused_by_name(tmp_path: Path, name: str) -> None:
    content, message = REFUSED_LEGACY[name]
    path = write(tmp_path / "bad.dat", content)
    with pytest.raises(InputError) as refused:
        read_imatrix(path)
    assert message in str(refused.value)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "endless").symlink_to("/dev/zero")
    for name in ("absent", ".", "pipe", "endless"):
        with pytest.raises(InputError, match="cannot read"):
            read_imatrix(tmp_path / name)


def test_every_truncation_of_either_form_is_refused_or_loses_no_number(tmp_path: Path) -> None:
    old = legacy(legacy_entry(QUERIES.encode(), 4, floats(8, 2)), legacy_entry(b"b", 1, floats(1)))
    new = write_gguf(tmp_path / "a.gguf", one([8.0, 2.0], 4)).read_bytes()
    path = tmp_path / "cut"
    for whole in (old, new):
        numbers = values_of(read_imatrix(write(path, whole)))
        for size in range(len(whole)):
            try:
                found = read_imatrix(write(path, whole[:size]))
            except InputError:
                continue
            assert values_of(found) == numbers
            assert whole is new
            assert not any(whole[size:])  # padding alone


@st.composite
def legacy_files(draw: st.DrawFn) -> tuple[bytes, dict[str, list[float]], int]:
    """Return a file of the older form, what it holds, and the windows it says."""
    names = draw(st.lists(st.text("abk.0_", min_size=1, max_size=9), min_size=1, max_size=4, unique=True))
    number = st.floats(0, 2.0**100, width=32)
    rows = {name: draw(st.lists(number, min_size=1, max_size=6)) for name in names}
    calls, chunks = draw(st.integers(0, 1 << 20)), draw(st.integers(0, 1 << 20))
    entries = [legacy_entry(name.encode(), calls, floats(*row)) for name, row in rows.items()]
    divided = {name: [float(np.float32(v) / np.float32(calls or 1)) for v in row] for name, row in rows.items()}
    return legacy(*entries, tail=struct.pack("<i", chunks)), divided, chunks


@given(legacy_files())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_file_of_the_older_form_is_read_as_written(
    tmp_path: Path, made: tuple[bytes, dict[str, list[float]], int]
) -> None:
    content, divided, chunks = made
    found = read_imatrix(write(tmp_path / "x.dat", content))
    assert values_of(found) == divided
    assert found.chunks == chunks


def mutated(data: st.DataObject, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        at, width = data.draw(st.integers(0, len(changed) - 1)), data.draw(st.sampled_from([1, 1, 4, 8]))
        extreme = st.sampled_from([0, 1, 0x7F800001, 0x7FC00000, 0x80000000, 0xFFFFFFFF, (1 << 63) - 1, (1 << 64) - 1])
        value = data.draw(st.one_of(st.integers(0, (1 << 64) - 1), extreme))
        changed[at : at + width] = value.to_bytes(8, "little")[:width]
    cut = data.draw(st.one_of(st.just(len(changed)), st.integers(0, len(changed))))
    return bytes(changed[:cut])


@pytest.mark.parametrize("form", ["gguf", "legacy"])
@given(data=st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mutated_files_are_read_as_importance_or_refused(tmp_path: Path, form: str, data: st.DataObject) -> None:
    """Nothing but `InputError` comes out, a warning included; what is read is finite and not negative."""
    valid = tmp_path / "valid.gguf"
    if not valid.exists():
        write_gguf(valid, {QUERIES: ([[8.0, 2.0]], [[4.0]]), DOWN: ([[1.0]], [[0.0]])})
    old = legacy(legacy_entry(QUERIES.encode(), 4, floats(8, 2)), GOOD, tail=struct.pack("<ii", 9, 1) + b"t")
    path = tmp_path / "x"
    path.unlink(missing_ok=True)  # the GGUF reader maps the file
    write(path, mutated(data, valid.read_bytes() if form == "gguf" else old))
    try:
        found = read_imatrix(path)
    except InputError as error:
        assert str(path) in str(error)  # noqa: PT017  # either way out is right
        return
    assert found.columns
    assert found.chunks >= 0
    assert all(np.isfinite(values).all() and (values >= 0).all() for values in found.columns.values())
