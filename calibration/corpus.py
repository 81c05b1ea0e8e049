"""Files as streams of token ids, read from the start and no further than needed: a gigabyte costs what its first windows cost.

A .txt is one document. A .jsonl has a document a line: `{"text": …}`, or `{"messages": […]}` in the model's own chat template.
Documents of a stream follow one another with the model's end-of-text token between, so none is cut short: one that is longer than
a window goes on in the next.
"""

from __future__ import annotations

import codecs
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from r1q.calibration.conversations import render_conversation
from r1q.calibration.shares import fill
from r1q.calibration.spec import KINDS
from r1q.core.errors import InputError
from r1q.models.tokenizer import Tokenizer

MAX_LINE_BYTES = 1 << 24
_BYTES_PER_TOKEN = 5  # a first guess of how far to read
# Where a text was cut, its last tokens may not be those of the whole text: so many are not used.
_UNSURE = 64
# Text that is all white space, or one letter without end, could be read for ever without a window coming of it.
_SPARSE_BYTES, _SPARSE_BYTES_PER_TOKEN = 1 << 24, 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """The first ids of a file. `whole`: there are no more. `sha256` is of the first `bytes` bytes, which is what was read."""

    name: str
    ids: list[int]
    whole: bool
    bytes: int
    sha256: str
    documents: int


def take(files: Sequence[Path], tokenizer: Tokenizer, count: int) -> tuple[list[int], list[Taken]]:
    """Return the first `count` ids of `files` (fewer where there are no more), and what was taken of each.

    Several files give ids in proportion to their size, each from its own start; what a short one lacks, the others give. Raises
    `InputError` naming the file, and the line or byte, for what cannot be read as text.
    """
    sizes = [path.stat().st_size for path in files]
    held = [_unread(path, size) for path, size in zip(files, sizes, strict=True)]

    def get(index: int, need: int) -> int:
        if len(held[index].ids) < need and not held[index].whole:
            held[index] = take_file(files[index], tokenizer, need)
        return min(need, len(held[index].ids))

    needs = fill(count, sizes, get)
    if len(files) == 1:
        return held[0].ids[:count], held
    end = separator(tokenizer)
    parts = [ended(taken.ids[:need], end) for taken, need in zip(held, needs, strict=True) if need]
    return list(itertools.chain.from_iterable(parts))[:count], held


def _unread(path: Path, size: int) -> Taken:
    return Taken(name=path.name, ids=[], whole=not size, bytes=0, sha256=hashlib.sha256().hexdigest(), documents=0)


def take_file(path: Path, tokenizer: Tokenizer, count: int) -> Taken:
    """Return at least the first `count` ids of one file, or all there are; see `take`."""
    try:
        if KINDS[path.suffix.lower()] == "text":
            return _take_text(path, tokenizer, count)
        return _take_lines(path, tokenizer, count)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error


def separator(tokenizer: Tokenizer) -> list[int]:
    """Return what stands between documents: the end-of-text token, a blank line where the model has none."""
    if tokenizer.eos_id is not None:
        return [tokenizer.eos_id]
    return tokenizer.encode("\n\n", add_special=False)


def ended(ids: list[int], end: list[int]) -> list[int]:
    """Return a document's ids with `end` after them, unless it ends so already (a template may add a line break to it)."""
    return ids if end[0] in ids[-2:] else [*ids, *end]


def _take_text(path: Path, tokenizer: Tokenizer, count: int) -> Taken:
    """Take a text's ids as llama.cpp's tools do: BOS where the tokenizer adds one, and no line break at the very end."""
    size = path.stat().st_size
    reach = max(1 << 16, count * _BYTES_PER_TOKEN)
    while True:
        with open(path, "rb") as file:
            data = file.read(reach)
        whole = len(data) >= size
        text = _decoded(path, data, whole)
        ids = tokenizer.encode(text.removesuffix("\n") if whole else text, add_special=True) if text else []
        ids = ids if whole else ids[: max(len(ids) - _UNSURE, 0)]
        if whole or len(ids) >= count:
            digest = hashlib.sha256(data).hexdigest()
            return Taken(name=path.name, ids=ids, whole=whole, bytes=len(data), sha256=digest, documents=1)
        if len(data) > max(_SPARSE_BYTES, _SPARSE_BYTES_PER_TOKEN * count):
            raise InputError(
                f"{path} has {len(ids)} tokens in its first {len(data)} bytes; that is no text to learn from"
            )
        reach *= 2


def _decoded(path: Path, data: bytes, whole: bool) -> str:
    try:
        # What was read may end inside a character.
        return codecs.getincrementaldecoder("utf-8")().decode(data, final=whole)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); convert it") from None


def _take_lines(path: Path, tokenizer: Tokenizer, count: int) -> Taken:
    digest, size, documents = hashlib.sha256(), 0, 0
    ids: list[int] = []
    end, whole = separator(tokenizer), True
    for number, line in _lines(path):
        if len(ids) >= count:
            whole = False
            break
        digest.update(line)
        size += len(line)
        if line.strip():
            document = _document(line, tokenizer, f"{path}, line {number}")
            ids += ended(document, end) if document else []
            documents += 1
    return Taken(name=path.name, ids=ids, whole=whole, bytes=size, sha256=digest.hexdigest(), documents=documents)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise InputError(f"{path}, line {number} has more than {MAX_LINE_BYTES} bytes; split the document")
            yield number, line


def _document(line: bytes, tokenizer: Tokenizer, where: str) -> list[int]:
    """Return the ids of one line's document; an empty text has none."""
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 text (byte {error.start} of the line); convert it") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON ({' '.join(str(error).split())}); give one object a line") from None
    if not isinstance(value, Mapping) or ("text" in value) == ("messages" in value):
        raise InputError(f"{where} is no object with either text or messages; give one of the two")
    if "messages" in value:
        try:
            rendered = render_conversation(tokenizer, value["messages"])
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        return _encoded(tokenizer, rendered, where, special=False)
    if not isinstance(value["text"], str):
        raise InputError(f"{where}: text is not text; give a string")
    return _encoded(tokenizer, value["text"], where, special=True) if value["text"] else []


def _encoded(tokenizer: Tokenizer, text: str, where: str, *, special: bool) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell what no text can hold
        raise InputError(f"{where} has half of a surrogate pair in it; give whole characters") from None
    return tokenizer.encode(text, add_special=special)
