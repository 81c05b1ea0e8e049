"""Importance matrices: llama.cpp's files of mean squared activations by input column, both forms read with every bound checked.

GGUF form: `general.type` = imatrix, and for each weight the float32 tensors `<name>.in_sum2` [experts, columns] and `<name>.counts`
[experts]. Older form: a count of entries, then name, number of calls, length and that many float32 means × calls for each.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from r1q.core.errors import InputError
from r1q.core.gguf_file import GgufFile
from r1q.core.qtensor import Floats

_SUM, _COUNT = ".in_sum2", ".counts"
_MAX_BYTES = 1 << 31
_MAX_ENTRIES, _MAX_NAME, _MAX_COLUMNS = 1 << 16, 256, 1 << 24
_MEND = "make it again with llama-imatrix"


@dataclass(frozen=True, slots=True)
class Imatrix:
    """Mean squared activations by GGUF tensor name: [columns], of experts [experts, columns].

    `chunks` windows of text went in (0: the file does not say). `unseen` says of how many experts there were no tokens; all columns
    of those count alike, as llama.cpp takes them.
    """

    columns: Mapping[str, Floats]
    chunks: int
    unseen: Mapping[str, int] = field(default_factory=dict)


def read_imatrix(path: Path) -> Imatrix:
    """Read a file of llama-imatrix, of either form. Raises `InputError` with the file, the entry and the defect."""
    try:
        if path.exists() and not path.is_file():
            # A pipe would wait for ever, and a device never end.
            raise InputError(f"cannot read {path}: not a regular file")
        size = path.stat().st_size
        with open(path, "rb") as file:
            magic = file.read(4)
            if size > _MAX_BYTES:
                raise InputError(f"{path} has {size} bytes, more than an importance matrix can have")
            rest = b"" if magic == b"GGUF" else file.read()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    unseen: dict[str, int] = {}
    found, chunks = _from_gguf(path, unseen) if magic == b"GGUF" else _from_legacy(path, magic + rest)
    if not found:
        raise InputError(f"{path} holds no importance of any tensor; {_MEND}")
    for name, values in found.items():
        if not np.isfinite(values).all() or (values < 0).any():
            raise InputError(f"{path}: {name} holds NaN, infinite or negative importance; {_MEND}")
    return Imatrix(found, chunks, unseen)


def _from_gguf(path: Path, unseen: dict[str, int]) -> tuple[dict[str, Floats], int]:
    file = GgufFile.open(path)
    if file.metadata.get("general.type") != "imatrix":
        raise InputError(f"{path} is a GGUF file of another kind, not an importance matrix")
    stems = [name.removesuffix(end) for name in file.tensors for end in (_SUM, _COUNT) if name.endswith(end)]
    chunks = file.metadata.get("imatrix.chunk_count", 0)
    found = {stem: _gguf_entry(file, stem, unseen) for stem in dict.fromkeys(stems)}
    return found, chunks if isinstance(chunks, int) else 0


def _gguf_entry(file: GgufFile, stem: str, unseen: dict[str, int]) -> Floats:
    sums_at, counts_at = file.tensors.get(stem + _SUM), file.tensors.get(stem + _COUNT)
    if sums_at is None or counts_at is None or not sums_at.type == counts_at.type == "f32":
        raise InputError(f"{file.path}: {stem} lacks its sums or its counts, or they are not float32; {_MEND}")
    sums, counts = (file.read_bytes(stem + end).view("<f4") for end in (_SUM, _COUNT))
    if len(counts) != sums_at.rows:
        raise InputError(f"{file.path}: {stem} has {sums_at.rows} rows of sums and {len(counts)} counts; {_MEND}")
    wrong = next((float(count) for count in counts if not (count >= 0 and float(count).is_integer())), None)
    if wrong is not None:
        raise InputError(f"{file.path}: {stem} has seen {wrong:g} tokens, which is no count; {_MEND}")
    # What is without any token says nothing: llama.cpp weighs its columns alike.
    rows = [
        _divided(row, count) if count else np.ones_like(row)
        for row, count in zip(sums.reshape(len(counts), -1), counts, strict=True)
    ]
    if len(rows) == 1:
        return rows[0]
    lost = int((counts == 0).sum())
    if lost:
        unseen[stem] = lost
    return np.stack(rows)


def _divided(sums: Floats, count: float) -> Floats:
    with np.errstate(all="ignore"):  # what overflows, or was NaN, is refused with the entry's name
        return (sums / np.float32(count)).astype(np.float32)


def _from_legacy(path: Path, data: bytes) -> tuple[dict[str, Floats], int]:
    cursor = _Cursor(path, data)
    entries = cursor.integer("number of entries", 1, _MAX_ENTRIES)
    found = dict(_legacy_entries(cursor, entries))
    if len(found) != entries:
        raise InputError(f"{path}: a tensor occurs twice; {_MEND}")
    chunks = cursor.integer("number of chunks", 0, 1 << 30) if cursor.left() >= 4 else 0
    return found, chunks


def _legacy_entries(cursor: _Cursor, entries: int) -> Iterator[tuple[str, Floats]]:
    for _ in range(entries):
        raw = cursor.take(cursor.integer("length of a name", 1, _MAX_NAME))
        try:
            name = raw.decode()
        except UnicodeDecodeError:
            raise InputError(f"{cursor.path}: a name is not text; not an importance matrix, or {_MEND}") from None
        calls = cursor.integer(f"calls of {name}", 0, 1 << 30)
        columns = cursor.integer(f"columns of {name}", 1, _MAX_COLUMNS)
        values = np.frombuffer(cursor.take(4 * columns), "<f4").astype(np.float32)
        yield name, _divided(values, calls) if calls else values


@dataclass(slots=True)
class _Cursor:
    """Reads little-endian fields, each inside the file and inside its own bounds."""

    path: Path
    data: bytes
    at: int = 0

    def left(self) -> int:
        return len(self.data) - self.at

    def take(self, count: int) -> bytes:
        if count > self.left():
            raise InputError(f"{self.path} ends early, at byte {len(self.data)}; not an importance matrix, or {_MEND}")
        self.at += count
        return self.data[self.at - count : self.at]

    def integer(self, what: str, low: int, high: int) -> int:
        (value,) = struct.unpack("<i", self.take(4))
        if not low <= value <= high:
            raise InputError(f"{self.path}: {what} is {value}; not an importance matrix, or {_MEND}")
        return int(value)
