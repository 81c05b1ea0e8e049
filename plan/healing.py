"""`r1q quantize --heal`: scales and norms trained on the calibration text behind the codes, in the same job and the same folder.

<output>/checkpoint/   the codes, finished, until the healed ones take their place
<output>/healing/      the state of the training, and the healed checkpoint while it is written

The files of the healed checkpoint are moved over the others one by one, its manifest last; until then there is none in `checkpoint/`.
Whatever a kill leaves, the next run finds one of: codes unfinished, training unfinished, a healed checkpoint to be moved, or the end.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from r1q.core import journal
from r1q.core.artifact import OutputFolder
from r1q.core.checkpoint import JOB, JOURNAL, MANIFEST, QuantizedCheckpoint
from r1q.core.errors import ResourceError, UsageError
from r1q.core.files import writing
from r1q.core.recipe import PlannedTensor
from r1q.models.source import ModelSource
from r1q.plan.memory import PROGRAM, Workload
from r1q.quantize.engine import Engine
from r1q.quantize.run import Calibration, Event, Request, quantize_checkpoint

WORK = "healing"
_TOKENS, _MEASURED, _RATE = 512, 8, 1e-4
"""Tokens of a step, measurements of a run, and the highest learning rate: the relative change of a scale."""
HEALING_COPIES = 2
"""On the disk: the healed checkpoint beside the other, and as much for what is trained, its moments, and the float model's states."""
# Counted, not measured: bytes for each weight's level and its share of a step with gradient, two moments and copies; numbers of a
# position inside a block, of hidden and of feed-forward size; bytes for some rows of logits, five times.
_TRAINED, _INNER, _GATED, _LOGITS = 2.3, 18, 8, 200_000_000


def healed_checkpoint(source: ModelSource, request: Request, output: OutputFolder) -> Iterator[Event]:
    """Quantize as `quantize_checkpoint` does, then heal what came of it on the calibration text; yield the events of both.

    A finished folder is left as it is. Raises as `quantize_checkpoint` and `heal_checkpoint` do.
    """
    work, folder = output.path / WORK, output.checkpoint
    if (work / folder.name / MANIFEST).is_file():
        _install(work / folder.name, folder)
    if _is_healed(folder):
        journal.open_job(folder, request.job(source) | {"healing": _stored_job(folder)["healing"]})
        if (folder / MANIFEST).is_file() and not QuantizedCheckpoint.open(folder).damaged_files():
            shutil.rmtree(work, ignore_errors=True)
            yield Event(what="already done")
            return
        shutil.rmtree(folder)  # what codes were before is no longer to be had
    for event in quantize_checkpoint(source, request, folder):
        if event.what not in ("done", "already done"):
            yield event
    assert request.calibrated is not None
    yield from _heal(QuantizedCheckpoint.open(folder), source, request.calibrated, work)
    _install(work / folder.name, folder)
    shutil.rmtree(work, ignore_errors=True)
    yield Event(what="done")


def _heal(checkpoint: QuantizedCheckpoint, source: ModelSource, calibrated: Calibration, work: Path) -> Iterator[Event]:
    """Write the healed checkpoint into `work`, under the name of the other."""
    from r1q.distill.heal import Healed, heal_checkpoint
    from r1q.distill.text import WindowText
    from r1q.distill.train import Plan
    from r1q.models.threads import torch_threads

    steps, length = calibrated.engine.heal, calibrated.tokens.shape[1]
    text = WindowText(calibrated.tokens, 0, calibrated.record)
    plan = Plan(steps=steps, rows=max(1, _TOKENS // length), lr=_RATE, every=-(-steps // _MEASURED), patience=_MEASURED)
    folder = work / checkpoint.path.name
    with torch_threads(calibrated.engine.threads):
        for found in heal_checkpoint(checkpoint, source, text, plan, folder, work, always=True):
            if isinstance(found, Healed):
                yield Event(what="healed" if found.helped else "note", name=found.told)
            else:
                told = f"step {found.step} of {steps}, {found.held_out:.5f} nats a token"
                yield Event(what="healing", name=told, count=found.step)


def _install(made: Path, folder: Path) -> None:
    """Move the files of a finished checkpoint over those in `folder`, its manifest last."""
    with writing(folder):
        for name in (MANIFEST, JOURNAL):
            (folder / name).unlink(missing_ok=True)
        for path in sorted(made.rglob("*"), key=lambda path: path.name == MANIFEST):
            if path.is_file():
                path.replace(folder / path.relative_to(made))


def _stored_job(folder: Path) -> dict[str, object]:
    try:
        value = json.loads((folder / JOB).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _is_healed(folder: Path) -> bool:
    return "healing" in _stored_job(folder)


def refuse_healing(work: Workload, engine: Engine, limit: int) -> None:
    """Raise `UsageError` where this model cannot be healed as `engine` has it, `ResourceError` where `limit` bytes are too few."""
    if not engine.heal:
        return
    if why := _unhealable(work):
        raise UsageError(f"--heal: {why}")
    need = sum(healing_parts(work, engine.compute).values())
    if need > limit:
        raise ResourceError(
            f"healing needs about {need / 1e6:.0f} MB and may take {limit / 1e6:.0f} MB: the quantized model is in memory whole; "
            "raise --max-ram, free memory, or leave --heal out"
        )


def _unhealable(work: Workload) -> str:
    """Return why a model is not healed whatever memory there is; empty where it can be."""
    if any(tensor.spec.expert is not None for tensor in work.tensors) or work.config.latent is not None:
        return "scales of dense models alone can be trained, and this is none"
    if all(tensor.scheme.facts.family == "float" for tensor in _coded(work)):
        return "no block has codes"
    return "some of the text is kept apart, and there is one window" if work.windows < 2 else ""


def healing_parts(work: Workload, compute: str, positions: int | None = None) -> dict[str, int]:
    """Return about how many bytes of memory each part of healing takes, the largest first.

    Products are of dtype `compute`, and a step is of `positions` tokens, if not of as many as `healed_checkpoint` takes.
    """
    config, positions = work.config, positions or max(_TOKENS, work.length)
    coded = sum(tensor.spec.size for tensor in _coded(work))
    number = 2 if compute == "bfloat16" else 4
    rows = config.vocab_size * config.hidden_size
    parts = {
        "program": PROGRAM,
        "codes and scales": int(_TRAINED * coded),
        "embedding and heads": number * rows * (2 if config.tied else 3),
        "a block's weights": 12 * coded // max(1, config.num_layers),
        "hidden states": 4 * positions * (config.hidden_size * config.num_layers + _INNER * config.hidden_size)
        + 4 * positions * _GATED * config.intermediate_size,
        "logits": _LOGITS,
    }
    return dict(sorted(parts.items(), key=lambda part: -part[1]))


def healing_work(work: Workload, engine: Engine) -> tuple[float, float]:
    """Return the multiply-adds of healing in the engine's dtype, and those in float32."""
    config, positions = work.config, max(1, _TOKENS // work.length) * work.length
    coded = sum(tensor.spec.size for tensor in _coded(work))
    head, held = config.vocab_size * config.hidden_size, 1 + _MEASURED
    kept = len(range(0, work.windows, 16)) * work.length
    # Forward twice, and back to the inputs and to the weights; two heads, and back from one.
    step = positions * (4 * coded + 3 * head)
    return engine.heal * step + held * kept * (coded + 2 * head), (work.windows * work.length + 2 * kept) * coded


def _coded(work: Workload) -> list[PlannedTensor]:
    return [tensor for tensor in work.tensors if tensor.spec.is_matrix and tensor.spec.layer is not None]
