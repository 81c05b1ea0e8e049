"""What makes a GGUF file slow or heavy in llama.cpp on this processor, read from its header."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

from r1q.core.gguf_file import GgufFile, GgufTensor
from r1q.core.gguf_types import TENSOR_TYPE_NUMBERS, TENSOR_TYPES
from r1q.core.mixtures import FALLBACKS, FILE_TYPES, MIXTURES
from r1q.core.scheme import GRIDS
from r1q.export.lint import Finding, megabytes

FLOATS = ("f32", "f16", "bf16")
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
# Types with a fast path for prompts, by the best instruction set that a processor has: those of ggml-cpu's repack.cpp and amx, and of
# llamafile's sgemm, which every build has (llama.cpp, August 2026).
_SGEMM = (*FLOATS, "q8_0", "q4_0", "q5_0", "iq4_nl")
_FAST: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("amx_int8", "AMX", ("q4_0", "q4_1", "q8_0", "q4_k", "q5_k", "q6_k", "iq4_xs")),
    ("avx512f", "AVX-512", ("q4_0", "q4_k", "iq4_nl", "mxfp4", "q2_k")),
    ("avx2", "AVX2", ("q4_0", "q4_k", "iq4_nl", "mxfp4")),
    ("i8mm", "ARM i8mm", ("q4_0", "q4_k", "q5_k", "q6_k", "q8_0", "iq4_nl", "mxfp4")),
    ("asimddp", "ARM dot products", ("q4_0", "q4_k", "q5_k", "q6_k", "q8_0", "iq4_nl", "mxfp4")),
)
_ROWS = 8  # rows of a matrix are repacked eight at a time


def lint_gguf(path: Path, features: Collection[str]) -> Iterator[Finding]:
    """Yield what makes a GGUF file slow or heavy. Raises `InputError` for a file that our reader refuses."""
    file = GgufFile.open(path)
    matrices = [tensor for tensor in file.tensors.values() if len(tensor.shape) > 1]
    yield from _floats(file, matrices)
    yield from _fallbacks(file, matrices)
    # An embedding is looked up, not multiplied with, unless it is the head too.
    multiplied = [tensor for tensor in matrices if tensor.name != EMBEDDING or HEAD not in file.tensors]
    yield from _not_repacked(multiplied, features)


def _floats(file: GgufFile, matrices: list[GgufTensor]) -> Iterator[Finding]:
    inner = [tensor for tensor in matrices if tensor.name not in (EMBEDDING, HEAD)]
    # The router of experts is float in every file, and small.
    floats = [tensor for tensor in inner if tensor.type in FLOATS and "ffn_gate_inp" not in tensor.name]
    for name, what in ((EMBEDDING, "embedding"), (HEAD, "head")):
        tensor = file.tensors.get(name)
        if tensor is None or tensor.type not in FLOATS:
            continue
        tied = " and head (tied)" if name == EMBEDDING and HEAD not in file.tensors else ""
        cost = f"{megabytes(tensor.nbytes)}, as q8_0 {megabytes(_bytes_as(tensor, 'q8_0'))}"
        mend = "code it too: r1q quantize … --scheme q8_0 (or q4_k_m)"
        yield Finding(what=f"{what}{tied} in {tensor.type}", count=1, cost=cost, mend=mend)
    if floats:
        size, small = sum(t.nbytes for t in floats), sum(_bytes_as(t, "q8_0") for t in floats)
        cost = f"{megabytes(size)} are read for every token, as q8_0 {megabytes(small)}"
        yield Finding(
            what="float matrix", count=len(floats), cost=cost, mend="r1q quantize … --scheme q8_0 (or q4_k_m)"
        )


def _fallbacks(file: GgufFile, matrices: list[GgufTensor]) -> Iterator[Finding]:
    """Matrices whose rows the preset's blocks do not divide: they took another type, and more bytes."""
    preset = _preset(file)
    if preset not in MIXTURES:
        return
    default = MIXTURES[preset].default
    block = TENSOR_TYPES[TENSOR_TYPE_NUMBERS[default]].block
    fell: dict[tuple[int, str], list[GgufTensor]] = {}
    for tensor in matrices:
        kind = TENSOR_TYPES[TENSOR_TYPE_NUMBERS[tensor.type]]
        if tensor.shape[-1] % block and kind.block < block and tensor.type not in FLOATS:
            fell.setdefault((tensor.shape[-1], tensor.type), []).append(tensor)
    for (columns, kind_name), tensors in sorted(fell.items()):
        meant = next(
            (grid for grid, other in FALLBACKS.items() if other == kind_name and grid[0] == default[0]), default
        )
        size, wanted = sum(t.nbytes for t in tensors), sum(_bytes_as(t, meant) for t in tensors)
        what = f"rows of {columns}, which blocks of {block} do not divide, as {kind_name}"
        cost = f"{megabytes(size)}, as {meant} they would be {megabytes(wanted)}"
        mend = "choose a scheme of blocks of 32 for this model: q4_0, iq4_nl or q8_0"
        yield Finding(what=what, count=len(tensors), cost=cost, mend=mend)


def _not_repacked(matrices: list[GgufTensor], features: Collection[str]) -> Iterator[Finding]:
    found = next(((name, fast) for flag, name, fast in _FAST if flag in features), None)
    if found is None:
        return
    name, fast = found
    slow = [t for t in matrices if t.type not in _SGEMM and (t.type not in fast or _rows(t) % _ROWS)]
    sizes = Counter({kind: sum(t.nbytes for t in slow if t.type == kind) for kind in {t.type for t in slow}})
    whole = sum(t.nbytes for t in matrices)
    for kind, size in sizes.most_common():
        why = "" if kind not in fast else f" with rows not a multiple of {_ROWS}"
        cost = (
            f"{megabytes(size)} ({size / whole:.0%}) without llama.cpp's repacked kernels for {name}: prompts up to 1.6 × slower "
            "there (what they gave q4_0, llama.cpp #8713); answers as fast"
        )
        mend = f"for fast prompts choose among {', '.join(grid for grid in fast if grid in GRIDS)}"
        yield Finding(what=f"matrix as {kind}{why}", count=sum(t.type == kind for t in slow), cost=cost, mend=mend)


def _rows(tensor: GgufTensor) -> int:
    return tensor.shape[-2]


def _preset(file: GgufFile) -> str:
    stated = file.metadata.get("general.file_type")
    return {number: name for name, number in FILE_TYPES.items()}.get(stated, "") if type(stated) is int else ""


def _bytes_as(tensor: GgufTensor, kind_name: str) -> float:
    kind = TENSOR_TYPES[TENSOR_TYPE_NUMBERS[kind_name]]
    return math.prod(tensor.shape) / kind.block * kind.block_bytes
