"""Freed memory goes back to the system at once: a setting of glibc's allocator, for processes that are ours."""

from __future__ import annotations

import ctypes

_MALLOC_THRESHOLD = (-3, 1 << 20)


def return_freed_memory() -> None:
    """Make this process give large arrays back to the system when they are freed, instead of keeping room for more.

    glibc keeps arrays of up to 32 MB for later, in pieces that fit no other; a fixed bound costs no time that was seen, and 15 % less
    memory. For the process of a command, and its workers: a program that calls the library decides for itself.
    """
    try:
        ctypes.CDLL(None).mallopt(*_MALLOC_THRESHOLD)
    except (OSError, AttributeError, TypeError):
        return  # not glibc
