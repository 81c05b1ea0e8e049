"""ModelSource: a Hugging Face checkpoint on disk, checked whole when opened and read a few rows at a time.

Weights come from `model.safetensors`, or from the shards that `model.safetensors.index.json` names. Pickled weights are never
loaded. No file of the folder may lie outside of it (links into the blobs of a Hugging Face download cache are its own).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from r1q.core.errors import InputError
from r1q.core.files import sha256_file
from r1q.core.hf_folder import INDEX as INDEX
from r1q.core.hf_folder import SINGLE as SINGLE
from r1q.core.hf_folder import contained as contained
from r1q.core.hf_folder import open_weights
from r1q.core.safetensors_file import Entry, SafetensorsFile
from r1q.core.tensors import TensorSpec
from r1q.models import fp8
from r1q.models.config import ModelConfig
from r1q.models.families import EMBEDDING, HEAD, tensor_specs
from r1q.models.layout import Layout, Place, lay_out, read_place

Floats = NDArray[np.float32]
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
    "README.md",
)
_COMPARE_ROWS = 4096


class ModelSource:
    """An opened checkpoint. `tensors` is in the model's order; `config` is its checked config.json; `notes` say what was left out.

    Rows follow `TensorSpec`: a matrix has `spec.rows` rows, a vector is one row.
    """

    def __init__(
        self,
        path: Path,
        config: ModelConfig,
        tensors: tuple[TensorSpec, ...],
        files: Mapping[str, SafetensorsFile],
        layout: Layout,
    ) -> None:
        self.path, self.config, self.tensors = path, config, tensors
        self._specs = MappingProxyType({spec.name: spec for spec in tensors})
        self._files, self._places = files, layout.places
        self._scales: tuple[str, Floats] | None = None
        count = len(layout.left_out)
        self.notes = (
            (f"{count} tensors left out ({layout.left_out[0]}, …): they predict further tokens",) if count else ()
        )

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
        for sidecar in sidecar_files(path):
            contained(path, sidecar.name)
        config = ModelConfig.read(path, name)
        files = open_weights(path)
        headers: dict[str, Entry] = {name: file.tensors[name] for name, file in files.items()}
        layout = lay_out(config, headers, str(path))
        source = cls(path, config, tensor_specs(config, layout.headers, str(path)), files, layout)
        if config.tied and HEAD in headers:
            check_repeated_head(path, files[HEAD], files[EMBEDDING])
        return source

    def __reduce__(self) -> tuple[Callable[..., ModelSource], tuple[object, ...]]:
        """Let another process open the checkpoint for itself."""
        return ModelSource.open, (self.path.absolute(), self.config.name)

    def spec(self, name: str) -> TensorSpec:
        """Return the tensor named `name`; `KeyError` when the model has none."""
        return self._specs[name]

    def read_rows(self, name: str, start: int, stop: int) -> Floats:
        """Return rows [start, stop) as float32 [stop − start, columns], a vector as [columns]; exact for every stored dtype.

        8-bit floats come dequantized. Raises `InputError` with the tensor's name when a value is NaN or infinite.
        """
        place = self._places.get(name)
        if place is None and self.spec(name).dtype != fp8.DTYPE:
            return widened(self.raw_rows(name, start, stop))
        if not 0 <= start <= stop <= self.spec(name).rows:
            raise ValueError(f"rows {start}:{stop} of {name}, which has {self.spec(name).rows}")
        return read_place(place or Place(stored=name), self.config, start, stop, self._stored_rows)

    def expect(self, name: str) -> None:
        """Have the system read the tensor `name` from the disk meanwhile: it is asked for soon."""
        place, spec = self._places.get(name, Place(stored=name)), self.spec(name)
        file = self._files[place.stored]
        if place.half:
            file.expect(place.stored, 0, math.prod(file.tensors[place.stored].shape[:-1]))
        else:
            file.expect(place.stored, place.first, place.first + spec.rows)

    def raw_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Return rows as they are stored: float32, float16, or the bits of bfloat16 as uint16; finite, like `read_rows`.

        Not for tensors that are not stored as they are: parts of others, and 8-bit floats.
        """
        spec = self.spec(name)
        if not 0 <= start <= stop <= spec.rows:
            raise ValueError(f"rows {start}:{stop} of {name}, which has {spec.rows}")
        file = self._files[name]
        stored = file.read_rows(name, start, stop) if len(spec.shape) > 1 else file.read(name)
        _require_finite(file.path, name, stored)
        return stored

    def _stored_rows(self, name: str, start: int, stop: int) -> Floats:
        """Return rows of the stored tensor `name`, leading axes flattened, as finite float32 [rows, columns]."""
        file = self._files[name]
        stored = file.read_flat_rows(name, start, stop)
        if file.tensors[name].dtype == fp8.DTYPE and self.config.fp8_block is not None:
            with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused by name
                values = fp8.dequantize(stored, self._scales_of(name), start, self.config.fp8_block)
        else:
            values = widened(stored)
        _require_finite(file.path, name, values)
        return values

    def _scales_of(self, name: str) -> Floats:
        """Return the block scales of the 8-bit tensor `name`; those of the last one asked for are kept."""
        if self._scales is None or self._scales[0] != name:
            scale = f"{name}{fp8.SCALE_SUFFIX}"
            self._scales = name, np.asarray(self._files[scale].read(scale), dtype=np.float32)
        return self._scales[1]

    def fingerprint(self) -> dict[str, str]:
        """Return sha256 by file name: of the header and a sample of every tensor of weight files, of the whole of every sidecar."""
        hashes = {file.path.name: file.sampled_sha256() for file in dict.fromkeys(self._files.values())}
        return dict(sorted((hashes | {path.name: sha256_file(path) for path in self.sidecars()}).items()))

    def sidecars(self) -> list[Path]:
        """Return the files that belong to the model beside its weights: configs, tokenizer, chat templates, its card."""
        return sidecar_files(self.path)


def sidecar_files(folder: Path) -> list[Path]:
    """Return the files of a model folder that belong to the model beside its weights: configs, tokenizer, chat templates, its card."""
    names = [*_SIDECARS, *sorted(path.name for path in folder.glob("*.jinja"))]
    return [folder / name for name in names if (folder / name).is_file()]


def check_repeated_head(folder: Path, head: SafetensorsFile, embedding: SafetensorsFile) -> None:
    """Raise `InputError` for a tied model whose stored head is not its embedding: which of the two was meant is anyone's guess."""
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


def widened(stored: NDArray[Any]) -> Floats:
    """Return stored float32, float16 or bits of bfloat16 as float32."""
    if stored.dtype == np.uint16:
        wide = stored.astype(np.uint32)
        wide <<= 16  # bfloat16 is the upper half of float32
        return wide.view(np.float32)
    return stored.astype(np.float32, copy=False)


def _require_finite(path: Path, name: str, stored: NDArray[Any]) -> None:
    if not is_finite(stored):
        raise InputError(f"{path}: {name} holds NaN or infinite weights; the checkpoint is broken, take another")


def is_finite(stored: NDArray[Any]) -> bool:
    """Return whether stored floats, or bits of bfloat16, hold no NaN and nothing infinite."""
    if stored.dtype == np.uint16:  # bfloat16: all exponent bits set means NaN or infinity
        return not np.any((stored & 0x7F80) == 0x7F80)
    return bool(np.isfinite(stored).all())
