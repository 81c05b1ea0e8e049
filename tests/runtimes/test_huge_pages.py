"""Huge pages: what a block fills gets them, what it leaves empty stays empty, and contents never change."""

from __future__ import annotations

import ctypes
import mmap
import random
import re
from pathlib import Path

import pytest

from r1q.core import allocator
from r1q.core.allocator import huge_page_size
from r1q.runtimes import huge_pages
from r1q.runtimes.huge_pages import on_huge_pages

SMAPS = Path("/proc/self/smaps")
RELEASE = Path("/proc/sys/kernel/osrelease")


def test_parts_of_ranges_that_were_there_before_are_left_out() -> None:
    generator = random.Random(3)
    for _ in range(200):
        cuts = [sorted(generator.sample(range(40), 6)) for _ in range(2)]
        ranges, taken = ([(c[i], c[i + 1]) for i in (0, 2, 4)] for c in cuts)
        wanted = {x for a, b in ranges for x in range(a, b)} - {x for a, b in taken for x in range(a, b)}
        found = [x for a, b in huge_pages._without(ranges, taken) for x in range(a, b)]
        assert set(found) == wanted
        assert len(found) == len(wanted)


def private_memory(size: int) -> tuple[mmap.mmap, int]:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return memory, ctypes.addressof(ctypes.c_char.from_buffer(memory))


def kilobytes(what: str, start: int, stop: int) -> int:
    """Return what /proc/self/smaps counts under `what` in the mappings that meet [start, stop)."""
    total, inside = 0, False
    for line in SMAPS.read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) < stop and int(bounds[2], 16) > start
        elif inside and line.startswith(f"{what}:"):
            total += int(line.split()[1])
    return total


@pytest.mark.skipif(not SMAPS.exists(), reason="Linux alone has these")
def test_filled_memory_gets_huge_pages_and_empty_memory_nothing() -> None:
    size = huge_page_size()
    numbers = [int(part) for part in re.findall(r"\d+", RELEASE.read_text())[:2]]
    if not size or numbers < [6, 1]:
        pytest.skip("this system gives no huge pages at once")
    with on_huge_pages():
        filled, at = private_memory(8 * size)
        for place in range(0, len(filled), mmap.PAGESIZE):
            filled[place : place + 8] = place.to_bytes(8, "little")
        before = kilobytes("Rss", 0, 1 << 64)
        empty, _ = private_memory(8 * size)
    assert kilobytes("AnonHugePages", at, at + 8 * size) >= 4 * size >> 10
    assert kilobytes("Rss", 0, 1 << 64) < before + (size >> 10)  # not for the hole
    for place in range(0, len(filled), mmap.PAGESIZE):
        assert int.from_bytes(filled[place : place + 8], "little") == place
    assert empty[0] == 0


def test_a_system_that_never_gives_any_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "_HUGE_PAGES", tmp_path)
    assert huge_page_size() == 0
    (tmp_path / "enabled").write_text("always madvise [never]\n")
    (tmp_path / "hpage_pmd_size").write_text("2097152\n")
    assert huge_page_size() == 0
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    assert huge_page_size() == 1 << 21
    monkeypatch.setattr(huge_pages, "_MAPS", tmp_path / "none")
    with on_huge_pages():
        pass
