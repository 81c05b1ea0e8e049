"""Weights on huge pages: what a block of code allocates and fills, put on pages of 2 MB where Linux lets a process ask for it.

A decoding step reads every weight once, and with pages of 4 KB a good part of that is walking page tables, more so in a virtual
machine. Most systems give huge pages to those who ask (`/sys/kernel/mm/transparent_hugepage/enabled`: madvise); libraries that load
models do not. Elsewhere than on Linux, and where the system says never, nothing happens; contents and results never change.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from r1q.core.allocator import huge_page_size

_MAPS = Path("/proc/self/maps")
_ASK, _NOW = 14, 25  # MADV_HUGEPAGE and MADV_COLLAPSE (Linux 6.1) of <asm-generic/mman-common.h>
_FILLED = 15 / 16  # of its small pages: a huge page in place of a hole would be memory that nobody uses
_MAX_FAILURES = 64  # of huge pages that the system had not: then it has none to give

Range = tuple[int, int]


@contextmanager
def on_huge_pages() -> Iterator[None]:
    """Put memory that the block allocates on huge pages when it ends, as far as the system has any.

    Every large range of private memory that was not there before counts, whoever in this process allocated it. Costs the time of
    copying it once.
    """
    size = huge_page_size()
    before = _ranges() if size else []
    yield
    if size:
        _collapse(_without(_ranges(), before), size)


def _ranges() -> list[Range]:
    """Return the addresses [start, stop) of private memory that is no file's, in rising order."""
    try:
        lines = _MAPS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        address, access, _, _, inode, *name = line.split(maxsplit=5)
        if access == "rw-p" and inode == "0" and (not name or name[0] == "[heap]"):
            start, _, stop = address.partition("-")
            found.append((int(start, 16), int(stop, 16)))
    return found


def _without(ranges: Sequence[Range], taken: Sequence[Range]) -> list[Range]:
    """Return the parts of `ranges` that are in none of `taken`.

    >>> _without([(0, 10), (20, 30)], [(2, 4), (8, 22), (29, 40)])
    [(0, 2), (4, 8), (22, 29)]
    """
    left = []
    for start, stop in ranges:
        for from_, to in taken:
            if to > start and from_ < stop:
                if from_ > start:
                    left.append((start, from_))
                start = min(to, stop)
        if start < stop:
            left.append((start, stop))
    return left


def _collapse(ranges: Sequence[Range], size: int) -> None:
    """Make huge pages of the filled, aligned stretches of `size` bytes in `ranges`; stop where the system refuses."""
    library = ctypes.CDLL(None, use_errno=True)
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    library.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    present = np.empty(size // mmap.PAGESIZE, dtype=np.uint8)
    failures = 0
    for start, stop in ranges:
        first, last = -(-start // size) * size, stop // size * size
        if first >= last or library.madvise(first, last - first, _ASK):
            continue
        for at in range(first, last, size):
            if library.mincore(at, size, present.ctypes.data) or (present & 1).mean() < _FILLED:
                continue
            if library.madvise(at, size, _NOW):
                failures += 1
                if ctypes.get_errno() == errno.EINVAL or failures == _MAX_FAILURES:
                    return  # too old a kernel, which will do it in its own time; or none are left
