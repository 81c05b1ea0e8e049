"""The main job from end to end: open, plan, quantize, export, prove the tokenizer; a generator of events for a front end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from r1q import __version__
from r1q.core.artifact import Artifact, OutputFolder, find_reference
from r1q.core.checkpoint import MANIFEST, QuantizedCheckpoint
from r1q.core.errors import InputError, MissingError
from r1q.core.files import remove_leftovers
from r1q.models.embedded import OpenedModel
from r1q.plan.plan import Plan
from r1q.quantize.run import Calibration, Event, Request, quantize_checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A finished artifact, and whether it was there already."""

    artifact: Artifact
    path: Path
    already: bool


def versions() -> dict[str, str]:
    """Return the versions of everything that decides a byte of a checkpoint."""
    return {"r1q": __version__, "numpy": version("numpy"), "numba": version("numba")}


def quantize_model(
    model: OpenedModel, plan: Plan, output: OutputFolder, calibrated: Calibration | None = None
) -> Iterator[Event | Exported]:
    """Quantize and export `model` as `plan` says into `output`, yielding events; one `Exported` for each format.

    With `calibrated` blocks are coded by GPTQ on that text, else rounded to nearest.

    The same call on a finished folder yields «already done» and changes nothing.
    """
    output.refuse_foreign()
    source = model.source
    request = Request(
        model=plan.model,
        origin=model.origin,
        recipe=plan.recipe,
        planned=plan.tensors,
        method="rtn" if calibrated is None else "gptq",
        versions=versions() if calibrated is None else {**versions(), "torch": version("torch")},
        importance={} if plan.statistics is None else plan.statistics.importance,
        calibration=None if plan.statistics is None else plan.statistics.calibration,
        calibrated=calibrated,
    )
    if not (output.checkpoint / MANIFEST).is_file():
        plan.check_disk(output.path)
        _refuse_unexportable(source.path, plan.formats)
    yield from quantize_checkpoint(source, request, output.checkpoint)
    if find_reference(output.path) != source.path.resolve():
        # Not only on the first run: a kill just after the manifest, or a source that moved, would leave bench without its reference.
        output.remember_source(source.path)
    yield from export_checkpoint(output, plan.formats)


def export_checkpoint(output: OutputFolder, formats: Sequence[str]) -> Iterator[Exported]:
    """Write every format that is not there yet from the checkpoint in `output`; never quantizes."""
    for name in formats:
        current = output.current(name)
        already = current is not None
        if current is None:
            remove_leftovers(output.path)
            checkpoint = QuantizedCheckpoint.open(output.checkpoint)
            path, notes = _EXPORTERS[name](checkpoint, output.path)
            current = output.record(name, path, notes)
        yield Exported(artifact=current, path=output.path / current.name, already=already)


def _refuse_unexportable(source: Path, formats: Sequence[str]) -> None:
    """Raise `InputError` for a tokenizer that llama.cpp would read differently, `MissingError` without onnx: before the work."""
    if "gguf" in formats:
        from r1q.export.gguf import prove_source

        prove_source(source)
    if "onnx" in formats and find_spec("onnx") is None:
        raise MissingError("ONNX export needs the package onnx: pip install 'r1q[onnx]'")


def _gguf(checkpoint: QuantizedCheckpoint, folder: Path) -> tuple[Path, tuple[str, ...]]:
    from r1q.export.gguf import write_gguf
    from r1q.export.pretokenizer import prove_tokenizer

    path = write_gguf(checkpoint, folder)
    try:
        proof = prove_tokenizer(path, checkpoint.sidecar)
    except InputError:
        path.unlink()
        raise
    return path, (f"tokenizer: {proof}",)


def _gptq(checkpoint: QuantizedCheckpoint, folder: Path) -> tuple[Path, tuple[str, ...]]:
    from r1q.export.gptq import write_gptq

    return write_gptq(checkpoint, folder), ("opens in transformers (with gptqmodel) and vLLM",)


def _onnx(checkpoint: QuantizedCheckpoint, folder: Path) -> tuple[Path, tuple[str, ...]]:
    from r1q.export.onnx import write_onnx

    return write_onnx(checkpoint, folder), ("opens in onnxruntime and onnxruntime-genai",)


_EXPORTERS: dict[str, Callable[[QuantizedCheckpoint, Path], tuple[Path, tuple[str, ...]]]] = {
    "gguf": _gguf,
    "gptq": _gptq,
    "onnx": _onnx,
}
