"""Importance matrices written as llama-imatrix writes them: the diagonal of our second moments, for llama.cpp's own tools.

For each weight, in the order of their names, the float32 tensors `<name>.in_sum2` [columns], sums of squared activations, and
`<name>.counts` [1], the tokens they were summed over; for experts [experts, columns] and [experts, 1]. Equal numbers give equal
bytes; `core/imatrix_file.py` is the reader.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from r1q.core.errors import InputError
from r1q.core.files import atomic_write
from r1q.core.gguf_file import MAX_NAME_BYTES
from r1q.core.gguf_types import ARRAY, DEFAULT_ALIGNMENT, MAGIC, STRING

_VERSION, _U32, _F32 = 3, 4, 0
Counts = int | Sequence[int]


def write_imatrix(
    path: Path,
    sums: Mapping[str, NDArray[Any]],
    counts: Mapping[str, Counts],
    *,
    datasets: Sequence[str],
    chunks: int,
    chunk_size: int,
) -> None:
    """Write `path`, atomically: sums of squares and token counts, both by GGUF tensor name (`blk.0.attn_q.weight`).

    Sums are [columns] with one count, or [experts, columns] with a count for each expert; an expert may have seen no token.

    `datasets` are the names of the texts, `chunks` the windows that went in, `chunk_size` their length in tokens. Raises
    `InputError` naming a tensor whose sums are not finite numbers of zero and more, or too large for float32, and the errors of
    `core.files` for a disk that is full or not writable.
    """
    if sums.keys() != counts.keys():
        raise ValueError(f"sums of {sorted(sums.keys() ^ counts.keys())} without counts, or the other way round")
    tensors = list(_tensors(sums, counts))
    with atomic_write(path) as file:
        file.write(_header(tensors, datasets=datasets, chunks=chunks, chunk_size=chunk_size))
        file.write(bytes(-file.tell() % DEFAULT_ALIGNMENT))
        for _, values in tensors:
            file.write(values.tobytes())
            file.write(bytes(-values.nbytes % DEFAULT_ALIGNMENT))


def _tensors(
    sums: Mapping[str, NDArray[Any]], counts: Mapping[str, Counts]
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    for name in sorted(sums):
        count = np.array(counts[name], "<f4").reshape(-1)
        if count.max(initial=0) < 1 or (count < 0).any():
            raise ValueError(f"{name} was summed over {counts[name]} tokens")
        with np.errstate(over="ignore"):
            stored = sums[name].astype("<f4").reshape(len(count), -1)
        if not (np.isfinite(stored).all() and (stored >= 0).all()):
            raise InputError(
                f"the sums of squares of {name} are negative, not finite or too large; nothing was written"
            )
        one = len(count) == 1
        yield f"{name}.in_sum2", stored[0] if one else stored
        yield f"{name}.counts", count if one else count[:, None]


def _header(
    tensors: Sequence[tuple[str, NDArray[np.float32]]], *, datasets: Sequence[str], chunks: int, chunk_size: int
) -> bytes:
    listed = struct.pack("<IIQ", ARRAY, STRING, len(datasets)) + b"".join(_string(name) for name in datasets)
    entries = {
        "general.type": struct.pack("<I", STRING) + _string("imatrix"),
        "imatrix.datasets": listed,
        "imatrix.chunk_count": struct.pack("<II", _U32, chunks),
        "imatrix.chunk_size": struct.pack("<II", _U32, chunk_size),
    }
    header = MAGIC + struct.pack("<IQQ", _VERSION, len(tensors), len(entries))
    header += b"".join(_string(key) + value for key, value in entries.items())
    offset = 0
    for name, values in tensors:
        if len(name.encode()) > MAX_NAME_BYTES:
            raise ValueError(f"{name} has more than {MAX_NAME_BYTES} bytes")
        sides = values.shape[::-1]  # the fastest first
        header += _string(name) + struct.pack(f"<I{len(sides)}QIQ", len(sides), *sides, _F32, offset)
        offset += values.nbytes + -values.nbytes % DEFAULT_ALIGNMENT
    return header


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
