"""A ready student: another, smaller model of the teacher's own words is trained on its predictions, where nothing is to be pruned."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from r1q.core.errors import InputError
from r1q.core.files import atomic_path
from r1q.core.grids import float_bytes
from r1q.core.safetensors_file import write_safetensors
from r1q.models.source import SINGLE, ModelSource

_TOKENIZER = "tokenizer.json"


def require_pair(teacher: ModelSource, student: ModelSource) -> None:
    """Raise `InputError` where `student` is no smaller than `teacher`, or does not read and write the same tokens."""
    for model in (teacher, student):
        if model.config.experts is not None or model.config.latent is not None:
            raise InputError(f"{model.path}: a model with experts or latent attention is not trained; take a dense one")
    large, small = weights_of(teacher), weights_of(student)
    if small >= large:
        raise InputError(
            f"the student {student.path} has {small:,} weights and the teacher {teacher.path} {large:,}; a student is smaller"
        )
    taught, teaching = student.config.vocab_size, teacher.config.vocab_size
    if taught != teaching:
        raise InputError(
            f"the student {student.path} predicts {taught:,} tokens and the teacher {teacher.path} {teaching:,}; "
            "take a student with its teacher's tokenizer"
        )
    ours, theirs = (_words(model.path / _TOKENIZER) for model in (student, teacher))
    if ours != theirs:
        place = next(id for id in sorted({*ours, *theirs}) if ours.get(id) != theirs.get(id))
        raise InputError(
            f"the tokenizers differ: token {place} is {ours.get(place)!r} to the student {student.path} and {theirs.get(place)!r} to "
            f"the teacher {teacher.path}; take a student with its teacher's tokenizer"
        )


def weights_of(source: ModelSource) -> int:
    """Return the number of weights of a model."""
    return sum(spec.size for spec in source.tensors)


def copy_model(source: ModelSource, folder: Path) -> None:
    """Write a float model as one Hugging Face folder, its config.json last; one tensor in memory at a time."""
    for path in sorted(source.sidecars(), key=lambda path: path.name == "config.json"):
        if path.name == "config.json":
            stored = {spec: spec.dtype if spec.dtype in ("BF16", "F16", "F32") else "BF16" for spec in source.tensors}
            pieces = (
                float_bytes(dtype.lower(), source.read_rows(spec.name, 0, spec.rows).reshape(spec.rows, -1))
                for spec, dtype in stored.items()
            )
            entries = [(spec.name, dtype, spec.shape) for spec, dtype in stored.items()]
            write_safetensors(folder / SINGLE, entries, pieces, metadata={"format": "pt"})
        with atomic_path(folder / path.name) as temporary:
            shutil.copyfile(path, temporary)


def _words(path: Path) -> dict[int, str]:
    """Return the token of each id in a tokenizer.json. Raises `InputError` where it is not one."""
    try:
        value: Any = json.loads(path.read_bytes())
        words = {int(number): str(word) for word, number in value["model"]["vocab"].items()}
        return words | {int(token["id"]): str(token["content"]) for token in value["added_tokens"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} cannot be compared: it is no tokenizer with a vocabulary ({error})") from error
