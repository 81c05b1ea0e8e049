"""How fast the disks of a run are, and what they add to its time."""

from __future__ import annotations

import math
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from r1q.core.recipe import PlannedTensor
from r1q.core.safetensors_file import NUMPY_DTYPES

_PLACES, _READ, _TIMES, _WRITTEN = 16, 1 << 21, 5, 1 << 23
_REREAD = 2  # a block's parts: for the forward pass, and for its file


@dataclass(frozen=True, slots=True, kw_only=True)
class Disks:
    """Bytes a second read from the disk that holds the model, and written for good to the one that gets the output."""

    read: float = math.inf
    written: float = math.inf

    def seconds(self, tensors: Sequence[PlannedTensor], room: int) -> float:
        """Return what they add to a calibrated run: weights are read once, and written twice, in parts and as a block's file.

        Parts are read again out of the system's memory, or, where a block's are more than `room` bytes, from the disk.
        """
        read, blocks = 0, Counter[int]()
        for tensor in tensors:
            if tensor.spec.layer is not None:
                read += tensor.spec.size * NUMPY_DTYPES[tensor.spec.dtype].itemsize
                blocks[tensor.spec.layer] += tensor.scheme.row_bytes(tensor.spec.columns) * tensor.spec.rows
        again = _REREAD * sum(size for size in blocks.values() if size > room)
        return (read + again) / self.read + 2 * blocks.total() / self.written


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
