"""The GPTQ folder that transformers, gptqmodel and vLLM load: packed integers in safetensors, and the model's own files beside them.

Layout per linear layer with `in` inputs, `out` outputs, groups of g and b bits (AutoGPTQ's `checkpoint_format: gptq`, version 1):

    qweight  int32   [in·b/32, out]    codes along the inputs, low bits first
    qzeros   int32   [in/g, out·b/32]  zero code − 1 along the outputs, low bits first
    scales   float16 [in/g, out]
    g_idx    int32   [in]              i // g: no activation order
    bias     float16 [out]             where the layer has one

Everything else (norms, embedding, head) is float16, the type its kernels are written for.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from r1q import __version__
from r1q.core.checkpoint import QuantizedCheckpoint
from r1q.core.errors import InputError
from r1q.core.files import atomic_path, remove_leftovers, write_json, writing
from r1q.core.formats import gptq_scheme
from r1q.core.integers import middle, pack_bits, unpack_bits
from r1q.core.qtensor import Codes, Floats
from r1q.core.recipe import PlannedTensor
from r1q.core.safetensors_file import SafetensorsFile, write_safetensors
from r1q.core.scheme import Scheme
from r1q.core.tensors import TensorSpec

FOLDER, WEIGHTS, CONFIG = "gptq", "model.safetensors", "config.json"
Entry = tuple[str, str, tuple[int, ...]]


def write_gptq(checkpoint: QuantizedCheckpoint, folder: Path) -> Path:
    """Write `folder`/gptq from a checkpoint whose blocks hold one symmetric integer grid; codes and scales are copied.

    Raises `UsageError` for a checkpoint that the format cannot hold, `InputError` for a value beyond float16.
    """
    records = checkpoint.records.values()
    scheme = gptq_scheme(PlannedTensor(spec=r.spec, scheme=r.scheme, wanted=r.wanted) for r in records)
    entries = [entry for spec in checkpoint.tensors for entry in _entries(spec, scheme)]
    out = folder / FOLDER
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        remove_leftovers(out)
    for path in sorted(checkpoint.sidecar.iterdir()):
        if path.name != CONFIG:
            with atomic_path(out / path.name) as temporary:
                shutil.copyfile(path, temporary)
    pieces = (piece for spec in checkpoint.tensors for piece in _pieces(checkpoint, spec, scheme))
    write_safetensors(out / WEIGHTS, entries, pieces, metadata={"format": "pt"})
    quantization = quantization_config(scheme)
    write_json(out / "quantize_config.json", quantization)
    # config.json last: without it nothing takes the folder for a model.
    config = json.loads((checkpoint.sidecar / CONFIG).read_bytes())
    dtype_key = "dtype" if "dtype" in config else "torch_dtype"
    write_json(out / CONFIG, {**config, dtype_key: "float16", "quantization_config": quantization})
    return out


def quantization_config(scheme: Scheme) -> dict[str, object]:
    """Return what config.json and quantize_config.json say of the weights."""
    return {
        "quant_method": "gptq",
        "bits": scheme.facts.bits,
        "group_size": scheme.group_size,
        "desc_act": False,
        "sym": True,
        "checkpoint_format": "gptq",
        "lm_head": False,
        "true_sequential": True,
        "static_groups": False,
        "damp_percent": 0.05,
        "pack_dtype": "int32",
        "provider": f"r1q:{__version__}",
    }


def _is_packed(spec: TensorSpec) -> bool:
    return spec.layer is not None and spec.is_matrix


def _entries(spec: TensorSpec, scheme: Scheme) -> list[Entry]:
    if not _is_packed(spec):
        return [(spec.name, "F16", spec.shape)]
    (outputs, inputs), bits = spec.shape, scheme.facts.bits
    groups, stem = inputs // scheme.group(inputs), spec.name.removesuffix("weight")
    if inputs * bits % 32 or outputs * bits % 32:
        raise InputError(
            f"{spec.name}: {outputs} × {inputs} codes of {bits} bits do not fill whole 32-bit words of a GPTQ folder"
        )
    return [
        (f"{stem}qweight", "I32", (inputs * bits // 32, outputs)),
        (f"{stem}qzeros", "I32", (groups, outputs * bits // 32)),
        (f"{stem}scales", "F16", (groups, outputs)),
        (f"{stem}g_idx", "I32", (inputs,)),
    ]


def _pieces(checkpoint: QuantizedCheckpoint, spec: TensorSpec, scheme: Scheme) -> Iterator[NDArray[np.generic]]:
    if not _is_packed(spec):
        yield from _half_floats(checkpoint, spec)
        return
    tensor = checkpoint.read(spec.name, 0, spec.rows)
    bits, inputs = scheme.facts.bits, spec.columns
    scales = tensor.params["scales" if "scales" in tensor.params else "d"]
    yield _words(tensor.codes, bits).T
    zeros = np.full((scales.shape[1], spec.rows), middle(bits) - 1, dtype=np.uint8)
    yield _words(zeros, bits)
    yield scales.T
    yield (np.arange(inputs) // scheme.group(inputs)).astype("<i4")


def _words(codes: Codes, bits: int) -> NDArray[np.int32]:
    return cast("NDArray[np.int32]", np.ascontiguousarray(pack_bits(codes, bits)).view("<i4"))


def _half_floats(checkpoint: QuantizedCheckpoint, spec: TensorSpec) -> Iterator[NDArray[np.generic]]:
    step = max(1, (1 << 23) // spec.columns)
    for start in range(0, spec.rows, step):
        with np.errstate(over="ignore"):
            values = checkpoint.read_rows(spec.name, start, min(start + step, spec.rows)).astype("<f2")
        if not np.isfinite(values).all():
            raise InputError(
                f"{spec.name}: a value is beyond float16, the type of a GPTQ folder; export to gguf instead"
            )
        yield values


def read_linear(file: SafetensorsFile, name: str, scheme: Scheme, shape: tuple[int, ...]) -> tuple[Codes, Floats]:
    """Return the codes [out, in] and scales [out, groups] that a written folder holds for the layer weight `name`.

    Raises `InputError` when zeros or g_idx are not those of a symmetric grid in natural order, or a shape is another.
    """
    stem, bits, (outputs, inputs) = name.removesuffix("weight"), scheme.facts.bits, shape
    groups = inputs // scheme.group(inputs)
    words, zero_words = file.read(f"{stem}qweight"), file.read(f"{stem}qzeros")
    scales, g_idx = file.read(f"{stem}scales"), file.read(f"{stem}g_idx")
    if words.shape != (inputs * bits // 32, outputs) or scales.shape != (groups, outputs) or g_idx.shape != (inputs,):
        raise InputError(f"{file.path}: {name} has another shape than the checkpoint's")
    zeros = unpack_bits(np.ascontiguousarray(zero_words).view(np.uint8), bits, outputs)
    if (zeros != middle(bits) - 1).any() or (g_idx != np.arange(inputs) // scheme.group(inputs)).any():
        raise InputError(f"{file.path}: {name} has zeros or g_idx of another kind than r1q writes")
    codes = unpack_bits(np.ascontiguousarray(words.T).view(np.uint8), bits, inputs)
    return codes, np.ascontiguousarray(scales.T.astype(np.float32))
