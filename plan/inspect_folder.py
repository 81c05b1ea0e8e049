"""A folder of safetensors: a float checkpoint, or one quantized as its config.json says (GPTQ, AWQ, FP8, …); or a single file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1q.core.errors import InputError
from r1q.core.safetensors_file import Entry, SafetensorsFile
from r1q.models.config import read_json
from r1q.models.source import INDEX, SINGLE, contained
from r1q.plan.inspection import Inspection, ModelFacts, Shown, TensorRow
from r1q.plan.model_facts import read_config, read_facts, shown_config

_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
# Endings of tensors that belong to another one's numbers, in folders that say they are quantized.
_COMPANIONS = ("_scale", "_scale_inv", "_zero_point", "_scale_2", ".g_idx", ".absmax", ".quant_map", "_shape")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Packed:
    """How a quantization packs a layer: its `method`, and bits and group from config.json (None: not stated)."""

    method: str
    bits: int | None
    group: int | None
    symmetric: bool


def inspect_folder(folder: Path) -> Inspection:
    """Return what a Hugging Face folder holds. Raises `InputError` for missing or damaged weights and unreadable settings."""
    files = _weight_files(folder)
    entries = {name: entry for file in files for name, entry in file.tensors.items()}
    config = read_config(folder)
    quantization = config.get("quantization_config")
    packed = _packed(quantization) if isinstance(quantization, Mapping) else None
    rows = tuple(_rows(entries, packed))
    names = frozenset(row.name for row in rows)
    metadata = {**shown_config(config), **{f"{f.path.name}.{k}": v for f in files[:1] for k, v in f.metadata.items()}}
    return Inspection(
        path=folder,
        format=f"{packed.method} (safetensors)" if packed else "safetensors (float)",
        model=read_facts(folder, names),
        tensors=rows,
        file_bytes=sum(file.path.stat().st_size for file in files),
        metadata=metadata,
        made_by=tuple(_made_by(config)),
        notes=tuple(_notes(folder, rows, files)),
    )


def inspect_safetensors(path: Path) -> Inspection:
    """Return what one safetensors file holds, without the settings that may lie beside it."""
    file = SafetensorsFile.open(path)
    metadata: dict[str, Shown] = dict(file.metadata)
    model = ModelFacts(
        architecture="unknown", context=None, vocabulary=None, sizes={}, tied=None, chat_template=None
    )  # a file of weights says none of this
    return Inspection(
        path=path,
        format="safetensors (one file)",
        model=model,
        tensors=tuple(_rows(file.tensors, None)),
        file_bytes=path.stat().st_size,
        metadata=metadata,
        notes=("a file of weights alone: give its folder to see the model's settings too",),
    )


def _weight_files(folder: Path) -> list[SafetensorsFile]:
    if (folder / SINGLE).is_file():
        names = [SINGLE]
    elif (folder / INDEX).is_file():
        table = read_json(contained(folder, INDEX)).get("weight_map")
        if not isinstance(table, Mapping) or not all(isinstance(name, str) for name in table.values()):
            raise InputError(f"{folder / INDEX}: weight_map does not map tensor names to file names; fetch it again")
        names = sorted(set(table.values()))
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
    absent = [name for name in names if not contained(folder, name).is_file()]
    if absent:
        raise InputError(f"{folder / absent[0]} is missing, though {INDEX} names it; fetch the shard")
    return [SafetensorsFile.open(contained(folder, name)) for name in names]


def _packed(quantization: Mapping[str, Any]) -> _Packed:
    def number(*keys: str) -> int | None:
        found = next((quantization[key] for key in keys if key in quantization), None)
        return found if type(found) is int else None

    symmetric = quantization.get("sym", not quantization.get("zero_point", False))
    return _Packed(
        method=str(quantization.get("quant_method", "quantized, by an unnamed method")),
        bits=number("bits", "w_bit"),
        group=number("group_size", "q_group_size"),
        symmetric=symmetric is True,
    )


def _rows(entries: Mapping[str, Entry], packed: _Packed | None) -> Iterator[TensorRow]:
    """Yield a row for each tensor; the parts of a GPTQ or AWQ layer make one row under the weight's own name."""
    layers = {name.removesuffix("qweight") for name in entries if packed and name.endswith(".qweight")}
    for name, entry in entries.items():
        stem, _, part = name.rpartition(".")
        if f"{stem}." in layers and part in _PARTS:
            if part == "qweight" and packed:
                yield _layer_row(f"{stem}.", entries, packed)
            continue
        yield TensorRow(
            name=name,
            grid=entry.dtype.lower(),
            shape=entry.shape,
            weights=_weights(name, entry, packed),
            bytes=_size(entry),
        )


def _layer_row(stem: str, entries: Mapping[str, Entry], packed: _Packed) -> TensorRow:
    parts = [entries[stem + part] for part in _PARTS if stem + part in entries]
    words, scales, order = (entries.get(stem + part) for part in ("qweight", "scales", "g_idx"))
    bits, shape = packed.bits, words.shape if words else ()
    # Codes are packed along the inputs by GPTQ (rows of words) and along the outputs by AWQ (columns).
    if len(shape) == 2 and packed.method == "gptq":
        inputs = order.shape[0] if order and order.shape and order.shape[0] else shape[0] * 32 // (bits or 32)
        bits, shape = shape[0] * 32 // inputs, (shape[1], inputs)
    elif len(shape) == 2 and bits:
        shape = (shape[1] * 32 // bits, shape[0])
    else:
        bits = None
    group = packed.group
    if bits and scales and len(scales.shape) == 2 and scales.shape[0]:
        group = shape[1] // scales.shape[0]
    grid = f"int{bits} g{group}{'' if packed.symmetric else ' asym'}" if bits else f"{packed.method} packed"
    size = math.prod(shape) if bits else None
    return TensorRow(name=f"{stem}weight", grid=grid, shape=shape, weights=size, bytes=sum(map(_size, parts)))


def _weights(name: str, entry: Entry, packed: _Packed | None) -> int | None:
    if entry.dtype in _FLOATS and not (packed and name.endswith(_COMPANIONS)):
        return math.prod(entry.shape)
    if packed is None or name.endswith(_COMPANIONS):
        return 0  # a buffer, or numbers that serve another tensor
    return None


def _size(entry: Entry) -> int:
    return entry.stop - entry.start


def _made_by(config: Mapping[str, Any]) -> Iterator[str]:
    quantization = config.get("quantization_config")
    if isinstance(quantization, Mapping):
        meta = quantization.get("meta")
        quantizer = meta.get("quantizer") if isinstance(meta, Mapping) else None
        makers = quantizer if isinstance(quantizer, list) else [quantizer] if quantizer else []
        for maker in [quantization.get("provider"), *makers]:
            if isinstance(maker, str):
                yield maker.replace(":", " ", 1)
    if isinstance(config.get("transformers_version"), str):
        yield f"settings written by transformers {config['transformers_version']}"


def _notes(folder: Path, rows: tuple[TensorRow, ...], files: list[SafetensorsFile]) -> Iterator[str]:
    if not (folder / "config.json").is_file():
        yield "there is no config.json: what model this is cannot be told"
    unknown = sum(row.weights is None for row in rows)
    if unknown:
        yield f"the number of weights is not told for {unknown} of the tensors: their packing is not in the header"
    if len(files) > 1:
        yield f"{len(files)} files of weights"
