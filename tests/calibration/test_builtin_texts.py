"""The built-in text: small enough to ship, what its sources say, nothing that models are measured on, and enough for long windows."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r1q.calibration.corpus import take
from r1q.calibration.problems import draw_problem
from r1q.calibration.spec import BUILTIN_FILES, BUILTIN_FOLDER
from r1q.calibration.windows import make_windows
from r1q.models.embedded import EMBEDDED
from r1q.models.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
EVALUATION = ("benchmarks/texts/evaluation.txt", "models/tiny_r1/evaluation.txt")
SEED, PROBLEMS = 20250120, 608


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (BUILTIN_FOLDER / name).read_text(encoding="utf-8").splitlines()]


def text_of(line: dict[str, Any]) -> str:
    if "text" in line:
        return str(line["text"])
    return "\n".join(message["content"] + "\n" + message.get("reasoning_content", "") for message in line["messages"])


def runs(text: str, length: int = 8) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.casefold())
    return {tuple(words[at : at + length]) for at in range(len(words) - length + 1)}


def test_two_megabytes_are_not_passed_and_nothing_else_lies_there() -> None:
    files = sorted(path.name for path in BUILTIN_FOLDER.iterdir())
    assert files == sorted([*BUILTIN_FILES, "SOURCES.md"])
    assert sum((BUILTIN_FOLDER / name).stat().st_size for name in BUILTIN_FILES) <= 2_000_000


def test_every_source_is_named_with_the_bytes_it_has() -> None:
    page = (BUILTIN_FOLDER / "SOURCES.md").read_text(encoding="utf-8")
    sizes: Counter[str] = Counter()
    for name in BUILTIN_FILES[:3]:
        for line in lines(name):
            assert set(line) == {"text", "source"}
            sizes[line["source"]] += len(line["text"].encode())
    for source, size in sizes.items():
        row = next(row for row in page.splitlines() if f" {size:,} " in row)
        assert source.split(" (")[0].removesuffix(".js").casefold().split(".")[0][:9] in row.casefold().replace("*", "")


def test_the_reasoning_is_what_the_generator_writes() -> None:
    written = lines("reasoning.jsonl")
    assert len(written) == PROBLEMS
    for index, line in enumerate(written):
        problem = draw_problem(SEED, index)
        user, assistant = line["messages"]
        assert user == {"role": "user", "content": problem.question}
        assert (assistant["content"], assistant["reasoning_content"]) == (problem.answer, problem.thoughts)


@pytest.mark.parametrize("name", BUILTIN_FILES)
def test_nothing_that_models_are_measured_on_is_in_it(name: str) -> None:
    measured = set().union(*(runs((ROOT / path).read_text(encoding="utf-8")) for path in EVALUATION))
    assert len(measured) > 20_000
    mine = set().union(*(runs(text_of(line)) for line in lines(name)))
    assert mine
    assert not mine & measured


def test_every_beginning_of_a_file_holds_its_larger_works() -> None:
    for name, least in (("english.jsonl", 4), ("chinese.jsonl", 5), ("code.jsonl", 6)):
        first = lines(name)[:24]
        assert len({line["source"] for line in first}) >= least


def test_chinese_is_chinese_and_without_editors_notes() -> None:
    text = "".join(text_of(line) for line in lines("chinese.jsonl"))
    assert sum("\u4e00" <= character <= "\u9fff" for character in text) > 0.75 * len(text)
    assert not re.search("注释|本篇最初|分节阅读|http|[⑴-⒇①-⑳]", text)


def test_the_builtin_mixture_is_even_and_keeps_the_thoughts() -> None:
    tokenizer = Tokenizer.open(EMBEDDED)
    windows = make_windows("builtin", tokenizer, samples=128, length=512)
    entries: Any = windows.record["sources"]
    assert [(entry["name"], entry["kind"], entry["share"], entry["windows"]) for entry in entries] == [
        (name, "builtin", 0.25, 32) for name in BUILTIN_FILES
    ]
    assert windows.tokens.shape == (128, 512)
    # Of even shares, every fourth window is of one kind: its stream, but for the ids that BOS replaced.
    stream, _ = take([BUILTIN_FOLDER / "reasoning.jsonl"], tokenizer, 32 * 512)
    np.testing.assert_array_equal(windows.tokens[3::4, 1:], np.reshape(stream, (32, 512))[:, 1:])
    thinking = tokenizer.decode(stream)
    for problem in (draw_problem(SEED, index) for index in range(20)):
        assert f"<think>\n{problem.thoughts}\n</think>\n\n{problem.answer}" in thinking
    again = make_windows("builtin", tokenizer, samples=128, length=512)
    assert again.record == windows.record


def test_there_is_text_for_long_windows_too() -> None:
    windows = make_windows("builtin", Tokenizer.open(EMBEDDED), samples=128, length=2048)
    assert windows.record["samples"] == 128
