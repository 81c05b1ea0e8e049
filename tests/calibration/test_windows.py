"""Windows: what a spec means, which ids they hold, what is written of them, and how bad text is refused."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1q.calibration import corpus, spec
from r1q.calibration.shares import allocate, fill
from r1q.calibration.spec import parse_spec
from r1q.calibration.windows import Windows, make_windows
from r1q.core.errors import InputError, UsageError
from r1q.models.embedded import EMBEDDED
from r1q.models.tokenizer import Tokenizer

MakeModel = Callable[..., Path]
PROSE = "".join(f"Line {n}: the quick brown fox, {n * n} times over, thinks «hm» — then 想一想.\n" for n in range(4000))


@pytest.fixture(scope="module")
def r1() -> Tokenizer:
    """The embedded model's tokenizer: it adds BOS, and its template is R1's."""
    return Tokenizer.open(EMBEDDED)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "prose.txt"
    path.write_text(PROSE, encoding="utf-8")
    return path


def write_lines(path: Path, *documents: Any) -> Path:
    path.write_text("".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents))
    return path


def sources(windows: Windows) -> Any:
    return windows.record["sources"]


def test_one_text_gives_the_chunks_of_llama_cpps_tools(r1: Tokenizer, text: Path) -> None:
    """A text is split once, chunks follow one another, and BOS takes the place of the first id of each."""
    whole = [r1.bos_id, *r1.encode(PROSE, add_special=False)]
    chunks = np.array(whole[: 20 * 64]).reshape(20, 64)
    chunks[:, 0] = r1.bos_id
    windows = make_windows(str(text), r1, samples=20, length=64)
    assert windows.tokens.dtype == np.int64
    np.testing.assert_array_equal(windows.tokens, chunks)
    assert sources(windows)[0]["bytes"] == 1 << 16 < len(PROSE.encode())
    assert sources(windows)[0]["whole"] is False


def test_a_cut_through_the_text_changes_no_id(r1: Tokenizer, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However far is read at first, in or between characters and words, the ids are those of the whole text."""
    whole = r1.encode(PROSE, add_special=True)
    for guess in range(1, 6):
        monkeypatch.setattr(corpus, "_BYTES_PER_TOKEN", guess)
        taken = corpus.take_file(text, r1, 40_000)
        assert not taken.whole
        assert len(taken.ids) >= 40_000
        assert taken.ids == whole[: len(taken.ids)]


def test_windows_without_bos_keep_every_id(make_model: MakeModel, text: Path) -> None:
    tokenizer = Tokenizer.open(make_model("qwen3"))
    assert not tokenizer.adds_bos
    windows = make_windows(str(text), tokenizer, samples=3, length=50)
    assert tokenizer.decode(windows.tokens.ravel().tolist()) in PROSE


@pytest.mark.runtime
def test_llama_cpp_splits_the_text_alike(make_model: MakeModel, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    from r1q.core.artifact import OutputFolder
    from r1q.core.recipe import Recipe
    from r1q.models.embedded import open_model
    from r1q.plan.plan import make_plan
    from r1q.plan.walk import Exported, quantize_model
    from r1q.runtimes.base import Options
    from r1q.runtimes.table import load_runtime

    opened = open_model(str(make_model("qwen2")))
    plan = make_plan(opened.source, Recipe.named("q8_0"), ("gguf",))
    *_, exported = quantize_model(opened, plan, OutputFolder(tmp_path / "out"))
    assert isinstance(exported, Exported)
    with load_runtime("llama-cpp").open(exported.path, Options(context=64)) as session:
        ids = [session.bos, *session.encode(PROSE)]
    expected = np.array(ids[: 30 * 128]).reshape(30, 128)
    expected[:, 0] = session.bos
    windows = make_windows(str(text), Tokenizer.open(opened.source.path), samples=30, length=128)
    np.testing.assert_array_equal(windows.tokens, expected)


def test_the_record_can_be_checked_by_hand(r1: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    path = tmp_path / "deep" / "er" / "short.txt"
    path.write_bytes(b"12 + 30 = 42\n" * 9)
    windows = make_windows(f"{path}:3", r1, samples=5, length=20)
    ids = r1.encode("12 + 30 = 42\n" * 8 + "12 + 30 = 42", add_special=True)
    count = len(ids) // 20
    assert 1 < count < 5
    stored = np.ascontiguousarray(windows.tokens, dtype="<i8").tobytes()
    assert windows.record == {
        "tokens": hashlib.sha256(stored).hexdigest(),
        "samples": count,
        "asked": 5,
        "length": 20,
        "sources": [
            {
                "name": "short.txt",
                "kind": "text",
                "share": 1.0,
                "windows": count,
                "tokens": len(ids),
                "bytes": 117,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "documents": 1,
                "whole": True,
            }
        ],
    }
    json.dumps(windows.record)
    assert not windows.tokens.flags.writeable


def test_lines_are_packed_with_end_of_text_between(r1: Tokenizer, tmp_path: Path) -> None:
    talk = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2", "reasoning_content": "One, two."},
    ]
    path = write_lines(tmp_path / "a.jsonl", {"text": "first"}, {"text": ""}, {"messages": talk}, {"text": "last"})
    first, last = (r1.encode(word, add_special=False) for word in ("first", "last"))
    chat = r1.encode("<｜User｜>1 + 1?<｜Assistant｜><think>\nOne, two.\n</think>\n\n2", add_special=False)
    stream = [r1.bos_id, *first, r1.eos_id, r1.bos_id, *chat, r1.eos_id, r1.bos_id, *last, r1.eos_id]
    windows = make_windows(str(path), r1, samples=1, length=len(stream))
    assert windows.tokens[0].tolist() == stream
    assert sources(windows)[0]["documents"] == 4
    assert sources(windows)[0]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_turn_that_ends_with_end_of_text_and_a_line_break_gets_no_second(
    make_model: MakeModel, tmp_path: Path
) -> None:
    folder = make_model("qwen3")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content + eos_token + '\\n' }}{% endfor %}"
    )
    tokenizer = Tokenizer.open(folder)
    path = write_lines(tmp_path / "a.jsonl", *[{"messages": [{"role": "user", "content": "fox"}]}] * 2)
    turn = [*tokenizer.encode("fox", add_special=False), tokenizer.eos_id, *tokenizer.encode("\n", add_special=False)]
    assert corpus.take_file(path, tokenizer, 100).ids == turn * 2


def test_without_end_of_text_a_blank_line_stands_between(make_model: MakeModel, tmp_path: Path) -> None:
    folder = make_model()
    (folder / "tokenizer_config.json").unlink()
    tokenizer = Tokenizer.open(folder)
    path = write_lines(tmp_path / "a.jsonl", {"text": "fox"}, {"text": "dog"})
    assert tokenizer.decode(corpus.take_file(path, tokenizer, 100).ids) == "fox\n\ndog\n\n"


def test_only_the_lines_needed_are_read(r1: Tokenizer, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", *[{"text": "the quick brown fox jumps over the lazy dog"}] * 50)
    with open(path, "ab") as file:
        file.write(b"this is never reached")
    windows = make_windows(str(path), r1, samples=2, length=32)
    entry = sources(windows)[0]
    lines = path.read_bytes().splitlines(keepends=True)
    assert entry["documents"] < 10
    assert entry["sha256"] == hashlib.sha256(b"".join(lines[: entry["documents"]])).hexdigest()


def test_a_mixture_is_shared_by_weight_and_lies_evenly(r1: Tokenizer, tmp_path: Path) -> None:
    for name, letter in (("a.txt", "a "), ("b.txt", "b ")):
        (tmp_path / name).write_text(letter * 2000)
    windows = make_windows(f"{tmp_path}/a.txt:0.75,{tmp_path}/b.txt:0.25", r1, samples=8, length=16)
    kinds = ["a" if "a" in r1.decode(row[1:].tolist()) else "b" for row in windows.tokens]
    assert "".join(kinds) == "aabaaaba"
    assert [(entry["name"], entry["windows"]) for entry in sources(windows)] == [("a.txt", 6), ("b.txt", 2)]


def test_what_a_short_source_lacks_the_others_give(r1: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text(PROSE)
    (tmp_path / "short.txt").write_text("a b c d e f g h i j k l m n o p q r s t")
    windows = make_windows(f"{tmp_path}/short.txt,{tmp_path}/long.txt", r1, samples=10, length=16)
    short, long = sources(windows)
    assert short["whole"]
    assert (short["windows"], long["windows"]) == (short["tokens"] // 16, 10 - short["tokens"] // 16)
    assert 0 < short["windows"] < 5
    assert len(windows.tokens) == windows.record["samples"] == 10


def test_a_folder_is_one_source_shared_by_size(r1: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, words in (("b.txt", 3000), ("a.txt", 1000)):
        (folder / name).write_text(f"{name[0]} " * words)
    write_lines(folder / "c.jsonl", {"text": "c " * 400})
    (folder / "README.md").write_text("ignored")
    (folder / ".hidden.txt").write_text("not seen")
    windows = make_windows(str(folder), r1, samples=10, length=100)
    entry = sources(windows)[0]
    assert (entry["name"], entry["kind"], entry["ignored"]) == ("3 files", "folder", 1)
    assert [part["name"] for part in entry["files"]] == ["a.txt", "b.txt", "c.jsonl"]
    letters = r1.decode(windows.tokens.ravel().tolist(), skip_special=True)
    assert letters.index("b") > letters.rindex("a")
    # Sizes are 2000, 6000 and 813 bytes.
    assert letters.count("a") / letters.count("b") == pytest.approx(1 / 3, abs=0.02)
    assert str(tmp_path) not in json.dumps(windows.record)


def test_small_files_of_a_folder_are_packed_into_windows(r1: Tokenizer, tmp_path: Path) -> None:
    for index in range(30):
        (tmp_path / f"{index:02}.txt").write_text(f"{index} fox " * 5)
    (tmp_path / "empty.txt").write_text("")
    windows = make_windows(str(tmp_path), r1, samples=2, length=128)
    assert len(windows.tokens) == 2
    assert (windows.tokens == r1.eos_id).sum() > 5


def test_equal_text_gives_equal_windows_and_other_text_others(r1: Tokenizer, text: Path) -> None:
    first, second = (make_windows(str(text), r1, samples=4, length=32) for _ in range(2))
    assert first.record == second.record
    text.write_text("A" + PROSE)
    other = make_windows(str(text), r1, samples=4, length=32)
    assert other.record["tokens"] != first.record["tokens"]
    assert sources(other)[0]["sha256"] != sources(first)[0]["sha256"]


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ("nowhere.txt", "does not exist"),
        ("picture.png", "neither .txt nor .jsonl"),
        ("empty", "holds no .txt and no .jsonl"),
        ("pipe.txt", "not a regular file"),
        ("huge.txt", "more than 1073741824"),
        ("latin.txt", r"not UTF-8 text \(byte 3\)"),
        ("cut.txt", r"not UTF-8 text \(byte 2\)"),
        ("short.txt", "has 3 tokens, less than one window of 16"),
        ("nothing.txt", "has 0 tokens"),
        ("nothing.jsonl", "has 0 tokens"),
        ("bad.jsonl", "line 2 is not JSON"),
        ("deep.jsonl", "line 1 is not JSON"),
        ("list.jsonl", "line 1 is no object with either"),
        ("both.jsonl", "line 1 is no object with either"),
        ("number.jsonl", "line 1: text is not text"),
        ("latin.jsonl", r"line 1 is not UTF-8 text \(byte 10"),
        ("half.jsonl", "line 1 has half of a surrogate pair"),
        ("talk.jsonl", "line 1: message 0 has no role"),
        ("wide.jsonl", "line 1 has more than"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(
    r1: Tokenizer, tmp_path: Path, part: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "MAX_LINE_BYTES", 1 << 16)
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")
    with open(tmp_path / "huge.txt", "wb") as file:
        file.truncate(spec.MAX_FILE_BYTES + 1)
    contents = {
        "picture.png": b"\x89PNG",
        "latin.txt": b"caf\xe9 au lait",
        "cut.txt": "caé".encode()[:-1],
        "short.txt": b"ab",
        "nothing.txt": b"",
        "nothing.jsonl": b"\n\n",
        "bad.jsonl": b'{"text": "a"}\n{"text": "b"\n',
        "deep.jsonl": b"[" * 50_000,
        "list.jsonl": b'["text"]',
        "both.jsonl": b'{"text": "a", "messages": []}',
        "number.jsonl": b'{"text": 3}',
        "latin.jsonl": b'{"text": "\xe9"}',
        "half.jsonl": b'{"text": "\\ud800"}',
        "talk.jsonl": b'{"messages": [{"content": "a"}]}',
        "wide.jsonl": b'{"text": "' + b"a" * (1 << 16) + b'"}',
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=reason) as refused:
        make_windows(str(tmp_path / part), r1, samples=2, length=16)
    assert part in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ("", "empty part"),
        ("builtin,", "empty part"),
        (":0.5", "empty part"),
        ("builtin:0", "a positive number"),
        ("builtin:-1", "a positive number"),
        ("builtin:nan", "a positive number"),
        ("builtin:1e999", "a positive number"),
        ("a.txt:0.5,builtin", "to some sources only"),
        ("builtin,builtin", "builtin twice"),
    ],
)
def test_a_spec_that_says_nothing_clear_is_refused(asked: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        parse_spec(asked)


def test_a_colon_before_anything_but_a_number_belongs_to_the_path(tmp_path: Path) -> None:
    (tmp_path / "part:one.txt").write_text("a")
    (tmp_path / "part:2").mkdir()
    (tmp_path / "part:2" / "b.txt").write_text("b")
    first, second = parse_spec(f"{tmp_path}/part:one.txt:3, {tmp_path}/part:2/b.txt:1")
    assert (first.name, first.share, second.name, second.share) == ("part:one.txt", 0.75, "b.txt", 0.25)


@pytest.mark.parametrize(("samples", "length"), [(0, 512), (-1, 512), (1, 1), (1 << 20, 1 << 20)])
def test_numbers_that_make_no_windows_are_refused(r1: Tokenizer, text: Path, samples: int, length: int) -> None:
    with pytest.raises(UsageError, match="windows of"):
        make_windows(str(text), r1, samples=samples, length=length)


@given(
    count=st.integers(0, 500),
    rows=st.lists(
        st.tuples(st.floats(0, 100, allow_subnormal=False), st.none() | st.integers(0, 100)), min_size=1, max_size=8
    ),
)
def test_shares_keep_their_limits_and_their_proportion(count: int, rows: list[tuple[float, int | None]]) -> None:
    weights, limits = zip(*rows, strict=True)
    given_out = allocate(count, weights, limits)
    room = sum(count if limit is None else limit for weight, limit in rows if weight)
    assert sum(given_out) == min(count, room)
    assert all(limit is None or got <= limit for got, limit in zip(given_out, limits, strict=True))
    free = [(got, weight) for got, (weight, limit) in zip(given_out, rows, strict=True) if weight and limit is None]
    # Each is within one of its share at a common rate, so of any two the cross products are within the sum of their weights.
    for (one, weight), (two, other) in itertools.combinations(free, 2):
        assert abs(one * other - two * weight) < (weight + other) * (1 + 1e-9)


def test_sources_that_run_dry_are_asked_once_more_and_no_further() -> None:
    asked: list[tuple[int, int]] = []

    def get(index: int, need: int) -> int:
        asked.append((index, need))
        return min(need, (3, 100, 0)[index])

    assert fill(30, [1, 1, 1], get) == [3, 27, 0]
    assert asked == [(0, 10), (1, 10), (2, 10), (0, 3), (1, 27), (2, 0)]
