"""Subjects: the artifacts that a bench was asked for, of every format, with the facts that their headers tell.

Formats: `gguf` a file; `onnx` a folder with a graph; `gptq` and `hf` folders in Hugging Face's layout, coded and float; `checkpoint`
our own. Everything is header-checked here, before a runtime sees it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from r1q.benchmarks.traffic import Traffic
from r1q.core.artifact import ARTIFACTS, OutputFolder
from r1q.core.checkpoint import MANIFEST
from r1q.core.errors import InputError
from r1q.core.gguf_file import GgufFile
from r1q.core.gptq_folder import read_settings

CONFIG = "config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One artifact: `bytes` of its files, `weights` in them, `bits_per_weight` true (data only), `context` the model was trained for.

    `traffic` is what decoding a token touches; `files` are those with weights, for a load from the disk.
    """

    path: Path
    name: str
    format: str
    grid: str
    bytes: int
    weights: int
    bits_per_weight: float
    context: int
    traffic: Traffic | None = None
    files: tuple[Path, ...] = ()


def find_subjects(artifacts: Sequence[Path], formats: Sequence[str] = ()) -> list[Subject]:
    """Return a subject for every artifact named, and for each in a folder that `r1q quantize` filled, in that order.

    `formats` are those of runtimes that others have installed: a file whose name ends in `.<format>` is handed to them unread.
    Every header is checked. Raises InputError for a file that is not sound or a folder without any.
    """
    found: dict[Path, Subject] = {}
    for path in artifacts:
        for part in _parts(path):
            if part not in found:
                found[part] = _subject(part, formats)
    return list(found.values())


def _parts(path: Path) -> list[Path]:
    """Return the artifacts at `path`: itself, or what an output folder holds."""
    if not path.is_dir():
        return [path]
    if _kind(path):
        return [path]
    listed = []
    for artifact in OutputFolder(path).listed().values():
        part = path / artifact.name
        if not part.exists():
            raise InputError(
                f"{part} is gone, though {path / ARTIFACTS} lists it: run r1q export {path / 'checkpoint'}"
            )
        listed.append(part)
    found = [*listed, *(file for file in sorted(path.glob("*.gguf")) if file not in listed)]
    if not found and (path / "checkpoint" / MANIFEST).is_file():
        return [path / "checkpoint"]
    if not found:
        raise InputError(
            f"{path} holds no artifact: give a .gguf file, an ONNX, GPTQ or Hugging Face folder, or the folder that r1q quantize wrote"
        )
    return found


def _kind(folder: Path) -> str:
    """Return the format of a folder that is an artifact itself, empty for one that is not."""
    if (folder / MANIFEST).is_file():
        return "checkpoint"
    if any(folder.glob("*.onnx")):
        return "onnx"
    if (folder / CONFIG).is_file():
        return "hf" if read_settings(folder) is None else "gptq"
    return ""


def _subject(path: Path, formats: Sequence[str]) -> Subject:
    if path.is_dir() or path.suffix.lower() == ".onnx":
        from r1q.benchmarks import subject_folders

        return subject_folders.folder_subject(path, _kind(path) if path.is_dir() else "onnx")
    own = path.suffix.lower().removeprefix(".")
    if own in formats and own != "gguf" and path.is_file():
        # Another package's format: only its runtime can say what is in the file.
        size = path.stat().st_size
        return Subject(
            path=path, name=path.stem, format=own, grid=own, bytes=size, weights=0, bits_per_weight=0.0, context=1 << 20, files=(path,)
        )  # fmt: skip
    return gguf_subject(path)


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
        traffic=_gguf_traffic(file),
        files=(path,),
    )


def _gguf_traffic(file: GgufFile) -> Traffic | None:
    def number(key: str) -> int:
        value = file.metadata.get(f"{file.architecture}.{key}", 0)
        return int(value) if isinstance(value, int) else 0

    blocks, heads, width = number("block_count"), number("attention.head_count"), number("embedding_length")
    if not blocks or not heads or not width:
        return None
    used = number("expert_used_count") / number("expert_count") if number("expert_count") else 1.0
    touched = [
        tensor
        for name, tensor in file.tensors.items()
        if name != "token_embd.weight" or "output.weight" not in file.tensors
    ]
    shares = [used if "_exps." in tensor.name else 1.0 for tensor in touched]
    key = number("attention.key_length") or width // heads
    latent = number("attention.kv_lora_rank")
    per_block = (
        latent + number("rope.dimension_count")
        if latent
        else (number("attention.head_count_kv") or heads) * (key + (number("attention.value_length") or key))
    )
    embedding = file.tensors.get("token_embd.weight")
    return Traffic(
        weight_bytes=int(sum(share * tensor.nbytes for share, tensor in zip(shares, touched, strict=True))),
        touched_weights=int(
            sum(share * math.prod(tensor.shape) for share, tensor in zip(shares, touched, strict=True))
        ),
        cache_values=blocks * per_block,
        width=width,
        inner=number("feed_forward_length"),
        vocab=embedding.rows if embedding is not None else 0,
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
