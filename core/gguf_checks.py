"""What a GGUF's metadata must satisfy beyond its syntax: element types, lengths, head counts, blocks, vocabulary, splits.

llama.cpp casts some arrays without looking at their element type and trusts several counts; files that would mislead it are
refused here. Architectures that this program writes are held to more (`WRITTEN`), since their tensors are known.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from r1q.core.errors import InputError

if TYPE_CHECKING:
    from r1q.core.gguf_file import GgufTensor, Value

WRITTEN = ("llama", "qwen2", "qwen3", "qwen3moe", "deepseek2")
MAX_BLOCKS = 10_000
MAX_HEADS = 1 << 16
MAX_WIDTH = 1 << 20
MAX_SPLITS = 1 << 10
MAX_TEMPLATE_BYTES = 1 << 20

KEY_TYPES: Mapping[str, str] = {
    "general.architecture": "str",
    "general.type": "str",
    "general.name": "str",
    "general.file_type": "u32",
    "general.quantization_version": "u32",
    "imatrix.chunk_count": "u32",
    "imatrix.chunk_size": "u32",
    "imatrix.datasets": "arr[str]",
    "split.no": "u16",
    "split.count": "u16",
    "split.tensors.count": "i32",
    "tokenizer.ggml.model": "str",
    "tokenizer.ggml.pre": "str",
    "tokenizer.ggml.tokens": "arr[str]",
    "tokenizer.ggml.merges": "arr[str]",
    "tokenizer.ggml.scores": "arr[f32]",
    "tokenizer.ggml.token_type": "arr[i32]",
    "tokenizer.ggml.bos_token_id": "u32",
    "tokenizer.ggml.eos_token_id": "u32",
    "tokenizer.ggml.add_bos_token": "bool",
    "tokenizer.ggml.add_eos_token": "bool",
    "tokenizer.chat_template": "str",
}
_BLOCK = re.compile(r"blk\.(\d{1,9})\.")


def check(
    path: Path, metadata: Mapping[str, Value], types: Mapping[str, str], tensors: Mapping[str, GgufTensor]
) -> None:
    """Raise `InputError` for the first thing in a parsed header that disagrees with itself."""
    for key, expected in KEY_TYPES.items():
        if types.get(key, expected) != expected:
            _refuse(path, f"{key} is {types[key]}, not {expected}")
    template = metadata.get("tokenizer.chat_template", "")
    if isinstance(template, str) and len(template) > MAX_TEMPLATE_BYTES:
        _refuse(path, f"tokenizer.chat_template has {len(template)} characters; {MAX_TEMPLATE_BYTES} is the most")
    _check_vocabulary(path, metadata, tensors)
    split = _check_split(path, metadata)
    arch = metadata.get("general.architecture")
    if isinstance(arch, str):
        _check_shape_numbers(path, arch, metadata, types)
        if metadata.get("general.type", "model") == "model" and not split:
            _check_blocks(path, arch, metadata, tensors)


def _check_vocabulary(path: Path, metadata: Mapping[str, Value], tensors: Mapping[str, GgufTensor]) -> None:
    tokens = metadata.get("tokenizer.ggml.tokens")
    count = 0 if tokens is None else _length(tokens)
    for key in ("tokenizer.ggml.scores", "tokenizer.ggml.token_type"):
        if key in metadata and _length(metadata[key]) != count:
            _refuse(path, f"{key} has {_length(metadata[key])} entries for {count} tokens")
    if tokens is not None:
        _check_tokens(path, tokens)
    for name in ("bos", "eos"):
        marker = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if metadata.get(f"tokenizer.ggml.add_{name}_token") is True and isinstance(marker, int) and marker >= count:
            _refuse(path, f"tokenizer.ggml.{name}_token_id is {marker} for {count} tokens")
    embedding = tensors.get("token_embd.weight")
    if tokens is not None and embedding is not None and (len(embedding.shape) != 2 or embedding.shape[0] != count):
        _refuse(path, f"token_embd.weight has the shape {list(embedding.shape)} for {count} tokens")


def _check_tokens(path: Path, tokens: Value) -> None:
    """Refuse a token spelled twice: llama.cpp aborts the process on one. (It renames empty ones itself.)"""
    stored = getattr(tokens, "stored", None)
    if stored is None:
        return
    seen: set[bytes] = set()
    for index, token in enumerate(stored()):
        if token and token in seen:
            _refuse(path, f"tokenizer.ggml.tokens[{index}] repeats an earlier token")
        seen.add(token)


def _check_split(path: Path, metadata: Mapping[str, Value]) -> bool:
    count, number = metadata.get("split.count", 0), metadata.get("split.no", 0)
    if not isinstance(count, int) or not isinstance(number, int) or count > MAX_SPLITS:
        _refuse(path, f"split.count {count} is not a count up to {MAX_SPLITS}")
    if number >= max(count, 1):
        _refuse(path, f"split.no {number} is not below split.count {count}")
    return count > 1


def _check_shape_numbers(path: Path, arch: str, metadata: Mapping[str, Value], types: Mapping[str, str]) -> None:
    lowest = 1 if arch in WRITTEN else 0
    caps = {"block_count": MAX_BLOCKS, "embedding_length": MAX_WIDTH, "context_length": 1 << 31}
    for name, cap in caps.items():
        key = f"{arch}.{name}"
        if key not in metadata:
            continue
        value = metadata[key]
        if types[key] not in ("u32", "u64") or not isinstance(value, int) or not 1 <= value <= cap:
            _refuse(path, f"{key} is {value} ({types[key]}), not a count from 1 to {cap}")
    for name in ("attention.head_count", "attention.head_count_kv"):
        key = f"{arch}.{name}"
        if key in metadata:
            _check_heads(path, key, metadata[key], types[key], lowest)
    if arch in WRITTEN:
        heads, kv = metadata.get(f"{arch}.attention.head_count"), metadata.get(f"{arch}.attention.head_count_kv")
        if isinstance(heads, int) and isinstance(kv, int) and heads % kv:
            _refuse(path, f"{arch}.attention.head_count {heads} is not a multiple of head_count_kv {kv}")


def _check_heads(path: Path, key: str, value: Value, kind: str, lowest: int) -> None:
    if kind not in ("u32", "arr[u32]", "arr[i32]"):
        _refuse(path, f"{key} is {kind}, not u32")
    values = np.atleast_1d(np.asarray(value)).astype(np.int64)
    if len(values) > MAX_BLOCKS or np.any(values < lowest) or np.any(values > MAX_HEADS):
        _refuse(path, f"{key} is not between {lowest} and {MAX_HEADS}")


def _check_blocks(path: Path, arch: str, metadata: Mapping[str, Value], tensors: Mapping[str, GgufTensor]) -> None:
    found = {int(match[1]) for name in tensors if (match := _BLOCK.match(name))}
    claimed = metadata.get(f"{arch}.block_count")
    if not found:
        return
    if not isinstance(claimed, int):
        _refuse(path, f"it has tensors of blocks but no {arch}.block_count")
    if max(found) >= claimed or (arch in WRITTEN and len(found) != claimed):
        _refuse(
            path, f"{arch}.block_count is {claimed}, but the tensors have {len(found)} blocks, the last {max(found)}"
        )


def _length(value: Value) -> int:
    return len(value) if hasattr(value, "__len__") else 0


def _refuse(path: Path, what: str) -> NoReturn:
    raise InputError(f"{path}: {what}; download or export it again")
