"""Layout: where a model's tensors lie in a checkpoint that keeps some of them together, or their scales apart.

The model's own list has one matrix per expert and the two halves of `kv_b_proj`, as a GGUF file needs them (k_b of every head
transposed); checkpoints keep `kv_b_proj` whole and may fuse experts: `experts.gate_up_proj` [experts, 2 · inner, hidden] and
`experts.down_proj` [experts, hidden, inner].
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from r1q.core.errors import InputError
from r1q.core.safetensors_file import Entry
from r1q.models.config import ModelConfig
from r1q.models.config_moe import Latent
from r1q.models.fp8 import check_scales

Floats = NDArray[np.float32]
ReadRows = Callable[[str, int, int], Floats]
KV_B = "self_attn.kv_b_proj.weight"
K_B, V_B = "self_attn.k_b_proj.weight", "self_attn.v_b_proj.weight"
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a tensor lies: rows from `first` on of the stored tensor (leading axes flattened), or one half of a stored kv_b_proj."""

    stored: str
    first: int = 0
    half: Literal["", "k_b", "v_b"] = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """`headers` as if every tensor of the model were stored alone; `places` of those that are not; names that are `left_out`."""

    headers: Mapping[str, Entry]
    places: Mapping[str, Place]
    left_out: tuple[str, ...] = ()


def lay_out(config: ModelConfig, headers: Mapping[str, Entry], where: str) -> Layout:
    """Return where the tensors of a model of `config` lie in a checkpoint with `headers`.

    Raises `InputError` naming a tensor that is missing or has another shape, and for 8-bit floats without sound scales.
    """
    beyond = _beyond(config, headers)
    kept = {name: entry for name, entry in headers.items() if name not in beyond}
    scales = check_scales(kept, config.fp8_block, where)
    kept = {name: entry for name, entry in kept.items() if name not in scales}
    places: dict[str, Place] = {}
    if config.latent is not None:
        _split_kv_b(config, config.latent, kept, places, where)
    if config.experts is not None:
        _split_experts(config, kept, places, where)
    return Layout(headers=kept, places=places, left_out=tuple(sorted(beyond)))


def read_place(place: Place, config: ModelConfig, start: int, stop: int, read: ReadRows) -> Floats:
    """Return rows [start, stop) of the tensor at `place`; `read(name, start, stop)` reads stored rows, leading axes flattened."""
    latent = config.latent
    if not place.half or latent is None:
        return read(place.stored, place.first + start, place.first + stop)
    whole, each = latent.key_dim + latent.value_dim, latent.rank if place.half == "k_b" else latent.value_dim
    parts = [np.empty((0, latent.key_dim if place.half == "k_b" else latent.rank), np.float32)]
    for head in range(start // each, -(-stop // each)):
        low, high = max(start - head * each, 0), min(stop - head * each, each)
        if place.half == "v_b":
            at = head * whole + latent.key_dim
            parts.append(read(place.stored, at + low, at + high))
        else:
            parts.append(read(place.stored, head * whole, head * whole + latent.key_dim).T[low:high])
    return np.concatenate(parts)


def _beyond(config: ModelConfig, headers: Mapping[str, Entry]) -> set[str]:
    """Return the tensors of layers behind the last one that predict further tokens."""
    low, high = config.num_layers, config.num_layers + config.mtp_layers
    found = ((name, _LAYER.match(name)) for name in headers)
    return {name for name, match in found if match and low <= int(match[1]) < high}


def _split_kv_b(
    config: ModelConfig, latent: Latent, headers: dict[str, Entry], places: dict[str, Place], where: str
) -> None:
    heads = config.num_heads
    shape = (heads * (latent.key_dim + latent.value_dim), latent.rank)
    for layer in range(config.num_layers):
        stem = f"model.layers.{layer}."
        entry = _taken(headers, stem + KV_B, shape, where)
        for name, half, wanted in (
            (stem + K_B, "k_b", (heads * latent.rank, latent.key_dim)),
            (stem + V_B, "v_b", (heads * latent.value_dim, latent.rank)),
        ):
            headers[name] = Entry(dtype=entry.dtype, shape=wanted, start=0, stop=0)
            places[name] = Place(stored=stem + KV_B, half="k_b" if half == "k_b" else "v_b")


def _split_experts(config: ModelConfig, headers: dict[str, Entry], places: dict[str, Place], where: str) -> None:
    experts, hidden = config.experts, config.hidden_size
    for layer in range(config.num_layers):
        stem = f"model.layers.{layer}.mlp.experts."
        if experts is None or f"{stem}gate_up_proj" not in headers:
            continue
        both = _taken(headers, f"{stem}gate_up_proj", (experts.count, 2 * experts.inner, hidden), where)
        down = _taken(headers, f"{stem}down_proj", (experts.count, hidden, experts.inner), where)
        for expert in range(experts.count):
            for part, entry, fused, first, shape in (
                ("gate_proj", both, "gate_up_proj", 2 * expert * experts.inner, (experts.inner, hidden)),
                ("up_proj", both, "gate_up_proj", (2 * expert + 1) * experts.inner, (experts.inner, hidden)),
                ("down_proj", down, "down_proj", expert * hidden, (hidden, experts.inner)),
            ):
                name = f"{stem}{expert}.{part}.weight"
                if name in headers:
                    raise InputError(
                        f"{where}: {name} is there beside {stem}{fused}; which of the two counts is unclear"
                    )
                headers[name] = Entry(dtype=entry.dtype, shape=shape, start=0, stop=0)
                places[name] = Place(stored=f"{stem}{fused}", first=first)


def _taken(headers: dict[str, Entry], name: str, shape: tuple[int, ...], where: str) -> Entry:
    entry = headers.pop(name, None)
    if entry is None:
        raise InputError(f"{where} lacks tensors: {name}; config.json and the weights do not belong together")
    if entry.shape != shape:
        raise InputError(
            f"{where}: {name} has the shape {list(entry.shape)}, config.json says {list(shape)}; the two do not belong together"
        )
    return entry
