"""What a GGUF file says of its model: `general.*` and the architecture's keys, as llama.cpp's converter writes them.

Everything is a list of `Entry` values, in file order; `export/gguf_tokenizer.py` makes those of the tokenizer.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1q.core.mixtures import FILE_TYPES
from r1q.core.scheme import Scheme
from r1q.core.tensors import TensorSpec
from r1q.export.gguf_moe import moe_entries, yarn_entries

if TYPE_CHECKING:
    from r1q.models.config import ModelConfig

QUANTIZATION_VERSION = 2
# What DeepSeek recommends for R1 and its distillates (the usage notes of their model cards).
R1_SAMPLING: Mapping[str, float] = {"temperature": 0.6, "top_p": 0.95}
R1_TEMPLATE_MARKS = ("<think>", "<｜Assistant｜>")
# generation_config.json's name -> (GGUF key, stored type)
_SAMPLING: Mapping[str, tuple[str, str]] = {
    "top_k": ("general.sampling.top_k", "i32"),
    "top_p": ("general.sampling.top_p", "f32"),
    "min_p": ("general.sampling.min_p", "f32"),
    "temperature": ("general.sampling.temp", "f32"),
}
# A file whose recipe is no preset names itself after the grid of most weights, as llama.cpp's loader would guess it.
_GRID_FILE_TYPES: Mapping[str, int] = {**FILE_TYPES, "q3_k": 12, "q4_k": 15, "q5_k": 17}
_CARD_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Entry:
    """One metadata value. `type` is spelled as `core.gguf_file` spells it: u32, i32, f32, bool, str, arr[str], arr[i32], arr[f32]."""

    key: str
    value: object
    type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelNames:
    """A model's name in the parts of the GGUF naming convention, and what its card says of its license."""

    name: str
    basename: str | None
    size_label: str
    finetune: str | None
    version: str | None
    organization: str | None
    card: tuple[Entry, ...]


def name_model(model_name: str, weights: int, folder: Path) -> ModelNames:
    """Return the parts of `model_name` (a folder's or hub name), sized by `weights` where it does not say; card from `folder`."""
    from gguf import Metadata, size_label

    title, organization, basename, finetune, version, label = Metadata.get_model_id_components(model_name, weights)
    return ModelNames(
        name=Metadata.id_to_title(title or "model") or "model",
        basename=basename,
        size_label=label or size_label(weights, weights, 0, 0),
        finetune=finetune,
        version=version,
        organization=organization and Metadata.id_to_title(organization),
        card=tuple(_card_entries(folder)),
    )


def file_name(names: ModelNames, encoding: str) -> str:
    """Return `BaseName-SizeLabel-FineTune-Version-Encoding.gguf`, of letters, digits, points, dashes and underscores only."""
    from gguf import naming_convention

    stem = naming_convention(names.name, names.basename, names.finetune, names.version, names.size_label, encoding)
    return (re.sub(r"[^\w.+-]+", "-", stem).lstrip(".-") or "model") + ".gguf"


def general_entries(names: ModelNames, generation: Mapping[str, Any], is_r1: bool) -> Iterator[Entry]:
    """Yield `general.*` without the architecture (the writer's own first key), file type and quantization version."""
    yield Entry("general.type", "model", "str")
    defaults = R1_SAMPLING if is_r1 else {}
    for name, (key, kind) in _SAMPLING.items():
        stated = generation.get(name)
        value = defaults.get(name) if stated is None else stated
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            yield Entry(key, int(value) if kind == "i32" else float(value), kind)
    yield Entry("general.name", names.name, "str")
    for key in ("version", "organization", "finetune", "basename", "size_label"):
        if value := getattr(names, key):
            yield Entry(f"general.{key}", value, "str")
    yield from names.card


def architecture_entries(config: ModelConfig) -> Iterator[Entry]:
    """Yield the hyper-parameters under the family's name."""
    arch = config.architecture
    yield Entry(f"{arch}.block_count", config.num_layers, "u32")
    yield Entry(f"{arch}.context_length", config.max_position_embeddings, "u32")
    yield Entry(f"{arch}.embedding_length", config.hidden_size, "u32")
    yield Entry(f"{arch}.feed_forward_length", config.intermediate_size, "u32")
    yield Entry(f"{arch}.attention.head_count", config.num_heads, "u32")
    yield Entry(f"{arch}.attention.head_count_kv", 1 if config.latent else config.num_kv_heads, "u32")
    yield Entry(f"{arch}.rope.freq_base", config.rope_theta, "f32")
    yield Entry(f"{arch}.attention.layer_norm_rms_epsilon", config.rms_norm_eps, "f32")
    yield from (Entry(f"{arch}.{key}", value, kind) for key, value, kind in moe_entries(config))
    if config.latent is not None:
        return
    yield from (Entry(f"{arch}.{key}", value, kind) for key, value, kind in yarn_entries(config))
    # llama.cpp takes hidden/heads where these are absent; written whenever the config states its own, as the converter does.
    if config.raw.get("head_dim") is not None or config.head_dim * config.num_heads != config.hidden_size:
        yield Entry(f"{arch}.attention.key_length", config.head_dim, "u32")
        yield Entry(f"{arch}.attention.value_length", config.head_dim, "u32")
    if arch == "llama":
        yield Entry("llama.vocab_size", config.vocab_size, "u32")
        yield Entry("llama.rope.dimension_count", config.head_dim, "u32")


def file_entries(recipe: str, schemes: Sequence[tuple[TensorSpec, Scheme]]) -> Iterator[Entry]:
    """Yield `general.file_type`, the preset's number or that of the grid with most weights, and the quantization version."""
    number = FILE_TYPES.get(recipe, _GRID_FILE_TYPES[dominant_grid(schemes)])
    yield Entry("general.file_type", number, "u32")
    yield Entry("general.quantization_version", QUANTIZATION_VERSION, "u32")


def dominant_grid(schemes: Sequence[tuple[TensorSpec, Scheme]]) -> str:
    """Return the grid that holds most weights of the matrices."""
    weights: dict[str, int] = {}
    for spec, scheme in schemes:
        if spec.is_matrix:
            weights[scheme.grid] = weights.get(scheme.grid, 0) + spec.size
    return max(weights, key=lambda grid: weights[grid], default="f32")


def is_r1_template(template: str | None) -> bool:
    """Return whether a chat template is DeepSeek-R1's: it opens a thought for the assistant."""
    return template is not None and all(mark in template for mark in R1_TEMPLATE_MARKS)


def provenance_entries(manifest: Mapping[str, object], recipe: str) -> Iterator[Entry]:
    """Yield where the file comes from, without time or path: the r1q that quantized it and the recipe's name."""
    versions = manifest.get("versions")
    version = versions.get("r1q") if isinstance(versions, Mapping) else None
    if isinstance(version, str) and version:
        yield Entry("r1q.version", version, "str")
    if recipe:
        yield Entry("r1q.recipe", recipe, "str")


def _card_entries(folder: Path) -> Iterator[Entry]:
    """Yield the license that a model card's front matter states in one line; other spellings are left out."""
    card = folder / "README.md"
    if not card.is_file() or card.stat().st_size > _CARD_BYTES:
        return
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines()
    if not lines or lines[0].strip() != "---":
        return
    for line in itertools.takewhile(lambda line: line.strip() != "---", lines[1:]):
        match = re.fullmatch(r"(license|license_name|license_link):\s*[\"']?([^\"'#\[\]{}|>]+?)[\"']?\s*", line)
        if match:
            yield Entry(f"general.{match[1]}", match[2], "str")


def read_generation(folder: Path) -> Mapping[str, Any]:
    """Return generation_config.json of `folder`; empty where it is absent or no JSON object."""
    try:
        value = json.loads((folder / "generation_config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
