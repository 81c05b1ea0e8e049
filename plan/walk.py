"""The main job from end to end: open, plan, quantize, export, prove the tokenizer; a generator of events for a front end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from r1q import __version__
from r1q.core.artifact import Artifact, OutputFolder, find_reference
from r1q.core.cache_scales import CACHE_SCALES, CacheScales
from r1q.core.checkpoint import MANIFEST, QuantizedCheckpoint
from r1q.core.errors import InputError, MissingError
from r1q.core.files import remove_leftovers, sha256_file
from r1q.models.embedded import OpenedModel
from r1q.models.source import ModelSource
from r1q.plan.activations import ActivationText, balanced_source
from r1q.plan.healing import HEALING_COPIES, healed_checkpoint
from r1q.plan.kv_cache import CacheText, cache_scales
from r1q.plan.plan import Plan
from r1q.quantize.balance import BalancedSource
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
    model: OpenedModel,
    plan: Plan,
    output: OutputFolder,
    calibrated: Calibration | None = None,
    cache: CacheText | None = None,
    activations: ActivationText | None = None,
) -> Iterator[Event | Exported]:
    """Quantize and export `model` as `plan` says into `output`, yielding events; one `Exported` for each format.

    With `calibrated` blocks are coded by GPTQ on that text, else rounded to nearest. `cache` as in `export_checkpoint`. With
    `activations` inputs are measured on that text, and channels balanced, before.

    The same call on a finished folder yields «already done» and changes nothing.
    """
    output.refuse_foreign()
    if not (output.checkpoint / MANIFEST).is_file():
        healed = calibrated is not None and calibrated.engine.heal
        plan.check_disk(output.path, more=HEALING_COPIES * plan.bytes if healed else 0)
        _refuse_unexportable(model.source.path, plan.formats)
    source: ModelSource | BalancedSource = model.source
    notes: list[str] = []
    for found in () if activations is None else balanced_source(model.source, output, activations):
        if isinstance(found, Event):
            notes += [found.name] if found.what == "note" else []
            yield found
        else:
            source = found
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
        notes=(*plan.notes, *notes),
    )
    if calibrated is not None and calibrated.engine.heal:
        yield from healed_checkpoint(model.source, request, output)
    else:
        yield from quantize_checkpoint(source, request, output.checkpoint)
    # With an adapter no folder holds the float model, and bench shall not compare with the base as if it were.
    if "adapter" not in model.origin and find_reference(output.path) != model.source.path.resolve():
        # Not only on the first run: a kill just after the manifest, or a source that moved, would leave bench without its reference.
        output.remember_source(model.source.path)
    yield from export_checkpoint(output, plan.formats, cache)


def export_checkpoint(
    output: OutputFolder, formats: Sequence[str], cache: CacheText | None = None
) -> Iterator[Event | Exported]:
    """Write every format that is not there yet from the checkpoint in `output`; never quantizes weights.

    `cache` is the text on which the 8-bit cache of an ONNX folder is calibrated, None for a float32 one.
    """
    for name in formats:
        scales = None
        if name == "onnx" and cache is not None:
            for found in cache_scales(output, cache):
                if isinstance(found, CacheScales):
                    scales = found
                else:
                    yield found
        settings = _settings(output, scales)
        current = output.current(name, settings)
        already = current is not None
        if current is None:
            remove_leftovers(output.path)
            checkpoint = QuantizedCheckpoint.open(output.checkpoint)
            path, notes = _EXPORTERS[name](checkpoint, output.path, scales)
            current = output.record(name, path, notes, settings)
        yield Exported(artifact=current, path=output.path / current.name, already=already)


def _settings(output: OutputFolder, scales: CacheScales | None) -> Mapping[str, str]:
    return {} if scales is None else {"kv": "int8", "kv_scales": sha256_file(output.path / CACHE_SCALES)}


def _refuse_unexportable(source: Path, formats: Sequence[str]) -> None:
    """Raise `InputError` for a tokenizer that llama.cpp would read differently, `MissingError` without onnx: before the work."""
    if "gguf" in formats:
        from r1q.export.gguf import prove_source

        prove_source(source)
    if "onnx" in formats and find_spec("onnx") is None:
        raise MissingError("ONNX export needs the package onnx: pip install 'r1q[onnx]'")


def _gguf(checkpoint: QuantizedCheckpoint, folder: Path, _: CacheScales | None) -> tuple[Path, tuple[str, ...]]:
    from r1q.export.gguf import write_gguf
    from r1q.export.pretokenizer import prove_tokenizer

    path = write_gguf(checkpoint, folder)
    try:
        proof = prove_tokenizer(path, checkpoint.sidecar)
    except InputError:
        path.unlink()
        raise
    return path, (f"tokenizer: {proof}",)


def _gptq(checkpoint: QuantizedCheckpoint, folder: Path, _: CacheScales | None) -> tuple[Path, tuple[str, ...]]:
    from r1q.export.gptq import write_gptq

    return write_gptq(checkpoint, folder), ("opens in transformers (with gptqmodel) and vLLM",)


def _onnx(checkpoint: QuantizedCheckpoint, folder: Path, scales: CacheScales | None) -> tuple[Path, tuple[str, ...]]:
    from r1q.export.onnx import write_onnx

    notes = ["opens in onnxruntime and onnxruntime-genai"]
    if scales is not None:
        text = scales.record["calibration"]
        seen = f"{text['samples']} windows of {text['length']} tokens" if isinstance(text, Mapping) else "text"
        notes.append(f"keys and values in 8 bits, by channel, ranges found on {seen} ({CACHE_SCALES})")
    return write_onnx(checkpoint, folder, cache=scales), tuple(notes)


_Exporter = Callable[[QuantizedCheckpoint, Path, CacheScales | None], tuple[Path, tuple[str, ...]]]
_EXPORTERS: Mapping[str, _Exporter] = {
    "gguf": _gguf,
    "gptq": _gptq,
    "onnx": _onnx,
}
