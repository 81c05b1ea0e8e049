"""Parts: what is coded of a block in work, on disk slab of rows by slab, until the block's file is put together of them.

A part is written by whoever coded it, in one rename, and holds everything about it: so a block's codes are never in memory together,
and a run that was killed inside a block codes again only what has no part yet. Parts are bound to their job by the folder they are in.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from r1q.core.errors import InputError
from r1q.core.files import remove_leftovers
from r1q.core.recipe import PlannedTensor
from r1q.core.safetensors_file import Array, SafetensorsFile, write_safetensors
from r1q.quantize.run import PARTS_STEM
from r1q.quantize.storing import Slab

_ROWS, _SQUARES = "rows", "squares"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part that is on disk and whole. `pieces` are its rows, piece by piece: how many, and the sums of squares of a `Slab`.

    `events` is what was done otherwise than asked in its stage; `squares` [inner] the sum of squares of what an expert's down
    projection read, empty in others.
    """

    path: Path
    pieces: tuple[tuple[int, float, float], ...]
    events: tuple[str, ...]
    squares: NDArray[np.float64]

    def slabs(self) -> Iterator[Slab]:
        """Yield the rows, a piece at a time."""
        start = 0
        with SafetensorsFile.open(self.path) as file:
            for rows, squared_error, squared_weight in self.pieces:
                stored = file.read_rows(_ROWS, start, start + rows)
                yield Slab(stored=stored, squared_error=squared_error, squared_weight=squared_weight)
                start += rows


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of the block in work, in a folder of its own."""

    folder: Path

    @classmethod
    def of(cls, checkpoint: Path, layer: int) -> Parts:
        """Return the parts of block `layer` of a checkpoint folder."""
        return cls(checkpoint / f"{PARTS_STEM}{layer:05d}")

    def write(
        self,
        planned: PlannedTensor,
        rows: slice,
        slabs: Sequence[Slab],
        events: Sequence[str],
        squares: NDArray[np.float64] | None = None,
    ) -> None:
        """Write what `rows` of a tensor were coded to, atomically. Raises `ResourceError` for a full disk."""
        extra = np.zeros(0) if squares is None else squares
        record = {
            "tensor": planned.spec.name,
            "scheme": str(planned.scheme),
            "rows": [rows.start, rows.stop],
            "pieces": [[len(slab.stored), slab.squared_error.hex(), slab.squared_weight.hex()] for slab in slabs],
            "events": list(events),
        }
        data: list[Array] = [extra, *(slab.stored for slab in slabs)]
        entries = [
            (_SQUARES, "F64", extra.shape),
            (_ROWS, "U8", (rows.stop - rows.start, slabs[0].stored.shape[1])),
        ]
        text = json.dumps(record, sort_keys=True)
        metadata = {"format": "r1q part", "record": text, "sha256": _hash(text, data)}
        write_safetensors(self._path(planned, rows), entries, data, metadata)

    def find(self, planned: PlannedTensor, rows: slice) -> Part | None:
        """Return the part of these rows of a tensor, None where there is none, or none that is whole."""
        path = self._path(planned, rows)
        if not path.is_file():
            return None
        try:
            with SafetensorsFile.open(path) as file:
                return _read(file, planned, rows)
        except (InputError, KeyError, TypeError, ValueError, RecursionError):
            return None  # it is made again

    def first(self, planned: PlannedTensor, rows: Sequence[slice]) -> Part:
        """Return the first part of a tensor that has just been written. Raises `InputError` where it is not to be read again."""
        part = self.find(planned, rows[0])
        if part is None:
            raise InputError(
                f"{self._path(planned, rows[0])} was written a moment ago and is gone or damaged: is the disk sound? run again"
            )
        return part

    def slabs(self, planned: PlannedTensor, rows: Sequence[slice]) -> Iterator[Slab]:
        """Yield a tensor that is in parts of these `rows`, a piece at a time. Raises `InputError` as `first` does."""
        for here in rows:
            yield from self.first(planned, [here]).slabs()

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def remove_leftovers(self) -> None:
        """Remove temporary files of a run that was killed."""
        remove_leftovers(self.folder)

    def _path(self, planned: PlannedTensor, rows: slice) -> Path:
        return self.folder / f"{planned.spec.key}.{rows.start:08d}.safetensors"


def _read(file: SafetensorsFile, planned: PlannedTensor, rows: slice) -> Part | None:
    text = file.metadata["record"]
    record = json.loads(text)
    same = (record["tensor"], record["scheme"], record["rows"]) == (
        planned.spec.name,
        str(planned.scheme),
        [rows.start, rows.stop],
    )
    pieces = tuple((int(count), float.fromhex(e), float.fromhex(w)) for count, e, w in record["pieces"])
    shape = (rows.stop - rows.start, planned.scheme.row_bytes(planned.spec.columns))
    if not same or file.tensors[_ROWS].shape != shape or sum(count for count, _, _ in pieces) != shape[0]:
        return None
    squares = file.read(_SQUARES)
    if _hash(text, _data(file, squares, pieces)) != file.metadata["sha256"]:
        return None
    return Part(path=file.path, pieces=pieces, events=tuple(map(str, record["events"])), squares=squares)


def _data(file: SafetensorsFile, squares: Array, pieces: Sequence[tuple[int, float, float]]) -> Iterator[Array]:
    yield squares
    start = 0
    for rows, _, _ in pieces:
        yield file.read_rows(_ROWS, start, start + rows)
        start += rows


def _hash(text: str, data: Iterable[Array]) -> str:
    digest = hashlib.sha256(text.encode())
    for array in data:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
