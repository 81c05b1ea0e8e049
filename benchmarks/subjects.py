"""Subjects: the artifact files that a bench was asked for, with the facts that their headers tell."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from r1q.core.errors import InputError
from r1q.core.gguf_file import GgufFile


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One artifact: `bytes` of the file, `weights` in it, `bits_per_weight` true (data only), `context` the model was trained for."""

    path: Path
    name: str
    format: str
    grid: str
    bytes: int
    weights: int
    bits_per_weight: float
    context: int


def find_subjects(artifacts: Sequence[Path]) -> list[Subject]:
    """Return a subject for every GGUF file named, and for every one in a folder named, in that order.

    Every header is checked here, before anything is measured. Raises InputError for a file that is not sound or a folder without any.
    """
    files: list[Path] = []
    for path in artifacts:
        found = sorted(path.glob("*.gguf")) if path.is_dir() else [path]
        if not found:
            raise InputError(f"{path} holds no artifact: give a .gguf file, or the folder that r1q quantize wrote")
        files += [file for file in found if file not in files]
    return [gguf_subject(path) for path in files]


def gguf_subject(path: Path) -> Subject:
    """Return the facts of a GGUF file. Raises InputError for one that our reader refuses."""
    file = GgufFile.open(path)
    weights = sum(math.prod(tensor.shape) for tensor in file.tensors.values())
    if not weights:
        raise InputError(f"{path} holds no weights: it is a vocabulary or a piece of a model, and cannot be benched")
    context = file.metadata.get(f"{file.architecture}.context_length", 0)
    if not isinstance(context, int) or context < 2:
        raise InputError(f"{path}: {file.architecture}.context_length is {context}: it must be at least 2")
    return Subject(
        path=path,
        name=path.stem,
        format="gguf",
        grid=_grid(file),
        bytes=path.stat().st_size,
        weights=weights,
        bits_per_weight=8 * sum(tensor.nbytes for tensor in file.tensors.values()) / weights,
        context=context,
    )


def _grid(file: GgufFile) -> str:
    """Return the preset the file was made with if it says so (`q4_k_m`), else the grid most of its weights are in."""
    from gguf import LlamaFileType

    stated = file.metadata.get("general.file_type")
    if isinstance(stated, int) and stated in set(LlamaFileType):
        return str(LlamaFileType(stated).name).removeprefix("MOSTLY_").removeprefix("ALL_").lower()
    counts: Counter[str] = Counter()
    for tensor in file.tensors.values():
        counts[tensor.type] += math.prod(tensor.shape)
    return counts.most_common(1)[0][0]
