"""The GGUF reader against files of gguf's own writer, hand-built hostile files, and mutated bytes."""

from __future__ import annotations

import ctypes
import importlib.util
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from r1q.core.errors import InputError
from r1q.core.gguf_file import GgufFile, Strings
from r1q.core.gguf_types import TENSOR_TYPES


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str, kind: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + payload


def u32(key: str, value: int) -> bytes:
    return entry(key, 4, struct.pack("<I", value))


def string(key: str, value: str | bytes) -> bytes:
    return entry(key, 8, text(value))


def array(key: str, element: int, count: int, payload: bytes) -> bytes:
    return entry(key, 9, struct.pack("<IQ", element, count) + payload)


def tensor(name: str | bytes, dims: list[int], number: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, number, offset)


def build(
    keys: list[bytes],
    tensors: list[bytes],
    data: bytes = b"",
    *,
    version: int = 3,
    magic: bytes = b"GGUF",
    align: int = 32,
) -> bytes:
    head = magic + struct.pack("<IQQ", version, len(tensors), len(keys)) + b"".join(keys) + b"".join(tensors)
    return head + b"\0" * (-len(head) % align) + data


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def small_model(path: Path) -> Path:
    """A two-block llama-shaped file by gguf's own writer, with every kind of metadata value."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_embedding_length(32)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(2)
    writer.add_token_list(["a", "é", "", "日本", "<s>"])
    writer.add_token_types([1, 1, 1, 1, 3])
    writer.add_token_merges(["a b", "b c"])
    writer.add_add_bos_token(True)
    writer.add_chat_template("{{ messages }}")
    writer.add_array("test.floats", [0.5, -1.5])
    writer.add_array("test.flags", [True, False, True])
    writer.add_float64("test.f64", 0.1)
    writer.add_int64("test.i64", -(1 << 40))
    writer.add_uint8("test.u8", 255)
    rng = np.random.default_rng(0)
    writer.add_tensor("token_embd.weight", rng.standard_normal((5, 32)).astype(np.float32))
    for block in range(2):
        writer.add_tensor(f"blk.{block}.attn_norm.weight", rng.standard_normal(32).astype(np.float32))
        rows = rng.integers(0, 255, (3, 18), dtype=np.uint8)
        writer.add_tensor(f"blk.{block}.ffn_up.weight", rows, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_reads_what_gguf_wrote(tmp_path: Path) -> None:
    path = small_model(tmp_path / "small.gguf")
    file = GgufFile.open(path)
    theirs = gguf.GGUFReader(path)
    assert file.version == 3
    assert file.alignment == 32
    assert file.architecture == "llama"
    assert set(file.metadata) == {name for name in theirs.fields if not name.startswith("GGUF.")}
    for key, value in file.metadata.items():
        contents = theirs.fields[key].contents()
        assert list(value) == contents if isinstance(value, Strings | np.ndarray) else value == contents, key
    assert list(file.tensors) == [t.name for t in theirs.tensors]
    for t in theirs.tensors:
        mine = file.tensors[t.name]
        assert mine.shape == tuple(int(n) for n in reversed(t.shape))
        assert mine.type == t.tensor_type.name.lower()
        np.testing.assert_array_equal(file.read_bytes(t.name), t.data.reshape(-1).view(np.uint8))
    assert file.read_rows("blk.0.ffn_up.weight", 1, 3).shape == (2, 18)
    assert file.types["tokenizer.ggml.tokens"] == "arr[str]"
    assert file.metadata["tokenizer.ggml.tokens"][1:4] == ["é", "", "日本"]  # type: ignore[index]


def test_rows_are_memory_of_their_own(tmp_path: Path) -> None:
    file = GgufFile.open(small_model(tmp_path / "small.gguf"))
    before = file.read_bytes("token_embd.weight").copy()
    file.read_bytes("token_embd.weight")[:] += 1
    np.testing.assert_array_equal(file.read_bytes("token_embd.weight"), before)
    whole = file.read_bytes("blk.0.ffn_up.weight").reshape(file.tensors["blk.0.ffn_up.weight"].rows, -1)
    np.testing.assert_array_equal(file.read_rows("blk.0.ffn_up.weight", 1, 3), whole[1:3])


def test_a_file_that_shrank_is_an_error_and_not_a_crash(tmp_path: Path) -> None:
    path = small_model(tmp_path / "small.gguf")
    file = GgufFile.open(path)
    last = list(file.tensors)[-1]
    with path.open("r+b") as shorter:
        shorter.truncate(file.tensors[last].offset)
    with pytest.raises(InputError, match=f"the file ends inside the data of tensor '{last}'"):
        file.read_bytes(last)


def test_hand_built_file_at_the_limits(tmp_path: Path) -> None:
    """Version 2, alignment 64, a scalar tensor, a 63-byte name, no padding after the last tensor."""
    data = struct.pack("<f", 2.5) + b"\0" * 60 + bytes(34)
    keys = [u32("general.alignment", 64), string("note", "")]
    content = build(keys, [tensor("s", [], 0, 0), tensor("n" * 63, [32, 1], 8, 64)], data, version=2, align=64)
    file = GgufFile.open(write(tmp_path / "a.gguf", content))
    assert file.version == 2
    assert file.tensors["s"].shape == ()
    assert file.read_bytes("s").view("<f4")[0] == 2.5
    assert file.tensors["n" * 63].nbytes == 34
    assert file.metadata["note"] == ""


def test_tensor_types_match_gguf_and_libggml() -> None:
    from_gguf = {int(t): size for t, size in gguf.GGML_QUANT_SIZES.items()}
    for number, kind in TENSOR_TYPES.items():
        if (
            number in from_gguf and kind.name != "q8_1"
        ):  # gguf's table gives Q8_1 float32 scales; ggml's struct has float16
            assert (kind.block, kind.block_bytes) == from_gguf[number], kind
            assert gguf.GGMLQuantizationType(number).name.lower() == kind.name
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        pytest.skip("llama-cpp-python is not installed")
    lib = ctypes.CDLL(str(Path(spec.origin).parent / "lib" / "libggml-base.so"))
    lib.ggml_type_size.restype = ctypes.c_size_t
    lib.ggml_blck_size.restype = ctypes.c_int64
    lib.ggml_type_name.restype = ctypes.c_char_p
    for number, kind in TENSOR_TYPES.items():
        assert lib.ggml_type_size(number) == kind.block_bytes, kind
        assert lib.ggml_blck_size(number) == kind.block, kind
        assert lib.ggml_type_name(number).decode().lower() == kind.name


F32_4 = tensor("t", [4], 0, 0)
MODEL = [string("general.architecture", "llama")]
HUGE = (1 << 63) - 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "too short"),
        (b"GGUF", "too short"),
        (build([], [], bytes(32), magic=b"GGML"), "not a GGUF file"),
        (build([], [], bytes(32), version=1), "version 1"),
        (build([], [], bytes(32), version=4), "version 4"),
        (build([], [], bytes(32), version=3 << 24), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, HUGE, 0) + bytes(64), "tensors claimed"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, HUGE) + bytes(64), "keys claimed"),
        (build([u32("", 1)], []), "is empty"),
        (build([u32("a", 1), u32("a", 1)], []), "twice"),
        (build([u32("k" * (1 << 16), 1)], []), "claims 65536 bytes"),
        (build([string(b"a\xff".decode("latin1"), b"\xff")], []), "not UTF-8"),
        (build([entry("a", 8, struct.pack("<Q", HUGE))], [], bytes(64)), "claims"),
        (build([entry("a", 13, bytes(8))], []), "unknown value type 13"),
        (build([array("a", 9, 1, bytes(64))], []), "unsupported type 9"),
        (build([array("a", 77, 1, bytes(64))], []), "unsupported type 77"),
        (build([array("a", 4, HUGE, bytes(64))], []), "claims"),
        (build([array("a", 8, HUGE, bytes(64))], []), "claims"),
        (build([array("a", 8, 2, text("x") + struct.pack("<Q", HUGE))], [], bytes(64)), "a[1]"),
        (build([u32("a", 1)], [], align=1)[:-1], "ends inside a"),
        (build([entry("general.alignment", 10, struct.pack("<Q", 32))], []), "not a u32"),
        (build([u32("general.alignment", 0)], []), "power of two"),
        (build([u32("general.alignment", 48)], []), "power of two"),
        (build([u32("general.alignment", 1 << 17)], []), "power of two"),
        (build([], [tensor("", [4], 0, 0)], bytes(64)), "no name"),
        (build([], [tensor("n" * 64, [4], 0, 0)], bytes(64)), "63"),
        (build([], [F32_4, tensor("t", [4], 0, 32)], bytes(64)), "twice"),
        (build([], [tensor("t", [1] * 5, 0, 0)], bytes(64)), "5 dimensions"),
        (build([], [tensor("t", [0], 0, 0)], bytes(64)), "impossible shape"),
        (build([], [tensor("t", [1 << 40, 1 << 40], 0, 0)], bytes(64)), "impossible shape"),
        (build([], [tensor("t", [1 << 40], 0, 0)], bytes(64)), "beyond the file"),
        (build([], [tensor("t", [32], 4, 0)], bytes(64)), "unknown type 4"),
        (build([], [tensor("t", [32], 43, 0)], bytes(64)), "unknown type 43"),
        (build([], [tensor("t", [33], 8, 0)], bytes(64)), "block of 32"),
        (build([], [tensor("t", [128], 12, 0)], bytes(256)), "block of 256"),
        (build([], [tensor("t", [4], 0, 4)], bytes(64)), "expected 0"),
        (build([], [F32_4, tensor("u", [4], 0, 16)], bytes(64)), "expected 32"),
        (build([], [F32_4, tensor("u", [4], 0, 64)], bytes(96)), "expected 32"),
        (build([], [F32_4], bytes(15)), "inside the data"),
        (build([u32("general.architecture", 1)], []), "not str"),
        (build([array("tokenizer.ggml.tokens", 4, 1, bytes(4))], []), "not arr[str]"),
        (build([array("tokenizer.ggml.tokens", 8, 3, text("a") + text("b") + text("a"))], []), "tokens[2] repeats"),
        (
            build(
                [
                    array("tokenizer.ggml.tokens", 8, 2, text("a") + text("b")),
                    u32("tokenizer.ggml.bos_token_id", 2),
                    entry("tokenizer.ggml.add_bos_token", 7, b"\1"),
                ],
                [],
            ),
            "bos_token_id is 2 for 2 tokens",
        ),
        (build([array("tokenizer.ggml.scores", 8, 1, text("a"))], []), "not arr[f32]"),
        (build([array("tokenizer.ggml.token_type", 0, 4, bytes(4))], []), "not arr[i32]"),
        (build([array("tokenizer.ggml.merges", 5, 1, bytes(4))], []), "not arr[str]"),
        (
            build(
                [array("tokenizer.ggml.tokens", 8, 1, text("a")), array("tokenizer.ggml.scores", 6, 2, bytes(8))], []
            ),
            "2 entries for 1 tokens",
        ),
        (
            build(
                [array("tokenizer.ggml.tokens", 8, 1, text("a"))],
                [tensor("token_embd.weight", [2, 2], 0, 0)],
                bytes(32),
            ),
            "for 1 tokens",
        ),
        (build([string("tokenizer.chat_template", "x" * ((1 << 20) + 1))], []), "1048577 characters"),
        (build([entry("split.count", 2, struct.pack("<H", 2000))], []), "split.count 2000"),
        (build([entry("split.count", 4, struct.pack("<I", 2))], []), "not u16"),
        (
            build([entry("split.count", 2, struct.pack("<H", 2)), entry("split.no", 2, struct.pack("<H", 2))], []),
            "split.no 2",
        ),
        (build([*MODEL, u32("llama.block_count", 0)], []), "llama.block_count"),
        (build([*MODEL, u32("llama.block_count", 1 << 30)], []), "llama.block_count"),
        (build([*MODEL, entry("llama.block_count", 5, struct.pack("<i", -1))], []), "llama.block_count"),
        (build([*MODEL, u32("llama.attention.head_count", 0)], []), "head_count"),
        (build([*MODEL, u32("llama.attention.head_count_kv", 1 << 20)], []), "head_count_kv"),
        (build([*MODEL, array("llama.attention.head_count", 8, 1, text("a"))], []), "head_count"),
        (
            build([*MODEL, u32("llama.attention.head_count", 6), u32("llama.attention.head_count_kv", 4)], []),
            "not a multiple",
        ),
        (build(MODEL, [tensor("blk.0.x", [4], 0, 0)], bytes(32)), "no llama.block_count"),
        (build([*MODEL, u32("llama.block_count", 2)], [tensor("blk.0.x", [4], 0, 0)], bytes(32)), "block_count is 2"),
        (build([*MODEL, u32("llama.block_count", 1)], [tensor("blk.1.x", [4], 0, 0)], bytes(32)), "block_count is 1"),
    ],
)
def test_refuses(tmp_path: Path, content: bytes, words: str) -> None:
    path = write(tmp_path / "bad.gguf", content)
    with pytest.raises(InputError) as caught:
        GgufFile.open(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_refuses_what_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        GgufFile.open(tmp_path / "absent.gguf")
    with pytest.raises(InputError, match="not a regular file"):
        GgufFile.open(tmp_path)


def test_a_token_that_is_not_utf8_is_refused_when_read(tmp_path: Path) -> None:
    content = build([array("tokenizer.ggml.tokens", 8, 2, text("a") + text(b"\xff"))], [])
    tokens = GgufFile.open(write(tmp_path / "a.gguf", content)).metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, Strings)
    assert tokens[0] == "a"
    assert tokens.raw(1) == b"\xff"
    with pytest.raises(InputError, match=r"tokens\[1\] is not UTF-8"):
        tokens[1]
    with pytest.raises(InputError, match=r"tokens\[1\] is not UTF-8"):
        list(tokens)
    assert tokens[:1] == ["a"]
    assert list(tokens.stored()) == [b"a", b"\xff"]


def test_a_split_or_foreign_file_may_hold_only_some_blocks(tmp_path: Path) -> None:
    split = [entry("split.count", 2, struct.pack("<H", 2)), entry("split.no", 2, struct.pack("<H", 1))]
    content = build([*MODEL, u32("llama.block_count", 4), *split], [tensor("blk.3.x", [4], 0, 0)], bytes(32))
    assert GgufFile.open(write(tmp_path / "a.gguf", content)).tensors
    deci = [string("general.architecture", "deci"), u32("deci.block_count", 4)]
    content = build(deci, [tensor("blk.3.x", [4], 0, 0)], bytes(32))
    assert GgufFile.open(write(tmp_path / "b.gguf", content)).tensors


def test_a_large_vocabulary_opens_fast_and_small(tmp_path: Path) -> None:
    """150 000 tokens and 280 000 merges: under a second, and far less memory than the decoded strings would take."""
    tokens = b"".join(text(f"token{i}") for i in range(150_000))
    merges = b"".join(text(f"tok{i} en{i}") for i in range(280_000))
    keys = [array("tokenizer.ggml.tokens", 8, 150_000, tokens), array("tokenizer.ggml.merges", 8, 280_000, merges)]
    path = write(tmp_path / "big.gguf", build(keys, []))
    began = time.process_time()
    file = GgufFile.open(path)
    assert time.process_time() - began < 1.0
    tracemalloc.start()
    file = GgufFile.open(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 << 20
    assert file.metadata["tokenizer.ggml.tokens"][149_999] == "token149999"  # type: ignore[index]


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return small_model(tmp_path_factory.mktemp("gguf") / "small.gguf").read_bytes()


def mutations(draw: Callable[[st.SearchStrategy[int]], int], content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, min(len(changed), 1600) - 1))
        width = draw(st.sampled_from([1, 1, 4, 8]))
        extreme = st.sampled_from([0, 1, 0xFF, 0x7FFFFFFF, 0xFFFFFFFF, HUGE, (1 << 64) - 1])
        value = draw(st.one_of(st.integers(0, (1 << 64) - 1), extreme))
        changed[at : at + width] = value.to_bytes(8, "little")[:width]
    return bytes(changed[: draw(st.sampled_from([len(changed), len(changed), draw(st.integers(0, len(changed)))]))])


@given(data=st.data())
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mutated_files_open_or_raise_input_error(valid: bytes, tmp_path: Path, data: st.DataObject) -> None:
    path = write(tmp_path / "fuzz.gguf", mutations(data.draw, valid))
    try:
        file = GgufFile.open(path)
        for name, found in file.tensors.items():
            assert file.read_bytes(name).nbytes == found.nbytes
        for value in file.metadata.values():
            if isinstance(value, Strings):
                list(value)
    except InputError:
        pass
