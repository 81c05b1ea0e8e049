"""Importance matrices: llama.cpp's files of mean squared activations by input column, both forms read with every bound checked.

GGUF form: `general.type` = imatrix, and for each weight the float32 tensors `<name>.in_sum2` [experts, columns] and `<name>.counts`
[experts]. Older form: a count of entries, then name, number of calls, length and that many float32 means × calls for each.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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
    """Mean squared activations [columns] by GGUF tensor name; `chunks` windows of text went in (0: the file does not say)."""

    columns: Mapping[str, Floats]
    chunks: int


def read_imatrix(path: Path) -> Imatrix:
    """Read a file of llama-imatrix, of either form. Raises `InputError` with the file, the entry and the defect."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            magic = file.read(4)
            if size > _MAX_BYTES:
                raise InputError(f"{path} has {size} bytes, more than an importance matrix can have")
            rest = b"" if magic == b"GGUF" else file.read()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    found, chunks = _from_gguf(path) if magic == b"GGUF" else _from_legacy(path, magic + rest)
    if not found:
        raise InputError(f"{path} holds no importance of any tensor; {_MEND}")
    for name, values in found.items():
        if not np.isfinite(values).all() or (values < 0).any():
            raise InputError(f"{path}: {name} holds NaN, infinite or negative importance; {_MEND}")
    return Imatrix(found, chunks)


def _from_gguf(path: Path) -> tuple[dict[str, Floats], int]:
    file = GgufFile.open(path)
    if file.metadata.get("general.type") != "imatrix":
        raise InputError(f"{path} is a GGUF file of another kind, not an importance matrix")
    found: dict[str, Floats] = {}
    for name, tensor in file.tensors.items():
        if not name.endswith(_SUM):
            continue
        stem = name.removesuffix(_SUM)
        counts_tensor = file.tensors.get(stem + _COUNT)
        if counts_tensor is None or tensor.type != "f32" or counts_tensor.type != "f32":
            raise InputError(f"{path}: {stem} lacks its counts, or they are not float32; {_MEND}")
        sums = file.read_bytes(name).view("<f4").reshape(-1, tensor.shape[-1])
        counts = file.read_bytes(stem + _COUNT).view("<f4").reshape(-1)
        if len(counts) != len(sums):
            raise InputError(f"{path}: {stem} has {len(sums)} rows of sums and {len(counts)} counts; {_MEND}")
        if len(sums) != 1:
            raise InputError(f"{path}: {stem} is of {len(sums)} experts; mixtures of experts are not supported")
        # An entry without any token says nothing: llama.cpp weighs its columns alike.
        found[stem] = (sums[0] / counts[0]).astype(np.float32) if counts[0] > 0 else np.ones(sums.shape[1], np.float32)
    chunks = file.metadata.get("imatrix.chunk_count", 0)
    return found, chunks if isinstance(chunks, int) else 0


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
        yield name, values / np.float32(calls) if calls > 0 else values


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
