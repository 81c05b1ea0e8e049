"""What this process has around it: CPU, memory with its limits, disk, GPUs. Measures nothing and imports no heavy library."""

from __future__ import annotations

import ctypes.util
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from r1q.core.processor import instruction_sets, processor_fields
from r1q.runtimes.cores import physical_cores

# Features that the runtimes have kernels for, as /proc/cpuinfo spells them; every avx512 and amx one is told besides.
_TOLD = ("f16c", "fma", "avx", "avx2", "avx_vnni", "neon", "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme")
_TOLD_BEGINNINGS = ("avx512", "amx")
_UNLIMITED = 1 << 60  # cgroup version 1 writes a number near 2^63 for «no limit»
_GPU_SECONDS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """`cores`: physical ones this process may keep busy; `logical`: CPUs of the system; memory and disk in bytes.

    `memory_limit` is the control group's, None without one; `features` is empty where the system does not tell.
    """

    system: str
    cpu: str
    cores: int
    logical: int
    features: tuple[str, ...]
    memory: int
    available: int
    memory_limit: int | None
    disk_free: int


def look_around(folder: Path, *, sysfs: Path = Path("/sys"), proc: Path = Path("/proc")) -> Surroundings:
    """Return what this machine offers to this process; the disk is that of `folder`."""
    info = processor_fields(proc)
    listed = instruction_sets(info)
    memory = psutil.virtual_memory()
    return Surroundings(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=info.get("model name") or platform.processor() or platform.machine() or "unknown",
        cores=physical_cores(sysfs, proc),
        logical=psutil.cpu_count() or os.cpu_count() or 1,
        features=tuple(name for name in listed if name in _TOLD or name.startswith(_TOLD_BEGINNINGS)),
        memory=memory.total,
        available=memory.available,
        memory_limit=memory_limit(sysfs, proc),
        disk_free=shutil.disk_usage(folder).free,
    )


def memory_limit(sysfs: Path = Path("/sys"), proc: Path = Path("/proc")) -> int | None:
    """Return the least memory in bytes that the control groups above this process allow, None without a limit."""
    return min(_limits(sysfs / "fs/cgroup", proc), default=None)


def find_gpus() -> tuple[str, ...]:
    """Return a line for each NVIDIA GPU that nvidia-smi names, or for a driver without it; empty where there is neither."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        driver = ctypes.util.find_library("cuda")
        return () if driver is None else (f"NVIDIA's driver ({driver}) is there, nvidia-smi is not",)
    query = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_GPU_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return (f"nvidia-smi does not answer: {error}",)
    if done.returncode:
        return (f"nvidia-smi fails: {' '.join((done.stderr or done.stdout).split())[:120]}",)
    lines = [[part.strip() for part in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    return tuple(f"{', '.join(parts[:-1])}, driver {parts[-1]}" for parts in lines)


def _limits(root: Path, proc: Path) -> Iterator[int]:
    groups = ["/"]  # a container may see its own group's files at the root
    for line in _text(proc / "self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if number and (not controllers or "memory" in controllers.split(",")):
            groups.append(group)
    for group in groups:
        for top in (root, root / "memory"):
            folder = top / group.lstrip("/")
            for place in (folder, *(parent for parent in folder.parents if parent.is_relative_to(top))):
                for name in ("memory.max", "memory.limit_in_bytes"):
                    text = _text(place / name).strip()
                    if text.isdigit() and int(text) < _UNLIMITED:
                        yield int(text)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
