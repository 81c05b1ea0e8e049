"""What a run will take, before any weight is read: bytes by format, disk, memory by part, time from a probe of this machine."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from r1q.plan.disks import probe_disks
from r1q.plan.healing import HEALING_COPIES, healing_parts, healing_work
from r1q.plan.job import OpenedJob, job_folder, planned_engine, refuse_little_memory, workload
from r1q.plan.memory import ceiling, memory_parts, rounding_parts, tell
from r1q.plan.plan import Plan

# Quiet runs took this much longer than what is counted of them: 135M in two efforts, and a block of R1.
_UNCOUNTED = 1.15


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """`bytes` by format, `disk` and `memory` in bytes, `parts` of the memory, `seconds` None where nothing is calibrated."""

    bytes: Mapping[str, int]
    disk: int
    memory: int
    parts: Mapping[str, int]
    spilled: bool
    seconds: float | None

    @property
    def memory_told(self) -> str:
        """The parts of the memory in a line."""
        return tell(self.parts)

    def to_dict(self) -> dict[str, object]:
        """Return everything as JSON can hold it."""
        return asdict(self)


def outlook(opened: OpenedJob, plan: Plan, *, timed: bool = True) -> Outlook:
    """Return what the job will take. Raises `ResourceError` where its memory does not fit."""
    job = opened.job
    sizes = dict.fromkeys(("checkpoint", *plan.formats), plan.bytes)
    config, tokens = opened.model.source.config, job.samples * job.seq_len
    parts, spilled, seconds, hidden = rounding_parts(config, plan.formats), False, None, 0
    refuse_little_memory(opened, plan)
    if job.calibrated:
        engine = planned_engine(opened, plan)
        parts, spilled = memory_parts(workload(opened, plan), engine), engine.spill
        healing = healing_parts(workload(opened, plan), engine.compute) if engine.heal else {}
        parts = max(parts, healing, key=lambda found: sum(found.values()))
        hidden = 2 * 4 * tokens * config.hidden_size * (2 if engine.exact_stream else 1) + plan.block_bytes
        if timed:
            from r1q.quantize import pace

            loaded, main = time.process_time(), pace.main_schemes(plan.tensors)  # the run loads the same
            if main is not None:
                found = pace.probe(engine, *main)
                seconds = pace.seconds(config, plan.tensors, engine, tokens, job.seq_len, found)
                disks = probe_disks(opened.model.source.path, job_folder(job, plan))
                seconds += disks.seconds(plan.tensors, ceiling(job.max_ram) - sum(parts.values()))
                seconds = _UNCOUNTED * seconds + loaded
                if engine.heal:
                    products, exact = healing_work(workload(opened, plan), engine)
                    seconds += products / found.products + exact / found.exact_products
        hidden = max(hidden, HEALING_COPIES * plan.bytes if engine.heal else 0)
    disk = sum(sizes.values()) + hidden
    return Outlook(bytes=sizes, disk=disk, memory=sum(parts.values()), parts=parts, spilled=spilled, seconds=seconds)
