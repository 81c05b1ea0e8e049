"""What glibc's allocator does with large arrays: freed ones go back to the system, new ones come on huge pages."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_MALLOC_THRESHOLD = (-3, 1 << 22)
_TUNABLES, _SETTING = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")


def return_freed_memory() -> None:
    """Make this process give large arrays back to the system when they are freed, instead of keeping room for more.

    glibc keeps arrays of up to 32 MB for later, in pieces that fit no other: 15 % more memory. The price is that arrays of more than
    4 MB come fresh from the system each time (with a bound of 1 MB that was a third of a run's processor time): see
    `restart_on_huge_pages`, and what is done to all weights is done in smaller pieces (`quantize/storing.py`). For the process of a
    command, and its workers: a program that calls the library decides for itself.
    """
    _tell("mallopt", *_MALLOC_THRESHOLD)


def trim_freed_memory() -> None:
    """Give the system back what has been freed: 15 MB behind a tokenizer of 3.5 MB, before weights are loaded."""
    _tell("malloc_trim", 0)


def huge_page_size() -> int:
    """Return the size of a huge page in bytes, 0 where a process cannot ask for any."""
    try:
        if "[never]" in (_HUGE_PAGES / "enabled").read_text(encoding="ascii"):
            return 0
        size = int((_HUGE_PAGES / "hpage_pmd_size").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0
    return size if size > 0 and size & (size - 1) == 0 else 0


def restart_on_huge_pages() -> None:
    """Start this process anew, once, with the same number and arguments, so that large arrays come on huge pages.

    glibc (2.35 and later) asks for them where its setting `glibc.malloc.hugetlb` is 1, which it reads before any of our code runs.
    Where the setting is there already, or means nothing, nothing happens.
    """
    given = os.environ.get(_TUNABLES, "")
    if _SETTING in given or not huge_page_size() or not _is_glibc():
        return
    os.environ[_TUNABLES] = ":".join(filter(None, [given, f"{_SETTING}=1"]))
    try:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    except OSError:
        return  # slower, then


def _is_glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, ValueError, OSError):
        return False


def _tell(function: str, *values: int) -> None:
    import ctypes  # the command line imports this module at every start

    try:
        getattr(ctypes.CDLL(None), function)(*values)
    except (OSError, AttributeError, TypeError):
        return  # not glibc
