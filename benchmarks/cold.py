"""Cold files: ask the system to forget what it holds of a file, so that the next load reads the disk, and see whether it did."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

WARM = 0.02  # of the pages still in memory: more than that, and a load is not cold


def forget(paths: Iterable[Path]) -> str:
    """Drop the cached pages of `paths`; return why a load after this is not cold, empty where it is."""
    if not hasattr(os, "posix_fadvise"):
        return "this system has no way to drop a file from its cache"
    held = total = 0
    for path in paths:
        with path.open("rb") as file:
            os.fdatasync(file.fileno())  # what is not written yet is not dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            size = path.stat().st_size
            if size:
                kept = resident_pages(file.fileno(), size)
                if kept is None:
                    return "this system does not say what it holds of a file"
                held, total = held + kept, total + -(-size // mmap.PAGESIZE)
    if held > WARM * total:
        return f"{held / total:.0%} of it stayed in memory: another program has it open, or it lies on a disk in memory"
    return ""


def resident_pages(descriptor: int, size: int) -> int | None:
    """Return how many pages of a file of `size` > 0 bytes are in memory, None where the system does not say."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        mincore = libc.mincore
    except (OSError, AttributeError):
        return None
    pages = -(-size // mmap.PAGESIZE)
    present = (ctypes.c_ubyte * pages)()
    # A private map that may be written to has an address that ctypes can take; nothing is written.
    with mmap.mmap(descriptor, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as view:
        anchor = ctypes.c_char.from_buffer(view)
        code = mincore(ctypes.c_void_p(ctypes.addressof(anchor)), ctypes.c_size_t(size), present)
        del anchor
    return None if code else sum(page & 1 for page in present)
