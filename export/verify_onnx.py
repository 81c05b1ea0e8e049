"""A written ONNX folder against its checkpoint: every graph followed, every weight unpacked from the written bytes.

Nothing of the writer is used. `export/verify_onnx_graph.py` finds the matrices by what the graph does with them; codes and zero points
are unpacked here by their place in a byte, rotary tables recomputed position by position in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from r1q.core.activations import ACTIVATIONS
from r1q.core.cache_scales import CACHE_SCALES, CacheScales
from r1q.core.checkpoint import QuantizedCheckpoint
from r1q.core.errors import InputError
from r1q.core.files import sha256_file
from r1q.core.grids import steps, unpack
from r1q.core.onnx_file import ALL_LOGITS, CONFIG, OnnxFolder
from r1q.core.onnx_graph import OnnxTensor
from r1q.core.qtensor import Floats, QuantizedTensor
from r1q.core.tensors import TensorSpec
from r1q.export.verified import Defect, Verified
from r1q.export.verify_onnx_graph import follow
from r1q.export.verify_onnx_integers import input_defects
from r1q.export.verify_onnx_order import BEFORE_DOWN, Order, in_order, order_defect, row_orders
from r1q.export.verify_onnx_values import LOGITS, Bound, Key, Logits, Matrix, Reading, stated
from r1q.export.verify_rope import frequency, turn_scale

if TYPE_CHECKING:
    from r1q.models.config import ModelConfig

SLAB_WEIGHTS = 1 << 20
# onnxruntime-genai 0.18 has no names of its own for these.
_TYPES = {"qwen3_moe": "qwen3", "deepseek_v2": "llama", "deepseek_v3": "llama"}
# What float32 may cost: half a step of a number up to 1, and that of a frequency, as often as it turned.
_ROUNDING = 1.5 * 2.0**-24
Integers = NDArray[np.int16]


def verify_onnx(checkpoint: QuantizedCheckpoint, path: Path) -> Verified:
    """Return every way in which the ONNX folder `path` is not what `checkpoint` holds."""
    from r1q.models.config import ModelConfig

    try:
        folder = OnnxFolder.open(path)
        config = ModelConfig.read(checkpoint.sidecar, name=checkpoint.model_name)
    except InputError as error:
        said = str(error).removeprefix(f"{path}: ").removesuffix("; download or export it again")
        unreadable = Defect(where=path.name, what=said, unreadable=True)
        return Verified(format="onnx", path=path, files=0, tensors=0, defects=(unreadable,))
    readings = [follow(folder, graph, config) for graph in folder.graphs.values()]
    comparison = _Comparison(checkpoint, folder, config)
    defects = [*_setting_defects(folder, config), *_copy_defects(checkpoint, folder)]
    notes: list[str] = []
    for reading in readings:
        defects += [*reading.defects, *comparison.defects_of(reading), *_cache_defects(reading, notes)]
        if not reading.defects:
            defects += input_defects(reading, checkpoint.activations)
    return Verified(
        format="onnx",
        path=path,
        files=0,
        tensors=len(comparison.compared),
        defects=tuple(dict.fromkeys(defects)),
        notes=tuple(dict.fromkeys(notes)),
    )


def _setting_defects(folder: OnnxFolder, config: ModelConfig) -> Iterator[Defect]:
    """Yield what genai_config.json says otherwise than the model's own configuration."""
    if not folder.config:
        yield Defect(where=CONFIG, what="is missing")
        return
    model, decoder = ("model",), ("model", "decoder")
    heads, size = config.cached_heads
    wanted: list[tuple[tuple[str, ...], object]] = [
        ((*model, "type"), _TYPES.get(config.family, config.family)),
        ((*model, "vocab_size"), config.vocab_size),
        ((*decoder, "head_size"), size),
        ((*decoder, "hidden_size"), config.hidden_size),
        ((*decoder, "num_attention_heads"), config.num_heads),
        ((*decoder, "num_hidden_layers"), config.num_layers),
        ((*decoder, "num_key_value_heads"), heads),
    ]
    if config.bos_id is not None:
        wanted.append(((*model, "bos_token_id"), config.bos_id))
    if config.eos_ids:
        wanted.append(((*model, "eos_token_id"), list(config.eos_ids)))
    for keys, want in wanted:
        have = stated(folder.config, *keys)
        if have != want and [have] != want:
            yield Defect(
                where=f"{CONFIG}: {'.'.join(keys)}", what=f"is {have!r}, the model's config.json says {want!r}"
            )
    lengths = [stated(folder.config, *keys) for keys in (("search", "max_length"), ("model", "context_length"))]
    if not all(type(length) is int for length in lengths) or not 1 <= lengths[0] <= lengths[1]:
        yield Defect(where=f"{CONFIG}: search.max_length", what=f"is {lengths[0]!r} of a context of {lengths[1]!r}")


def _cache_defects(reading: Reading, notes: list[str]) -> Iterator[Defect]:
    """Hold the scales of an 8-bit cache against the file beside the folder that keeps them; they are no weights."""
    config, path = reading.config, reading.folder.path.absolute().parent / CACHE_SCALES
    if not reading.cache:
        return
    if not path.is_file():
        notes.append(
            f"keys and values are kept in 8 bits; {CACHE_SCALES}, which has their scales, is not beside the folder"
        )
        return
    shape = (config.num_kv_heads, config.head_dim)
    try:
        wanted = CacheScales.read(path, (config.num_layers, *shape))
    except InputError as error:
        yield Defect(where=CACHE_SCALES, what=str(error).removeprefix(f"{path} "))
        return
    notes.append(f"keys and values are kept in 8 bits, with the scales of {CACHE_SCALES}")
    for layer in range(config.num_layers):
        for part, tensor, want in zip(
            ("keys", "values"), reading.cache.get(layer, ()), (wanted.keys[layer], wanted.values[layer]), strict=False
        ):
            where = f"{reading.graph.path.name}: scales of the {part} of block {layer}"
            if tensor.dtype != "float32" or tensor.size != want.size:
                yield Defect(where=where, what=f"are {tensor.dtype} {list(tensor.shape)}, not {list(shape)} of float32")
                continue
            counts, largest = _differences(reading.folder.read(tensor).reshape(shape), want)
            if (defect := Defect.of_counts(where, counts, largest)) is not None:
                yield defect


def _copy_defects(checkpoint: QuantizedCheckpoint, folder: OnnxFolder) -> Iterator[Defect]:
    """Yield the model's own files that are not in the folder byte for byte."""
    for source in sorted(checkpoint.sidecar.iterdir()):
        if source.name == ACTIVATIONS:
            continue  # it stands in the graph, and is held against that
        copy = folder.path / source.name
        if not (copy.is_file() and sha256_file(copy) == sha256_file(source)):
            what = "is not byte for byte the model's own" if copy.is_file() else "is missing"
            yield Defect(where=source.name, what=what)


@dataclass(slots=True)
class _Comparison:
    """Compares what graphs hold with the checkpoint; bytes that two graphs share are compared once."""

    checkpoint: QuantizedCheckpoint
    folder: OnnxFolder
    config: ModelConfig
    compared: set[str] = field(default_factory=set)
    _done: dict[object, Defect | None] = field(default_factory=dict)

    def defects_of(self, reading: Reading) -> Iterator[Defect]:
        """Yield the tensors of a followed graph that differ, are missing, or are none of the checkpoint's."""
        specs: dict[Key, TensorSpec] = {_key(spec): spec for spec in self.checkpoint.tensors}
        if self.config.tied:
            specs[None, "output", "weight"] = specs[None, "token_embd", "weight"]
        name, orders = reading.graph.path.name, row_orders(self.checkpoint, reading, specs)
        logits = reading.values.get(LOGITS)
        if name == ALL_LOGITS and isinstance(logits, Logits) and logits.last:
            yield Defect(where=name, what="gives the last position's logits, not every one's")
        for bound in reading.bound:
            spec = specs.get(bound.key)
            rows = orders.get(bound.key[0]) if bound.key[1] in BEFORE_DOWN else None
            if spec is None:
                what = f"holds {bound.key[1]} {bound.key[2]} of block {bound.key[0]}, which the model has not"
                yield Defect(where=f"{name}: {bound.node}", what=what, difference=math.inf)
            elif (defect := order_defect(self.checkpoint, reading, bound, spec)) is not None:
                yield defect
            else:
                place = (spec.name, *_place(bound), None if rows is None else rows.tobytes())
                if (defect := self._once(place, self._tensor, bound, spec, rows)) is not None:
                    yield defect
        # After a defect in the graph itself what it could not follow is not missing.
        missing = set(specs) - {bound.key for bound in reading.bound}
        for key in sorted(missing, key=str) if not reading.defects else ():
            yield Defect(where=specs[key].name, what=f"is missing in {name}", difference=math.inf)
        for tables in reading.rotary:
            for table, function in zip(tables, (np.cos, np.sin), strict=True):
                if (defect := self._once((function, _address(table)), self._rotary, table, function)) is not None:
                    yield defect

    def _once(self, place: object, compare: Callable[..., Defect | None], *arguments: object) -> Defect | None:
        if place not in self._done:
            self._done[place] = compare(*arguments)
        return self._done[place]

    def _tensor(self, bound: Bound, spec: TensorSpec, order: Order | None) -> Defect | None:
        """Hold a tensor, whose rows stand in `order`, against the checkpoint's."""
        self.compared.add(spec.name)
        held, rows = bound.held, bound.rows
        shape, dtype = ((rows, held.columns), "float32") if isinstance(held, Matrix) else ((rows,), held.dtype)
        if shape != spec.shape or dtype != "float32":
            what = f"is {list(shape)} ({dtype}) at {bound.node}, the checkpoint has {list(spec.shape)}"
            return Defect(where=spec.name, what=what, difference=math.inf)
        counts, largest = {"code": 0, "scale": 0, "value": 0}, 0.0
        step = max(1, SLAB_WEIGHTS // spec.columns) if spec.is_matrix else 1
        for start in range(0, spec.rows, step):
            stop = min(start + step, spec.rows)
            chosen = np.arange(start, stop) if order is None else order[start:stop]
            if not isinstance(held, Matrix):
                have = self._vector(held, bound.start, bound.stop)
                found, by = _differences(have, in_order(self.checkpoint.read_rows(spec.name, 0, 1).reshape(-1), order))
            elif held.scales is None:
                values = self._float_rows(held, bound.start + start, bound.start + stop)
                found, by = _differences(values, self._wanted_floats(spec, chosen))
            else:
                found, by = self._block_rows(held, bound.start + start * bound.step, bound.step, spec, chosen)
            counts = {what: counts[what] + found.get(what, 0) for what in counts}
            largest = max(largest, by)
        return Defect.of_counts(spec.name, counts, largest)

    def _vector(self, held: OnnxTensor, start: int, stop: int) -> Floats:
        values: Floats = self.folder.read(held).reshape(-1)[start:stop]
        return values

    def _float_rows(self, held: Matrix, start: int, stop: int) -> Floats:
        if held.across:
            return np.ascontiguousarray(self.folder.read(held.weight)[:, start:stop].T)
        values: Floats = self.folder.read_rows(held.weight, start, stop)
        return values

    def _wanted_floats(self, spec: TensorSpec, rows: Order) -> Floats:
        first = int(rows.min())
        values: Floats = self.checkpoint.read_rows(spec.name, first, int(rows.max()) + 1)[rows - first]
        return values

    def _wanted(self, spec: TensorSpec, rows: Order) -> QuantizedTensor:
        first = int(rows.min())
        packed = self.checkpoint.packed_rows(spec.name, first, int(rows.max()) + 1)[rows - first]
        return unpack(self.checkpoint.scheme(spec.name), packed, spec.columns)

    def _block_rows(
        self, held: Matrix, first: int, step: int, spec: TensorSpec, rows: Order
    ) -> tuple[dict[str, int], float]:
        """Return how many codes and scales of every `step`th row differ from the checkpoint's `rows`; values by how much at most."""
        levels, scales = self._unpacked(held, first, first + step * (len(rows) - 1) + 1)
        levels, scales = levels[::step], scales[::step]
        scheme = self.checkpoint.scheme(spec.name)
        counts: dict[str, int] = {}
        if scheme.facts.family == "float":
            want_values = self._wanted_floats(spec, rows)
            want_levels = want_scales = None
        else:
            want = self._wanted(spec, rows)
            grid = steps(scheme, want.params, spec.columns)
            repeats, rest = divmod(grid.group, held.block)
            if rest or grid.table is not None or grid.offset.any():
                want_values, want_levels, want_scales = want.dequantize(), None, None
            else:
                zeros = np.repeat(np.broadcast_to(grid.zero, grid.scale.shape).astype(np.int16), grid.group, axis=1)
                want_levels, want_scales = want.codes - zeros, np.repeat(grid.scale, repeats, axis=1)
                counts = {"code": int((levels != want_levels).sum()), "scale": _different(scales, want_scales)}
                if not any(counts.values()):
                    return counts, 0.0
                want_values = want.dequantize()
        with np.errstate(invalid="ignore", over="ignore"):
            have = levels.astype(np.float32) * np.repeat(scales, held.block, axis=1)[:, : held.columns]
        found, largest = _differences(have, want_values)
        return (counts if want_levels is not None else found), largest

    def _unpacked(self, held: Matrix, start: int, stop: int) -> tuple[Integers, Floats]:
        """Return codes less their zero points [rows, columns] and scales [rows, blocks] of some rows of a matrix in blocks."""
        assert held.scales is not None
        if held.across:
            codes, scales = self.folder.read(held.weight), self.folder.read(held.scales).reshape(-1)
            return np.ascontiguousarray(codes[:, start:stop].T).astype(np.int16), scales[start:stop, None]
        rows, blocks = stop - start, -(-held.columns // held.block)
        padded = self._places(held.weight, held, start, stop)[:, : blocks * held.block]
        zeros = np.full((rows, blocks), 1 << (held.bits - 1), dtype=np.int16)
        if held.zeros is not None:
            zeros = self._places(held.zeros, held, start, stop)[:, :blocks]
        levels = (padded.reshape(rows, blocks, held.block) - zeros[:, :, None]).reshape(rows, -1)
        scales = self._rows_of(held.scales, held, start, stop)
        return levels[:, : held.columns], scales

    def _places(self, tensor: OnnxTensor, held: Matrix, start: int, stop: int) -> Integers:
        """Return every number of `held.bits` bits in some rows of bytes, the low bits of a byte first."""
        packed = self._rows_of(tensor, held, start, stop)
        shifts = np.arange(0, 8, held.bits, dtype=np.uint8)
        numbers = (packed[:, :, None] >> shifts) & np.uint8((1 << held.bits) - 1)
        return numbers.reshape(stop - start, -1).astype(np.int16)

    def _rows_of(self, tensor: OnnxTensor, held: Matrix, start: int, stop: int) -> NDArray[Any]:
        flat = replace(tensor, shape=(held.rows, tensor.size // held.rows))
        return self.folder.read_rows(flat, start, stop)

    def _rotary(self, table: OnnxTensor, function: Any) -> Defect | None:
        """Hold a table [positions, head_dim/2] against cosines or sines computed here, a slab of positions at a time."""
        name = (
            f"rotary {function.__name__}ines ({table.name})" if function is np.cos else f"rotary sines ({table.name})"
        )
        self.compared.add(name)
        pairs, context = self.config.head_dim // 2, stated(self.folder.config, "model", "context_length")
        if len(table.shape) != 2 or table.shape[1] != pairs or table.dtype != "float32":
            return Defect(
                where=name, what=f"is {table.dtype} {list(table.shape)}, not {pairs} a position", difference=math.inf
            )
        if isinstance(context, int) and context > table.shape[0]:
            return Defect(where=name, what=f"ends at {table.shape[0]} of {context} positions", difference=math.inf)
        turns = np.array([frequency(self.config, index) for index in range(pairs)], dtype=np.float64)
        scale, wrong, largest = turn_scale(self.config), 0, 0.0
        for start in range(0, table.shape[0], 4096):
            have = self.folder.read_rows(table, start, min(start + 4096, table.shape[0])).astype(np.float64)
            angles = np.arange(start, start + len(have))[:, None] * turns
            far = np.abs(have - scale * function(angles))
            wrong += int((~(far <= scale * _ROUNDING * (1 + angles))).sum())
            largest = max(largest, float(far.max(initial=0.0)))
        return Defect.of_counts(name, {"value": wrong}, largest)


def _key(spec: TensorSpec) -> Key:
    return spec.layer, spec.kind if spec.expert is None else f"{spec.kind}.{spec.expert}", spec.part


def _place(bound: Bound) -> tuple[object, ...]:
    held = bound.held
    parts = (held.weight, held.scales, held.zeros) if isinstance(held, Matrix) else (held,)
    return (bound.start, bound.stop, bound.step, *(_address(part) for part in parts if part is not None))


def _address(tensor: OnnxTensor) -> tuple[object, ...]:
    return (tensor.location, tensor.offset, tensor.nbytes, tensor.name if tensor.location is None else "")


def _differences(have: Floats, want: Floats) -> tuple[dict[str, int], float]:
    """Return how many values differ in their bits, and by how much at most."""
    with np.errstate(invalid="ignore", over="ignore"):
        distance = np.abs(have.astype(np.float64) - want.astype(np.float64))
    return {"value": _different(have, want)}, float(np.nan_to_num(distance, nan=np.inf).max(initial=0.0))


def _different(have: Floats, want: Floats) -> int:
    bits = [np.ascontiguousarray(values, dtype=np.float32).view(np.uint32) for values in (have, want)]
    return int((bits[0] != bits[1]).sum())
