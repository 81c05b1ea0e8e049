"""Importance matrices written as llama-imatrix writes them: the diagonal of our second moments, for llama.cpp's own tools.

For each weight, in the order of their names, the float32 tensors `<name>.in_sum2` [columns], sums of squared activations, and
`<name>.counts` [1], the tokens they were summed over. Equal numbers give equal bytes; `core/imatrix_file.py` is the reader.
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


def write_imatrix(
    path: Path,
    sums: Mapping[str, NDArray[Any]],
    counts: Mapping[str, int],
    *,
    datasets: Sequence[str],
    chunks: int,
    chunk_size: int,
) -> None:
    """Write `path`, atomically: sums of squares [columns] and token counts, both by GGUF tensor name (`blk.0.attn_q.weight`).

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


def _tensors(sums: Mapping[str, NDArray[Any]], counts: Mapping[str, int]) -> Iterator[tuple[str, NDArray[np.float32]]]:
    for name in sorted(sums):
        if counts[name] < 1:
            raise ValueError(f"{name} was summed over {counts[name]} tokens")
        with np.errstate(over="ignore"):
            stored = sums[name].astype("<f4").reshape(-1)
        if not (np.isfinite(stored).all() and (stored >= 0).all()):
            raise InputError(
                f"the sums of squares of {name} are negative, not finite or too large; nothing was written"
            )
        yield f"{name}.in_sum2", stored
        yield f"{name}.counts", np.array([counts[name]], "<f4")


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
        header += _string(name) + struct.pack("<IQIQ", 1, len(values), _F32, offset)
        offset += values.nbytes + -values.nbytes % DEFAULT_ALIGNMENT
    return header


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
