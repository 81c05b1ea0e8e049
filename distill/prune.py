"""Pruning: a smaller model made of the channels, heads and blocks of a larger one that matter most on calibration text.

Feed-forward channels are ranked by the mean square of what ffn_down reads times the squared norm of its column; kv groups by the same
sum over the columns of attn_output that read them; hidden channels, the same ones everywhere, by their mean square behind the norms
(Muralidharan 2024, arXiv 2407.14679, section 2.2); blocks by how far they turn the hidden states (Men 2024, arXiv 2403.03853).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from r1q.calibration.columns import column_sums
from r1q.core.files import atomic_path, json_bytes, write_json
from r1q.core.grids import float_bytes
from r1q.core.qtensor import Floats
from r1q.core.safetensors_file import write_safetensors
from r1q.core.tensors import TensorSpec
from r1q.distill.sizes import Sizes, check_sizes
from r1q.models.block import run_block
from r1q.models.config import ModelConfig
from r1q.models.forward import TensorReader, embed, load_block
from r1q.models.rope import rotation
from r1q.models.source import SINGLE, ModelSource

Doubles = NDArray[np.float64]
Places = NDArray[np.intp]
_AXES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "token_embd": ("all", "hidden"),
        "attn_norm": ("one", "hidden"),
        "attn_q": ("queries", "hidden"),
        "attn_k": ("keys", "hidden"),
        "attn_v": ("keys", "hidden"),
        "attn_q_norm": ("one", "all"),
        "attn_k_norm": ("one", "all"),
        "attn_output": ("hidden", "queries"),
        "ffn_norm": ("one", "hidden"),
        "ffn_gate": ("inner", "hidden"),
        "ffn_up": ("inner", "hidden"),
        "ffn_down": ("hidden", "inner"),
        "output_norm": ("one", "hidden"),
        "output": ("all", "hidden"),
    }
)
"""What the rows and the columns of each kind of matrix are; a bias has an entry a row, a norm an entry a column."""
_NORM_READERS = MappingProxyType({"attn_norm": "attn_q", "ffn_norm": "ffn_gate"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What a student keeps of its teacher, as ascending indices.

    `hidden` channels and `layers`; by teacher's layer the `inner` channels and `groups` (kv heads with their queries); and by the GGUF
    name of a norm the factor `norms` that makes up for the channels which its root mean square no longer counts.
    """

    hidden: Places
    layers: Places
    inner: Mapping[int, Places]
    groups: Mapping[int, Places]
    norms: Mapping[str, float]


def choose_kept(source: TensorReader, tokens: NDArray[np.int64], sizes: Sizes) -> Kept:
    """Return what matters most on `tokens` [windows, length] of a model, in `sizes`.

    One pass of the float model, a block at a time; a second one where layers are dropped. Raises `InputError` for impossible sizes.
    """
    config = source.config
    check_sizes(config, sizes)
    sums: dict[str, Doubles] = {}
    for found in column_sums(source, tokens, head=True):
        sums |= {name: value / tokens.size for name, value in found.items()}
    spread = {f"{spec.gguf_name}": _spread(source, spec, sums) for spec in source.tensors if _is_norm(spec)}
    hidden = _largest(sum(_seen(source, spec, sums) for spec in source.tensors if _is_norm(spec)), sizes.hidden)
    layers = np.arange(config.num_layers, dtype=np.intp)
    if sizes.layers < config.num_layers:
        layers = _largest(block_influence(source, tokens), sizes.layers)
    per_head = config.head_dim * (config.num_heads // config.num_kv_heads)
    inner, groups = {}, {}
    for layer in layers.tolist():
        channels = _contributions(source, f"blk.{layer}.ffn_down.weight", sums)
        inner[layer] = _largest(channels, sizes.ffn)
        mixed = _contributions(source, f"blk.{layer}.attn_output.weight", sums)
        groups[layer] = _largest(mixed.reshape(-1, per_head).sum(1), sizes.kv_heads)
    norms = {name: float(np.sqrt(energy[hidden].mean() / energy.mean())) for name, energy in spread.items()}
    return Kept(hidden=hidden, layers=layers, inner=inner, groups=groups, norms=norms)


@torch.inference_mode()
def block_influence(source: TensorReader, tokens: NDArray[np.int64]) -> Doubles:
    """Return 1 − the mean cosine of hidden states before and behind each block [layers]; the first and the last count as infinite."""
    hidden, turn = embed(source, tokens), rotation(source.config, tokens.shape[1])
    found = np.empty(source.config.num_layers)
    for layer in range(source.config.num_layers):
        weights = load_block(source, layer)
        total = 0.0
        for window in hidden:
            after = run_block(weights, source.config, window, turn)
            total += float(torch.cosine_similarity(window, after, dim=-1).sum(dtype=torch.float64))
            window.copy_(after)
        found[layer] = 1 - total / tokens.size
    found[[0, -1]] = np.inf
    return found


def cut_rows(source: TensorReader, spec: TensorSpec, kept: Kept) -> Floats:
    """Return what a student keeps of one tensor: [rows, columns] of a matrix, [1, length] of a vector."""
    values = source.read_rows(spec.name, 0, spec.rows).reshape(spec.rows, -1)
    row_axis, column_axis = _AXES[spec.kind]
    if _is_norm(spec):
        values = values * np.float32(kept.norms[spec.gguf_name])
    if spec.part == "bias":
        return np.ascontiguousarray(values[:, _places(source.config, row_axis, spec.layer, kept)])
    rows = values[_places(source.config, row_axis, spec.layer, kept)]
    return np.ascontiguousarray(rows[:, _places(source.config, column_axis, spec.layer, kept)])


def student_json(config: ModelConfig, sizes: Sizes, kept: Kept) -> dict[str, Any]:
    """Return the student's config.json: the teacher's with the sizes exchanged."""
    raw = json.loads(json_bytes(dict(config.raw)))
    raw |= {
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.ffn,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads(config),
        "num_key_value_heads": sizes.kv_heads,
    }
    if "head_dim" in raw or sizes.heads(config) * config.head_dim != sizes.hidden:
        raw["head_dim"] = config.head_dim
    if isinstance(raw.get("layer_types"), list):
        raw["layer_types"] = [raw["layer_types"][layer] for layer in kept.layers.tolist()]
    if isinstance(raw.get("max_window_layers"), int):
        raw["max_window_layers"] = min(raw["max_window_layers"], sizes.layers)
    raw.pop("quantization_config", None)
    return dict(raw)


def student_tensors(source: ModelSource, kept: Kept) -> Iterator[tuple[str, str, tuple[int, ...], Floats]]:
    """Yield the name, dtype, shape and values of every tensor of the student, in model order; blocks are numbered anew."""
    numbers = {layer: number for number, layer in enumerate(kept.layers.tolist())}
    for spec in source.tensors:
        if spec.layer is None or spec.layer in numbers:
            values = cut_rows(source, spec, kept)
            name = spec.name
            if spec.layer is not None:
                name = name.replace(f"layers.{spec.layer}.", f"layers.{numbers[spec.layer]}.", 1)
            dtype = spec.dtype if spec.dtype in ("BF16", "F16", "F32") else "BF16"
            yield name, dtype, values.shape if len(spec.shape) > 1 else (values.size,), values


def write_student(source: ModelSource, sizes: Sizes, kept: Kept, folder: Path) -> None:
    """Write the pruned model as a Hugging Face folder, its config.json last; tensors are cut one at a time, twice."""
    for path in source.sidecars():
        if path.name != "config.json":
            with atomic_path(folder / path.name) as temporary:
                shutil.copyfile(path, temporary)
    entries = [(name, dtype, shape) for name, dtype, shape, _ in student_tensors(source, kept)]
    pieces = (float_bytes(dtype.lower(), values) for _, dtype, _, values in student_tensors(source, kept))
    write_safetensors(folder / SINGLE, entries, pieces, metadata={"format": "pt"})
    write_json(folder / "config.json", student_json(source.config, sizes, kept))


def _is_norm(spec: TensorSpec) -> bool:
    return spec.kind in ("attn_norm", "ffn_norm", "output_norm")


def _seen(source: TensorReader, spec: TensorSpec, sums: Mapping[str, Doubles]) -> Doubles:
    """Return the mean square [hidden] of what the norm `spec` gives."""
    reader = _NORM_READERS.get(spec.kind)
    if reader is not None:
        return sums[f"blk.{spec.layer}.{reader}.weight"]
    return sums["token_embd.weight" if source.config.tied else "output.weight"]


def _spread(source: TensorReader, spec: TensorSpec, sums: Mapping[str, Doubles]) -> Doubles:
    """Return the mean square [hidden] of the hidden states, over their root mean square, that the norm `spec` reads."""
    weight = source.read_rows(spec.name, 0, 1).reshape(-1).astype(np.float64)
    seen = _seen(source, spec, sums)
    return np.divide(seen, weight**2, out=np.zeros_like(seen), where=weight != 0)


def _contributions(source: TensorReader, gguf_name: str, sums: Mapping[str, Doubles]) -> Doubles:
    """Return the mean square of each column's share in what a matrix gives: mean x² · Σ w² [columns]."""
    spec = next(spec for spec in source.tensors if spec.gguf_name == gguf_name)
    weight = source.read_rows(spec.name, 0, spec.rows).astype(np.float64)
    return np.asarray(sums[gguf_name] * np.square(weight).sum(0))


def _largest(scores: Any, count: int) -> Places:
    """Return the places of the `count` largest scores in ascending order; of equals, the first."""
    return np.sort(np.argsort(-np.asarray(scores), kind="stable")[:count])


def _places(config: ModelConfig, axis: str, layer: int | None, kept: Kept) -> Any:
    if axis in ("all", "one"):
        return slice(None)
    if axis == "hidden":
        return kept.hidden
    assert layer is not None
    if axis == "inner":
        return kept.inner[layer]
    width = config.head_dim * (config.num_heads // config.num_kv_heads if axis == "queries" else 1)
    return (kept.groups[layer][:, None] * width + np.arange(width)).reshape(-1)
