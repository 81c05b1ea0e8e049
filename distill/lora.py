"""LoRA adapters (PEFT folders) merged as the weights are read: a fine-tuned model without a second copy of it on the disk.

Hu et al. 2021: W' = W + s · B A, with s = lora_alpha / r, or lora_alpha / √r where `use_rslora` is said (Kalajdzievski 2023).
`adapter_config.json` has settings by which the same two matrices would mean something else; all that is not known to change nothing
is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numba
import numpy as np

from r1q.core.errors import InputError
from r1q.core.files import sha256_file
from r1q.core.hf_folder import contained, read_json
from r1q.core.qtensor import Floats
from r1q.core.safetensors_file import SafetensorsFile
from r1q.core.tensors import TensorSpec
from r1q.models.embedded import OpenedModel
from r1q.models.layout import Layout
from r1q.models.source import ModelSource

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_RANK = 4096
MAX_PATTERNS = 4096
_PATTERN_LENGTH = 512
_PART = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<half>[AB])\.weight")
_FLOATS = ("F32", "F16", "BF16")
# Settings that decide what is trained, or how, and leave the two matrices what they are; and those read below.
_NO_MATTER = {
    *(
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "task_type",
        "inference_mode",
        "peft_type",
        "peft_version",
    ),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "runtime_config"),
    *("megatron_core", "qalora_group_size", "eva_config", "ensure_weight_tying"),
    *("loftq_config", "corda_config", "lora_ga_config"),  # of no effect unless init_lora_weights says so
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights", "bias"),
}
_WHY = {
    "use_dora": "DoRA scales whole rows besides",
    "modules_to_save": "it carries whole layers of its own",
    "fan_in_fan_out": "its matrices are transposed",
    "lora_bias": "it carries biases",
    "layer_replication": "it repeats layers of the model",
    "trainable_token_indices": "it carries embeddings of its own",
    "alora_invocation_tokens": "it is switched on by certain tokens, and cannot be merged",
    "target_parameters": "it adapts parameters that are no linear layers",
    "megatron_config": "its layers are Megatron's",
}
# The others (pissa, olora, corda, loftq, …) start by changing the base weights, which the folder does not hold.
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
_MEND = "merge it with PEFT's merge_and_unload, save that, and quantize the merged folder"


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What is added to one matrix: `scale` · B A, A [rank, columns] and B [rows, rank] under their names in the adapter's file."""

    a: str
    b: str
    rank: int
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """An opened adapter: `updates` by the tensor that each goes to, `hashes` of its two files whole."""

    name: str
    updates: Mapping[str, Update]
    file: SafetensorsFile
    hashes: Mapping[str, str]

    @classmethod
    def open(cls, folder: Path, tensors: tuple[TensorSpec, ...]) -> Adapter:
        """Open the PEFT folder `folder` for a model with `tensors`.

        Raises `InputError` for a folder that is none, for a kind of adapter that is not plain LoRA, and, naming tensor and shapes,
        for an adapter of another model.
        """
        if not (folder / SETTINGS).is_file():
            raise InputError(f"{folder} has no {SETTINGS}; give the folder that PEFT's save_pretrained wrote")
        settings = _read_settings(contained(folder, SETTINGS))
        path = contained(folder, WEIGHTS)
        if not path.is_file():
            pickled = " (only pickled weights, which can run code and are never loaded)"
            raise InputError(
                f"{path} is missing{pickled if (folder / 'adapter_model.bin').is_file() else ''}; "
                "save the adapter again with safe_serialization=True"
            )
        file = SafetensorsFile.open(path)
        updates = _updates(file, settings, {spec.name: spec for spec in tensors})
        hashes = {f"adapter/{part.name}": sha256_file(part) for part in (folder / SETTINGS, path)}
        return cls(name=folder.resolve().name, updates=updates, file=file, hashes=hashes)

    def matrix(self, name: str, start: int, stop: int) -> Floats:
        """Return rows [start, stop) of one of the adapter's own matrices in float32; raises `InputError` unless all are finite."""
        stored = self.file.read_rows(name, start, stop)
        if stored.dtype == np.uint16:  # bfloat16 is the upper half of float32
            stored = (stored.astype(np.uint32) << 16).view(np.float32)
        values: Floats = np.ascontiguousarray(stored, dtype=np.float32)
        if not np.isfinite(values).all():
            raise InputError(f"{self.file.path}: {name} holds NaN or infinite weights; the adapter is broken")
        return values


class AdaptedSource(ModelSource):
    """A model with an adapter merged into what is read; memory holds one A and the rows of B that go with the rows asked for."""

    def __init__(self, base: ModelSource, adapter: Adapter) -> None:
        layout = Layout(headers={}, places=base._places)
        config = replace(base.config, name=f"{base.config.name}-{adapter.name}")
        super().__init__(base.path, config, base.tensors, base._files, layout)
        self.notes = (*base.notes, f"adapter {adapter.name} merged into {len(adapter.updates)} matrices")
        self._base, self._adapter = base, adapter
        self._last: tuple[str, Floats] | None = None

    def __reduce__(self) -> tuple[Callable[..., ModelSource], tuple[object, ...]]:
        """Let another process open the checkpoint and the adapter for itself."""
        return AdaptedSource, (self._base, self._adapter)

    def read_rows(self, name: str, start: int, stop: int) -> Floats:
        """Return rows [start, stop) of the merged tensor as float32; the same rows are the same bits however they are cut."""
        values = super().read_rows(name, start, stop)
        update = self._adapter.updates.get(name)
        if update is None or start == stop:
            return values
        last = self._last  # threads may share the source
        if last is None or last[0] != name:
            last = self._last = name, self._adapter.matrix(update.a, 0, update.rank)
        merged: Floats = np.array(values, dtype=np.float32, order="C")
        _add_product(merged, self._adapter.matrix(update.b, start, stop), last[1], np.float32(update.scale))
        if not np.isfinite(merged).all():
            raise InputError(f"{self._adapter.file.path}: merged into {name}, it makes numbers that are not finite")
        return merged

    def fingerprint(self) -> dict[str, str]:
        """Return the base's sums and those of the adapter's two files."""
        return {**super().fingerprint(), **self._adapter.hashes}


def adapted(model: OpenedModel, folder: Path) -> OpenedModel:
    """Return `model` with the adapter in `folder` merged, its name in the origin. Raises what `Adapter.open` raises."""
    adapter = Adapter.open(folder, model.source.tensors)
    return OpenedModel(AdaptedSource(model.source, adapter), {**model.origin, "adapter": adapter.name})


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def _add_product(rows: Floats, b: Floats, a: Floats, scale: np.float32) -> None:
    """Add scale · b a to `rows`. A BLAS may sum in another order where a slab has other rows, and a resumed run would show it."""
    total = np.empty(rows.shape[1], np.float32)
    for i in range(rows.shape[0]):
        total[:] = 0
        for k in range(a.shape[0]):
            for j in range(rows.shape[1]):
                total[j] += b[i, k] * a[k, j]
        for j in range(rows.shape[1]):
            rows[i, j] += scale * total[j]


def _read_settings(path: Path) -> dict[str, Any]:
    settings = read_json(path)
    if settings.get("peft_type") != "LORA":
        raise InputError(f"{path}: peft_type is {settings.get('peft_type')!r}; r1q merges plain LoRA alone: {_MEND}")
    bias = settings.get("bias", "none")
    if bias != "none":
        raise InputError(f"{path}: bias is {bias!r}: it carries biases of its own; {_MEND}")
    start = settings.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise InputError(
            f"{path}: init_lora_weights is {start!r}, which changed the base weights, and the folder does not hold them; {_MEND}"
        )
    for key, value in settings.items():
        if value and key not in _NO_MATTER:
            raise InputError(f"{path}: {key} is set: {_WHY.get(key, 'r1q does not know what it changes')}; {_MEND}")
    return settings


def _updates(file: SafetensorsFile, settings: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> dict[str, Update]:
    halves: dict[str, dict[str, str]] = {}
    for name in file.tensors:
        found = _PART.fullmatch(name)
        if found is None:
            raise InputError(f"{file.path} holds {name}, which is no half of a plain LoRA; {_MEND}")
        halves.setdefault(found["module"], {})[found["half"]] = name
    if not halves:
        raise InputError(f"{file.path} holds no tensors; save the adapter again")
    where = file.path.with_name(SETTINGS)
    return {
        f"{module}.weight": _update(file, module, names, _Rule(where, settings).of(module), specs)
        for module, names in halves.items()
    }


def _update(
    file: SafetensorsFile,
    module: str,
    names: Mapping[str, str],
    rule: tuple[int, float],
    specs: Mapping[str, TensorSpec],
) -> Update:
    target, (rank, scale) = specs.get(f"{module}.weight"), rule
    if len(names) != 2:
        raise InputError(f"{file.path} has only half of the update of {module}; save the adapter again")
    if target is None:
        raise InputError(
            f"{file.path} adapts {module}.weight, which this model does not have as a matrix of its own; "
            "the adapter belongs to another model"
        )
    if not target.is_matrix or target.kind == "token_embd":
        raise InputError(f"{file.path} adapts {target.name}, which is no linear layer; {_MEND}")
    a, b = file.tensors[names["A"]], file.tensors[names["B"]]
    if a.shape != (rank, target.columns) or b.shape != (target.rows, rank):
        raise InputError(
            f"{file.path}: {module} has A {list(a.shape)} and B {list(b.shape)}, but {target.name} {list(target.shape)} "
            f"takes {[rank, target.columns]} and {[target.rows, rank]}; the adapter belongs to another model"
        )
    for name in names.values():
        if file.tensors[name].dtype not in _FLOATS:
            raise InputError(f"{file.path}: {name} is stored as {file.tensors[name].dtype}; save it as float32")
    return Update(a=names["A"], b=names["B"], rank=rank, scale=scale)


@dataclass(frozen=True, slots=True)
class _Rule:
    """Rank and scale of every module: the general ones, or those of the first pattern that its name ends with."""

    where: Path
    settings: Mapping[str, Any]

    def of(self, module: str) -> tuple[int, float]:
        rank, alpha = self._value("rank_pattern", "r", module), self._value("alpha_pattern", "lora_alpha", module)
        if type(rank) is not int or not 0 < rank <= MAX_RANK:
            raise InputError(f"{self.where}: the rank of {module} is {rank!r}, not between 1 and {MAX_RANK}")
        if type(alpha) not in (int, float) or not math.isfinite(alpha):
            raise InputError(f"{self.where}: lora_alpha of {module} is {alpha!r}, not a number")
        return rank, alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)

    def _value(self, patterns: str, general: str, module: str) -> Any:
        table = self.settings.get(patterns) or {}
        if not isinstance(table, dict) or len(table) > MAX_PATTERNS:
            raise InputError(f"{self.where}: {patterns} is no short object")
        for pattern, value in table.items():
            if self._ends_with(module, pattern, patterns):
                return value
        return self.settings.get(general)

    def _ends_with(self, module: str, pattern: str, key: str) -> bool:
        """PEFT takes the pattern for a regular expression; here it is plain names, as a stranger's expression can run for ever."""
        if len(pattern) > _PATTERN_LENGTH or not re.fullmatch(r"\^?[\w.\\]+", pattern):
            raise InputError(
                f"{self.where}: {key} has the pattern {pattern[:80]!r}, and only names of modules are read; {_MEND}"
            )
        plain = pattern.replace("\\.", ".")
        if plain.startswith("^"):
            return module == plain[1:]
        return module == plain or module.endswith(f".{plain}")
