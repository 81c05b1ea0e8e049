"""Verify: the written files against the checkpoint they were made from: hashes, structure, every weight from the written bytes.

The reading side shares no table with the writers: `export/verify_gguf.py` takes tensor names from gguf's own map, decodes blocks
with gguf's own code and undoes Llama's row order by where each rotary pair must lie.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from r1q.core.artifact import ARTIFACTS, CHECKPOINT, WHERE, Artifact, OutputFolder, artifact_files
from r1q.core.checkpoint import JOB, MANIFEST, PERMUTATIONS, QuantizedCheckpoint, TensorRecord
from r1q.core.errors import InputError
from r1q.core.files import sha256_file
from r1q.core.onnx_file import CONFIG as GENAI_CONFIG
from r1q.core.onnx_file import MODEL as ONNX_MODEL
from r1q.export.verified import Defect, Verified
from r1q.export.verify_gguf import verify_gguf
from r1q.export.verify_gptq import verify_gptq
from r1q.export.verify_onnx import verify_onnx

SLAB_BYTES = 1 << 24
Verifier = Callable[[QuantizedCheckpoint, Path], Verified]
_VERIFIERS: Mapping[str, Verifier] = {"gguf": verify_gguf, "gptq": verify_gptq, "onnx": verify_onnx}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Subject:
    """What to verify: the checkpoint, and artifacts (format, path, what artifacts.json says of it or None)."""

    checkpoint: Path
    artifacts: tuple[tuple[str, Path, Artifact | None], ...] = ()
    notes: tuple[str, ...] = ()


def verify_path(path: Path) -> Iterator[Verified]:
    """Yield what is found out about the checkpoint that `path` belongs to, then about each artifact.

    `path` is an output folder (every artifact in it), its checkpoint folder, or one artifact: a GGUF file, a GPTQ or an ONNX folder.
    Raises `InputError` where there is nothing to compare with or the manifest cannot be read; what is wrong with other files is in
    the results (see `refuse_failed`).
    """
    subject = _find(path)
    checkpoint = QuantizedCheckpoint.open(subject.checkpoint)
    yield replace(verify_checkpoint(checkpoint), notes=subject.notes)
    manifest_sha256 = sha256_file(subject.checkpoint / MANIFEST)
    for format_name, artifact_path, listed in subject.artifacts:
        yield _verify_artifact(checkpoint, format_name, artifact_path, listed, manifest_sha256)


def verify_checkpoint(checkpoint: QuantizedCheckpoint) -> Verified:
    """Compare every file and every tensor's stored bytes with the sha256 that the manifest lists."""
    files = checkpoint.manifest.get("files")
    listed = files if isinstance(files, Mapping) else {}
    wanted = {str(name): (checkpoint.path / str(name), str(digest)) for name, digest in listed.items()}
    if checkpoint.permutations_sha256 is not None:
        wanted[PERMUTATIONS] = (checkpoint.path / PERMUTATIONS, checkpoint.permutations_sha256)
    outside = [name for name in wanted if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]
    if outside:
        raise InputError(f"{checkpoint.path / MANIFEST} names a file outside its folder: {outside[0]}")
    defects = _hash_defects(wanted, MANIFEST)
    for file in sorted({record.file for record in checkpoint.records.values()} - set(wanted)):
        defects.append(Defect(where=file, what=f"holds tensors, but {MANIFEST} has no hash of it"))
    same = len(wanted) - len(defects)
    defects += [defect for record in checkpoint.records.values() if (defect := _stored_defect(checkpoint, record))]
    return Verified(
        format="checkpoint",
        path=checkpoint.path,
        files=max(same, 0),
        tensors=len(checkpoint.records),
        defects=tuple(defects),
    )


def _stored_defect(checkpoint: QuantizedCheckpoint, record: TensorRecord) -> Defect | None:
    digest, spec = hashlib.sha256(), record.spec
    step = max(1, SLAB_BYTES // max(1, record.scheme.row_bytes(spec.columns)))
    try:
        for start in range(0, spec.rows, step):
            digest.update(checkpoint.packed_rows(spec.name, start, min(start + step, spec.rows)).data)
    except InputError as error:
        return Defect(where=spec.name, what=str(error), difference=float("inf"), unreadable=True)
    if digest.hexdigest() == record.sha256:
        return None
    return Defect(
        where=spec.name, what=f"its bytes in {record.file} are not those of {MANIFEST}", difference=float("inf")
    )


def _verify_artifact(
    checkpoint: QuantizedCheckpoint, format_name: str, path: Path, listed: Artifact | None, manifest_sha256: str
) -> Verified:
    """Return hashes and weights of one artifact in one result."""
    defects: list[Defect] = []
    notes: list[str] = []
    found = artifact_files(path)
    if listed is None:
        notes.append(f"{ARTIFACTS} does not list it: there is no hash to compare with")
    else:
        folder = path if path.is_dir() else path.parent
        defects += _hash_defects({name: (folder / name, digest) for name, digest in listed.files.items()}, ARTIFACTS)
        notes += [
            f"{name} is not in {ARTIFACTS} and was not checked" for name in sorted(set(found) - set(listed.files))
        ]
        if listed.manifest_sha256 != manifest_sha256:
            defects.append(
                Defect(
                    where=path.name, what=f"was written from another checkpoint: the {MANIFEST} here has other bytes"
                )
            )
    same = 0 if listed is None else len(listed.files) - sum(d.where in listed.files for d in defects)
    if format_name not in _VERIFIERS:
        notes.append(f"the weights of a {format_name} artifact cannot be verified yet")
        result = Verified(format=format_name, path=path, files=0, tensors=0)
    elif not found:
        missing = Defect(where=path.name, what="is missing", unreadable=True)
        result = Verified(format=format_name, path=path, files=0, tensors=0, defects=(missing,))
    else:
        result = _VERIFIERS[format_name](checkpoint, path)
    return replace(result, files=max(same, 0), defects=(*defects, *result.defects), notes=(*result.notes, *notes))


def _hash_defects(wanted: Mapping[str, tuple[Path, str]], listing: str) -> list[Defect]:
    defects = []
    for name, (path, digest) in wanted.items():
        try:
            found = sha256_file(path)
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            what = "is missing" if missing else f"cannot be read: {error.strerror or error}"
            defects.append(Defect(where=name, what=what, unreadable=True))
            continue
        if found != digest:
            what = f"sha256 is {found[:12]}…, {listing} says {digest[:12]}…: the file was changed or damaged"
            defects.append(Defect(where=name, what=what))
    return defects


def _find(path: Path) -> _Subject:
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; give the folder that r1q quantize made, or a file in it")
    if path.is_dir() and ((path / MANIFEST).is_file() or (path / JOB).is_file()):
        return _Subject(
            checkpoint=path, notes=("the checkpoint alone: give its parent folder to verify artifacts too",)
        )
    if path.is_dir() and (checkpoint := _checkpoint_of(path)) is not None:
        listed = OutputFolder(path).listed()
        names = {artifact.name for artifact in listed.values()}
        others = [entry.name for entry in sorted(path.glob("*.gguf")) if entry.name not in names]
        return _Subject(
            checkpoint=checkpoint,
            artifacts=tuple((name, path / artifact.name, artifact) for name, artifact in listed.items()),
            notes=tuple(f"{name} is not in {ARTIFACTS} and was not checked: give its own path" for name in others),
        )
    if path.is_file() and path.suffix.lower() == ".onnx":
        path = path.absolute().parent
    format_name = _format(path)
    checkpoint = _checkpoint_of(path.absolute().parent)
    if checkpoint is None:
        raise InputError(
            f"{path} has no r1q checkpoint beside it to compare with (a folder named {CHECKPOINT}); "
            "r1q inspect shows what a file holds"
        )
    listed = OutputFolder(path.absolute().parent).listed()
    entry = next((artifact for artifact in listed.values() if artifact.name == path.absolute().name), None)
    return _Subject(checkpoint=checkpoint, artifacts=((format_name, path, entry),))


def _format(path: Path) -> str:
    if path.is_file() and path.suffix.lower() == ".gguf":
        return "gguf"
    if path.is_dir() and any((path / name).is_file() for name in (GENAI_CONFIG, ONNX_MODEL)):
        return "onnx"
    if path.is_dir() and (path / "config.json").is_file():
        return "gptq"
    raise InputError(f"{path} is neither a folder of r1q quantize, nor a .gguf file, nor a GPTQ or ONNX folder")


def _checkpoint_of(folder: Path) -> Path | None:
    """Return the checkpoint that artifacts in `folder` were made from: in it, or where `r1q export -o` noted it to be."""
    if (folder / CHECKPOINT).is_dir():
        return folder / CHECKPOINT
    try:
        where = json.loads((folder / WHERE).read_bytes())
    except (OSError, ValueError):
        return None
    noted = where.get("checkpoint") if isinstance(where, Mapping) else None
    return Path(noted) if isinstance(noted, str) and Path(noted).is_dir() else None
