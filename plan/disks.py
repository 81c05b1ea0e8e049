"""How fast the disks of a run are, and how long they are at it."""

from __future__ import annotations

import math
import os
import random
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from r1q.core.recipe import PlannedTensor
from r1q.core.safetensors_file import NUMPY_DTYPES

_PLACES, _READ, _TIMES, _WRITTEN = 16, 1 << 21, 5, 1 << 23


@dataclass(frozen=True, slots=True, kw_only=True)
class Disks:
    """Bytes a second read from the disk that holds the model, and written for good to the one that gets the output."""

    read: float = math.inf
    written: float = math.inf

    def reading(self, tensors: Sequence[PlannedTensor]) -> float:
        """Return the seconds that weights of blocks take to be read, once; a run computes meanwhile."""
        size = sum(
            one.spec.size * NUMPY_DTYPES[one.spec.dtype].itemsize for one in tensors if one.spec.layer is not None
        )
        return size / self.read

    def writing(self, tensors: Sequence[PlannedTensor], states: int) -> float:
        """Return the seconds that blocks take to be written, in parts and as files, and `states` bytes of hidden states once."""
        size = sum(t.scheme.row_bytes(t.spec.columns) * t.spec.rows for t in tensors if t.spec.layer is not None)
        return (2 * size + states) / self.written


def probe_disks(model: Path, output: Path) -> Disks:
    """Measure with some megabytes from all over the model's files, and with a nameless file where `output` will be.

    What cannot be measured, as where nothing may be written, takes no time.
    """
    read = written = math.inf
    with suppress(OSError, AttributeError, IndexError, ZeroDivisionError):  # macOS and Windows have no posix_fadvise
        read = _read_rate([path for path in model.glob("*.safetensors") if path.stat().st_size >= _READ])
    place = next(parent for parent in (output.absolute(), *output.absolute().parents) if parent.is_dir())
    with suppress(OSError), tempfile.TemporaryFile(dir=place, buffering=0) as file:
        noise, taken = random.randbytes(_WRITTEN), []
        for _ in range(_TIMES):
            began = time.perf_counter()
            file.write(noise)
            os.fsync(file.fileno())
            taken.append(time.perf_counter() - began)
        written = _WRITTEN / median(taken)
    return Disks(read=read, written=written)


def _read_rate(files: Sequence[Path]) -> float:
    """Return bytes a second at places drawn anew each time, since those that were just read are in somebody's memory.

    The median of them: where another program flushes its files meanwhile, a place may take a hundred times as long.
    """
    taken = []
    for _ in range(_PLACES):
        path = random.choice(files)
        with path.open("rb", buffering=0) as file:
            start = random.randrange(path.stat().st_size - _READ + 1)
            os.posix_fadvise(file.fileno(), start, _READ, os.POSIX_FADV_DONTNEED)
            file.seek(start)
            began = time.perf_counter()
            file.read(_READ)
            taken.append(time.perf_counter() - began)
    return _READ / median(taken)
