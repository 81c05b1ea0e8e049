"""ModelSource: a Hugging Face checkpoint on disk, checked whole when opened and read a few rows at a time.

Weights come from `model.safetensors`, or from the shards that `model.safetensors.index.json` names. Pickled weights are never
loaded. No file of the folder may lie outside of it (links into the blobs of a Hugging Face download cache are its own).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from r1q.core.errors import InputError
from r1q.core.files import is_bare_name, sha256_file
from r1q.core.safetensors_file import Entry, SafetensorsFile
from r1q.core.tensors import TensorSpec
from r1q.models.config import ModelConfig, read_json
from r1q.models.families import EMBEDDING, HEAD, tensor_specs

Floats = NDArray[np.float32]
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SIDECARS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.json",
)
_COMPARE_ROWS = 4096


class ModelSource:
    """An opened checkpoint. `tensors` is in the model's order; `config` is its checked config.json.

    Rows follow `TensorSpec`: a matrix has `spec.rows` rows, a vector is one row.
    """

    def __init__(
        self, path: Path, config: ModelConfig, tensors: tuple[TensorSpec, ...], files: Mapping[str, SafetensorsFile]
    ) -> None:
        self.path, self.config, self.tensors = path, config, tensors
        self._specs = MappingProxyType({spec.name: spec for spec in tensors})
        self._files = files

    @classmethod
    def open(cls, path: Path, name: str | None = None) -> ModelSource:
        """Open the checkpoint folder `path`, checking every header against the config; `name` is the model's, else the folder's.

        Raises `InputError` naming the file or tensor: no folder, no config, an unsupported architecture, pickled weights only,
        a missing or damaged shard, a link that leaves the folder, tensors missing, unexpected or of another shape.
        """
        if not path.is_dir():
            what = "is a file" if path.exists() else "does not exist"
            raise InputError(
                f"{path} {what}; give a folder with a Hugging Face checkpoint (config.json, *.safetensors)"
            )
        for sidecar in _sidecars(path):
            contained(path, sidecar.name)
        config = ModelConfig.read(path, name)
        files = _open_files(path)
        headers: dict[str, Entry] = {name: file.tensors[name] for name, file in files.items()}
        source = cls(path, config, tensor_specs(config, headers, str(path)), files)
        if config.tied and HEAD in headers:
            _check_repeated_head(path, files[HEAD], files[EMBEDDING])
        return source

    def spec(self, name: str) -> TensorSpec:
        """Return the tensor named `name`; `KeyError` when the model has none."""
        return self._specs[name]

    def read_rows(self, name: str, start: int, stop: int) -> Floats:
        """Return rows [start, stop) as float32 [stop − start, columns], a vector as [columns]; exact for every stored dtype.

        Raises `InputError` with the tensor's name when a value is NaN or infinite.
        """
        stored = self.raw_rows(name, start, stop)
        if self.spec(name).dtype == "BF16":
            wide = stored.astype(np.uint32)
            wide <<= 16  # bfloat16 is the upper half of float32
            return wide.view(np.float32)
        return stored.astype(np.float32, copy=False)

    def raw_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Return rows as they are stored: float32, float16, or the bits of bfloat16 as uint16; finite, like `read_rows`."""
        spec = self.spec(name)
        if not 0 <= start <= stop <= spec.rows:
            raise ValueError(f"rows {start}:{stop} of {name}, which has {spec.rows}")
        file = self._files[name]
        stored = file.read_rows(name, start, stop) if len(spec.shape) > 1 else file.read(name)
        if not _is_finite(stored):
            raise InputError(
                f"{file.path}: {name} holds NaN or infinite weights; the checkpoint is broken, take another"
            )
        return stored

    def fingerprint(self) -> dict[str, str]:
        """Return sha256 by file name: of the header and a sample of every tensor of weight files, of the whole of every sidecar."""
        hashes = {file.path.name: file.sampled_sha256() for file in dict.fromkeys(self._files.values())}
        return dict(sorted((hashes | {path.name: sha256_file(path) for path in self.sidecars()}).items()))

    def sidecars(self) -> list[Path]:
        """Return the files that belong to the model beside its weights: configs, tokenizer, chat templates."""
        return _sidecars(self.path)


def contained(folder: Path, name: str) -> Path:
    """Return `folder / name` if `name` is a bare file name and the file, links followed, lies in `folder`.

    Links into the `blobs` of a Hugging Face download cache are allowed when `folder` is a snapshot of that cache.
    Raises `InputError` otherwise.
    """
    if not is_bare_name(name) or ":" in name:
        raise InputError(f"{folder}: the file name {name!r} leaves the folder; the checkpoint is not safe to read")
    root = folder.resolve()
    allowed = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    path = folder / name
    if not any(path.resolve().is_relative_to(place) for place in allowed):
        raise InputError(f"{path} is a link that leaves the folder; put the file itself there")
    return path


def _sidecars(folder: Path) -> list[Path]:
    names = [*_SIDECARS, *sorted(path.name for path in folder.glob("*.jinja"))]
    return [folder / name for name in names if (folder / name).is_file()]


def _open_files(folder: Path) -> dict[str, SafetensorsFile]:
    """Return the open file of every tensor name."""
    if (folder / SINGLE).exists():
        file = SafetensorsFile.open(contained(folder, SINGLE))
        return dict.fromkeys(file.tensors, file)
    if (folder / INDEX).exists():
        return _open_shards(folder, _weight_map(folder))
    raise InputError(_no_weights(folder))


def _weight_map(folder: Path) -> dict[str, str]:
    index = contained(folder, INDEX)
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(file, str) for file in table.values()):
        raise InputError(f"{index}: weight_map does not map tensor names to file names; fetch it again")
    return table


def _open_shards(folder: Path, weight_map: Mapping[str, str]) -> dict[str, SafetensorsFile]:
    files: dict[str, SafetensorsFile] = {}
    for shard in sorted(set(weight_map.values())):
        path = contained(folder, shard)
        if path.suffix != ".safetensors":
            raise InputError(
                f"{folder / INDEX} names {shard}, which is not a .safetensors file; convert the checkpoint first"
            )
        if not path.is_file():
            raise InputError(f"{path} is missing, though {INDEX} names it; fetch the shard")
        file = SafetensorsFile.open(path)
        for name in file.tensors:
            if weight_map.get(name) != shard:
                raise InputError(
                    f"{path} holds {name}, which {INDEX} places in {weight_map.get(name)}; fetch both again"
                )
            files[name] = file
    absent = next((name for name in weight_map if name not in files), None)
    if absent is not None:
        raise InputError(f"{folder / weight_map[absent]} lacks {absent}, which {INDEX} places there; fetch both again")
    return files


def _no_weights(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    pickled = next((name for name in names if name.endswith(_PICKLED)), None)
    if pickled:
        return (
            f"{folder} has only pickled weights ({pickled}), which can run code and are never loaded; where you trust them, convert: "
            "transformers' AutoModelForCausalLM.from_pretrained(…).save_pretrained(…) writes safetensors"
        )
    found = _first(name for name in names if name.endswith((".safetensors", ".gguf", ".onnx")))
    return f"{folder} has neither {SINGLE} nor {INDEX}{f' (only {found})' if found else ''}; fetch the checkpoint's weights"


def _first(names: Iterable[str]) -> str | None:
    return next(iter(names), None)


def _check_repeated_head(folder: Path, head: SafetensorsFile, embedding: SafetensorsFile) -> None:
    """Refuse a tied model whose stored head is not its embedding: which of the two was meant is anyone's guess."""
    ours, theirs = embedding.tensors[EMBEDDING], head.tensors[HEAD]
    same = (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape) and all(
        np.array_equal(
            embedding.read_rows(EMBEDDING, row, min(row + _COMPARE_ROWS, ours.shape[0])).view(np.uint8),
            head.read_rows(HEAD, row, min(row + _COMPARE_ROWS, ours.shape[0])).view(np.uint8),
        )
        for row in range(0, ours.shape[0], _COMPARE_ROWS)
    )
    if not same:
        raise InputError(
            f"{folder}: config.json ties the head to the embedding, but {HEAD} differs from {EMBEDDING}; "
            "set tie_word_embeddings to false, or remove the tensor"
        )


def _is_finite(stored: NDArray[Any]) -> bool:
    if stored.dtype == np.uint16:  # bfloat16: all exponent bits set means NaN or infinity
        return not np.any((stored & 0x7F80) == 0x7F80)
    return bool(np.isfinite(stored).all())
