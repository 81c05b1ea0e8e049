"""What tells a machine and a folder from others: a worker that would compute other last bits, or write elsewhere, is refused."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from r1q.core.checkpoint import JOB
from r1q.core.errors import MissingError
from r1q.core.files import sha256_file
from r1q.core.processor import instruction_sets, processor_fields

_PACKAGES = ("torch", "numpy", "numba")
# Instruction sets that products and sums differ by, as the system names them.
_SETS = ("amx_bf16", "avx512_bf16", "bf16", "avx512f", "avx2", "fma", "asimd", "sve")


def numbers() -> str:
    """Return all that decides the last bits of what this machine computes, in a line."""
    found = instruction_sets(processor_fields())
    sets = [name for name in _SETS if name in found]
    return ", ".join((platform.machine(), torch.backends.cpu.get_cpu_capability(), *sets, *map(_told, _PACKAGES)))


def job_hash(folder: Path) -> str:
    """Return the sha256 of the job in a checkpoint folder, empty without one."""
    path = folder / JOB
    return sha256_file(path) if path.is_file() else ""


def refuse_elsewhere(wanted: str, job: str, folder: Path) -> None:
    """Raise `MissingError` where this machine computes otherwise than `wanted`, or sees another `folder` than that of the `job`."""
    here = numbers()
    if here != wanted:
        raise MissingError(
            f"a worker on {platform.node()} would compute other last bits ({here}) than the run ({wanted}); leave that machine out"
        )
    if job_hash(folder) != job:
        raise MissingError(
            f"a worker on {platform.node()} does not see the run's {folder}: model and output lie at the same paths on all machines"
        )


def _told(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"no {package}"
