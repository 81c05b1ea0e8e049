"""GptqSource: a GPTQ folder of these families as a model of float weights, dequantized row by row as a reader asks for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from r1q.core.errors import InputError
from r1q.core.files import sha256_file
from r1q.core.gptq_folder import SETTINGS, GptqFolder, GptqLayer, read_settings
from r1q.core.hf_folder import contained, read_json
from r1q.core.qtensor import Floats
from r1q.core.safetensors_file import Entry
from r1q.core.tensors import TensorSpec
from r1q.models.config import ModelConfig, config_of
from r1q.models.families import EMBEDDING, HEAD, tensor_specs
from r1q.models.layout import Place, lay_out, read_place
from r1q.models.source import check_repeated_head, sidecar_files


class GptqSource:
    """An opened folder. `tensors` is in the model's order; a coded weight's `dtype` there is that of its scales.

    `config` is the model's config without quantization_config; `folder` gives the codes themselves.
    """

    def __init__(
        self,
        folder: GptqFolder,
        config: ModelConfig,
        tensors: tuple[TensorSpec, ...],
        places: Mapping[str, Place] = MappingProxyType({}),
    ) -> None:
        self.path, self.folder, self.config, self.tensors = folder.path, folder, config, tensors
        self._places = places
        self._specs = MappingProxyType({spec.name: spec for spec in tensors})
        self._last: tuple[str, Floats] | None = None

    @classmethod
    def open(cls, path: Path, name: str | None = None) -> GptqSource:
        """Open `path`, checking every header against the config; `name` is the model's, else the folder's.

        Raises `InputError` for what is no sound GPTQ folder of a supported family.
        """
        if not path.is_dir():
            raise InputError(f"{path} is no folder; give one with a GPTQ checkpoint (config.json, *.safetensors)")
        for sidecar in sidecar_files(path):
            contained(path, sidecar.name)
        folder = GptqFolder.open(path)
        config = read_config(path, name)
        layout = lay_out(config, _headers(folder), str(path))
        headers = layout.headers
        tensors = tensor_specs(config, headers, str(path))
        if config.tied and HEAD in headers:
            if HEAD not in folder.floats:
                raise InputError(
                    f"{path}: lm_head is coded, but config.json ties it to the embedding; one of the two is wrong"
                )
            check_repeated_head(path, folder.file(HEAD), folder.file(EMBEDDING))
        return cls(folder, config, tensors, layout.places)

    def spec(self, name: str) -> TensorSpec:
        """Return the tensor named `name`; `KeyError` when the model has none."""
        return self._specs[name]

    def part_of_codes(self, name: str) -> bool:
        """Return whether the tensor `name` is a part of a coded layer (a half of kv_b_proj), with values but no codes of its own."""
        place = self._places.get(name)
        return place is not None and self.layer_of(place.stored) is not None

    def layer_of(self, name: str) -> str | None:
        """Return the name of the coded layer whose weight `name` is, None for a tensor of floats and for a part of another."""
        stem = name.removesuffix(".weight")
        return stem if stem != name and stem in self.folder.layers else None

    def read_layer(self, name: str) -> GptqLayer:
        """Return the codes of the weight `name`; see `GptqFolder.read_layer`."""
        return self.folder.read_layer(name.removesuffix(".weight"))

    def read_rows(self, name: str, start: int, stop: int) -> Floats:
        """Return rows [start, stop) as float32 [stop − start, columns], a vector as [columns]; dequantized where they are codes.

        Raises `InputError` with the tensor's name for numbers that are not finite.
        """
        spec = self.spec(name)
        if not 0 <= start <= stop <= spec.rows:
            raise ValueError(f"rows {start}:{stop} of {name}, which has {spec.rows}")
        place = self._places.get(name)
        if place is not None:
            return read_place(place, self.config, start, stop, self._stored_rows)
        if len(spec.shape) == 1:
            return self.folder.read_float(name)
        return self._stored_rows(name, start, stop)

    def _stored_rows(self, name: str, start: int, stop: int) -> Floats:
        """Return rows of a stored matrix, dequantized where it is codes."""
        if self.layer_of(name) is None:
            return self.folder.read_float(name, start, stop)
        if self._last is None or self._last[0] != name:
            self._last = None  # not two layers at once
            self._last = name, self.read_layer(name).dequantize()
        return self._last[1][start:stop]

    def fingerprint(self) -> dict[str, str]:
        """Return sha256 by file name: of the header and a sample of every tensor of weight files, of the whole of every sidecar."""
        hashes = {file.path.name: file.sampled_sha256() for file in self.folder.files()}
        return dict(sorted((hashes | {path.name: sha256_file(path) for path in self.sidecars()}).items()))

    def sidecars(self) -> list[Path]:
        """Return the files that belong to the model beside its weights, config.json with its quantization_config among them."""
        return sidecar_files(self.path)


def is_gptq(path: Path) -> bool:
    """Return whether a folder's settings say that it is a GPTQ folder. Raises `InputError` for settings that r1q cannot read."""
    return path.is_dir() and read_settings(path) is not None


def read_config(path: Path, name: str | None = None) -> ModelConfig:
    """Return the config of a quantized model as if it were a float one."""
    raw = {k: v for k, v in read_json(contained(path, SETTINGS)).items() if k != "quantization_config"}
    generation = path / "generation_config.json"
    extra = read_json(contained(path, generation.name)) if generation.is_file() else {}
    return config_of(raw, where=str(path / SETTINGS), name=name or path.resolve().name, generation=extra)


def _headers(folder: GptqFolder) -> Mapping[str, Entry]:
    """Return the headers that the folder would have as a float checkpoint."""
    coded = {}
    for name, shape in folder.layers.items():
        scales = folder.file(f"{name}.scales").tensors[f"{name}.scales"]
        weight = f"{name}.weight"
        if weight in folder.floats:
            raise InputError(
                f"{folder.path}: {weight} is there beside {name}.qweight; which of the two counts is anyone's guess"
            )
        coded[weight] = Entry(dtype=scales.dtype, shape=(shape.outputs, shape.inputs), start=0, stop=0)
    return {**folder.floats, **coded}
