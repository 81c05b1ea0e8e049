"""From `--effort` and this machine to the engine of a calibrated run; a run that was begun keeps the engine it began with."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, cast

from r1q.core.checkpoint import JOB
from r1q.core.errors import UsageError
from r1q.plan.surroundings import look_around
from r1q.quantize.crews import LOCAL, parse_workers
from r1q.quantize.engine import Effort, Engine

if TYPE_CHECKING:
    from r1q.plan.job import Job

# Instruction sets that change the last bits of a sum, widest first; those with bfloat16 products come before all.
_BFLOAT16 = ("amx_bf16", "avx512_bf16", "bf16")
_LADDER = (*_BFLOAT16, "avx512f", "avx2", "asimd")
_PASSES: Mapping[Effort, int] = MappingProxyType({"fast": 0, "default": 0, "high": 4})


def choose_engine(job: Job, checkpoint: Path) -> tuple[Engine, bool]:
    """Return how the calibrated `job` computes here, and whether a run of it was begun.

    A run in `checkpoint` that was begun is replayed with its own tiles and slabs, and its own number of threads unless another is
    asked for. Raises `UsageError` where it was begun on another instruction set, whose sums differ.
    """
    features = look_around(Path.cwd()).features
    found = next((name for name in _LADDER if name in features), "plain")
    begun = _begun(checkpoint)
    isa = f"{platform.machine()} {found}"
    if begun is not None and begun.isa != isa:
        raise UsageError(
            f"{checkpoint} was begun on {begun.isa} and this is {isa}: its numbers would differ; finish it there, or choose another -o"
        )
    effort = cast(Effort, job.effort or "default")
    engine = Engine(
        effort=effort,
        threads=job.threads or (begun.threads if begun is not None else None) or _threads(job),
        isa=isa,
        compute="bfloat16" if found in _BFLOAT16 or job.device != "cpu" else "float32",
        device=job.device,
        damp=job.damp,
        passes=_PASSES[effort],
        heal=job.heal or 0,
        experts=job.moe_calibration,
    )
    if begun is None:
        return engine, False
    return replace(engine, tile=begun.tile, slab=begun.slab), True


def _threads(job: Job) -> int:
    """Return the threads of a task: those of all cores, shared by the workers that are here."""
    return max(1, look_around(Path.cwd()).cores // parse_workers(job.workers).count)


def workers_beside(job: Job) -> int:
    """Return how many workers code on this machine beside the run, 0 where it does so itself."""
    workers = parse_workers(job.workers)
    if workers.address is None:
        return workers.count if workers.count > 1 else 0
    if workers.address != LOCAL:
        return 1  # this machine may be one of Ray's
    cores = look_around(Path.cwd()).cores
    return max(1, cores // (job.threads or cores))


def _begun(checkpoint: Path) -> Engine | None:
    """Return the engine of the run in `checkpoint`; None without one, or where job.json is no calibrated run's."""
    try:
        return Engine.from_dict(json.loads((checkpoint / JOB).read_bytes())["engine"])
    except (OSError, ValueError, TypeError, KeyError):
        return None  # what is wrong with it, `open_job` says by comparing
