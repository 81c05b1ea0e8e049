"""What a run will take, before any weight is read: bytes by format, disk, memory by part, time from a probe of this machine."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from r1q.plan.disks import probe_disks
from r1q.plan.effort import workers_beside
from r1q.plan.healing import HEALING_COPIES, healing_parts, healing_work
from r1q.plan.holders import gguf_holder, onnx_holder
from r1q.plan.job import OpenedJob, job_folder, planned_engine, refuse_little_memory, workload
from r1q.plan.memory import memory_parts, rounding_parts, tell
from r1q.plan.plan import Plan
from r1q.quantize.engine import Engine

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
    sizes = {"checkpoint": plan.bytes, **{name: _bytes_of(name, opened, plan) for name in plan.formats}}
    config = opened.model.source.config
    parts, spilled, seconds, hidden = rounding_parts(config, plan.formats), False, None, 0
    refuse_little_memory(opened, plan)
    if job.calibrated:
        engine, work = planned_engine(opened, plan), workload(opened, plan)
        parts, spilled = memory_parts(work, engine), engine.spill
        healing = healing_parts(work, engine.compute) if engine.heal else {}
        parts = max(parts, healing, key=lambda found: sum(found.values()))
        hidden = 2 * _state_bytes(opened, engine) + plan.block_bytes
        hidden = max(hidden, HEALING_COPIES * plan.bytes if engine.heal else 0)
        if timed:
            seconds = _seconds(opened, plan, engine)
    disk = sum(sizes.values()) + hidden
    return Outlook(bytes=sizes, disk=disk, memory=sum(parts.values()), parts=parts, spilled=spilled, seconds=seconds)


def _bytes_of(name: str, opened: OpenedJob, plan: Plan) -> int:
    """Return the bytes of an artifact: of GGUF and of ONNX to the byte; else those of the weights.

    Else is a GPTQ folder, w8a8, and a model whose tokenizer is not there.
    """
    source = opened.model.source
    holders = {"gguf": gguf_holder(), "onnx": onnx_holder(cache=opened.job.cache is not None)}
    if name not in holders or opened.job.static or not (source.path / "tokenizer.json").is_file():
        return plan.bytes
    return holders[name].whole_bytes(source, plan.tensors, plan.recipe.name)


def _state_bytes(opened: OpenedJob, engine: Engine) -> int:
    """Return the size of the hidden states before a block, in float32."""
    job, config = opened.job, opened.model.source.config
    return 4 * job.samples * job.seq_len * config.hidden_size * (1 + engine.exact_stream)


def _seconds(opened: OpenedJob, plan: Plan, engine: Engine) -> float | None:
    """Return the time of a calibrated run, None where no matrix is coded.

    For a process that has done nothing else: what it has loaded by now, the run loads too.
    """
    from r1q.quantize import pace

    loaded, main = time.process_time(), pace.main_schemes(plan.tensors)
    if main is None:
        return None
    job, source = opened.job, opened.model.source
    found = pace.probe(engine, *main)
    tokens, config, disks = job.samples * job.seq_len, source.config, probe_disks(source.path, job_folder(job, plan))
    workers = max(1, workers_beside(job))
    computed = _UNCOUNTED * pace.seconds(config, plan.tensors, engine, tokens, job.seq_len, found, workers)
    # Weights are read while others are coded.
    seconds = max(computed, disks.reading(plan.tensors)) + loaded
    states = config.num_layers * _state_bytes(opened, engine)
    seconds += disks.writing(plan.tensors, states) + states / found.hashed
    if engine.heal:
        products, exact = healing_work(workload(opened, plan), engine)
        seconds += products / found.products + exact / found.exact_products
    return seconds
