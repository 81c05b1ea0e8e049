"""The GPTQ folder that transformers, gptqmodel and vLLM load: packed integers in safetensors, and the model's own files beside them.

Layout per linear layer with `in` inputs, `out` outputs, groups of g and b bits (AutoGPTQ's `checkpoint_format: gptq`, version 1):

    qweight  int32   [in·b/32, out]    codes along the inputs, low bits first
    qzeros   int32   [in/g, out·b/32]  zero code − 1 along the outputs, low bits first
    scales   float16 [in/g, out]
    g_idx    int32   [in]              i // g: no activation order
    bias     float16 [out]             where the layer has one

Everything else (norms, embedding, head) is float16, the type its kernels are written for. A model with latent attention overflows
float16: its floats are bfloat16, `kv_b_proj` among them, which is one matrix here and two in a checkpoint. What is not packed inside
of the blocks is named in `dynamic` (gptqmodel's and vLLM's exceptions). Experts have tensors of their own
(`model.layers.N.mlp.experts.M.gate_proj.qweight`). More than `SHARD_BYTES` go into several files with an index.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from r1q import __version__
from r1q.core.checkpoint import QuantizedCheckpoint
from r1q.core.errors import InputError
from r1q.core.files import atomic_path, remove_leftovers, write_json, writing
from r1q.core.formats import gptq_packs, gptq_scheme
from r1q.core.grids import to_bfloat16
from r1q.core.hf_folder import INDEX, SINGLE
from r1q.core.integers import middle, pack_bits, unpack_bits
from r1q.core.qtensor import Codes, Floats
from r1q.core.recipe import PlannedTensor
from r1q.core.safetensors_file import NUMPY_DTYPES, SafetensorsFile, write_safetensors
from r1q.core.scheme import Scheme
from r1q.core.tensors import TensorSpec

FOLDER, CONFIG = "gptq", "config.json"
SHARD_BYTES = 5_000_000_000
K_B, V_B, KV_B = "attn_k_b", "attn_v_b", "kv_b_proj"
_FULL = ("exp_probs_b",)  # kinds that every reader keeps in float32: what they decide hangs on small differences
Entry = tuple[str, str, tuple[int, ...]]
Pieces = Callable[[], Iterator[NDArray[np.generic]]]


@dataclass(frozen=True, slots=True)
class _Stored:
    """Tensors of the folder that belong together, and the numbers of all of them, made when they are written."""

    entries: list[Entry]
    pieces: Pieces

    @property
    def bytes(self) -> int:
        return sum(math.prod(shape) * NUMPY_DTYPES[dtype].itemsize for _, dtype, shape in self.entries)


def write_gptq(checkpoint: QuantizedCheckpoint, folder: Path, *, shard_bytes: int = SHARD_BYTES) -> Path:
    """Write `folder`/gptq from a checkpoint whose blocks hold one symmetric integer grid; codes and scales are copied.

    Raises `UsageError` for a checkpoint that the format cannot hold, `InputError` for a value beyond float16.
    """
    records = checkpoint.records.values()
    scheme = gptq_scheme(PlannedTensor(spec=r.spec, scheme=r.scheme, wanted=r.wanted) for r in records)
    stored = list(_stored(checkpoint, scheme))
    out = folder / FOLDER
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        remove_leftovers(out)
    for path in sorted(checkpoint.sidecar.iterdir()):
        if path.name != CONFIG:
            with atomic_path(out / path.name) as temporary:
                shutil.copyfile(path, temporary)
    _write_weights(out, stored, shard_bytes)
    quantization = quantization_config(scheme, kept_modules(checkpoint))
    write_json(out / "quantize_config.json", quantization)
    # config.json last: without it nothing takes the folder for a model.
    config = json.loads((checkpoint.sidecar / CONFIG).read_bytes())
    dtype_key = "dtype" if "dtype" in config else "torch_dtype"
    dtype = {"F16": "float16", "BF16": "bfloat16"}[float_dtype(checkpoint)]
    write_json(out / CONFIG, {**config, dtype_key: dtype, "quantization_config": quantization})
    return out


def _write_weights(out: Path, stored: Sequence[_Stored], shard_bytes: int) -> None:
    """Write the weights, in several files with an index where they are more than `shard_bytes`."""
    shards: list[list[_Stored]] = [[]]
    size = 0
    for item in stored:
        if shards[-1] and size + item.bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += item.bytes
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    index: dict[str, str] = {}
    for name, shard in zip([SINGLE] if len(shards) == 1 else names, shards, strict=True):
        entries = [entry for item in shard for entry in item.entries]
        write_safetensors(out / name, entries, (p for item in shard for p in item.pieces()), metadata={"format": "pt"})
        index |= dict.fromkeys((entry[0] for entry in entries), name)
    if len(shards) > 1:
        write_json(out / INDEX, {"metadata": {"total_size": sum(item.bytes for item in stored)}, "weight_map": index})


def quantization_config(scheme: Scheme, kept: Sequence[str] = ()) -> dict[str, object]:
    """Return what config.json and quantize_config.json say of the weights; `kept` modules are floats."""
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
        **({"dynamic": {pattern: {} for pattern in exceptions(kept)}} if kept else {}),
    }


def kept_modules(checkpoint: QuantizedCheckpoint) -> list[str]:
    """Return the modules inside of the blocks whose matrices are floats, as Hugging Face names them."""
    specs = [spec for spec in checkpoint.tensors if spec.layer is not None and spec.is_matrix]
    names = (
        _joined_name(spec.name) if spec.kind in (K_B, V_B) else spec.name
        for spec in specs
        if not gptq_packs(spec, checkpoint.scheme(spec.name))
    )
    return list(dict.fromkeys(name.removesuffix(".weight") for name in names))


def exceptions(modules: Sequence[str]) -> list[str]:
    """Return patterns that name `modules` in every block: `-:model\\.layers\\.\\d+\\.mlp\\.gate$`."""
    patterns = (re.sub(r"layers\\\.\d+", r"layers\\.\\d+", re.escape(name)) for name in modules)
    return list(dict.fromkeys(f"-:{pattern}$" for pattern in patterns))


def float_dtype(checkpoint: QuantizedCheckpoint) -> str:
    """Return the dtype of what is not packed."""
    return "BF16" if any(spec.kind == K_B for spec in checkpoint.tensors) else "F16"


def _joined_name(name: str) -> str:
    return re.sub(r"\.[kv]_b_proj\.", f".{KV_B}.", name)


def _stored(checkpoint: QuantizedCheckpoint, scheme: Scheme) -> Iterator[_Stored]:
    """Yield what the folder holds, in the checkpoint's order."""
    dtype = float_dtype(checkpoint)
    others = {(spec.layer, spec.kind): spec for spec in checkpoint.tensors if spec.kind == V_B}
    for spec in checkpoint.tensors:
        if gptq_packs(spec, checkpoint.scheme(spec.name)):
            yield _Stored(_entries(spec, scheme), partial(_packed, checkpoint, spec, scheme))
        elif spec.kind == K_B:
            yield _joined(checkpoint, spec, others[spec.layer, V_B])
        elif spec.kind != V_B:
            own = "F32" if spec.kind in _FULL else dtype
            yield _Stored([(spec.name, own, spec.shape)], partial(_floats, checkpoint, spec, own))


def _joined(checkpoint: QuantizedCheckpoint, keys: TensorSpec, values: TensorSpec) -> _Stored:
    """Return kv_b_proj [heads · (key length + value length), rank] of its two halves; every head's keys are transposed there."""
    rank, key_dim = values.columns, keys.columns
    heads = keys.rows // rank
    value_dim = values.rows // heads

    def pieces() -> Iterator[NDArray[np.generic]]:
        for head in range(heads):
            yield _halves("BF16", keys.name, checkpoint.read_rows(keys.name, head * rank, (head + 1) * rank).T)
            rows = checkpoint.read_rows(values.name, head * value_dim, (head + 1) * value_dim)
            yield _halves("BF16", values.name, rows)

    return _Stored([(_joined_name(keys.name), "BF16", (heads * (key_dim + value_dim), rank))], pieces)


def _entries(spec: TensorSpec, scheme: Scheme) -> list[Entry]:
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


def _packed(checkpoint: QuantizedCheckpoint, spec: TensorSpec, scheme: Scheme) -> Iterator[NDArray[np.generic]]:
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


def _floats(checkpoint: QuantizedCheckpoint, spec: TensorSpec, dtype: str) -> Iterator[NDArray[np.generic]]:
    step = max(1, (1 << 23) // spec.columns)
    for start in range(0, spec.rows, step):
        yield _halves(dtype, spec.name, checkpoint.read_rows(spec.name, start, min(start + step, spec.rows)))


def _halves(dtype: str, name: str, values: Floats) -> NDArray[np.generic]:
    """Return values in `dtype`, bfloat16 as its bits."""
    if dtype == "F32":
        return values.astype("<f4")
    if dtype == "BF16":
        return to_bfloat16(values)
    with np.errstate(over="ignore"):
        halves = values.astype("<f2")
    if not np.isfinite(halves).all():
        raise InputError(f"{name}: a value is beyond float16, the type of a GPTQ folder; export to gguf instead")
    return halves


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
