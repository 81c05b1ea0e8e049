"""Import: a GPTQ folder of anyone's making becomes one of our checkpoints, codes and scales copied, for the same exporters.

What each tensor becomes depends on the formats asked for:
  coded layers     q4_0 or q8_0 where GGUF is asked, blocks of 32 repeating a wider group's scale; else integers in their own groups
  embedding, head  as they are stored (float16, …); in 8 bits where ONNX is asked, which has no fast form of float ones
  layers left out  as they are stored
  norms, biases    float32, and so are routers, and the halves of a kv_b_proj whose codes belong to neither of them
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from r1q.core.artifact import OutputFolder
from r1q.core.checkpoint import PERMUTATIONS
from r1q.core.errors import InputError, UsageError
from r1q.core.files import TEMP_PREFIX, sha256_file, write_json, writing
from r1q.core.formats import refuse_unfit
from r1q.core.gptq_folder import SETTINGS, GptqLayer
from r1q.core.grids import pack
from r1q.core.hf_folder import read_json
from r1q.core.mixtures import never_coded
from r1q.core.qtensor import Floats
from r1q.core.recipe import PlannedTensor, Recipe
from r1q.core.safetensors_file import write_safetensors
from r1q.core.scheme import WHOLE_ROW, Scheme
from r1q.core.tensors import TensorSpec
from r1q.models.gptq_source import GptqSource
from r1q.plan.walk import versions
from r1q.quantize.block_file import Store
from r1q.quantize.run import Event, Request, quantize_checkpoint, stored_slabs
from r1q.quantize.storing import Slab

BLOCK = 32
SMALLEST = 16  # columns of a group: the smallest block that an exporter has a form for
METHOD = "gptq, imported"
_GGUF_GRIDS = {4: "q4_0", 8: "q8_0"}
_FLOAT_GRIDS = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
Orders = Mapping[str, NDArray[np.int32]]


@dataclass(frozen=True, slots=True)
class _Imported:
    """A GPTQ folder as the run loop's source; `config` is the file that stands for its config.json."""

    source: GptqSource
    config: Path

    def read_rows(self, name: str, start: int, stop: int) -> Floats:
        """Return float rows."""
        return self.source.read_rows(name, start, stop)

    def fingerprint(self) -> Mapping[str, str]:
        """Return the folder's own sums."""
        return self.source.fingerprint()

    def sidecars(self) -> Sequence[Path]:
        """Return the files of the model, config.json without quantization_config among them."""
        return [self.config if path.name == SETTINGS else path for path in self.source.sidecars()]


def import_gptq(path: Path, formats: Sequence[str], output: OutputFolder) -> Iterator[Event]:
    """Make the checkpoint of `output` from the GPTQ folder `path`, for `formats`; go on where a killed import stopped.

    Raises `UsageError` for what one of the formats cannot hold, before anything is written, and `InputError` for a folder that is
    not sound, or whose numbers our grids do not hold exactly.
    """
    source = GptqSource.open(path)
    orders = _orders(source)
    if orders and set(formats) != {"onnx"}:
        name = next(iter(orders))
        raise UsageError(
            f"{name}: its inputs are coded in order of activation (desc_act), which only an ONNX file can hold: --to onnx, "
            "or quantize the original model again"
        )
    planned = tuple(_planned(source, spec, formats) for spec in source.tensors)
    refuse_unfit(planned, formats)
    output.refuse_foreign()
    origin = {"format": "gptq"}
    if orders:
        origin["permutations"] = _write_orders(output.checkpoint, orders)
    request = Request(
        model=source.config.name,
        origin=origin,
        recipe=_recipe(source, planned),
        planned=planned,
        method=METHOD,
        versions=versions(),
        store=_store(source, orders),
    )
    with tempfile.TemporaryDirectory(prefix=TEMP_PREFIX) as place:
        config = Path(place) / SETTINGS
        write_json(config, {k: v for k, v in read_json(path / SETTINGS).items() if k != "quantization_config"})
        yield from quantize_checkpoint(_Imported(source, config), request, output.checkpoint)


def _orders(source: GptqSource) -> Orders:
    """Return the permutation of every weight whose inputs are not in order."""
    found = {f"{layer}.weight": source.folder.permutation(layer) for layer in source.folder.layers}
    return {name: order for name, order in found.items() if order is not None}


def _write_orders(folder: Path, orders: Orders) -> str:
    """Write the permutations and return the file's sha256."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    names = sorted(orders)
    write_safetensors(
        folder / PERMUTATIONS, [(name, "I32", orders[name].shape) for name in names], (orders[name] for name in names)
    )
    return sha256_file(folder / PERMUTATIONS)


def _planned(source: GptqSource, spec: TensorSpec, formats: Sequence[str]) -> PlannedTensor:
    if never_coded(spec) or source.part_of_codes(spec.name):
        scheme = Scheme(grid="f32")
    elif source.layer_of(spec.name) is not None:
        scheme = _gguf_scheme(source, spec) if "gguf" in formats else _integers(source, spec)
    elif spec.layer is None and "onnx" in formats and spec.columns % BLOCK == 0:
        scheme = Scheme(grid="q8_0")
    else:
        scheme = Scheme(grid=_FLOAT_GRIDS[spec.dtype])
    return PlannedTensor(spec=spec, scheme=scheme, wanted=scheme.grid)


def _integers(source: GptqSource, spec: TensorSpec) -> Scheme:
    """Return the integer grid that a layer is in. Zero points are kept where they may differ from the middle.

    Groups of different sizes (a row that the group size does not divide) become several equal ones with one scale.
    """
    layer, settings = spec.name.removesuffix(".weight"), source.folder.settings
    shape, sizes = source.folder.layers[layer], np.bincount(source.folder.groups(layer))
    size = int(np.gcd.reduce(sizes))
    if size < SMALLEST:
        raise InputError(
            f"{source.path}: {layer}.g_idx makes groups that have no common size of at least {SMALLEST} inputs"
        )
    return Scheme(
        grid=f"int{shape.bits}",
        group_size=WHOLE_ROW if shape.groups == 1 and settings.group_size == WHOLE_ROW else size,
        symmetric=settings.symmetric and not settings.dynamic,
    )


def _gguf_scheme(source: GptqSource, spec: TensorSpec) -> Scheme:
    """Return q4_0 or q8_0. Raises `UsageError` for what neither holds."""
    scheme = _integers(source, spec)
    bits, group = scheme.facts.bits, scheme.group(spec.columns)
    symmetric = source.folder.settings.symmetric
    if bits not in _GGUF_GRIDS or not symmetric or group % BLOCK:
        raise UsageError(
            f"{spec.name}: GGUF has no form for int{bits} in groups of {group}{'' if symmetric else ' with zero points'}; it holds "
            f"symmetric 4 and 8 bits in groups of 32 and their multiples{'' if bits == 3 else '; --to onnx holds this'}"
        )
    return Scheme(grid=_GGUF_GRIDS[bits])


def _recipe(source: GptqSource, planned: Sequence[PlannedTensor]) -> Recipe:
    """Return a recipe that names what most layers are in."""
    coded = [tensor.scheme for tensor in planned if source.layer_of(tensor.spec.name) is not None]
    most = max(dict.fromkeys(coded), key=coded.count)
    label = most.grid if most.group_size is None else f"{most.grid}-g{most.group_size}".replace("g-1", "row")
    return Recipe(name=f"gptq-{label}" if most.facts.family == "int" else label, base=most)


def _store(source: GptqSource, orders: Orders) -> Store:
    """Return what stores a coded layer as its own codes, anything else as the run loop would."""
    others = stored_slabs(source, {})

    def store(planned: PlannedTensor) -> Iterator[Slab]:
        name = planned.spec.name
        if source.layer_of(name) is None:
            yield from others(planned)
            return
        layer = source.read_layer(name)
        order, groups = orders.get(name), np.sort(source.folder.groups(name.removesuffix(".weight")))
        codes = layer.codes if order is None else np.ascontiguousarray(layer.codes[:, order])
        yield Slab(
            stored=pack(planned.scheme, codes, _params(planned, layer, groups)), squared_error=0.0, squared_weight=0.0
        )

    return store


def _params(planned: PlannedTensor, layer: GptqLayer, groups: NDArray[np.int32]) -> Mapping[str, NDArray[np.generic]]:
    """Return the params of a layer's codes on the planned grid; `groups` [in] is the folder's group of each stored column.

    Raises `InputError` where that would change a value.
    """
    name, scheme = planned.spec.name, planned.scheme
    with np.errstate(over="ignore"):
        scales = layer.scales.astype(np.float16)
    if (scales != layer.scales).any():
        raise InputError(f"{name}: its {layer.scales_dtype} scales are no float16 numbers, which every export stores")
    if scheme.symmetric and not layer.symmetric:
        raise InputError(f"{name}: it has zero points, which {scheme} does not; --to onnx holds them")
    of_block = groups[:: scheme.group(planned.spec.columns)]
    scales = scales[:, of_block]
    if scheme.facts.family == "ggml":
        return {"d": scales}
    return {"scales": scales} if scheme.symmetric else {"scales": scales, "zeros": layer.zeros[:, of_block]}
