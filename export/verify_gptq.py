"""A written GPTQ folder against its checkpoint: codes, scales and floats of its weight files, and the files beside them."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from r1q.core.checkpoint import QuantizedCheckpoint
from r1q.core.errors import InputError, UsageError
from r1q.core.files import sha256_file
from r1q.core.formats import as_integers, gptq_packs, gptq_scheme
from r1q.core.grids import to_bfloat16
from r1q.core.hf_folder import open_weights
from r1q.core.qtensor import Floats
from r1q.core.recipe import KV_B_HALVES, PlannedTensor
from r1q.core.safetensors_file import SafetensorsFile
from r1q.core.scheme import Scheme
from r1q.core.tensors import TensorSpec
from r1q.export.gptq import CONFIG, read_linear
from r1q.export.verified import Defect, Verified

SLAB_WEIGHTS = 1 << 22
WEIGHTS = "the folder's weight files"
_WIDE = {"F16": "float16", "BF16": "bfloat16"}
_PARTS = ("qweight", "qzeros", "scales", "g_idx")


def verify_gptq(checkpoint: QuantizedCheckpoint, folder: Path) -> Verified:
    """Return every way in which the GPTQ folder is not what `checkpoint` holds; notes say what float16 rounded."""
    try:
        files = open_weights(folder)
        records = checkpoint.records.values()
        scheme = gptq_scheme(PlannedTensor(spec=r.spec, scheme=r.scheme, wanted=r.wanted) for r in records)
        defects = [*_setting_defects(checkpoint, folder, scheme), *_name_defects(checkpoint, files)]
    except (InputError, UsageError) as error:
        unreadable = Defect(where=folder.name, what=str(error), unreadable=True)
        return Verified(format="gptq", path=folder, files=0, tensors=0, defects=(unreadable,))
    rounding: dict[str, float] = {}
    compared = 0
    for spec in checkpoint.tensors:
        names = _stored_names(checkpoint, spec)
        if not set(names) <= set(files):
            continue
        compared += 1
        file = files[names[0]]
        try:
            if spec.kind in KV_B_HALVES:
                found = _half(checkpoint, file, names[0], spec)
            elif _packed(checkpoint, spec):
                found = _linear_defect(checkpoint, file, spec)
            else:
                found = _floats(checkpoint, file, spec, rounding)
        except InputError as error:
            found = Defect(where=spec.name, what=str(error).removeprefix(f"{file.path}: "), difference=math.inf)
        defects += [found] if found is not None else []
    notes = [
        f"{what} rounded to {_WIDE[_float_dtype(checkpoint)]}, by up to {by:.2g}" for what, by in rounding.items() if by
    ]
    notes += _excepted(checkpoint)
    return Verified(format="gptq", path=folder, files=0, tensors=compared, defects=tuple(defects), notes=tuple(notes))


def _packed(checkpoint: QuantizedCheckpoint, spec: TensorSpec) -> bool:
    return gptq_packs(spec, checkpoint.scheme(spec.name))


def _float_dtype(checkpoint: QuantizedCheckpoint) -> str:
    return "BF16" if any(spec.kind in KV_B_HALVES for spec in checkpoint.tensors) else "F16"


def _excepted(checkpoint: QuantizedCheckpoint) -> Iterator[str]:
    """Yield a line that lists the matrices inside of the blocks which are not coded, by module."""
    names = (
        _stored_names(checkpoint, spec)[0]
        for spec in checkpoint.tensors
        if spec.layer is not None and spec.is_matrix and not _packed(checkpoint, spec)
    )
    counts = Counter(name.removesuffix(".weight").split(".", 3)[-1] for name in dict.fromkeys(names))
    if counts:
        dtype = _WIDE[_float_dtype(checkpoint)]
        yield f"excepted, in {dtype}: " + ", ".join(f"{count} × {module}" for module, count in counts.items())


def _stored_names(checkpoint: QuantizedCheckpoint, spec: TensorSpec) -> list[str]:
    if spec.kind in KV_B_HALVES:
        return [f"model.layers.{spec.layer}.self_attn.kv_b_proj.weight"]
    return [spec.name.removesuffix("weight") + part for part in _PARTS] if _packed(checkpoint, spec) else [spec.name]


def _name_defects(checkpoint: QuantizedCheckpoint, files: Mapping[str, SafetensorsFile]) -> Iterator[Defect]:
    expected = {name for spec in checkpoint.tensors for name in _stored_names(checkpoint, spec)}
    for name in sorted(expected - set(files)):
        yield Defect(where=name, what=f"is missing in {WEIGHTS}", difference=math.inf)
    for name in sorted(set(files) - expected):
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
    dynamic = stated.get("dynamic", {}) if isinstance(stated, Mapping) else {}
    uncovered = sorted(_uncovered(checkpoint, dynamic))
    if uncovered:
        what = (
            f"does not except {uncovered[0]}, which is stored as floats"
            if dynamic
            else "is missing: some layers are floats"
        )
        yield Defect(where=f"{CONFIG}: quantization_config.dynamic", what=what)
    # The source's own quantization_config, of 8-bit floats, is no longer true of these weights.
    for key in sorted({*ours, *source} - {"dtype", "torch_dtype", "quantization_config"}):
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


def _uncovered(checkpoint: QuantizedCheckpoint, dynamic: object) -> set[str]:
    """Return the modules that are floats and that no pattern excepts, or codes and one does."""
    patterns = [str(key).removeprefix("-:") for key in dynamic] if isinstance(dynamic, Mapping) else []
    wrong = set()
    for spec in checkpoint.tensors:
        if spec.layer is not None and spec.is_matrix:
            module = _stored_names(checkpoint, spec)[0].rpartition(".")[0]
            if any(re.match(pattern, module) for pattern in patterns) == _packed(checkpoint, spec):
                wrong.add(module)
    return wrong


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


def _half(checkpoint: QuantizedCheckpoint, file: SafetensorsFile, name: str, spec: TensorSpec) -> Defect | None:
    """Compare k_b or v_b with its part of kv_b_proj: in each head's rows keys come first, transposed here, then values."""
    sizes = {one.kind: one.shape for one in checkpoint.tensors if one.layer == spec.layer}
    (key_rows, key_dim), (value_rows, rank) = (sizes[kind] for kind in KV_B_HALVES)
    heads = key_rows // rank
    entry, wanted = file.tensors[name], (heads * key_dim + value_rows, rank)
    if (entry.dtype, entry.shape) != ("BF16", wanted):
        raise InputError(f"is {entry.dtype} {list(entry.shape)} in {name}, not BF16 {list(wanted)}")
    whole = (file.read(name).astype(np.uint32) << 16).view(np.float32).reshape(heads, -1, rank)
    if spec.kind == KV_B_HALVES[0]:
        have = np.ascontiguousarray(whole[:, :key_dim].swapaxes(1, 2)).reshape(spec.shape)
    else:
        have = np.ascontiguousarray(whole[:, key_dim:]).reshape(spec.shape)
    want = _rounded(checkpoint.read_rows(spec.name, 0, spec.rows), "BF16")
    largest = float(np.abs(have - want).max(initial=0.0))
    return Defect.of_counts(spec.name, {"value": _different(have, want)}, largest)


def _rounded(values: Floats, dtype: str) -> Floats:
    """Return values rounded to a dtype, in float32."""
    if dtype == "BF16":
        return (to_bfloat16(values).astype(np.uint32) << 16).view(np.float32).reshape(values.shape)
    return values.astype(np.float16).astype(np.float32) if dtype == "F16" else values


def _widened(stored: NDArray[np.generic]) -> Floats:
    wide = (stored.astype(np.uint32) << 16).view(np.float32) if stored.dtype == np.uint16 else stored
    return wide.astype(np.float32)


def _floats(
    checkpoint: QuantizedCheckpoint, file: SafetensorsFile, spec: TensorSpec, rounding: dict[str, float]
) -> Defect | None:
    """Compare a float tensor with the checkpoint's values rounded to its dtype; add what the rounding cost to `rounding`."""
    entry = file.tensors[spec.name]
    dtype = "F32" if spec.kind == "exp_probs_b" else _float_dtype(checkpoint)
    if entry.dtype != dtype or entry.shape != spec.shape:
        raise InputError(f"is {entry.dtype} {list(entry.shape)}, not {dtype} {list(spec.shape)}")
    scheme = checkpoint.scheme(spec.name)
    family = "8-bit values" if scheme.grid == "q8_0" else f"{scheme} values"
    if spec.layer is not None and spec.is_matrix:
        what = "matrices that are not coded:"
    else:
        what = f"embedding and head: {family}" if spec.is_matrix else "norms and biases:"
    wrong, largest = 0, 0.0
    step = max(1, SLAB_WEIGHTS // spec.columns) if spec.is_matrix else 1
    for start in range(0, spec.rows, step):
        stop = min(start + step, spec.rows)
        want = checkpoint.read_rows(spec.name, start, stop)
        stored = file.read_rows(spec.name, start, stop) if spec.is_matrix else file.read(spec.name)
        with np.errstate(invalid="ignore", over="ignore"):
            have, rounded = _widened(stored), _rounded(want, dtype)
            wrong += _different(have, rounded)
            largest = max(largest, float(np.nan_to_num(np.abs(have - rounded), nan=np.inf).max(initial=0.0)))
            rounding[what] = max(rounding.get(what, 0.0), float(np.abs(rounded - want).max(initial=0.0)))
    return Defect.of_counts(spec.name, {"value": wrong}, largest)


def _different(have: NDArray[np.generic], want: NDArray[np.generic]) -> int:
    kind = np.dtype(f"u{want.dtype.itemsize}")
    return int((np.ascontiguousarray(have).view(kind) != np.ascontiguousarray(want).view(kind)).sum())
