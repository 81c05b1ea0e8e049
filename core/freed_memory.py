"""Freed memory goes back to the system, which glibc's allocator keeps: from now on, or what is free by now."""

from __future__ import annotations

import ctypes

_MALLOC_THRESHOLD = (-3, 1 << 20)


def return_freed_memory() -> None:
    """Make this process give large arrays back to the system when they are freed, instead of keeping room for more.

    glibc keeps arrays of up to 32 MB for later, in pieces that fit no other: 15 % more memory. The price is that larger arrays than a
    megabyte come fresh from the system, page by page: what is done to all weights is done in smaller pieces (`quantize/storing.py`).
    For the process of a command, and its workers: a program that calls the library decides for itself.
    """
    _tell("mallopt", *_MALLOC_THRESHOLD)


def trim_freed_memory() -> None:
    """Give the system back what has been freed: 15 MB behind a tokenizer of 3.5 MB, before weights are loaded."""
    _tell("malloc_trim", 0)


def _tell(function: str, *values: int) -> None:
    try:
        getattr(ctypes.CDLL(None), function)(*values)
    except (OSError, AttributeError, TypeError):
        return  # not glibc
