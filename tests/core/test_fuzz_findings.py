"""What fuzzing found stays mended: every finding is refused (or read), every seed read, mutations of seeds at most refused.

The functions are those that the long run feeds (tests/fuzz/targets.py); nothing here needs the fuzzer itself.
"""

from __future__ import annotations

import random
import runpy
from pathlib import Path
from typing import Any

import pytest

from r1q.core.errors import InputError
from r1q.core.recipe import Recipe
from r1q.core.safetensors_file import SafetensorsFile
from r1q.models.source import ModelSource

FUZZ = Path(__file__).resolve().parents[1] / "fuzz"
TARGETS = runpy.run_path(str(FUZZ / "targets.py"), run_name="fuzz_targets")
SEEDS = runpy.run_path(str(FUZZ / "seeds.py"), run_name="fuzz_seeds")
SEED_FILES: dict[str, list[bytes]] = SEEDS["seeds"](TARGETS["CONFIG"], TARGETS["WEIGHT_MAP"])
FINDINGS = sorted((FUZZ / "findings").glob("*/*"))
# A damaged line of the journal is not refused: its block is done again. A sum without dimensions is one column.
READ = [path for path in FINDINGS if path.parent.name == "journal" or path.name == "sums-without-dimensions"]
OTHER_JOB = ("job", 0)  # the one seed that is rightly refused


def prepared(name: str, folder: Path) -> tuple[Any, Path]:
    target = TARGETS["TARGETS"][name]
    return target, TARGETS["make_folder"](target, folder)


@pytest.mark.parametrize("path", FINDINGS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_finding_is_refused_or_read(path: Path, tmp_path: Path) -> None:
    target, folder = prepared(path.parent.name, tmp_path)
    assert TARGETS["feed"](target, folder, path.read_bytes()) == (path in READ)


def test_every_target_has_seeds() -> None:
    assert SEED_FILES.keys() == TARGETS["TARGETS"].keys()
    assert {path.parent.name for path in FINDINGS} <= SEED_FILES.keys()


@pytest.mark.parametrize("name", SEED_FILES)
def test_seeds_are_read_and_their_mutations_at_most_refused(name: str, tmp_path: Path) -> None:
    target, folder = prepared(name, tmp_path)
    for number, data in enumerate(SEED_FILES[name]):
        assert TARGETS["feed"](target, folder, data) == ((name, number) != OTHER_JOB)
    rng = random.Random(20)
    outcomes = [
        TARGETS["feed"](target, folder, SEEDS["change"](name, rng, rng.choice(SEED_FILES[name]))) for _ in range(150)
    ]
    assert any(outcomes) == (name != "job")  # another job is never the same
    assert all(outcomes) == (name in ("journal", "recipe"))  # recipes are mutated as bytes, by the fuzzer itself


def test_a_reader_that_lies_or_breaks_is_a_finding(tmp_path: Path) -> None:
    """The targets can fail: a promise not kept, another exception, and a refusal that names no file come out."""
    lies, breaks, silent = InputError("x"), ValueError("x"), InputError("somewhere")

    def failing(error: Exception) -> Any:
        def read(path: Path) -> None:
            raise error

        return TARGETS["Target"]("x", read)

    for error, expected in ((lies, "BrokenPromiseError"), (breaks, "ValueError"), (silent, "BrokenPromiseError")):
        with pytest.raises(Exception, match=r"x|somewhere") as caught:  # the type is compared below
            TARGETS["feed"](failing(error), tmp_path, b"")
        assert type(caught.value).__name__ == expected


def test_links_to_endless_devices_and_pipes_are_refused(tmp_path: Path) -> None:
    """A checkpoint out of an archive can hold either: reading the one never ends, and opening the other never begins."""
    import os

    target, folder = prepared("config", tmp_path)
    (folder / "config.json").unlink(missing_ok=True)
    (folder / "config.json").symlink_to("/dev/zero")
    with pytest.raises(InputError, match="not a regular file"):
        ModelSource.open(folder)
    del target
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(InputError, match="not a regular file"):
        SafetensorsFile.open(tmp_path / "pipe.safetensors")


def test_a_recipe_refuses_what_its_base_would_ignore(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('base = "q4_k_m"\nsymmetric = true\n')
    with pytest.raises(InputError, match="q4_k_m has its own blocks"):
        Recipe.load(str(path))


def _letters(count: int) -> list[bytes]:
    return [format(number, "x").encode() for number in range(count)]


def _hostile(kind: str) -> tuple[str, bytes]:
    """Return a file whose every few bytes become an object of Python's, by the target that reads it."""
    lists = b'{"a":[' + b'{"":0},' * 37_000 + b"0]}"
    if kind == "lists in a safetensors header":
        return "safetensors", SEEDS["safetensors"](lists, b"")
    if kind == "keys of a GGUF file":
        return "gguf", SEEDS["gguf"]([SEEDS["gguf_entry"](w.decode(), 0, b"\1") for w in _letters(15_000)], [])
    if kind == "tokens of a GGUF file":
        tokens = b"".join(SEEDS["text"](word) for word in _letters(20_000))
        return "gguf", SEEDS["gguf"]([SEEDS["gguf_array"]("tokenizer.ggml.tokens", 8, 20_000, tokens)], [])
    return "imatrix", SEEDS["legacy_imatrix"]([(word, 1, (1.0,)) for word in _letters(12_000)])


@pytest.mark.parametrize(
    "kind", ["lists in a safetensors header", "keys of a GGUF file", "tokens of a GGUF file", "entries of an imatrix"]
)
def test_memory_stays_in_proportion_to_the_file(kind: str, tmp_path: Path) -> None:
    """A quarter of a megabyte made to cost as much as it can stays below 40 times its size (30 measured, for `{"":0},…`)."""
    import tracemalloc

    name, data = _hostile(kind)
    target, folder = prepared(name, tmp_path)
    tracemalloc.start()
    try:
        accepted = TARGETS["feed"](target, folder, data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 200_000 < len(data) < 300_000
    assert accepted == (name != "safetensors")
    assert peak < 40 * len(data)
