"""A GGUF file, whoever wrote it, from its header."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from r1q.core.gguf_file import GgufFile, Strings, Value
from r1q.core.gguf_types import TENSOR_TYPE_NUMBERS, TENSOR_TYPES
from r1q.core.mixtures import FILE_TYPES, MIXTURES
from r1q.core.scheme import GRIDS
from r1q.plan.inspection import LONG, Inspection, ModelFacts, Shown, TensorRow, shortened

_TEMPLATE = "tokenizer.chat_template"
# What to call a size, and GGUF's word for it after the architecture's name.
_SIZES = {
    "blocks": "block_count",
    "width": "embedding_length",
    "ffn": "feed_forward_length",
    "heads": "attention.head_count",
    "kv heads": "attention.head_count_kv",
    "head size": "attention.key_length",
    "experts": "expert_count",
}
# Keys that say who made a file and from what, and how a line begins that tells it.
_MAKERS = {
    "general.quantized_by": "quantized by",
    "general.organization": "organization",
    "general.author": "author",
    "general.source.url": "source",
    "general.source.huggingface.repository": "source",
    "general.repo_url": "repository",
}


def inspect_gguf(path: Path) -> Inspection:
    """Return what the GGUF file `path` says. Raises `InputError` for one that our reader refuses."""
    file = GgufFile.open(path)
    rows = tuple(
        TensorRow(name=t.name, grid=t.type, shape=t.shape, weights=math.prod(t.shape), bytes=t.nbytes)
        for t in file.tensors.values()
    )
    return Inspection(
        path=path,
        format=f"gguf (version {file.version}{', ' * bool(_stated_type(file))}{_stated_type(file)})",
        model=_facts(file),
        tensors=rows,
        file_bytes=path.stat().st_size,
        metadata={key: _shown(value) for key, value in file.metadata.items() if key != _TEMPLATE},
        made_by=tuple(_made_by(file)),
        fallbacks=tuple(_fallbacks(file)),
        notes=tuple(_notes(file)),
    )


def _facts(file: GgufFile) -> ModelFacts:
    arch, metadata = file.architecture, file.metadata
    sizes = {word: metadata.get(f"{arch}.{key}") for word, key in _SIZES.items()}
    tokens = metadata.get("tokenizer.ggml.tokens", metadata.get(f"{arch}.vocab_size"))
    context, template = metadata.get(f"{arch}.context_length"), metadata.get(_TEMPLATE)
    embedded = "token_embd.weight" in file.tensors
    return ModelFacts(
        architecture=arch or "unknown",
        context=context if type(context) is int else None,
        vocabulary=tokens if type(tokens) is int else len(tokens) if isinstance(tokens, Strings) else None,
        sizes={word: value for word, value in sizes.items() if type(value) is int},
        tied="output.weight" not in file.tensors if embedded else None,
        chat_template=template if isinstance(template, str) else None,
    )


def _stated_type(file: GgufFile) -> str:
    """Return the preset that a file says it was made with, as llama.cpp names its number; empty where it does not say."""
    from gguf import LlamaFileType

    stated = file.metadata.get("general.file_type")
    if not isinstance(stated, int) or stated not in set(LlamaFileType):
        return ""
    return str(LlamaFileType(stated).name).removeprefix("MOSTLY_").removeprefix("ALL_").lower()


def _shown(value: Value) -> Shown:
    if isinstance(value, Strings):
        # Not decoded strictly: an inspection shows what is there.
        first = [value.raw(i).decode("utf-8", "replace") for i in range(min(len(value), LONG))]
        return first if len(value) <= LONG else {"count": len(value), "first": first[:3]}
    if isinstance(value, np.ndarray):
        return shortened(value.tolist()) if len(value) <= LONG else {"count": len(value), "first": value[:3].tolist()}
    return value


def _made_by(file: GgufFile) -> Iterator[str]:
    metadata = file.metadata
    if "r1q.version" in metadata:
        recipe, stated = metadata.get("r1q.recipe"), _stated_type(file)
        # Tools that quantize a file again keep its keys, and change its type.
        again = recipe in FILE_TYPES and FILE_TYPES[str(recipe)] != metadata.get("general.file_type")
        wrote = f"r1q {metadata['r1q.version']}" + (f", recipe {recipe}" if recipe else "")
        yield f"another tool, from a file of {wrote}: it is {stated or 'of another type'} now" if again else wrote
    for key, word in _MAKERS.items():
        if key in metadata:
            yield f"{word} {metadata[key]}"
    importance = {
        key.rpartition(".")[2]: value for key, value in metadata.items() if key.startswith("quantize.imatrix.")
    }
    if importance:
        yield (
            f"importance matrix {importance.get('file', '(no name)')}, data {importance.get('dataset', 'not named')}, "
            f"{importance.get('entries_count', '?')} entries, {importance.get('chunks_count', '?')} chunks"
        )
    if "general.quantization_version" in metadata:
        yield f"ggml quantization version {metadata['general.quantization_version']}"


def _fallbacks(file: GgufFile) -> Iterator[str]:
    """Yield a line for matrices that a preset of 256-wide blocks could not hold because their rows do not divide."""
    names = {number: name for name, number in FILE_TYPES.items()}
    stated = file.metadata.get("general.file_type")
    preset = names.get(stated, "") if type(stated) is int else ""
    if preset not in MIXTURES:
        return
    block = GRIDS[MIXTURES[preset].default].block
    kinds = Counter(
        (tensor.shape[-1], tensor.type)
        for tensor in file.tensors.values()
        if len(tensor.shape) > 1
        and tensor.shape[-1] % block
        and TENSOR_TYPES[TENSOR_TYPE_NUMBERS[tensor.type]].block < block
    )
    for (columns, grid), count in sorted(kinds.items()):
        tensors = f"{count} tensor{'s' if count > 1 else ''}"
        yield f"{tensors} with rows of {columns}: {preset}'s blocks of {block} do not divide them, stored as {grid}"


def _notes(file: GgufFile) -> Iterator[str]:
    count, number = file.metadata.get("split.count", 0), file.metadata.get("split.no", 0)
    if isinstance(count, int) and isinstance(number, int) and count > 1:
        yield f"part {number + 1} of {count} of a split model: counts and sizes are of this part alone"
    if not file.tensors:
        yield "it holds no tensors: a vocabulary or metadata alone"
