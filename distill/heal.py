"""Healing: scales and norms of a finished checkpoint are trained on the float model's predictions; no code changes, no byte is added.

What was trained is rounded to what the format stores, measured in that form on text kept apart, and written only where the divergence
fell. The float model passes once, block by block; the quantized one is in memory whole, a byte a weight and its scales, with a batch's
states between its blocks.
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
from r1q.core.qtensor import Floats
from r1q.core.recipe import PlannedTensor
from r1q.core.safetensors_file import write_safetensors
from r1q.core.tensors import TensorSpec
from r1q.distill.frozen_heads import FrozenHeads, divergence_of_states
from r1q.distill.network import product_dtype
from r1q.distill.scales import changed_rows, load_healing
from r1q.distill.teacher import Truth, read_head, teacher_states
from r1q.distill.text import Text
from r1q.distill.train import Plan, Progress, distill, load_best
from r1q.models.config import ModelConfig
from r1q.models.forward import final_states
from r1q.models.source import ModelSource

TRUTH = "truth.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Healed:
    """What came of it: divergence in nats a token on the text kept apart, `before` and `after` as stored, and the new checkpoint."""

    folder: Path
    before: float
    after: float
    reached: Progress

    @property
    def helped(self) -> bool:
        """Whether the divergence fell."""
        return self.after < self.before

    @property
    def told(self) -> str:
        """The line for a manifest."""
        how = f"{self.before:.5f} to {self.after:.5f} nats a token on text kept apart, {self.reached.best_step} steps"
        return f"healed: {how}" if self.helped else f"healing did not help: {how}"


def heal_checkpoint(
    checkpoint: QuantizedCheckpoint,
    source: ModelSource,
    text: Text,
    plan: Plan,
    folder: Path,
    work: Path,
    *,
    always: bool = False,
) -> Iterator[Progress | Healed]:
    """Write a healed copy of `checkpoint` into `folder`, yielding each measurement and at last what came of it.

    `work` holds the state of the training; a killed run goes on from it. Where the divergence did not fall nothing is written and
    `CheckError` raised; with `always` the copy is then one of the checkpoint as it is, with an event that says so. Raises
    `InputError` where `source` is another model's or nothing can be healed, `ResourceError` for a full disk.
    """
    _require_same_model(checkpoint, source)
    with writing(work):
        work.mkdir(parents=True, exist_ok=True)
    dtype = product_dtype()
    job = _job(checkpoint, source, text, plan, dtype)
    journal.open_job(work, job)
    truth = teacher_states(source, text, work / TRUTH)
    network, changes = load_healing(checkpoint, source.config, matrices=dtype)
    heads = FrozenHeads(network.head, read_head(source, dtype))

    def loss(tokens: Tensor, weights: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            states = network.hidden(tokens, lean=True)
        return divergence_of_states(states.flatten(0, 1), truth(tokens).flatten(0, 1), heads, weights.flatten())

    now = None
    for now in distill(loss, changes, text, plan, work):
        yield now
    assert now is not None
    load_best(work, changes)
    before, after = (
        _divergence(_Stored(checkpoint, source.config, moved), truth, heads, text) for moved in ({}, changes)
    )
    reached = Healed(folder=folder, before=before, after=after, reached=now)
    if not reached.helped:
        if not always:
            raise CheckError(f"{reached.told}; nothing was written. Give more text, or a lower --lr")
        changes = {}
    _write(checkpoint, source, changes, folder, {**job, "before": before, "after": after}, reached.told)
    yield reached


def _require_same_model(checkpoint: QuantizedCheckpoint, source: ModelSource) -> None:
    ours = {spec.name: spec.shape for spec in checkpoint.tensors}
    theirs = {spec.name: spec.shape for spec in source.tensors}
    if ours != theirs:
        raise InputError(f"{source.path} is not the model {checkpoint.path} was made from: their tensors differ")


def _job(
    checkpoint: QuantizedCheckpoint, source: ModelSource, text: Text, plan: Plan, dtype: torch.dtype
) -> dict[str, object]:
    return {
        "checkpoint": sha256_file(checkpoint.path / MANIFEST),
        "teacher": source.fingerprint(),
        "text": dict(text.record),
        "plan": asdict(plan),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "compute": str(dtype).rpartition(".")[2],
    }


@dataclass(frozen=True, slots=True)
class _Stored:
    """A checkpoint as a reader of the file that is made of it under `changes` will find it."""

    checkpoint: QuantizedCheckpoint
    config: ModelConfig
    changes: Mapping[str, Tensor]

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """Every tensor of the model."""
        return self.checkpoint.tensors

    def read_rows(self, name: str, start: int, stop: int) -> Floats:
        """Return rows [start, stop) in float32."""
        spec = self.checkpoint.spec(name)
        stored = changed_rows(self.checkpoint, spec, self.changes)
        if stored is None:
            return self.checkpoint.read_rows(name, start, stop)
        return _values(self.checkpoint, spec, stored)[start:stop]


def _divergence(reader: _Stored, truth: Truth, heads: FrozenHeads, text: Text) -> float:
    """Return the divergence on the text kept apart, in nats a token, of a forward pass in float32."""
    total = count = 0.0
    for tokens, weights in text.validation():
        states = torch.from_numpy(final_states(reader, tokens.numpy())).flatten(0, 1)
        found = divergence_of_states(states, truth(tokens).flatten(0, 1), heads, weights.flatten())
        total += float(found) * float(weights.sum())
        count += float(weights.sum())
    return total / count


def _values(checkpoint: QuantizedCheckpoint, spec: TensorSpec, stored: Bytes) -> Floats:
    """Return the values of all rows [rows, columns] as `stored`."""
    scheme = checkpoint.scheme(spec.name)
    if scheme.facts.family == "float":
        return bytes_to_floats(scheme.grid, stored)
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
