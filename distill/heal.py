"""Healing: scales and norms of a finished checkpoint are trained on the float model's predictions; no code changes, no byte is added.

What was trained is rounded to what the format stores, measured in that form on text kept apart, and written only where the divergence
fell. Both models are in memory whole, and the gradients' way through one batch.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from r1q.core import journal
from r1q.core.checkpoint import JOB, JOURNAL, MANIFEST, QuantizedCheckpoint, stored_entry
from r1q.core.errors import CheckError, InputError
from r1q.core.files import atomic_path, sha256_file, write_json, writing
from r1q.core.grids import Bytes, bytes_to_floats, unpack
from r1q.core.recipe import PlannedTensor
from r1q.core.safetensors_file import write_safetensors
from r1q.core.tensors import TensorSpec
from r1q.distill.divergence import divergence_loss
from r1q.distill.network import Network, load_network
from r1q.distill.scales import changed_rows, load_healing
from r1q.distill.text import Text
from r1q.distill.train import Plan, Progress, distill, load_best, measure
from r1q.models.source import ModelSource


@dataclass(frozen=True, slots=True, kw_only=True)
class Healed:
    """What came of it: divergence in nats a token on the text kept apart, `before` and `after` as stored, and the new checkpoint."""

    folder: Path
    before: float
    after: float
    reached: Progress


def heal_checkpoint(
    checkpoint: QuantizedCheckpoint, source: ModelSource, text: Text, plan: Plan, folder: Path, work: Path
) -> Iterator[Progress | Healed]:
    """Write a healed copy of `checkpoint` into `folder`, yielding each measurement and at last what came of it.

    `work` holds the state of the training; a killed run goes on from it. Raises `InputError` where `source` is another model's or
    nothing can be healed, `CheckError` where the divergence did not fall (nothing is written then), `ResourceError` for a full disk.
    """
    _require_same_model(checkpoint, source)
    with writing(work):
        work.mkdir(parents=True, exist_ok=True)
    job = _job(checkpoint, source, text, plan)
    journal.open_job(work, job)
    network, changes = load_healing(checkpoint, source.config)
    teacher = load_network(
        source
    )  # in float32, and so is everything: what quantization cost is small beside the noise of 16 bits
    now = None
    for now in distill(divergence_loss(network, teacher), changes, text, plan, work):
        yield now
    assert now is not None
    load_best(work, changes)
    after = measure(divergence_loss(_as_stored(checkpoint, network, changes), teacher), text)
    if not after < now.first:
        raise CheckError(
            f"healing did not help: {now.first:.5f} nats a token before, {after:.5f} after, on text kept apart; nothing was written. "
            "Give more text, or a lower --lr"
        )
    note = f"healed: {now.first:.5f} to {after:.5f} nats a token on text kept apart, {now.best_step} steps"
    _write(checkpoint, source, changes, folder, {**job, "before": now.first, "after": after}, note)
    yield Healed(folder=folder, before=now.first, after=after, reached=now)


def _require_same_model(checkpoint: QuantizedCheckpoint, source: ModelSource) -> None:
    ours = {spec.name: spec.shape for spec in checkpoint.tensors}
    theirs = {spec.name: spec.shape for spec in source.tensors}
    if ours != theirs:
        raise InputError(f"{source.path} is not the model {checkpoint.path} was made from: their tensors differ")


def _job(checkpoint: QuantizedCheckpoint, source: ModelSource, text: Text, plan: Plan) -> dict[str, object]:
    return {
        "checkpoint": sha256_file(checkpoint.path / MANIFEST),
        "teacher": source.fingerprint(),
        "text": dict(text.record),
        "plan": asdict(plan),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def _as_stored(checkpoint: QuantizedCheckpoint, network: Network, changes: Mapping[str, Tensor]) -> Network:
    """Return the network with every tensor as a reader of the new file will find it."""
    tensors = {}
    for spec in checkpoint.tensors:
        stored = changed_rows(checkpoint, spec, changes)
        values = _values(
            checkpoint, spec, checkpoint.packed_rows(spec.name, 0, spec.rows) if stored is None else stored
        )
        tensors[spec.name] = torch.from_numpy(values).reshape(spec.shape)
    return Network(config=network.config, specs=network.specs, tensors=tensors)


def _values(
    checkpoint: QuantizedCheckpoint, spec: TensorSpec, stored: Bytes
) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    scheme = checkpoint.scheme(spec.name)
    if scheme.facts.family == "float":
        return np.array(bytes_to_floats(scheme.grid, stored))
    return unpack(scheme, stored, spec.columns).dequantize()


def _write(
    checkpoint: QuantizedCheckpoint,
    source: ModelSource,
    changes: Mapping[str, Tensor],
    folder: Path,
    healing: Mapping[str, object],
    note: str,
) -> None:
    """Write the new checkpoint: files that hold nothing changed are copied, the manifest comes last."""
    by_file: dict[str, list[TensorSpec]] = {}
    for record in checkpoint.records.values():
        by_file.setdefault(record.file, []).append(record.spec)
    records = {name: record.to_dict() for name, record in checkpoint.records.items()}
    with writing(folder):
        for path in sorted(checkpoint.path.rglob("*")):
            name = path.relative_to(checkpoint.path)
            if path.is_file() and name.name not in (*by_file, JOB, JOURNAL, MANIFEST):
                with atomic_path(folder / name) as temporary:
                    shutil.copyfile(path, temporary)
    for file, specs in by_file.items():
        entries = [stored_entry(_planned(checkpoint, spec)) for spec in specs]
        pieces = (_recorded(checkpoint, source, changes, spec, records) for spec in specs)
        write_safetensors(folder / file, entries, pieces, metadata={"format": "r1q"})
    job = json.loads((checkpoint.path / JOB).read_bytes()) | {"healing": dict(healing)}
    write_json(folder / JOB, job)
    files = checkpoint.manifest["files"]
    assert isinstance(files, Mapping)
    events = checkpoint.manifest.get("events")
    manifest = {
        **checkpoint.manifest,
        "healing": dict(healing),
        "events": [*(events if isinstance(events, list) else []), note],
        "files": {name: sha256_file(folder / name) for name in files},
        "tensors": list(records.values()),
    }
    write_json(folder / MANIFEST, manifest)


def _planned(checkpoint: QuantizedCheckpoint, spec: TensorSpec) -> PlannedTensor:
    record = checkpoint.records[spec.name]
    return PlannedTensor(spec=spec, scheme=record.scheme, wanted=record.wanted)


def _recorded(
    checkpoint: QuantizedCheckpoint,
    source: ModelSource,
    changes: Mapping[str, Tensor],
    spec: TensorSpec,
    records: dict[str, dict[str, object]],
) -> Bytes:
    """Return a tensor's stored bytes; where they are changed, enter their hash and their error against the float weights."""
    stored = changed_rows(checkpoint, spec, changes)
    if stored is None:
        return checkpoint.packed_rows(spec.name, 0, spec.rows)
    weights = source.read_rows(spec.name, 0, spec.rows).reshape(spec.rows, -1).astype(np.float64)
    off = _values(checkpoint, spec, stored).reshape(spec.rows, -1) - weights
    size = float(np.square(weights).sum())
    records[spec.name] |= {
        "sha256": hashlib.sha256(stored.tobytes()).hexdigest(),
        "error": math.sqrt(float(np.square(off).sum()) / size) if size else 0.0,
    }
    return stored
