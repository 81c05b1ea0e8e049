"""The main job from end to end: open, plan, quantize, export, prove the tokenizer; a generator of events for a front end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from r1q import __version__
from r1q.core.artifact import Artifact, OutputFolder
from r1q.core.checkpoint import QuantizedCheckpoint
from r1q.core.files import remove_leftovers
from r1q.models.source import ModelSource
from r1q.plan.plan import Plan
from r1q.quantize.run import Event, Request, quantize_checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """The last event: an artifact, and whether it was there already."""

    artifact: Artifact
    path: Path
    already: bool


def versions() -> dict[str, str]:
    """Return the versions of everything that decides a byte of a checkpoint."""
    return {"r1q": __version__, "numpy": version("numpy"), "numba": version("numba")}


def quantize_model(
    source: ModelSource, plan: Plan, output: OutputFolder, *, method: str = "rtn"
) -> Iterator[Event | Exported]:
    """Quantize and export `source` as `plan` says into `output`, yielding events; the last one is the artifact.

    The same call on a finished folder yields «already done» and changes nothing.
    """
    from r1q.export.gguf import write_gguf
    from r1q.export.pretokenizer import prove_tokenizer

    output.refuse_foreign()
    request = Request(model=plan.model, recipe=plan.recipe, planned=plan.tensors, method=method, versions=versions())
    events = quantize_checkpoint(source, request, output.checkpoint)
    yield from events
    current = output.current("gguf")
    if current is not None:
        yield Exported(artifact=current, path=output.path / current.file, already=True)
        return
    remove_leftovers(output.path)
    output.remember_source(source.path)
    checkpoint = QuantizedCheckpoint.open(output.checkpoint)
    path = write_gguf(checkpoint, output.path)
    proof = prove_tokenizer(path, checkpoint.sidecar)
    artifact = output.record("gguf", path, proof)
    yield Exported(artifact=artifact, path=path, already=False)
