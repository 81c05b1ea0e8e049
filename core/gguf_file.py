"""GgufFile: a bounds-checked reader of GGUF files; every defect is an `InputError` before native code sees the file.

The header is walked once and nothing of it is copied: strings stay in the memory map until they are asked for, number arrays are
views. Tensors are read into fresh memory: mapped, a file would count page by page as the process's own.

The checks are those of llama.cpp's `gguf.cpp` and more: limits that come from the file's own size, caps on every count, the element
types of arrays that the C code casts without looking, and (`core/gguf_checks.py`) hyper-parameters that agree with the tensors.
"""

from __future__ import annotations

import math
import struct
import threading
import weakref
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn, overload

import numpy as np
from numpy.typing import NDArray

from r1q.core.errors import InputError
from r1q.core.files import fill
from r1q.core.gguf_checks import check
from r1q.core.gguf_types import ARRAY, BOOL, DEFAULT_ALIGNMENT, MAGIC, SCALARS, STRING, TENSOR_TYPES, VERSIONS

Bytes = NDArray[np.uint8]

MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 17
MAX_KEY_BYTES = (1 << 16) - 1  # the specification's limit
MAX_STRING_BYTES = 1 << 24
MAX_ARRAY_STRINGS = 1 << 22
MAX_FILE_STRINGS = 1 << 23  # of all arrays together: bounds the time and the memory of opening a hostile file
MAX_ARRAY_NUMBERS = 1 << 26
MAX_NAME_BYTES = 63
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 1 << 16
_LARGEST = (1 << 63) - 1
_CHUNK = 1 << 14
_MEND = "download or export it again"


class Strings(Sequence[str]):
    """An array of strings inside a GGUF header, decoded when asked for."""

    def __init__(self, path: Path, key: str, data: Bytes, bounds: NDArray[np.uint64]) -> None:
        self._path, self._key, self._data, self._bounds = path, key, data, bounds

    def __len__(self) -> int:
        """Return the number of strings."""
        return len(self._bounds)

    def __iter__(self) -> Iterator[str]:
        """Yield every string, decoded; raises `InputError` for one that is not UTF-8."""
        for index, stored in enumerate(self.stored()):
            try:
                yield stored.decode("utf-8")
            except UnicodeDecodeError:
                yield self[index]  # raises, with the place

    def stored(self) -> Iterator[bytes]:
        """Yield the stored bytes of every string; much faster than one by one."""
        view = self._data.data
        for first in range(0, len(self), _CHUNK):
            for start, stop in self._bounds[first : first + _CHUNK].tolist():
                yield bytes(view[start:stop])

    def raw(self, index: int) -> bytes:
        """Return the stored bytes of string `index`."""
        start, stop = self._bounds[index]
        return self._data[int(start) : int(stop)].tobytes()

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        """Return one string or a list; raises `InputError` for a string that is not UTF-8."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        try:
            return self.raw(index).decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{self._path}: {self._key}[{index}] is not UTF-8; {_MEND}") from error


Value = int | float | bool | str | NDArray[np.generic] | Strings


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """One tensor: `shape` in numpy's order (rows first), `offset` from the start of the file, both in the file's own spelling."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def rows(self) -> int:
        """Number of rows; a vector is one row."""
        return math.prod(self.shape[:-1])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class GgufFile:
    """An opened GGUF file. `types` gives each key's stored type (`u32`, `str`, `arr[str]`)."""

    path: Path
    version: int
    alignment: int
    metadata: Mapping[str, Value]
    types: Mapping[str, str]
    tensors: Mapping[str, GgufTensor]
    _file: FileIO
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @staticmethod
    def open(path: Path | str) -> GgufFile:
        """Open and check a GGUF file; raises `InputError` with the file, the defect and its place."""
        path = Path(path)
        data, handle = _open(path)
        try:
            file = _parse(_Cursor(path, data), handle)
        except BaseException:
            handle.close()
            raise
        weakref.finalize(file, handle.close)
        return file

    @property
    def architecture(self) -> str:
        """The model's architecture as llama.cpp names it; empty where the file does not say."""
        return str(self.metadata.get("general.architecture", ""))

    def read_bytes(self, name: str) -> Bytes:
        """Return a tensor's stored bytes [nbytes]. Raises `InputError` where the file is shorter by now."""
        tensor = self.tensors[name]
        return self._read(tensor, tensor.offset, tensor.nbytes)

    def read_rows(self, name: str, start: int, stop: int) -> Bytes:
        """Return the stored bytes [stop − start, row_bytes] of some rows, as `read_bytes` does."""
        tensor = self.tensors[name]
        row_bytes = tensor.nbytes // tensor.rows
        found = self._read(tensor, tensor.offset + start * row_bytes, (stop - start) * row_bytes)
        return found.reshape(stop - start, row_bytes)

    def _read(self, tensor: GgufTensor, offset: int, size: int) -> Bytes:
        found = np.empty(size, dtype=np.uint8)
        with self._lock:
            whole = fill(self._file, offset, found.data)
        if not whole:
            raise InputError(f"{self.path}: the file ends inside the data of tensor {tensor.name!r}; {_MEND}")
        return found


def _open(path: Path) -> tuple[Bytes, FileIO]:
    """Return the file mapped, for its header, and open, for its tensors."""
    try:
        if not path.is_file():
            raise InputError(f"{path}: no such file" if not path.exists() else f"{path}: not a regular file")
        if path.stat().st_size < 24:
            raise InputError(f"{path}: too short for a GGUF file ({path.stat().st_size} bytes); {_MEND}")
        data = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
        return data, FileIO(path, "r")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


def _parse(cursor: _Cursor, handle: FileIO) -> GgufFile:
    path = cursor.path
    version, n_tensors, n_keys = _read_counts(cursor)
    metadata, types = _read_metadata(cursor, n_keys)
    alignment = _alignment(path, metadata, types)
    tensors = _read_tensors(cursor, n_tensors, alignment)
    check(path, metadata, types, tensors)
    return GgufFile(
        path=path,
        version=version,
        alignment=alignment,
        metadata=MappingProxyType(metadata),
        types=MappingProxyType(types),
        tensors=MappingProxyType(tensors),
        _file=handle,
    )


class _Cursor:
    """A position in the mapped file; every read is checked against the file's end."""

    def __init__(self, path: Path, data: Bytes) -> None:
        self.path, self.data, self.at, self.end = path, data, 0, len(data)
        self.strings_left = MAX_FILE_STRINGS

    def fail(self, what: str) -> NoReturn:
        raise InputError(f"{self.path}: {what} (at byte {self.at}); {_MEND}")

    @property
    def rest(self) -> int:
        return self.end - self.at

    def take(self, size: int, what: str) -> Bytes:
        if size > self.rest:
            self.fail(f"the file ends inside {what}")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, kind: int, what: str) -> int | float | bool:
        dtype = np.dtype(SCALARS[kind][1])
        value: int | float = self.take(dtype.itemsize, what).view(dtype)[0].item()
        return bool(value) if kind == BOOL else value

    def unsigned(self, size: int, what: str) -> int:
        return int.from_bytes(self.take(size, what).tobytes(), "little")

    def string(self, limit: int, what: str) -> str:
        length = self.unsigned(8, what)
        if length > min(limit, self.rest):
            self.fail(f"{what} claims {length} bytes; {min(limit, self.rest)} is the most it can have here")
        try:
            return self.take(length, what).tobytes().decode("utf-8")
        except UnicodeDecodeError:
            self.fail(f"{what} is not UTF-8")

    def strings(self, count: int, key: str) -> Strings:
        if count > min(MAX_ARRAY_STRINGS, self.strings_left, self.rest // 8):
            self.fail(f"{key} claims {count} strings, more than the file or this reader can hold")
        self.strings_left -= count
        bounds = array("Q")
        length_at = struct.Struct("<Q").unpack_from
        view, at, end = self.data.data, self.at, self.end
        for index in range(count):
            start = at + 8
            if start > end or (stop := start + length_at(view, at)[0]) > end:
                self.at = at
                self.fail(f"the file ends inside {key}[{index}]")
            bounds.append(start)
            bounds.append(stop)
            at = stop
        self.at = at
        return Strings(self.path, key, self.data, np.frombuffer(bounds, dtype=np.uint64).reshape(count, 2))

    def numbers(self, kind: int, count: int, key: str) -> NDArray[np.generic]:
        dtype = np.dtype(SCALARS[kind][1])
        if count > min(MAX_ARRAY_NUMBERS, self.rest // dtype.itemsize):
            self.fail(f"{key} claims {count} numbers, more than the file or this reader can hold")
        values = self.take(count * dtype.itemsize, key).view(dtype)
        return values != 0 if kind == BOOL else values


def _read_counts(cursor: _Cursor) -> tuple[int, int, int]:
    if (magic := cursor.take(4, "the magic").tobytes()) != MAGIC:
        cursor.fail(f"not a GGUF file: it begins with {magic!r}")
    version = cursor.unsigned(4, "the version")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "big"), "little")
        reason = "big-endian files are not supported" if swapped in VERSIONS else "versions 2 and 3 are supported"
        cursor.fail(f"GGUF version {version}: {reason}")
    n_tensors = cursor.unsigned(8, "the tensor count")
    n_keys = cursor.unsigned(8, "the key count")
    # The smallest tensor entry is 25 bytes (one-letter name, no dimensions), the smallest key entry 14.
    if n_tensors > min(MAX_TENSORS, cursor.rest // 25):
        cursor.fail(f"{n_tensors} tensors claimed, more than the file or this reader can hold")
    if n_keys > min(MAX_KEYS, cursor.rest // 14):
        cursor.fail(f"{n_keys} metadata keys claimed, more than the file or this reader can hold")
    return version, n_tensors, n_keys


def _read_metadata(cursor: _Cursor, n_keys: int) -> tuple[dict[str, Value], dict[str, str]]:
    metadata: dict[str, Value] = {}
    types: dict[str, str] = {}
    for index in range(n_keys):
        key = cursor.string(MAX_KEY_BYTES, f"metadata key {index}")
        if not key or key in metadata:
            cursor.fail(f"metadata key {index} is empty" if not key else f"metadata key {key!r} appears twice")
        metadata[key], types[key] = _read_value(cursor, key)
    return metadata, types


def _read_value(cursor: _Cursor, key: str) -> tuple[Value, str]:
    kind = cursor.unsigned(4, key)
    if kind == STRING:
        return cursor.string(MAX_STRING_BYTES, key), "str"
    if kind in SCALARS:
        return cursor.number(kind, key), SCALARS[kind][0]
    if kind != ARRAY:
        cursor.fail(f"{key} has the unknown value type {kind}")
    element = cursor.unsigned(4, key)
    count = cursor.unsigned(8, key)
    if element == STRING:
        return cursor.strings(count, key), "arr[str]"
    if element not in SCALARS:
        cursor.fail(f"{key} is an array of the unsupported type {element}")
    return cursor.numbers(element, count, key), f"arr[{SCALARS[element][0]}]"


def _alignment(path: Path, metadata: Mapping[str, Value], types: Mapping[str, str]) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if types.get("general.alignment", "u32") != "u32" or not isinstance(value, int):
        raise InputError(f"{path}: general.alignment is not a u32; {_MEND}")
    if value < 1 or value > MAX_ALIGNMENT or value & (value - 1):
        raise InputError(f"{path}: general.alignment {value} is not a power of two up to {MAX_ALIGNMENT}; {_MEND}")
    return value


def _read_tensors(cursor: _Cursor, n_tensors: int, alignment: int) -> dict[str, GgufTensor]:
    raw: dict[str, GgufTensor] = {}
    expected = 0
    for index in range(n_tensors):
        tensor = _read_tensor(cursor, index)
        if tensor.name in raw:
            cursor.fail(f"tensor {tensor.name!r} appears twice")
        if tensor.offset != expected:
            cursor.fail(f"tensor {tensor.name!r} is at data offset {tensor.offset}, expected {expected}")
        expected += _pad(tensor.nbytes, alignment)
        raw[tensor.name] = tensor
    start = _pad(cursor.at, alignment)
    for tensor in raw.values():
        if start + tensor.offset + tensor.nbytes > cursor.end:
            cursor.fail(f"the file ends inside the data of tensor {tensor.name!r}")
    return {
        t.name: GgufTensor(name=t.name, type=t.type, shape=t.shape, offset=start + t.offset, nbytes=t.nbytes)
        for t in raw.values()
    }


def _read_tensor(cursor: _Cursor, index: int) -> GgufTensor:
    name = cursor.string(MAX_NAME_BYTES, f"the name of tensor {index}")
    if not name:
        cursor.fail(f"tensor {index} has no name")
    what = f"tensor {name!r}"
    n_dims = cursor.unsigned(4, what)
    if n_dims > MAX_DIMENSIONS:
        cursor.fail(f"{what} has {n_dims} dimensions; {MAX_DIMENSIONS} is the most")
    dims = [cursor.unsigned(8, what) for _ in range(n_dims)]
    number = cursor.unsigned(4, what)
    offset = cursor.unsigned(8, what)
    if number not in TENSOR_TYPES:
        cursor.fail(f"{what} has the unknown type {number}")
    kind = TENSOR_TYPES[number]
    size = math.prod(dims)
    if size < 1 or size > _LARGEST:
        cursor.fail(f"{what} has the impossible shape {dims}")
    if (dims[0] if dims else 1) % kind.block:
        cursor.fail(
            f"{what} has rows of {dims[0] if dims else 1}, not a multiple of {kind.name}'s block of {kind.block}"
        )
    nbytes = size // kind.block * kind.block_bytes
    if nbytes > cursor.end or offset > cursor.end:
        cursor.fail(f"{what} claims {nbytes} bytes at data offset {offset}, beyond the file's {cursor.end}")
    return GgufTensor(name=name, type=kind.name, shape=tuple(reversed(dims)), offset=offset, nbytes=nbytes)


def _pad(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
