"""Ceiling: no more than so many bytes of memory for one child, by its control group where we may make one, else by watching it.

A control group counts what a phone would count, the pages of a mapped file among them, and the kernel holds it to the byte. Watching
looks at the resident memory some times a second: a peak between two looks is missed, so the result says which of the two it was.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")
LOOK = 0.02  # seconds between two looks at a watched child


class Fence:
    """One child's ceiling: `how` it is held; `passed` says whether the child went over it. `close` after its end."""

    def __init__(self, pid: int, limit: int, *, root: Path = CGROUPS, proc: Path = Path("/proc")) -> None:
        self.limit = limit
        self._passed = threading.Event()
        self._ended = threading.Event()
        self._group = _enclose(pid, limit, root, proc)
        self.how = "held by its control group" if self._group else f"watched {1 / LOOK:.0f} times a second"
        if self._group is None:
            threading.Thread(target=self._watch, args=(pid,), daemon=True).start()

    @property
    def passed(self) -> bool:
        """Whether the child was ended for going over the ceiling."""
        return self._passed.is_set() or (self._group is not None and _killed(self._group))

    def close(self) -> None:
        """Stop watching, or take the control group away."""
        self._ended.set()
        if self._group is not None:
            for _ in range(50):
                # The kernel lets go of a group a moment after its last process is gone.
                with contextlib.suppress(OSError):
                    self._group.rmdir()
                    return
                time.sleep(LOOK)

    def _watch(self, pid: int) -> None:
        try:
            process = psutil.Process(pid)
            while not self._ended.wait(LOOK):
                if process.memory_info().rss > self.limit:
                    self._passed.set()
                    process.kill()
                    return
        except psutil.Error:
            return  # it ended by itself


def _enclose(pid: int, limit: int, root: Path, proc: Path) -> Path | None:
    """Put the process into a control group of its own below this one; return the group, None where that is not allowed."""
    for parent, names in _parents(root, proc):
        group = parent / f"r1q-{os.getpid()}-{pid}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            _write(group, names[0], limit)
            for name in names[1:]:
                with contextlib.suppress(OSError):  # without swap accounting there is no such file
                    _write(group, name, 0 if name.startswith("memory.swap") else limit)
            (group / "cgroup.procs").write_text(str(pid))
            return group
        except OSError:
            with contextlib.suppress(OSError):
                group.rmdir()
    return None


def _write(group: Path, name: str, value: int) -> None:
    # Opened for writing and not made: a file that appears where no such control is would hold nothing.
    with (group / name).open("r+") as file:
        file.write(str(value))


def _parents(root: Path, proc: Path) -> list[tuple[Path, tuple[str, ...]]]:
    """Return the groups below which one could be made, ours first, and which files set a limit there: versions 2 and 1."""
    found = []
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        for own in dict.fromkeys((group, "/")):
            relative = own.lstrip("/")
            if number == "0" and not controllers:
                found += [(top / relative, ("memory.max", "memory.swap.max")) for top in (root, root / "unified")]
            elif "memory" in controllers.split(","):
                names = ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
                found.append((root / "memory" / relative, names))
    return [(folder, names) for folder, names in found if folder.is_dir()]


def _killed(group: Path) -> bool:
    for name in ("memory.events", "memory.oom_control"):
        with contextlib.suppress(OSError):
            for line in (group / name).read_text().splitlines():
                key, _, count = line.partition(" ")
                if key == "oom_kill" and count.strip() not in ("", "0"):
                    return True
    return False
