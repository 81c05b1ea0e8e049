"""The machine and the software that a number was measured on. No host name, no user, no path."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from r1q import __version__
from r1q.core.processor import PROC, fields, instruction_sets, processor_fields
from r1q.runtimes.cores import physical_cores

# Instruction sets that the runtimes here have kernels for, in the spelling of /proc/cpuinfo: x86 flags, then ARM features.
X86 = (
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_bf16",
    "avx_vnni",
    "amx_int8",
    "amx_bf16",
)
ARM = ("neon", "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2")
PACKAGES = ("numpy", "torch", "tokenizers", "gguf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """`cores`: physical cores this process may use; `logical`: CPUs the system has; `memory` in bytes."""

    cpu: str
    cores: int
    logical: int
    memory: int
    system: str
    features: tuple[str, ...]


def machine(proc: Path = PROC) -> Machine:
    """Return what this machine is."""
    info = processor_fields(proc)
    listed = instruction_sets(info)
    return Machine(
        cpu=info.get("model name") or platform.processor() or platform.machine(),
        cores=physical_cores(),
        logical=psutil.cpu_count() or 1,
        memory=psutil.virtual_memory().total,
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        features=tuple(name for name in (*X86, *ARM) if name in listed),
    )


def versions(runtime: Mapping[str, str]) -> dict[str, str]:
    """Return the versions of r1q, Python, the packages that compute, and what the runtime says of itself."""
    found = {"r1q": __version__, "python": ".".join(map(str, sys.version_info[:3]))}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # not installed here, so it computed nothing
    return {**found, **runtime}


def busy(seconds: float = 0.3) -> float:
    """Return the fraction of all processors in use by anybody during the next `seconds`, in which the caller sleeps."""
    return float(psutil.cpu_percent(interval=seconds)) / 100


def resident() -> tuple[int, int]:
    """Return the resident memory of this process in bytes: now, and the most it ever had.

    On Linux the peak is VmHWM, which begins with the program; getrusage's would begin with the parent's at the fork.
    """
    status = fields(_read(PROC / "self/status"))
    if "VmHWM" in status:
        return 1024 * int(status["VmRSS"].split()[0]), 1024 * int(status["VmHWM"].split()[0])
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return psutil.Process().memory_info().rss, peak if sys.platform == "darwin" else 1024 * peak


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
