"""Safetensors files: every claim of a header is checked against the file before a weight is read; written in one stream.

The format (huggingface/safetensors, README): eight bytes little-endian header length N, N bytes of JSON
{name: {dtype, shape, data_offsets: [start, stop]}}, then the data; offsets count from the data's first byte, cover it whole,
without holes or overlap. `__metadata__` maps strings to strings.

Rows are read into fresh memory instead of being mapped: a mapped file counts as the process's own memory page by page, and
kills the process without a word when the file shrinks under it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from r1q.core.closing import Closing
from r1q.core.errors import InputError
from r1q.core.files import fill, replacing, writing

Array = NDArray[Any]
Chunk = bytes | bytearray | memoryview | Array
Shaped = tuple[str, str, tuple[int, ...]]
"""A tensor to be written: its name, its dtype as the file spells it, its shape."""
_SAMPLE_BYTES = 4096
_EXPECTED_BYTES = 1 << 19
MAX_HEADER_BYTES = 100_000_000
_MAX_AXES = 8
_MAX_SIZE = 1 << 62
_MAX_EMPTY = 1 << 48  # of the sides of an empty tensor that are not 0: numpy refuses what it could not address
_METADATA = "__metadata__"
_MEND = "the file is damaged or was not fully downloaded: fetch it again"

# numpy has no bfloat16 and no 8-bit floats: those come as their bits.
NUMPY_DTYPES: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {
        "BOOL": np.dtype("?"),
        "U8": np.dtype("u1"),
        "I8": np.dtype("i1"),
        "F8_E4M3": np.dtype("u1"),
        "F8_E5M2": np.dtype("u1"),
        "F8_E8M0": np.dtype("u1"),
        "U16": np.dtype("<u2"),
        "I16": np.dtype("<i2"),
        "F16": np.dtype("<f2"),
        "BF16": np.dtype("<u2"),
        "U32": np.dtype("<u4"),
        "I32": np.dtype("<i4"),
        "F32": np.dtype("<f4"),
        "U64": np.dtype("<u8"),
        "I64": np.dtype("<i8"),
        "F64": np.dtype("<f8"),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One tensor of a file: its dtype as the file spells it, its shape, and the bytes [start, stop) of the file it occupies."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Digest(Protocol):
    """A hash of `hashlib` in the making."""

    def update(self, data: memoryview, /) -> None:
        """Add bytes."""

    def hexdigest(self) -> str:
        """Return the hash of what was added so far."""


class SafetensorsFile(Closing):
    """An open safetensors file whose header has been checked. `tensors` is in the order of the data.

    Close it, use it as a context manager, or let it go: the file is closed with the object. Threads may share it.
    """

    def __init__(self, path: Path, file: FileIO, header: bytes, size: int) -> None:
        self.path = path
        self.header_sha256 = hashlib.sha256(header).hexdigest()
        self.metadata, self.tensors = _parse(path, header, size)
        self._file = file
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, file.close)

    @classmethod
    def open(cls, path: Path) -> SafetensorsFile:
        """Open `path` and check its whole header. Raises `InputError` that names the file, the tensor and the way out."""
        try:
            if path.exists() and not path.is_file():
                # Opening a pipe would wait for ever.
                raise InputError(f"cannot read {path}: not a regular file")
            file = FileIO(path, "r")
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror or error}") from error
        try:
            size = file.seek(0, 2)
            return cls(path, file, _read_header(path, file, size), size)
        except OSError as error:
            file.close()
            raise InputError(f"cannot read {path}: {error.strerror or error}") from error
        except BaseException:
            file.close()
            raise

    def read(self, name: str) -> Array:
        """Return the tensor `name` whole, in its stored dtype (see `NUMPY_DTYPES`)."""
        entry = self._entry(name)
        return self._read(name, entry, entry.start, entry.shape)

    def read_rows(self, name: str, start: int, stop: int) -> Array:
        """Return rows [start, stop) along the tensor's first axis, in its stored dtype."""
        entry = self._entry(name)
        if not entry.shape or not 0 <= start <= stop <= entry.shape[0]:
            raise ValueError(f"rows {start}:{stop} of {name}, which has the shape {entry.shape}")
        row_bytes = (entry.stop - entry.start) // max(entry.shape[0], 1)
        return self._read(name, entry, entry.start + start * row_bytes, (stop - start, *entry.shape[1:]))

    def read_flat_rows(self, name: str, start: int, stop: int) -> Array:
        """Return rows [start, stop) of the tensor with all axes but the last flattened into rows, in its stored dtype."""
        entry = self._entry(name)
        rows, columns = math.prod(entry.shape[:-1]), entry.shape[-1] if entry.shape else 0
        if not entry.shape or not 0 <= start <= stop <= rows:
            raise ValueError(f"rows {start}:{stop} of {name}, which has the shape {entry.shape}")
        row_bytes = (entry.stop - entry.start) // max(rows, 1)
        return self._read(name, entry, entry.start + start * row_bytes, (stop - start, columns))

    def expect(self, name: str, start: int, stop: int) -> None:
        """Have the system read rows as of `read_flat_rows` into its memory meanwhile; where it cannot be asked, nothing happens."""
        entry = self._entry(name)
        row_bytes = (entry.stop - entry.start) // max(math.prod(entry.shape[:-1]), 1)
        first, last = entry.start + start * row_bytes, min(entry.start + stop * row_bytes, entry.stop)
        if not hasattr(os, "posix_fadvise"):  # macOS, Windows
            return
        with contextlib.suppress(OSError):
            # Linux takes no more than about this much of one call.
            for place in range(first, last, _EXPECTED_BYTES):
                os.posix_fadvise(self._file.fileno(), place, min(_EXPECTED_BYTES, last - place), os.POSIX_FADV_WILLNEED)

    def sampled_sha256(self) -> str:
        """Return a sha256 of the header and of the first bytes of every tensor: tells checkpoints apart without reading them whole."""
        digest = hashlib.sha256(self.header_sha256.encode())
        with self._lock:
            for entry in self.tensors.values():
                self._file.seek(entry.start)
                digest.update(self._file.read(min(_SAMPLE_BYTES, entry.stop - entry.start)))
        return digest.hexdigest()

    def close(self) -> None:
        """Close the file; reading after this is an error."""
        self._finalizer()

    def __reduce__(self) -> tuple[Callable[[Path], SafetensorsFile], tuple[Path]]:
        """Let another process open the file for itself."""
        return SafetensorsFile.open, (self.path.absolute(),)

    def _entry(self, name: str) -> Entry:
        try:
            return self.tensors[name]
        except KeyError:
            raise InputError(f"{self.path} has no tensor named {name}") from None

    def _read(self, name: str, entry: Entry, offset: int, shape: tuple[int, ...]) -> Array:
        values = np.empty(shape, dtype=NUMPY_DTYPES[entry.dtype])
        with self._lock:
            whole = fill(self._file, offset, values.reshape(-1).view(np.uint8).data)
        if not whole:
            raise InputError(f"{self.path}: the data of {name} ends early; {_MEND}")
        return values


class SafetensorsWriter:
    """A safetensors file in writing, its data pushed piece by piece; `writing_safetensors` gives it."""

    def __init__(self, path: Path, file: BinaryIO, header: bytes, size: int, digest: Digest | None) -> None:
        self._path, self._file, self._size, self._left, self._digest = path, file, size, size, digest
        self._put(memoryview(header))

    def write(self, chunk: Chunk) -> None:
        """Append little-endian bytes. Raises `ValueError` for more than the header promises."""
        view = _bytes_of(chunk)
        self._left -= len(view)
        if self._left < 0:
            raise ValueError(f"{self._path}: more data than the {self._size} bytes that the header promises")
        self._put(view)

    def finish(self) -> None:
        """Raise `ValueError` where data is missing."""
        if self._left:
            raise ValueError(f"{self._path}: {self._left} bytes fewer than the {self._size} that the header promises")

    def _put(self, data: memoryview) -> None:
        with writing(self._path):
            self._file.write(data)
        if self._digest is not None:
            self._digest.update(data)


@contextlib.contextmanager
def writing_safetensors(
    path: Path, entries: Sequence[Shaped], metadata: Mapping[str, str] | None = None, digest: Digest | None = None
) -> Iterator[SafetensorsWriter]:
    """Give a writer of a safetensors file that becomes `path` when the block ends without an error and all data is there.

    `entries` are (name, dtype, shape) in the order of the data. The header, padded to 8 bytes, comes first; as the format allows no
    holes, put wide dtypes before narrow ones where others shall map the file. `digest` gets every byte of the file.
    Raises `ValueError` when data and entries disagree, `ResourceError` for a full disk; errors of the enclosed code pass.
    """
    header, size = _header(entries, metadata or {})
    with replacing(path) as temporary:
        with writing(path):
            file = open(temporary, "wb")  # noqa: SIM115  # closed below: what is still to be written may not fit the disk
        try:
            writer = SafetensorsWriter(path, file, header, size, digest)
            yield writer
            writer.finish()
        finally:
            with writing(path):
                file.close()


def write_safetensors(
    path: Path,
    entries: Sequence[Shaped],
    chunks: Iterable[Chunk],
    metadata: Mapping[str, str] | None = None,
    digest: Digest | None = None,
) -> None:
    """Write a safetensors file atomically, its data in `chunks` as they come, cut anywhere; see `writing_safetensors`."""
    with writing_safetensors(path, entries, metadata, digest) as writer:
        for chunk in chunks:
            writer.write(chunk)


def _bytes_of(chunk: Chunk) -> memoryview:
    if isinstance(chunk, np.ndarray):
        return np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data
    return memoryview(chunk).cast("B")


def _header(entries: Sequence[Shaped], metadata: Mapping[str, str]) -> tuple[bytes, int]:
    """Return what stands before the data, and the data's size."""
    table: dict[str, object] = {_METADATA: dict(metadata)} if metadata else {}
    offset = 0
    for name, dtype, shape in entries:
        if name in table or name == _METADATA:
            raise ValueError(f"two tensors named {name}")
        stop = offset + math.prod(shape) * NUMPY_DTYPES[dtype].itemsize
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offset


def _read_header(path: Path, file: FileIO, size: int) -> bytes:
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8:
        raise InputError(f"{path} has only {size} bytes, too few for a safetensors file; {_MEND}")
    if length > MAX_HEADER_BYTES:
        raise InputError(
            f"{path}: a header of {length} bytes (the format's limit is {MAX_HEADER_BYTES}); not a safetensors file"
        )
    if length > size - 8:
        raise InputError(f"{path}: the header claims {length} bytes of a file of {size}; {_MEND}")
    header = b""
    while len(header) < length:
        piece = file.read(length - len(header))
        if not piece:
            raise InputError(f"{path}: the header ends early; {_MEND}")
        header += piece
    return header


def _parse(path: Path, header: bytes, size: int) -> tuple[Mapping[str, str], Mapping[str, Entry]]:
    table = _json_object(path, header)
    metadata = table.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError(f"{path}: {_METADATA} does not map strings to strings; {_MEND}")
    data_start = 8 + len(header)
    entries = [(name, _entry(path, name, facts, data_start, size)) for name, facts in table.items()]
    entries.sort(key=lambda item: (item[1].start, item[1].stop))
    expected = data_start
    for name, entry in entries:
        if entry.start != expected:
            defect = "overlaps the tensor before it" if entry.start < expected else "leaves a hole before it"
            raise InputError(f"{path}: tensor {name} {defect}; {_MEND}")
        expected = entry.stop
    if expected != size:
        raise InputError(f"{path}: {size - expected} bytes after the last tensor belong to none; {_MEND}")
    return MappingProxyType(metadata), MappingProxyType(dict(entries))


def _json_object(path: Path, header: bytes) -> dict[str, Any]:
    if header[:1] != b"{":
        raise InputError(f"{path}: the header is not a JSON object; not a safetensors file, or {_MEND}")
    try:
        table: dict[str, Any] = json.loads(header.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except _DuplicateError as error:
        raise InputError(f"{path}: the name {error} occurs twice in the header; {_MEND}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: the header is not valid JSON ({error}); {_MEND}") from error
    return table


class _DuplicateError(Exception):
    """A JSON object names a key twice."""


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = Counter(name for name, _ in pairs)
        raise _DuplicateError(repr(names.most_common(1)[0][0]))
    return table


def _entry(path: Path, name: str, facts: object, data_start: int, size: int) -> Entry:
    """Return the checked entry of one tensor; Python's integers cannot overflow, so products need no further care."""
    if not isinstance(facts, dict) or set(facts) != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"{path}: tensor {name} needs exactly dtype, shape and data_offsets; {_MEND}")
    dtype, shape, offsets = facts["dtype"], facts["shape"], facts["data_offsets"]
    if not isinstance(dtype, str) or dtype not in NUMPY_DTYPES:
        known = ", ".join(NUMPY_DTYPES)
        raise InputError(f"{path}: tensor {name} has the unknown dtype {dtype!r}; convert it to one of {known}")
    if not _are_sizes(shape):
        raise InputError(
            f"{path}: tensor {name} has the shape {shape!r}, not a short list of non-negative integers; {_MEND}"
        )
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InputError(f"{path}: tensor {name} has the offsets {offsets!r}, not an ordered pair; {_MEND}")
    start, stop = (data_start + offset for offset in offsets)
    if stop > size:
        raise InputError(f"{path}: tensor {name} ends at byte {stop} of a file of {size}; {_MEND}")
    wanted = math.prod(shape) * NUMPY_DTYPES[dtype].itemsize
    if stop - start != wanted:
        raise InputError(
            f"{path}: tensor {name}, {dtype} {shape}, needs {wanted} bytes and has {stop - start}; {_MEND}"
        )
    if not wanted and math.prod(side for side in shape if side) > _MAX_EMPTY:
        raise InputError(f"{path}: tensor {name} has the shape {shape!r}, empty but too wide for an array; {_MEND}")
    return Entry(dtype=dtype, shape=tuple(shape), start=start, stop=stop)


def _are_sizes(values: object) -> bool:
    return (
        isinstance(values, list)
        and len(values) <= _MAX_AXES
        and all(type(value) is int and 0 <= value <= _MAX_SIZE for value in values)  # true is an int to isinstance
    )
