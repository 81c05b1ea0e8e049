"""A GPTQ folder of anyone's making (AutoGPTQ, gptqmodel, our own): settings and headers checked when opened, one layer read at a time.

Layout per linear layer with `in` inputs, `out` outputs and b bits (research: AutoGPTQ's and gptqmodel's own packing code):

    qweight  int32  [in·b/32, out]      codes along the inputs, a stream of bits, low first (3 bits straddle words)
    qzeros   int32  [groups, out·b/32]  zero codes along the outputs; one less in version 1 (`gptq`), as they are in `gptq_v2`
    scales   float  [groups, out]
    g_idx    int32  [in]                the group of each input; i // group_size unless inputs were coded in order of activation
    bias     float  [out]               where the layer has one

`value[o, i] = scales[g_idx[i], o] · (code[o, i] − zero[g_idx[i], o])`.

`dynamic` (gptqmodel's settings by layer) is honoured without running its patterns, which are regular expressions of a stranger: bits
and groups of a layer follow from the shapes of its tensors, and its zero points say whether it is symmetric.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from r1q.core.errors import InputError
from r1q.core.hf_folder import INDEX, SINGLE, contained, open_weights, read_json
from r1q.core.integers import middle, unpack_bits
from r1q.core.qtensor import Codes, Floats
from r1q.core.safetensors_file import Entry, SafetensorsFile

BITS = (2, 3, 4, 8)
VERSIONS = {"gptq": 1, "gptq_v2": 2}
SETTINGS, OLD_SETTINGS = "config.json", "quantize_config.json"
PARTS = ("qweight", "qzeros", "scales", "g_idx")
_FLOATS = ("F16", "BF16", "F32")
_MEND = "the folder is damaged, or its quantization_config does not belong to its weights"


@dataclass(frozen=True, slots=True, kw_only=True)
class GptqSettings:
    """What the settings say. `version` 1 stores zero points less one; `dynamic`: layers may differ; `makers`: who wrote the folder."""

    bits: int
    group_size: int
    symmetric: bool
    desc_act: bool
    version: int
    dynamic: bool
    makers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """What the headers say of a layer: `groups` scales an output, `bits` of a code."""

    inputs: int
    outputs: int
    groups: int
    bits: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GptqLayer:
    """One layer unpacked. Shapes: codes [out, in]; scales (float32, exact) and zeros [out, groups]; bias [out].

    `g_idx` [in] is None where inputs lie in order, `in / groups` to a group. `scales_dtype` is the stored one.
    """

    bits: int
    codes: Codes
    scales: Floats
    zeros: Codes
    g_idx: NDArray[np.int32] | None
    bias: Floats | None
    scales_dtype: str

    @property
    def symmetric(self) -> bool:
        """Whether every zero point is the middle code."""
        return bool((self.zeros == middle(self.bits)).all())

    def dequantize(self) -> Floats:
        """Return the weights [out, in] in float32."""
        groups = self.scales.shape[1]
        of_input = (
            np.arange(self.codes.shape[1]) // (self.codes.shape[1] // groups) if self.g_idx is None else self.g_idx
        )
        values = self.codes.astype(np.float32)
        values -= self.zeros.astype(np.float32)[:, of_input]
        values *= self.scales[:, of_input]
        return values


class GptqFolder:
    """An opened folder. `layers` maps a layer's name (`model.layers.0.mlp.up_proj`) to its shape, `floats` the rest to its headers."""

    def __init__(self, path: Path, settings: GptqSettings, files: Mapping[str, SafetensorsFile]) -> None:
        self.path, self.settings, self._files = path, settings, files
        stems = {name.rpartition(".")[0] for name in files if name.rpartition(".")[2] == "qweight"}
        headers = {name: file.tensors[name] for name, file in files.items()}
        self.layers = {stem: _layer_shape(path, settings, headers, stem) for stem in sorted(stems)}
        packed = {f"{stem}.{part}" for stem in stems for part in PARTS}
        self.floats = {name: entry for name, entry in headers.items() if name not in packed}
        for name, entry in self.floats.items():
            if name.rpartition(".")[2] in PARTS:
                raise InputError(f"{path}: {name} belongs to a layer without a qweight; {_MEND}")
            if entry.dtype not in _FLOATS:
                raise InputError(
                    f"{path}: {name} is stored as {entry.dtype}, neither a GPTQ layer's part nor float; {_MEND}"
                )

    @classmethod
    def open(cls, path: Path) -> GptqFolder:
        """Open `path` and check its settings and every header.

        Raises `InputError` with the name of the tensor or setting: no GPTQ folder, another packing, shapes that do not go together.
        """
        settings = read_settings(path)
        if settings is None:
            raise InputError(f"{path} is no GPTQ folder: neither {SETTINGS} nor {OLD_SETTINGS} says quant_method gptq")
        folder = cls(path, settings, _open_files(path))
        if not folder.layers:
            raise InputError(f"{path}: no layer has a qweight, though its settings say gptq; {_MEND}")
        return folder

    def read_layer(self, name: str) -> GptqLayer:
        """Return a layer unpacked. Raises `InputError` for scales that are not finite and groups or zero points out of bounds."""
        shape, settings = self.layers[name], self.settings
        words = self._read(f"{name}.qweight")
        codes = unpack_bits(np.ascontiguousarray(words.T).view(np.uint8), shape.bits, shape.inputs)
        zeros = self._zeros(name, shape)
        if settings.symmetric and not settings.dynamic and (zeros != middle(shape.bits)).any():
            other = "gptq_v2" if settings.version == 1 else "gptq"
            hint = f"; perhaps its checkpoint_format is {other}" if (zeros == zeros.flat[0]).all() else ""
            raise InputError(
                f"{self.path}: {name}.qzeros are not {middle(shape.bits)} throughout, but sym is true{hint}; {_MEND}"
            )
        bias = self.read_float(f"{name}.bias") if f"{name}.bias" in self.floats else None
        return GptqLayer(
            bits=shape.bits,
            codes=codes,
            scales=np.ascontiguousarray(self._floats(f"{name}.scales", self._read(f"{name}.scales")).T),
            zeros=np.ascontiguousarray(zeros.T),
            g_idx=self._groups(name, shape),
            bias=bias,
            scales_dtype=self.file(f"{name}.scales").tensors[f"{name}.scales"].dtype,
        )

    def permutation(self, name: str) -> NDArray[np.int32] | None:
        """Return the order [in] of a layer's inputs that makes groups neighbours (stable in a group), None where they are already."""
        g_idx = self.groups(name)
        return None if (np.diff(g_idx) >= 0).all() else np.argsort(g_idx, kind="stable").astype(np.int32)

    def groups(self, name: str) -> NDArray[np.int32]:
        """Return the group of each input [in] of a layer; the last group may be shorter, any where inputs are in another order."""
        shape, g_idx = self.layers[name], self._groups(name, self.layers[name])
        return np.arange(shape.inputs, dtype=np.int32) // (shape.inputs // shape.groups) if g_idx is None else g_idx

    def read_float(self, name: str, start: int = 0, stop: int | None = None) -> Floats:
        """Return rows [start, stop) of a float tensor in float32, exact. Raises `InputError` where they are not finite."""
        entry = self.floats[name]
        whole = start == 0 and stop in (None, entry.shape[0])
        stored = self._read(name) if whole else self._files[name].read_rows(name, start, stop or entry.shape[0])
        return self._floats(name, stored)

    def files(self) -> tuple[SafetensorsFile, ...]:
        """Return the weight files, each once."""
        return tuple(dict.fromkeys(self._files.values()))

    def file(self, name: str) -> SafetensorsFile:
        """Return the file that a tensor lies in."""
        return self._files[name]

    def _read(self, name: str) -> NDArray[Any]:
        return self._files[name].read(name)

    def _floats(self, name: str, stored: NDArray[Any]) -> Floats:
        wide = stored.astype(np.uint32) << 16 if stored.dtype == np.uint16 else stored
        values = wide.view(np.float32) if stored.dtype == np.uint16 else wide.astype(np.float32)
        if not np.isfinite(values).all():
            raise InputError(
                f"{self.path}: {name} holds NaN or infinite numbers; the checkpoint is broken, take another"
            )
        return values

    def _zeros(self, name: str, shape: LayerShape) -> Codes:
        """Return the true zero codes [groups, out]."""
        words, bits = np.ascontiguousarray(self._read(f"{name}.qzeros")), shape.bits
        if self.settings.version == 2:
            return unpack_bits(words.view(np.uint8), bits, shape.outputs)
        fields = unpack_bits(words.view(np.uint8), bits, shape.outputs)
        top = (1 << bits) - 1
        if (fields == top).any():
            return self._wrapped_zeros(name, words, fields, shape)
        return fields + np.uint8(1)

    def _wrapped_zeros(self, name: str, words: NDArray[Any], fields: Codes, shape: LayerShape) -> Codes:
        """Return zero codes where one is 0, which version 1 cannot spell: only gptqmodel writes it so that it can be read back."""
        if not any(maker.startswith("gptqmodel") for maker in self.settings.makers):
            raise InputError(
                f"{self.path}: {name}.qzeros has a zero point of 0 less one, which checkpoint_format gptq cannot hold and readers "
                "take differently; save it again as gptq_v2"
            )
        if shape.bits == 3:  # field by field there; whole words, with their borrows, for the bits that divide a word
            return np.asarray((fields + np.uint8(1)) & np.uint8(7), dtype=np.uint8)
        ones = np.uint32(sum(1 << place for place in range(0, 32, shape.bits)))
        return unpack_bits((words.view(np.uint32) + ones).view(np.uint8), shape.bits, shape.outputs)

    def _groups(self, name: str, shape: LayerShape) -> NDArray[np.int32] | None:
        if f"{name}.g_idx" not in self._files:
            return None
        g_idx: NDArray[np.int32] = self._read(f"{name}.g_idx")
        if g_idx.min() < 0 or g_idx.max() >= shape.groups:
            raise InputError(
                f"{self.path}: {name}.g_idx names group {g_idx.min() if g_idx.min() < 0 else g_idx.max()} of {shape.groups}; {_MEND}"
            )
        in_order = shape.inputs % shape.groups == 0 and np.array_equal(
            g_idx, np.arange(shape.inputs) // (shape.inputs // shape.groups)
        )
        return None if in_order else g_idx


def read_settings(path: Path) -> GptqSettings | None:
    """Return the checked GPTQ settings of a model folder, None where it has none or another method's.

    Raises `InputError` for settings that are unreadable, or GPTQ's in a form that is not supported, with the key.
    """
    raw = None
    if (path / SETTINGS).is_file():
        raw = read_json(contained(path, SETTINGS)).get("quantization_config")
    where = path / SETTINGS
    if raw is None and (path / OLD_SETTINGS).is_file():
        where = path / OLD_SETTINGS
        raw = {"quant_method": "gptq", **read_json(contained(path, OLD_SETTINGS))}
    if not isinstance(raw, Mapping) or raw.get("quant_method", raw.get("method")) != "gptq":
        return None
    return _settings(raw, str(where))


def _settings(raw: Mapping[str, Any], where: str) -> GptqSettings:
    layout = raw.get("checkpoint_format", raw.get("format")) or "gptq"
    bits, group = raw.get("bits"), raw.get("group_size", -1)
    dynamic = raw.get("dynamic")
    meta = raw.get("meta")
    makers = meta.get("quantizer", []) if isinstance(meta, Mapping) else []
    refusals = {
        "checkpoint_format": (not isinstance(layout, str) or layout not in VERSIONS, layout, "gptq and gptq_v2"),
        "bits": (type(bits) is not int or bits not in BITS, bits, "2, 3, 4 and 8"),
        "group_size": (type(group) is not int or (group != -1 and group < 1), group, "-1 and positive numbers"),
        "pack_dtype": (raw.get("pack_dtype", "int32") not in ("int32", "torch.int32"), raw.get("pack_dtype"), "int32"),
        "dynamic": (dynamic is not None and not isinstance(dynamic, Mapping), dynamic, "an object"),
        "sym": (type(raw.get("sym", True)) is not bool, raw.get("sym"), "true and false"),
        "desc_act": (type(raw.get("desc_act", False)) is not bool, raw.get("desc_act"), "true and false"),
    }
    for key, (refused, value, known) in refusals.items():
        if refused:
            raise InputError(f"{where}: {key} = {str(value)[:40]!r} is not supported; r1q reads {known}")
    return GptqSettings(
        bits=int(bits or 0),
        group_size=int(group),
        symmetric=raw.get("sym", True),
        desc_act=raw.get("desc_act", False),
        version=VERSIONS[layout],
        # An exception (`-:`) leaves a layer as it is; only other rules make layers differ.
        dynamic=any(not str(rule).startswith("-:") for rule in dynamic or ()),
        makers=tuple(str(maker) for maker in (makers if isinstance(makers, list) else [makers])),
    )


def _open_files(path: Path) -> dict[str, SafetensorsFile]:
    """Return the open file of every tensor; AutoGPTQ's own name (`gptq_model-4bit-128g.safetensors`) is read too."""
    if not (path / SINGLE).exists() and not (path / INDEX).exists():
        alone = sorted(path.glob("*.safetensors"))
        if len(alone) == 1:
            file = SafetensorsFile.open(contained(path, alone[0].name))
            return dict.fromkeys(file.tensors, file)
    return open_weights(path)


def _layer_shape(path: Path, settings: GptqSettings, headers: Mapping[str, Entry], name: str) -> LayerShape:
    """Return a layer's shape after every header of it was held against the others and against the settings."""

    def bad(part: str, why: str) -> InputError:
        return InputError(f"{path}: {name}.{part} {why}; {_MEND}")

    entries = {part: headers.get(f"{name}.{part}") for part in PARTS}
    words, zeros, scales, order = (entries[part] for part in PARTS)
    if words is None or zeros is None or scales is None:
        missing = next(part for part in PARTS if entries[part] is None)
        raise bad(missing, "is missing")
    for part, entry, dtypes in (("qweight", words, ("I32",)), ("qzeros", zeros, ("I32",)), ("scales", scales, _FLOATS)):
        if entry.dtype not in dtypes or len(entry.shape) != 2 or not all(entry.shape):
            raise bad(part, f"is {entry.dtype} {list(entry.shape)}, not a matrix of {' or '.join(dtypes)}")
    if order is not None and (order.dtype != "I32" or len(order.shape) != 1 or not order.shape[0]):
        raise bad("g_idx", f"is {order.dtype} {list(order.shape)}, not a list of I32")
    rows, outputs = words.shape
    groups = scales.shape[0]
    inputs = order.shape[0] if order is not None else rows * 32 // settings.bits
    bits, left = divmod(rows * 32, inputs)
    if left or bits not in BITS or (bits != settings.bits and not settings.dynamic):
        raise bad("qweight", f"has {rows} rows of words for {inputs} inputs, which is not {settings.bits} bits each")
    if scales.shape != (groups, outputs) or outputs * bits % 32 or zeros.shape != (groups, outputs * bits // 32):
        raise bad(
            "scales", f"{list(scales.shape)} and qzeros {list(zeros.shape)} do not fit {outputs} outputs of {bits} bits"
        )
    wanted = 1 if settings.group_size == -1 else -(-inputs // settings.group_size)
    if groups != wanted and not settings.dynamic:
        raise bad("scales", f"has {groups} groups; {inputs} inputs in groups of {settings.group_size} are {wanted}")
    if order is None and inputs % groups:
        raise bad("g_idx", f"is missing, and {inputs} inputs do not split into {groups} groups")
    bias = headers.get(f"{name}.bias")
    if bias is not None and bias.shape != (outputs,):
        raise bad("bias", f"has the shape {list(bias.shape)}, not [{outputs}]")
    return LayerShape(inputs=inputs, outputs=outputs, groups=groups, bits=bits)
