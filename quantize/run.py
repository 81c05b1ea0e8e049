"""The run loop: a float checkpoint and a plan in, a QuantizedCheckpoint out, one row slab of one tensor in memory at a time."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from r1q.core import journal
from r1q.core.checkpoint import FORMAT_VERSION, MANIFEST, SIDECAR, QuantizedCheckpoint
from r1q.core.files import atomic_path, remove_leftovers, sha256_file, write_json, writing
from r1q.core.importance import row_slabs
from r1q.core.qtensor import Floats
from r1q.core.recipe import PlannedTensor, Recipe
from r1q.quantize.block_file import Store, writing_block
from r1q.quantize.engine import Engine
from r1q.quantize.event import Event as Event
from r1q.quantize.rtn import rtn
from r1q.quantize.source import FloatSource
from r1q.quantize.storing import Slab, store_rows

# Rows are taken in slabs of about this many weights (4 MB in float32), of which some nine are alive; codes do not depend on it.
SLAB_WEIGHTS = 1 << 20
STATE_STEM = "hidden-"
PARTS_STEM = "parts-"


Finished = MutableMapping[str, journal.FinishedFile]


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What a calibrated run sees and how it computes: token ids [windows, length], what the manifest says of them, the engine.

    `workers` says who codes (`crews.parse_workers`); it decides no byte.
    """

    tokens: NDArray[np.int64]
    record: Mapping[str, object]
    engine: Engine
    workers: str = "1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to quantize and how: everything that decides the bytes is in here, and in job.json.

    `importance` maps GGUF tensor names to mean squared activations (see `core/importance.py`); `calibration` says where they came
    from. With `calibrated` the blocks are coded by GPTQ on their own inputs, else everything is what `store` makes of it, rounding to
    nearest for None. `notes` are events of the manifest.
    """

    model: str
    origin: Mapping[str, str] = field(default_factory=dict)
    recipe: Recipe
    planned: tuple[PlannedTensor, ...]
    method: str
    versions: Mapping[str, str]
    importance: Mapping[str, Floats] = field(default_factory=dict)
    calibration: Mapping[str, object] | None = None
    calibrated: Calibration | None = None
    store: Store | None = None
    notes: tuple[str, ...] = ()

    def unweighted(self) -> list[PlannedTensor]:
        """Return the matrices that have no importance although there is some for others."""
        coded = (tensor for tensor in self.planned if tensor.scheme.facts.family == "ggml")
        return [tensor for tensor in coded if tensor.spec.gguf_name not in self.importance] if self.importance else []

    def job(self, source: FloatSource) -> dict[str, object]:
        """Return what job.json fixes."""
        return {
            "format": FORMAT_VERSION,
            "model": self.model,
            "origin": dict(self.origin),
            "recipe": self.recipe.to_dict(),
            "schemes": {tensor.spec.name: str(tensor.scheme) for tensor in self.planned},
            "method": self.method,
            "calibration": self.calibration if self.calibrated is None else dict(self.calibrated.record),
            "engine": None if self.calibrated is None else self.calibrated.engine.to_dict(),
            "source": dict(source.fingerprint()),
            "versions": dict(self.versions),
        }


def quantize_checkpoint(source: FloatSource, request: Request, folder: Path) -> Iterator[Event]:
    """Quantize `source` into `folder`, yielding an event for each step; go on where a killed run stopped.

    With `request.calibrated`, `source` is a `calibrated.ModelReader` (it has a config). Raises `UsageError` when `folder` holds
    another job, `InputError` for a weight that is not a number, `ResourceError` for a full disk. The folder becomes a
    `QuantizedCheckpoint` when the manifest is written, at the end.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    job = request.job(source)
    journal.open_job(folder, job)
    if (folder / MANIFEST).is_file() and not QuantizedCheckpoint.open(folder).damaged_files():
        yield Event(what="already done")
        return
    remove_leftovers(folder)
    _copy_sidecars(source, folder / SIDECAR)
    finished = journal.finished_files(folder)
    if request.calibrated is None:
        yield from _write_files(source, request, folder, finished)
    else:
        from r1q.quantize.calibrated import write_files

        yield from write_files(source, request, folder, finished)
    for state in folder.glob(f"{STATE_STEM}*"):
        state.unlink()  # before the manifest, behind which nobody would look for them again
    for parts in folder.glob(f"{PARTS_STEM}*"):
        shutil.rmtree(parts)
    _write_manifest(folder, job, request, [finished[file] for file in block_files(request.planned)])
    yield Event(what="done")


def _write_files(source: FloatSource, request: Request, folder: Path, finished: Finished) -> Iterator[Event]:
    """Write the block files that are not `finished`, and enter them there."""
    for file, tensors in block_files(request.planned).items():
        if file in finished:
            yield Event(what="kept", name=file, count=len(tensors))
            continue
        store = request.store or stored_slabs(source, request.importance)
        with writing_block(folder / file, tensors) as block:
            yield from block.grow(store)
        finished[file] = journal.FinishedFile(file=file, sha256=block.sha256, records=tuple(block.records))
        journal.append(folder, finished[file])
        yield Event(what="file", name=file)


def block_files(planned: Sequence[PlannedTensor]) -> dict[str, list[PlannedTensor]]:
    """Return the tensors of each block file, as they follow each other there: in model order, but routed experts one by one, last.

    So they are coded, and the file can grow meanwhile; models list the same matrix of all experts together.
    """
    files: dict[str, list[PlannedTensor]] = {}
    for tensor in planned:
        spec = tensor.spec
        outside = "embedding" if spec.kind == "token_embd" else "head"
        stem = outside if spec.layer is None else f"block-{spec.layer:05d}"
        files.setdefault(f"{stem}.safetensors", []).append(tensor)
    for tensors in files.values():
        tensors.sort(key=lambda tensor: -1 if tensor.spec.expert is None else tensor.spec.expert)
    return files


def stored_slabs(source: FloatSource, importance: Mapping[str, Floats]) -> Store:
    """Return what rounds a tensor to nearest, slab of rows by slab; `importance` is by GGUF name."""

    def store(planned: PlannedTensor) -> Iterator[Slab]:
        spec = planned.spec
        for start, stop, mine in row_slabs(importance, spec, max(1, SLAB_WEIGHTS // spec.columns)):
            weights = np.ascontiguousarray(source.read_rows(spec.name, start, stop)).reshape(-1, spec.columns)
            # A scale beyond float16 shows in the error, and is refused by name.
            with np.errstate(over="ignore", invalid="ignore"):
                coded = None if planned.scheme.facts.family == "float" else rtn(weights, planned.scheme, mine)
                found = store_rows(weights, coded, planned.scheme)
            yield from found

    return store


def _copy_sidecars(source: FloatSource, folder: Path) -> None:
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
    for path in source.sidecars():
        with atomic_path(folder / path.name) as temporary:
            shutil.copyfile(path, temporary)


def _write_manifest(
    folder: Path, job: Mapping[str, object], request: Request, finished: Sequence[journal.FinishedFile]
) -> None:
    found = {record.spec.name: record for entry in finished for record in entry.records}
    records = [found[tensor.spec.name] for tensor in request.planned]
    sidecars = sorted((folder / SIDECAR).iterdir())
    fell_back = [record for record in records if record.wanted != record.scheme.grid]
    events = [
        f"{r.spec.name}: {r.wanted} does not divide rows of {r.spec.columns}, stored as {r.scheme}" for r in fell_back
    ]
    events += [f"{tensor.spec.name}: no importance given, plain search" for tensor in request.unweighted()]
    events += [*request.notes, *(event for entry in finished for event in entry.events)]
    coverage = {entry.file: list(entry.coverage) for entry in finished if entry.coverage}
    manifest: dict[str, object] = {
        **job,
        **({"expert_tokens": coverage} if coverage else {}),
        "events": events,
        "files": {
            **{entry.file: entry.sha256 for entry in finished},
            **{f"{SIDECAR}/{path.name}": sha256_file(path) for path in sidecars},
        },
        "tensors": [record.to_dict() for record in records],
    }
    write_json(folder / MANIFEST, manifest)
