"""Which `tokenizer.ggml.pre` a tokenizer gets, and the proof that llama.cpp then gives the same token ids.

The name decides how llama.cpp cuts a text before it merges; a wrong one degrades a model without an error. It is found by
llama.cpp's own table (the hash of the ids of one test text), else by the tokenizer's own pre_tokenizer compared with known
ones. Both tables are `pretokenizers.json`. Neither is trusted: `prove_tokenizer` compares ids on thousands of pieces of text.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from r1q.core.errors import InputError
from r1q.export.gguf_tokenizer import (
    TOKENIZER_JSON,
    flat_steps,
    normalizes_to_nfc,
    read_tokenizer_json,
    tokenizer_kind,
)
from r1q.export.tokenizer_proof import tokenize_apart
from r1q.export.tokenizer_texts import proof_texts
from r1q.models.tokenizer import Tokenizer

_TABLE = Path(__file__).with_name("pretokenizers.json")


@cache
def _table() -> Mapping[str, Any]:
    value: dict[str, Any] = json.loads(_TABLE.read_text(encoding="utf-8"))
    return value


def name_pretokenizer(folder: Path, tokenizer: Tokenizer) -> str:
    """Return the name that makes llama.cpp cut texts as the tokenizer of `folder` does.

    Raises `InputError` for one that llama.cpp does not know.
    """
    data = read_tokenizer_json(folder)
    if tokenizer_kind(data, folder / TOKENIZER_JSON) == "llama":
        return "default"  # llama.cpp's Llama 2 tokenizer does not cut
    by_hash, by_structure = name_by_hash(tokenizer), _row_by_structure(data)
    if by_structure is not None:
        # The hash comes from one text, which some different pre-tokenizers cut alike; the structure is the tokenizer itself.
        agrees = by_hash == by_structure["name"] or by_hash in by_structure["same_as"]
        return by_hash if by_hash is not None and agrees else str(by_structure["name"])
    if by_hash is None:
        raise InputError(
            f"{folder / TOKENIZER_JSON}: llama.cpp has no pre-tokenizer like this one ({steps_of(data)}); "
            "a GGUF file would cut texts differently"
        )
    return by_hash


def name_by_hash(tokenizer: Tokenizer) -> str | None:
    """Return llama.cpp's name for the tokenizer that gives these ids to its test text, or None.

    Libraries differ in whether special tokens are put around a text, so each way is tried; the hash of a wrong one matches none.
    """
    text = str(_table()["check_text"])
    plain, full = tokenizer.encode(text, add_special=False), tokenizer.encode(text, add_special=True)
    with_bos = [tokenizer.bos_id, *plain]
    for ids in (full, plain, with_bos):
        name = _table()["hashes"].get(hashlib.sha256(str(list(ids)).encode()).hexdigest())
        if name is not None:
            return str(name)
    return None


def _row_by_structure(data: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the row of the table whose pre_tokenizer is the one of this tokenizer.json, or None."""
    steps, ignore = steps_of(data), data["model"].get("ignore_merges") is True
    for row in _table()["structures"]:
        if steps == [_step_of_table(step) for step in row["steps"]] and ignore == row["ignore_merges"]:
            found: Mapping[str, Any] = row
            return found
    return None


def steps_of(data: Mapping[str, Any]) -> list[str]:
    """Return the cuts that a tokenizer.json makes, in order; a step that the table cannot spell stands as its type in brackets."""
    return [step for part in flat_steps(data.get("pre_tokenizer"), "pretokenizers") for step in _step(part)]


def _step(part: Mapping[str, Any]) -> Iterator[str]:
    kind, pattern = part.get("type"), part.get("pattern")
    if kind == "ByteLevel" and not part.get("add_prefix_space"):
        if part.get("use_regex", True):
            yield "gpt2"
    elif kind == "Digits":
        yield "digit" if part.get("individual_digits") else "digits"
    elif kind == "Split" and isinstance(pattern, Mapping) and "Regex" in pattern and _isolates(part):
        yield _spelled(str(pattern["Regex"]))
    else:
        yield f"<{kind}>"


def _isolates(part: Mapping[str, Any]) -> bool:
    # «Removed» with invert keeps the matches and drops the rest; these expressions match every character, so nothing is dropped.
    return (part.get("behavior"), bool(part.get("invert"))) in (("Isolated", False), ("Removed", True))


def _step_of_table(step: object) -> str:
    return _spelled(str(step["split"])) if isinstance(step, Mapping) else str(step)


def _spelled(pattern: str) -> str:
    return pattern.replace("\r", "\\r").replace("\n", "\\n")


def prove_tokenizer(gguf: Path, folder: Path) -> str:
    """Compare the token ids of llama.cpp, reading `gguf`, with those of the tokenizer in `folder`, on a fixed set of texts.

    Returns one line that says what was proven, or «not proven» and why (llama-cpp-python is not installed). Raises `InputError`
    with the first text whose ids differ, and `MissingError` when llama.cpp crashes. llama.cpp runs in a process of its own.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        return "not proven: llama-cpp-python is not installed (pip install 'r1q[llama-cpp]')"
    data = read_tokenizer_json(folder)
    composed = normalizes_to_nfc(data)
    texts = proof_texts([token["content"] for token in data.get("added_tokens") or []])
    if composed:
        texts = [unicodedata.normalize("NFC", text) for text in texts]
    theirs, tokenizer = tokenize_apart(gguf, texts), Tokenizer.open(folder)
    for text, found in zip(texts, theirs.ids, strict=True):
        expected = tokenizer.encode(text, add_special=False)
        if expected != found:
            raise InputError(_difference(folder, text, expected, found))
    framed = tokenizer.encode(texts[0], add_special=True)
    if framed != theirs.framed:
        raise InputError(
            f"{folder}: llama.cpp adds other special tokens: {texts[0]!r} is {theirs.framed}, not {framed}"
        )
    note = "; texts in Unicode NFC, which llama.cpp leaves to its caller" if composed else ""
    return f"proven: {len(texts)} texts, {sum(map(len, theirs.ids))} tokens, equal ids in {theirs.version}{note}"


def _difference(folder: Path, text: str, expected: Sequence[int], found: Sequence[int]) -> str:
    at = next(
        (i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), min(len(expected), len(found))
    )
    shown = text if len(text) <= 80 else text[:80] + "…"
    return (
        f"{folder / TOKENIZER_JSON}: llama.cpp cuts {shown!r} differently than this tokenizer (from token {at}: "
        f"{list(found[at : at + 4])}, not {list(expected[at : at + 4])}); a GGUF file would degrade the model"
    )
