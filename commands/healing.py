"""r1q heal from end to end: the output folder and its float model found, the new folder filled, and what is said on the way."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from r1q.commands.distilling import refuse_large
from r1q.core.artifact import OutputFolder, find_reference
from r1q.core.checkpoint import MANIFEST, QuantizedCheckpoint
from r1q.core.errors import CheckError, InputError
from r1q.core.recipe import PlannedTensor
from r1q.distill.heal import Healed, heal_checkpoint
from r1q.distill.network import product_dtype
from r1q.distill.text import PROBLEMS, open_text
from r1q.distill.train import Plan, Progress
from r1q.models.embedded import open_model
from r1q.models.source import ModelSource
from r1q.models.tokenizer import Tokenizer
from r1q.plan.healing import healing_parts
from r1q.plan.memory import Workload
from r1q.plan.walk import Exported, export_checkpoint
from r1q.quantize.run import Event

WORK = "healing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What `r1q heal` is asked: see its options."""

    quantized: Path
    output: Path
    plan: Plan
    text: str
    samples: int
    length: int
    seed: int
    reference: str | None


def heal_output(asked: Asked, *, progress: bool = False) -> Iterator[Progress | Healed | Event | Exported]:
    """Fill the new output folder, yielding every step. Raises `InputError` where the float model is not to be found."""
    before, after = OutputFolder(asked.quantized), OutputFolder(asked.output)
    checkpoint = QuantizedCheckpoint.open(before.checkpoint)
    found = asked.reference or find_reference(asked.quantized)
    if found is None:
        raise InputError(f"{asked.quantized} does not say which float model it was made from; give --reference MODEL")
    source = open_model(str(found), progress=progress).source
    refuse_large(_memory_need(checkpoint, source, asked))
    if not (after.checkpoint / MANIFEST).is_file():
        if after.path.exists() and {path.name for path in after.path.iterdir()} - {WORK, after.checkpoint.name}:
            raise InputError(f"{after.path} exists and holds something else; choose another folder with -o")
        tokenizer = Tokenizer.open(source.path)
        text = open_text(asked.text, tokenizer, samples=asked.samples, length=asked.length, seed=asked.seed)
        try:
            yield from heal_checkpoint(checkpoint, source, text, asked.plan, after.checkpoint, after.path / WORK)
        except CheckError:
            shutil.rmtree(after.path)  # it holds the state of this run alone, and the next one is asked otherwise
            raise
    shutil.rmtree(after.path / WORK, ignore_errors=True)
    after.remember_source(source.path)
    yield from export_checkpoint(after, tuple(before.listed()))


def _memory_need(checkpoint: QuantizedCheckpoint, source: ModelSource, asked: Asked) -> int:
    planned = [PlannedTensor(spec=r.spec, scheme=r.scheme, wanted=r.wanted) for r in checkpoint.records.values()]
    work = Workload(config=source.config, tensors=planned, windows=asked.samples, length=asked.length)
    parts = healing_parts(
        work, "bfloat16" if product_dtype().itemsize == 2 else "float32", asked.plan.rows * asked.length
    )
    whole = 4 * sum(spec.size for spec in source.tensors) if asked.text == PROBLEMS else 0
    return sum(parts.values()) + whole


def show_healing(console: Console, steps: Iterator[Progress | Healed | Event | Exported], plan: Plan) -> Iterator[Path]:
    """Say where the run is, and what came of it; yield the path of every artifact."""
    for step in steps:
        if isinstance(step, Exported):
            console.print(f"done: {step.path} ({step.artifact.bytes:,} bytes)", highlight=False)
            yield step.path
        elif isinstance(step, Healed):
            change = 100 * (step.after / step.before - 1)
            console.print(
                f"healed: {step.before:.5f} to {step.after:.5f} nats a token ({change:+.1f} %) on text kept apart, as stored, "
                f"in {step.reached.seconds:.0f} s",
                highlight=False,
            )
        elif isinstance(step, Progress):
            console.print(
                f"step {step.step} of {plan.steps}: held out {step.held_out:.5f} nats a token, {step.seconds:.0f} s",
                highlight=False,
            )
