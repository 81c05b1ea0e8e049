"""Packing: from an output folder of `r1q quantize` to a folder that a stranger can run and check."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from r1q import __version__
from r1q.benchmarks.result import BenchResult
from r1q.core.artifact import ARTIFACTS, Artifact, OutputFolder, artifact_files
from r1q.core.checkpoint import MANIFEST, QuantizedCheckpoint
from r1q.core.errors import InputError, UsageError
from r1q.core.files import TEMP_PREFIX, atomic_write, sha256_file, writing
from r1q.core.untrusted import printable
from r1q.models.config import read_json
from r1q.models.embedded import NAME as EMBEDDED_NAME
from r1q.ship.card import Card, card_text, read_results
from r1q.ship.cluster import kubernetes_yaml, object_name, prometheus_yaml
from r1q.ship.facts import R1_TEMPERATURE, R1_TOP_P, find_origin, gguf_facts
from r1q.ship.figures import figures
from r1q.ship.licences import licences_of
from r1q.ship.modelfile import make_modelfile
from r1q.ship.recall import RECIPE, recall
from r1q.ship.scripts import Run, run_scripts
from r1q.ship.seal import list_files, seal
from r1q.ship.targets import Target, find_target

_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_KEPT = ("method", "recipe", "calibration", "engine", "versions", "source", "origin", "events", "model")


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """A finished parcel: where it is, its files with their bytes, and what its user should know."""

    path: Path
    files: Mapping[str, int]
    notes: tuple[str, ...]


def pack(source: Path, target: str, output: Path, *, results: Path | None = None) -> Packed:
    """Pack the artifacts that lie in `source` (an output folder or its checkpoint) for a target into the new folder `output`.

    Raises `UsageError` where nothing fits the target or `output` is not empty, `InputError` for artifacts that are damaged.
    """
    row = find_target(target)
    folder, checkpoint = _open(source)
    artifacts = _fitting(folder, row)
    measured = _measured(results, artifacts) if results else []
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"{output} exists and is not empty; choose another folder with -o")
    with writing(output), _becoming(output) as parcel:
        for artifact in artifacts:
            _copy(folder.path, artifact, parcel)
        texts, notes = _texts(folder, checkpoint, artifacts, row, parcel, measured)
        for name, text in texts.items():
            with atomic_write(parcel / name) as file:
                file.write(text.encode())
        if "run.sh" in texts:
            os.chmod(parcel / "run.sh", 0o755)
        seal(parcel, _lock(checkpoint, row))
    files = {name: path.stat().st_size for name, path in list_files(output).items()}
    return Packed(path=output, files=files, notes=tuple(notes))


@contextlib.contextmanager
def _becoming(output: Path) -> Iterator[Path]:
    """Give a folder beside `output` that takes its place when all went well, and is removed otherwise."""
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=TEMP_PREFIX, dir=output.parent))
    try:
        yield folder
        os.chmod(folder, 0o755)
        os.replace(folder, output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _open(source: Path) -> tuple[OutputFolder, QuantizedCheckpoint]:
    if (source / ARTIFACTS).is_file():
        folder = OutputFolder(source)
    elif (source / MANIFEST).is_file() and (source.parent / ARTIFACTS).is_file():
        folder = OutputFolder(source.parent, elsewhere=source)
    else:
        raise InputError(
            f"{source} is not a folder that r1q quantize made, or it has no artifacts yet: r1q export {source}"
        )
    return folder, QuantizedCheckpoint.open(folder.checkpoint)


def _fitting(folder: OutputFolder, row: Target) -> list[Artifact]:
    """Return the artifacts for a target, best first, each of them the one that its checkpoint makes."""
    listed = folder.artifacts()
    found = [artifact for name in row.formats if name in listed and (artifact := folder.current(name))]
    if not found:
        has = ", ".join(listed) or "nothing"
        raise UsageError(
            f"{folder.path} has {has}; a {row.name} needs {' or '.join(row.formats)}: "
            f"r1q export {folder.checkpoint} --to {row.formats[0]}"
        )
    return found


def _measured(path: Path, artifacts: list[Artifact]) -> list[BenchResult]:
    """Return the results of a file, which may hold others' to compare with. Raises `UsageError` where none is of these artifacts."""
    found = read_results(path)
    names = {artifact.name.removesuffix(".gguf") for artifact in artifacts}
    if not any(result.name in names for result in found):
        raise UsageError(f"{path} has no result of {', '.join(sorted(names))}: r1q bench the same folder with --json")
    return found


def _copy(folder: Path, artifact: Artifact, output: Path) -> None:
    """Copy an artifact and prove the copy by the sums of artifacts.json."""
    origin, copy = folder / artifact.name, output / artifact.name
    if not _SAFE_NAME.fullmatch(artifact.name):
        raise UsageError(f"{artifact.name!r} has characters that a shell would read; export it under another name")
    if origin.is_dir():
        copy.mkdir()
        pairs = [(path, copy / name) for name, path in artifact_files(origin).items()]
    else:
        pairs = [(origin, copy)]
    for path, target in pairs:
        shutil.copyfile(path, target)
        if sha256_file(target) != artifact.files.get(path.name):
            raise InputError(f"{path} is not what r1q wrote (its sha256 differs); export it again")


def _texts(
    folder: OutputFolder,
    checkpoint: QuantizedCheckpoint,
    artifacts: list[Artifact],
    row: Target,
    output: Path,
    measured: list[BenchResult],
) -> tuple[dict[str, str], list[str]]:
    """Return the text files of a parcel by name, and the notes for its user."""
    origin = find_origin(folder.path, checkpoint)
    licences = licences_of(origin)
    texts = {path.name: path.read_text(encoding="utf-8", errors="replace") for path in origin.texts}
    notices = "".join(licence.notice for licence in licences)
    if notices:
        texts["NOTICE"] = texts.get("NOTICE", "") + notices
    gguf = next((artifact for artifact in artifacts if artifact.format == "gguf"), None)
    run = _running_folder(artifacts[0], checkpoint, row) if gguf is None else _running(gguf, row, output)
    texts |= run.texts
    notes = list(run.notes)
    if not licences:
        notes.append(f"the licence of {origin.base} is not known: find it out before passing this on")
    if "/" not in origin.base and origin.base != EMBEDDED_NAME:
        notes.append(
            f"base_model in README.md is {origin.base}, a folder's name: put the model's id on the hub there to publish it"
        )
    made = recall(checkpoint, [artifact.format for artifact in artifacts])
    if made.recipe is not None:
        texts[RECIPE] = made.recipe
    drawn = figures(measured, checkpoint)
    texts |= {figure.file: figure.svg for figure in drawn}
    card = Card(
        title=f"{checkpoint.model_name} {checkpoint.recipe_name}".strip(),
        origin=origin,
        licences=licences,
        recipe=checkpoint.recipe_name or "mixed",
        made=made,
        versions=_versions(checkpoint),
        files=[(artifact.name, artifact.bytes, artifact.format) for artifact in artifacts],
        results=measured,
        figures=drawn,
        target=row.name,
        format=run.format,
        sampling=run.sampling,
        context=run.context,
        notes=notes,
    )
    texts["README.md"] = card_text(card)
    return texts, notes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Running:
    """How a parcel's GGUF file is run: the texts of the files that do it by name, and what the card and its user should know."""

    context: int
    texts: Mapping[str, str] = field(default_factory=dict)
    format: str | None = None
    sampling: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()


def _running(gguf: Artifact, row: Target, output: Path) -> _Running:
    facts = gguf_facts(output / gguf.name)
    context = min(row.context, facts.context)
    model = make_modelfile(facts, gguf.name, context=context)
    name = object_name(gguf.name.removesuffix(".gguf"))
    scripts = Run(name=name, file=gguf.name, context=context, temperature=facts.temperature, top_p=facts.top_p)
    texts = {"Modelfile": model.text, **run_scripts(scripts), "prometheus.yml": prometheus_yaml(name)}
    if row.cluster:
        texts["kubernetes.yaml"] = kubernetes_yaml(
            facts,
            gguf.name,
            name=name,
            bytes=gguf.bytes,
            context=context,
            parallel=row.parallel,
            gpu=row.name == "gpu",
        )
    return _Running(
        context=context,
        texts=texts,
        format=model.format,
        sampling=(facts.temperature, facts.top_p),
        notes=model.notes,
    )


def _running_folder(artifact: Artifact, checkpoint: QuantizedCheckpoint, row: Target) -> _Running:
    """A folder is run by r1q alone, which reads template and settings from it."""
    trained = read_json(checkpoint.sidecar / "config.json").get("max_position_embeddings")
    context = min(row.context, trained) if isinstance(trained, int) and trained > 0 else row.context
    name = object_name(f"{checkpoint.model_name}-{artifact.name}")
    run = Run(name=name, file=artifact.name, context=context, temperature=R1_TEMPERATURE, top_p=R1_TOP_P)
    return _Running(context=context, texts={**run_scripts(run), "prometheus.yml": prometheus_yaml(name)}, format=None)


def _versions(checkpoint: QuantizedCheckpoint) -> dict[str, str]:
    versions = checkpoint.manifest.get("versions")
    found = versions.items() if isinstance(versions, Mapping) else ()
    return {printable(str(name)): printable(str(version)) for name, version in found}


def _lock(checkpoint: QuantizedCheckpoint, row: Target) -> dict[str, object]:
    kept = {key: checkpoint.manifest[key] for key in _KEPT if key in checkpoint.manifest}
    sums = {"manifest_sha256": sha256_file(checkpoint.path / MANIFEST)}
    return {"format": 1, "packed_by": f"r1q {__version__}", "target": row.name, "checkpoint": {**kept, **sums}}
