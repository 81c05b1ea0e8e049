"""Statistics for a plan: an importance matrix matched to a model's tensors, and what the job records of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from r1q.core.errors import InputError
from r1q.core.files import sha256_file
from r1q.core.imatrix_file import read_imatrix
from r1q.core.importance import stack_sizes
from r1q.core.qtensor import Floats
from r1q.core.tensors import TensorSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """Mean squared activations by GGUF tensor name, and the sha256 and counts that job.json holds of their file.

    `importance` is [columns], of a stack [parts, columns] (see `core/importance.py`); `notes` say where there was none.
    """

    importance: Mapping[str, Floats]
    calibration: Mapping[str, object]
    notes: tuple[str, ...] = ()


def read_statistics(path: Path, tensors: Sequence[TensorSpec]) -> Statistics:
    """Read an importance matrix for a model with `tensors`.

    Raises `InputError` when it is damaged, or belongs to another model: no name fits, or a length is another.
    """
    imatrix = read_imatrix(path)
    columns = {spec.gguf_name: spec.columns for spec in tensors if spec.is_matrix}
    parts = stack_sizes(tuple(tensors))
    fitting = {name: values for name, values in imatrix.columns.items() if name in columns}
    if not fitting:
        raise InputError(f"{path} has importance of no tensor of this model; make it from this model's own GGUF file")
    for name, values in fitting.items():
        wanted = columns[name] * parts.get(name, 1)
        if values.size != wanted or (values.ndim == 2 and len(values) != parts.get(name)):
            stack = f" in each of {parts[name]} parts" if name in parts else ""
            raise InputError(
                f"{path}: {name} has {' × '.join(map(str, values.shape))} columns, this model's has {columns[name]}{stack}; "
                "it is of another model"
            )
        if name in parts:
            fitting[name] = values.reshape(parts[name], columns[name])
    notes = tuple(
        f"{name}: {count} of {parts[name]} experts saw no token of the importance matrix, their columns weigh alike"
        for name, count in imatrix.unseen.items()
        if name in fitting
    )
    calibration = {"imatrix": sha256_file(path), "entries": len(fitting), "chunks": imatrix.chunks}
    return Statistics(importance=fitting, calibration=calibration, notes=notes)
