"""How many threads are right here: physical cores, within this process's affinity and its control group's quota."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import psutil


def physical_cores(sysfs: Path = Path("/sys"), proc: Path = Path("/proc")) -> int:
    """Return how many physical cores this process may keep busy, at least 1.

    Two hyper-threads of one core count once. A control group's quota is rounded down: threads that wait for each other by
    spinning lose more to being throttled than the fraction of a core would bring.
    """
    allowed = _allowed()
    cores = {_siblings(sysfs, cpu) for cpu in allowed} if allowed else set()
    count = len(cores) or psutil.cpu_count(logical=False) or os.cpu_count() or 1
    quota = _quota(sysfs / "fs/cgroup", proc)
    return max(1, count if quota is None else min(count, int(quota)))


def _allowed() -> tuple[int, ...]:
    # Only Linux tells a process's affinity; elsewhere every core counts.
    affinity = getattr(os, "sched_getaffinity", None)
    return tuple(sorted(affinity(0))) if affinity else ()


def _siblings(sysfs: Path, cpu: int) -> str:
    """Return a string that is equal for the hyper-threads of one core."""
    for name in ("core_cpus_list", "thread_siblings_list"):
        text = _text(sysfs / f"devices/system/cpu/cpu{cpu}/topology/{name}")
        if text:
            return text
    return str(cpu)


def _quota(root: Path, proc: Path) -> float | None:
    """Return the CPUs that the control groups above this process allow, None if they do not say. Both versions of cgroups."""
    quotas = []
    for group in _groups(proc):
        relative = group.lstrip("/")
        for folder in (root / relative, root / "cpu" / relative):
            quotas += [quota for parent in _up(folder, root) if (quota := _folder_quota(parent)) is not None]
    return min(quotas, default=None)


def _groups(proc: Path) -> list[str]:
    lines = [line.split(":", 2) for line in (_text(proc / "self/cgroup") or "").splitlines()]
    # A container may not see its own group's path below /sys/fs/cgroup: the root there is then its own group.
    return ["/", *(parts[2] for parts in lines if len(parts) == 3 and (not parts[1] or "cpu" in parts[1].split(",")))]


def _up(folder: Path, root: Path) -> Iterable[Path]:
    return (folder, *(parent for parent in folder.parents if parent == root or root in parent.parents))


def _folder_quota(folder: Path) -> float | None:
    modern = (_text(folder / "cpu.max") or "").split()
    legacy = [_text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")]
    quota, period = (modern if len(modern) == 2 else legacy)[:2]
    if quota is None or period is None or not quota.isdigit() or not period.isdigit() or int(period) == 0:
        return None  # "max" and −1 mean without limit
    return int(quota) / int(period)


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
