"""A written GPTQ folder against its checkpoint: codes, scales and floats of model.safetensors, and the files beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from r1q.core.checkpoint import QuantizedCheckpoint
from r1q.core.errors import InputError, UsageError
from r1q.core.files import sha256_file
from r1q.core.formats import as_integers, gptq_scheme
from r1q.core.recipe import PlannedTensor
from r1q.core.safetensors_file import SafetensorsFile
from r1q.core.scheme import Scheme
from r1q.core.tensors import TensorSpec
from r1q.export.gptq import CONFIG, WEIGHTS, read_linear
from r1q.export.verified import Defect, Verified

SLAB_WEIGHTS = 1 << 22
_PARTS = ("qweight", "qzeros", "scales", "g_idx")


def verify_gptq(checkpoint: QuantizedCheckpoint, folder: Path) -> Verified:
    """Return every way in which the GPTQ folder is not what `checkpoint` holds; notes say what float16 rounded."""
    try:
        file = SafetensorsFile.open(folder / WEIGHTS)
        records = checkpoint.records.values()
        scheme = gptq_scheme(PlannedTensor(spec=r.spec, scheme=r.scheme, wanted=r.wanted) for r in records)
        defects = [*_setting_defects(checkpoint, folder, scheme), *_name_defects(checkpoint, file)]
    except (InputError, UsageError) as error:
        unreadable = Defect(where=folder.name, what=str(error), unreadable=True)
        return Verified(format="gptq", path=folder, files=0, tensors=0, defects=(unreadable,))
    rounding: dict[str, float] = {}
    compared = 0
    for spec in checkpoint.tensors:
        if not set(_stored_names(spec)) <= set(file.tensors):
            continue
        compared += 1
        try:
            found = (
                _linear_defect(checkpoint, file, spec) if _packed(spec) else _floats(checkpoint, file, spec, rounding)
            )
        except InputError as error:
            found = Defect(where=spec.name, what=str(error).removeprefix(f"{file.path}: "), difference=math.inf)
        defects += [found] if found is not None else []
    notes = tuple(f"{what} rounded to float16, by up to {by:.2g}" for what, by in rounding.items() if by)
    return Verified(format="gptq", path=folder, files=0, tensors=compared, defects=tuple(defects), notes=notes)


def _packed(spec: TensorSpec) -> bool:
    return spec.layer is not None and spec.is_matrix


def _stored_names(spec: TensorSpec) -> list[str]:
    return [spec.name.removesuffix("weight") + part for part in _PARTS] if _packed(spec) else [spec.name]


def _name_defects(checkpoint: QuantizedCheckpoint, file: SafetensorsFile) -> Iterator[Defect]:
    expected = {name for spec in checkpoint.tensors for name in _stored_names(spec)}
    for name in sorted(expected - set(file.tensors)):
        yield Defect(where=name, what=f"is missing in {WEIGHTS}", difference=math.inf)
    for name in sorted(set(file.tensors) - expected):
        yield Defect(where=name, what=f"is in {WEIGHTS}, but the checkpoint has no such tensor", difference=math.inf)


def _setting_defects(checkpoint: QuantizedCheckpoint, folder: Path, scheme: Scheme) -> Iterator[Defect]:
    """Yield what config.json says otherwise than the model's own, and files that are not the model's own."""
    ours, source = _json(folder / CONFIG), _json(checkpoint.sidecar / CONFIG)
    stated = ours.pop("quantization_config", None)
    wanted = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": scheme.facts.bits,
        "group_size": scheme.group_size,
        "desc_act": False,
        "sym": True,
    }
    for key, value in wanted.items():
        have = stated.get(key) if isinstance(stated, Mapping) else None
        if have != value or type(have) is not type(value):
            yield Defect(where=f"{CONFIG}: quantization_config.{key}", what=f"is {have!r}, the weights are {value!r}")
    for key in sorted({*ours, *source} - {"dtype", "torch_dtype"}):
        if ours.get(key) != source.get(key):
            yield Defect(
                where=f"{CONFIG}: {key}", what=f"is {ours.get(key)!r}, the model's own says {source.get(key)!r}"
            )
    for path in sorted(checkpoint.sidecar.iterdir()):
        copy = folder / path.name
        if path.name != CONFIG and not (copy.is_file() and sha256_file(copy) == sha256_file(path)):
            yield Defect(
                where=path.name, what="is not byte for byte the model's own" if copy.is_file() else "is missing"
            )


def _json(path: Path) -> dict[str, object]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a JSON object")
    return value


def _linear_defect(checkpoint: QuantizedCheckpoint, file: SafetensorsFile, spec: TensorSpec) -> Defect | None:
    """Compare one layer's codes and scales, unpacked from the written words, with the checkpoint's."""
    scheme = as_integers(checkpoint.scheme(spec.name))
    if scheme is None:
        raise InputError(f"the checkpoint holds {checkpoint.scheme(spec.name)}, no symmetric integers")
    codes, scales = read_linear(file, spec.name, scheme, spec.shape)
    want = checkpoint.read(spec.name, 0, spec.rows)
    want_scales = want.params["scales" if "scales" in want.params else "d"].astype(np.float32)
    wrong_codes, wrong_scales = int((codes != want.codes).sum()), _different(scales, want_scales)
    if not wrong_codes and not wrong_scales:
        return None
    with np.errstate(invalid="ignore", over="ignore"):
        centred = codes.astype(np.float32) - np.float32(1 << (scheme.facts.bits - 1))
        have = centred * np.repeat(scales, scheme.group(spec.columns), axis=1)
        largest = float(np.nan_to_num(np.abs(have - want.dequantize()), nan=np.inf).max(initial=0.0))
    return Defect.of_counts(spec.name, {"code": wrong_codes, "stored scale": wrong_scales}, largest)


def _floats(
    checkpoint: QuantizedCheckpoint, file: SafetensorsFile, spec: TensorSpec, rounding: dict[str, float]
) -> Defect | None:
    """Compare a float16 tensor with the checkpoint's values rounded to float16; add what the rounding cost to `rounding`."""
    entry = file.tensors[spec.name]
    if entry.dtype != "F16" or entry.shape != spec.shape:
        raise InputError(f"is {entry.dtype} {list(entry.shape)}, not F16 {list(spec.shape)}")
    scheme = checkpoint.scheme(spec.name)
    family = "8-bit values" if scheme.grid == "q8_0" else f"{scheme} values"
    what = f"embedding and head: {family}" if spec.layer is None and spec.is_matrix else "norms and biases:"
    wrong, largest = 0, 0.0
    step = max(1, SLAB_WEIGHTS // spec.columns) if spec.is_matrix else 1
    for start in range(0, spec.rows, step):
        stop = min(start + step, spec.rows)
        want = checkpoint.read_rows(spec.name, start, stop)
        have = file.read_rows(spec.name, start, stop) if spec.is_matrix else file.read(spec.name)
        with np.errstate(invalid="ignore", over="ignore"):
            rounded = want.astype(np.float16)
            wrong += _different(have, rounded)
            distance = np.abs(have.astype(np.float32) - rounded.astype(np.float32))
            largest = max(largest, float(np.nan_to_num(distance, nan=np.inf).max(initial=0.0)))
            rounding[what] = max(
                rounding.get(what, 0.0), float(np.abs(rounded.astype(np.float32) - want).max(initial=0.0))
            )
    return Defect.of_counts(spec.name, {"value": wrong}, largest)


def _different(have: NDArray[np.generic], want: NDArray[np.generic]) -> int:
    kind = np.dtype(f"u{want.dtype.itemsize}")
    return int((np.ascontiguousarray(have).view(kind) != np.ascontiguousarray(want).view(kind)).sum())
