"""QuantizedCheckpoint: our own form of a quantized model on disk; every export reads it and none changes it.

    job.json             what was asked, written first; a run with another job is refused
    journal.jsonl        one line a finished block file, appended and flushed
    source/              the model's config, tokenizer, chat template and generation defaults, byte for byte
    embedding.safetensors, block-00000.safetensors, …, head.safetensors
    manifest.json        written last: without it the checkpoint is unfinished
    permutations.safetensors  only where inputs were coded in order of activation (a GPTQ folder with g_idx): by weight, int32
                         [columns], which input each stored column is of; its sha256 is in the job's `origin`

A block file holds each tensor as stored rows: float grids under their own dtype [rows, columns], quantized ones as bytes
[rows, row_bytes] (for the block grids, exactly the bytes of a GGUF tensor). No time and no path enters any of these files.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from r1q.core.activations import ACTIVATIONS, Activations
from r1q.core.errors import InputError, UsageError
from r1q.core.files import is_bare_name, sha256_file
from r1q.core.grids import Bytes, bytes_to_floats, unpack
from r1q.core.qtensor import Floats, QuantizedTensor
from r1q.core.recipe import PlannedTensor
from r1q.core.safetensors_file import SafetensorsFile
from r1q.core.scheme import Scheme
from r1q.core.tensors import TensorSpec

FORMAT_VERSION = 1
JOB, JOURNAL, MANIFEST, SIDECAR = "job.json", "journal.jsonl", "manifest.json", "source"
PERMUTATIONS = "permutations.safetensors"
_MAX_MANIFEST_BYTES = 1 << 28
_STORED_DTYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRecord:
    """What the manifest says of one tensor. `error` is the relative root-mean-square error against the source (0 when kept)."""

    spec: TensorSpec
    scheme: Scheme
    wanted: str
    file: str
    sha256: str
    error: float

    def to_dict(self) -> dict[str, object]:
        """Return the record as JSON can hold it."""
        spec, scheme = self.spec, self.scheme
        expert = {} if spec.expert is None else {"expert": spec.expert}
        return {
            "name": spec.name, "kind": spec.kind, "layer": spec.layer, "part": spec.part,
            "shape": list(spec.shape), "dtype": spec.dtype,
            "grid": scheme.grid, "group_size": scheme.group_size, "symmetric": scheme.symmetric,
            "wanted": self.wanted, "file": self.file, "sha256": self.sha256, "error": self.error, **expert,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, value: Mapping[str, object]) -> TensorRecord:
        """Read a record back. Raises `KeyError`, `TypeError` or `ValueError` for a record that is not one."""
        layer, shape, group, expert = value["layer"], value["shape"], value["group_size"], value.get("expert")
        if not isinstance(shape, list) or not shape or not all(type(side) is int and side > 0 for side in shape):
            raise ValueError("shape is not a list of lengths")
        if not (layer is None or type(layer) is int) or not (group is None or type(group) is int):
            raise ValueError("layer or group_size is not a number")
        if not (expert is None or (type(expert) is int and expert >= 0)):
            raise ValueError("expert is not an index")
        file, error = _text(value, "file"), value["error"]
        if not is_bare_name(file) or file.startswith("."):
            raise ValueError("file is not the name of a block file")
        if not isinstance(error, float | int) or not 0 <= error <= sys.float_info.max:
            raise ValueError("error is not a number")
        texts = {key: _text(value, key) for key in ("name", "kind", "part", "dtype")}
        try:
            scheme = Scheme(grid=_text(value, "grid"), group_size=group, symmetric=value["symmetric"] is True)
        except UsageError as unknown:
            raise ValueError(str(unknown)) from unknown
        if not scheme.divides(shape[-1]):
            raise ValueError(f"rows of {shape[-1]} do not split into blocks of {scheme}")
        return cls(
            spec=TensorSpec(layer=layer, shape=tuple(shape), expert=expert, **texts),
            scheme=scheme,
            wanted=_text(value, "wanted"),
            file=file,
            sha256=_text(value, "sha256"),
            error=float(error),
        )


def _text(value: Mapping[str, object], key: str) -> str:
    text = value[key]
    if not isinstance(text, str):
        raise TypeError(f"{key} is not text")
    return text


def stored_entry(planned: PlannedTensor) -> tuple[str, str, tuple[int, ...]]:
    """Return the (name, dtype, shape) under which a block file stores a tensor."""
    spec, scheme = planned.spec, planned.scheme
    if scheme.facts.family == "float":
        return spec.name, _STORED_DTYPES[scheme.grid], spec.shape
    return spec.name, "U8", (spec.rows, scheme.row_bytes(spec.columns))


@dataclass(frozen=True, slots=True)
class QuantizedCheckpoint:
    """A finished checkpoint, opened lazily: headers and manifest now, rows when asked for."""

    path: Path
    manifest: Mapping[str, object]
    records: Mapping[str, TensorRecord]
    _files: dict[str, SafetensorsFile] = field(default_factory=dict)
    _orders: dict[str, NDArray[np.int32]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> QuantizedCheckpoint:
        """Open a checkpoint folder. Raises `InputError` when it is unfinished, damaged or not one."""
        manifest_path = path / MANIFEST
        if not manifest_path.is_file():
            unfinished = (path / JOB).is_file()
            hint = "it is unfinished: run the same r1q quantize again" if unfinished else "r1q quantize makes one"
            raise InputError(f"{path} is not a finished r1q checkpoint (no {MANIFEST}); {hint}")
        if manifest_path.stat().st_size > _MAX_MANIFEST_BYTES:
            raise InputError(f"{manifest_path} is larger than a manifest can be")
        try:
            manifest = json.loads(manifest_path.read_bytes())
            if manifest["format"] != FORMAT_VERSION:
                raise InputError(f"{path} has format {manifest['format']}; this r1q reads {FORMAT_VERSION}")
            records = [TensorRecord.from_dict(value) for value in manifest["tensors"]]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{manifest_path} is damaged ({error}); quantize again") from error
        return cls(path, manifest, {record.spec.name: record for record in records})

    @property
    def sidecar(self) -> Path:
        """The folder with the source's config, tokenizer and templates, byte for byte."""
        return self.path / SIDECAR

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """Every tensor in model order."""
        return tuple(record.spec for record in self.records.values())

    @property
    def recipe_name(self) -> str:
        """The recipe's label, such as `q4_k_m`."""
        recipe = self.manifest.get("recipe")
        return str(recipe.get("name", "")) if isinstance(recipe, Mapping) else ""

    @property
    def model_name(self) -> str:
        """The source model's name, as the folder or id it came from was called."""
        return str(self.manifest.get("model", "model"))

    @property
    def activations(self) -> Activations | None:
        """How inputs of linear layers are spelled in 8 bits; None where only weights are. Raises `InputError` when damaged."""
        path = self.sidecar / ACTIVATIONS
        return Activations.read(path) if path.is_file() else None

    @property
    def permutations_sha256(self) -> str | None:
        """The sha256 that the file of permutations had when it was written; None where there is none."""
        origin = self.manifest.get("origin")
        digest = origin.get("permutations") if isinstance(origin, Mapping) else None
        return None if digest is None else str(digest)

    def spec(self, name: str) -> TensorSpec:
        """Return one tensor's facts."""
        return self.records[name].spec

    def scheme(self, name: str) -> Scheme:
        """Return one tensor's scheme."""
        return self.records[name].scheme

    def packed_rows(self, name: str, start: int, stop: int) -> Bytes:
        """Return stored rows [stop − start, row_bytes] as bytes; a vector is one row.

        Raises `InputError` when the block file is damaged.
        """
        record = self.records[name]
        file = self._file(record.file)
        entry = file.tensors.get(name)
        row_bytes = record.scheme.row_bytes(record.spec.columns)
        planned = PlannedTensor(spec=record.spec, scheme=record.scheme, wanted=record.wanted)
        if entry is None or (entry.dtype, entry.shape) != stored_entry(planned)[1:]:
            raise InputError(
                f"{self.path / record.file}: tensor {name} is missing or has another size than the manifest says"
            )
        if record.spec.rows == 1:
            return np.ascontiguousarray(file.read(name)).view(np.uint8).reshape(1, row_bytes)[start:stop]
        return np.ascontiguousarray(file.read_rows(name, start, stop)).view(np.uint8).reshape(stop - start, row_bytes)

    def permutation(self, name: str) -> NDArray[np.int32] | None:
        """Return which input each stored column of a weight is of [columns], None where columns stand in order.

        Raises `InputError` where the file of permutations is damaged or gone.
        """
        if self.permutations_sha256 is not None and not (self.path / PERMUTATIONS).is_file():
            raise InputError(f"{self.path / PERMUTATIONS} is missing: nobody knows the order of columns; import again")
        if not self._orders and (self.path / PERMUTATIONS).is_file():
            file = SafetensorsFile.open(self.path / PERMUTATIONS)
            for weight in file.tensors:
                order = file.read(weight)
                columns = self.records[weight].spec.columns if weight in self.records else 0
                if order.dtype != np.int32 or order.ndim != 1 or not np.array_equal(np.sort(order), np.arange(columns)):
                    raise InputError(f"{file.path}: {weight} is no order of {columns} inputs; import the folder again")
                self._orders[weight] = order
        return self._orders.get(name)

    def read(self, name: str, start: int, stop: int, *, in_order: bool = True) -> QuantizedTensor:
        """Return rows of a quantized tensor as codes and params.

        A tensor with a permutation is refused with `UsageError` unless `in_order` is False: the caller then minds the order itself.
        """
        if in_order and self.permutation(name) is not None:
            raise UsageError(
                f"{name}: its inputs are coded in order of activation, which only an ONNX file can hold: --to onnx"
            )
        record = self.records[name]
        return unpack(record.scheme, self.packed_rows(name, start, stop), record.spec.columns)

    def read_rows(self, name: str, start: int, stop: int) -> Floats:
        """Return rows as float32 values [stop − start, columns] (a vector: [length]), dequantized where they are codes; in order."""
        record = self.records[name]
        if record.scheme.facts.family != "float":
            values, order = self.read(name, start, stop, in_order=False).dequantize(), self.permutation(name)
            if order is None:
                return values
            ordered = np.empty_like(values)
            ordered[:, order] = values
            return ordered
        values = bytes_to_floats(record.scheme.grid, self.packed_rows(name, start, stop))
        return values.reshape(-1) if len(record.spec.shape) == 1 else values

    def damaged_files(self) -> list[str]:
        """Return the block files whose sha256 is not the manifest's."""
        files = self.manifest.get("files")
        listed = files if isinstance(files, Mapping) else {}
        return [
            n for n, digest in listed.items() if not (self.path / n).is_file() or sha256_file(self.path / n) != digest
        ]

    def _file(self, name: str) -> SafetensorsFile:
        if name not in self._files:
            self._files.clear()  # one block file mapped at a time
            self._files[name] = SafetensorsFile.open(self.path / name)
        return self._files[name]
