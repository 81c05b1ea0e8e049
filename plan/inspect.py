"""Inspect: find out what a path is, and say what it holds; headers and settings are read, weights are not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from r1q.core.artifact import ARTIFACTS, CHECKPOINT, OutputFolder
from r1q.core.checkpoint import JOB, MANIFEST, QuantizedCheckpoint
from r1q.core.errors import InputError
from r1q.models.source import INDEX
from r1q.plan.inspect_folder import inspect_folder, inspect_safetensors
from r1q.plan.inspect_gguf import inspect_gguf
from r1q.plan.inspection import Inspection, Shown, TensorRow
from r1q.plan.model_facts import read_facts, shown_config

_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_NAMED = 4
_TOLD_ELSEWHERE = ("tensors", "files", "schemes", "events", "source", "expert_tokens")


def inspect_path(path: Path) -> Inspection:
    """Return what a checkpoint or artifact holds: a GGUF or safetensors file, a Hugging Face folder, a GPTQ folder, ours.

    Raises `InputError` for a path that is none of these, with what was found instead.
    """
    if path.is_dir():
        return _inspect_folder(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic == b"GGUF" or path.suffix.lower() == ".gguf":
        return inspect_gguf(path)
    if path.suffix.lower() == ".safetensors":
        return inspect_safetensors(path)
    if path.suffix.lower() in _PICKLED:
        raise InputError(f"{path} is pickled, which can run code and is never opened; convert it to safetensors")
    raise InputError(f"{path} is no file that r1q knows; it inspects .gguf and .safetensors files and model folders")


def _inspect_folder(path: Path) -> Inspection:
    if (path / MANIFEST).is_file() or (path / JOB).is_file():
        return _inspect_checkpoint(path, path, ())
    if (path / CHECKPOINT).is_dir() and ((path / CHECKPOINT / JOB).is_file() or (path / ARTIFACTS).is_file()):
        return _inspect_checkpoint(path, path / CHECKPOINT, tuple(_artifact_lines(OutputFolder(path))))
    if list(path.glob("*.safetensors")) or (path / INDEX).is_file():
        return inspect_folder(path)
    artifacts = sorted(path.glob("*.gguf"))
    artifacts += [path / a.name for a in OutputFolder(path).listed().values() if (path / a.name).is_dir()]
    if len(artifacts) == 1:
        return inspect_path(artifacts[0])
    if artifacts:
        names = ", ".join(artifact.name for artifact in artifacts[:_NAMED])
        more = f" and {len(artifacts) - _NAMED} more" if len(artifacts) > _NAMED else ""
        raise InputError(f"{path} holds {len(artifacts)} artifacts: name one of {names}{more}")
    pickled = next((entry.name for entry in sorted(path.iterdir()) if entry.suffix in _PICKLED), None)
    if pickled:
        raise InputError(f"{path} has only pickled weights ({pickled}), which can run code and are never opened")
    if any(path.glob("*.onnx")):
        raise InputError(
            f"{path} is an ONNX folder: r1q verify and r1q bench read it; inspect the checkpoint that it was made from"
        )
    raise InputError(f"{path} holds no weights: neither .safetensors nor .gguf files, nor an r1q checkpoint")


def _inspect_checkpoint(path: Path, folder: Path, beside: tuple[str, ...]) -> Inspection:
    checkpoint = QuantizedCheckpoint.open(folder)
    rows = tuple(
        TensorRow(
            name=record.spec.name,
            grid=str(record.scheme),
            shape=record.spec.shape,
            weights=record.spec.size,
            bytes=record.spec.rows * record.scheme.row_bytes(record.spec.columns),
            error=record.error,
        )
        for record in checkpoint.records.values()
    )
    files = {record.file for record in checkpoint.records.values()}
    return Inspection(
        path=path,
        format="r1q checkpoint" if path == folder else "r1q output",
        model=read_facts(checkpoint.sidecar, frozenset(row.name for row in rows)),
        tensors=rows,
        file_bytes=sum((folder / name).stat().st_size for name in files if (folder / name).is_file()),
        metadata=_manifest(checkpoint),
        made_by=tuple(_made_by(checkpoint)),
        fallbacks=tuple(_fallbacks(checkpoint)),
        notes=(
            *_coverage(checkpoint.manifest.get("expert_tokens")),
            *(f"{name} is missing: run the same r1q quantize again" for name in sorted(_missing(folder, files))),
        ),
        beside=beside,
    )


def _coverage(counted: object) -> Iterator[str]:
    """Yield a line on how many calibration tokens the experts of each block were sent."""
    for file, counts in counted.items() if isinstance(counted, Mapping) else ():
        if isinstance(counts, list) and counts and all(type(count) is int for count in counts):
            least, middle, most = min(counts), sorted(counts)[len(counts) // 2], max(counts)
            block = str(file).removesuffix(".safetensors")
            yield f"{block}: its {len(counts)} experts were sent {least} to {most} calibration tokens, half of them {middle} or more"


def _missing(folder: Path, files: set[str]) -> set[str]:
    return {name for name in files if not (folder / name).is_file()}


def _manifest(checkpoint: QuantizedCheckpoint) -> dict[str, Shown]:
    """Return what the manifest says besides tensors, hashes and events."""
    told = {key: value for key, value in checkpoint.manifest.items() if key not in _TOLD_ELSEWHERE}
    return shown_config(told)


def _made_by(checkpoint: QuantizedCheckpoint) -> Iterator[str]:
    manifest = checkpoint.manifest
    versions = manifest.get("versions")
    version = versions.get("r1q", "of an unknown version") if isinstance(versions, Mapping) else "of an unknown version"
    calibration = "no calibration data" if manifest.get("calibration") is None else "with calibration data"
    origin = manifest.get("origin")
    source = checkpoint.model_name
    if isinstance(origin, Mapping) and origin.get("repository"):
        source = f"{origin['repository']} at {str(origin.get('commit', 'an unknown commit'))[:12]}"
    recipe, method = checkpoint.recipe_name or "unnamed", manifest.get("method", "unknown")
    yield f"r1q {version} from {source}, recipe {recipe}, method {method}, {calibration}"


def _fallbacks(checkpoint: QuantizedCheckpoint) -> Iterator[str]:
    """Yield a line for each kind of fallback, and one for what else the manifest counts as an event."""
    fell = [record for record in checkpoint.records.values() if record.wanted != record.scheme.grid]
    kinds = Counter((record.wanted, str(record.scheme), record.spec.columns) for record in fell)
    for (wanted, grid, columns), count in kinds.items():
        yield f"{count} tensor{'s' if count > 1 else ''} with rows of {columns}: {wanted} blocks do not divide them, stored as {grid}"
    events = checkpoint.manifest.get("events")
    others = len(events) - len(fell) if isinstance(events, list) else 0
    if others > 0:
        yield f"{others} other events in {MANIFEST}"


def _artifact_lines(output: OutputFolder) -> Iterator[str]:
    whole = output.artifacts()
    for name, artifact in output.listed().items():
        state = "" if name in whole else ", but it is gone or has another size: r1q export writes it again"
        if not state and output.current(name) is None:
            state = ", but it was written from another checkpoint: r1q export writes it again"
        yield f"{name}: {artifact.name}, {artifact.bytes / 1e6:.1f} MB{state}"
