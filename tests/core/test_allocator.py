"""A process starts anew on huge pages once, as the process it was, and not where that means nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import r1q
from r1q.core import allocator
from r1q.core.allocator import huge_page_size, restart_on_huge_pages

SAYS = (
    "import os, sys; from r1q.core.allocator import restart_on_huge_pages; print(os.getpid(), flush=True); "
    "restart_on_huge_pages(); print(os.environ.get('GLIBC_TUNABLES'), sys.argv[1:])"
)
NEEDED = pytest.mark.skipif(not huge_page_size() or not allocator._is_glibc(), reason="no huge pages here")


def said(tunables: str | None) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    environment |= {"PYTHONPATH": str(Path(r1q.__file__).resolve().parents[1])}
    environment |= {} if tunables is None else {"GLIBC_TUNABLES": tunables}
    command = [sys.executable, "-P", "-c", SAYS, "two words", "-x"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()


@NEEDED
@pytest.mark.parametrize("tunables", [None, "glibc.malloc.arena_max=2"])
def test_it_starts_anew_once_with_the_same_number_and_arguments(tunables: str | None) -> None:
    first, again, last = said(tunables)
    assert first == again
    wanted = ":".join(filter(None, [tunables, "glibc.malloc.hugetlb=1"]))
    assert last == f"{wanted} ['two words', '-x']"


def test_a_setting_of_the_users_own_stays() -> None:
    assert said("glibc.malloc.hugetlb=0")[1:] == ["glibc.malloc.hugetlb=0 ['two words', '-x']"]


@pytest.mark.parametrize("lacking", ["pages", "glibc", "leave"])
def test_where_it_means_nothing_or_fails_the_process_goes_on(
    lacking: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tried: list[str] = []

    def refuse(path: str, _: list[str]) -> None:
        tried.append(path)
        raise OSError

    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(os, "execv", refuse)
    (tmp_path / "enabled").write_text(f"always {'madvise [never]' if lacking == 'pages' else '[madvise] never'}\n")
    (tmp_path / "hpage_pmd_size").write_text("2097152\n")
    monkeypatch.setattr(allocator, "_HUGE_PAGES", tmp_path)
    monkeypatch.setattr(allocator, "_is_glibc", lambda: lacking != "glibc")
    restart_on_huge_pages()
    assert tried == ([sys.executable] if lacking == "leave" else [])
