"""What values in an ONNX decoder mean, and the record of following one: which stored tensor is which of the model's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from r1q.core.onnx_file import OnnxFolder
from r1q.core.onnx_graph import OnnxGraph, OnnxNode, OnnxTensor
from r1q.export.verified import Defect

if TYPE_CHECKING:
    from r1q.models.config import ModelConfig

LOGITS = "logits"
INT32 = 6  # TensorProto.DataType
MAX_LIST = 64
# What an operator takes an attribute to be that is not stated, where all operators that have it agree.
_DEFAULTS: Mapping[str, object] = {
    "axis": -1, "stash_type": 1, "alpha": 1.0, "transA": 0, "transBatchA": 0, "transBatchB": 0, "keepdims": 1,
    "do_rotary": 0, "rotary_interleaved": 0, "local_window_size": -1, "softcap": 0.0, "smooth_softmax": 0, "scale": 0.0,
    "accuracy_level": 0, "weight_prepacked": 0, "gather_axis": 0, "quantize_axis": 1, "qk_output": 0,
    "noop_with_empty_axes": 0, "kv_cache_bit_width": 0, "sliding_window_cache": 0,
    "largest": 1, "sorted": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """A matrix [rows, columns] as an operator holds it: `weight` floats, or codes of `bits` in blocks with `scales` and `zeros`.

    `across`: floats, or codes with one scale a row, are stored [columns, rows].
    """

    weight: OnnxTensor
    rows: int
    columns: int
    scales: OnnxTensor | None = None
    zeros: OnnxTensor | None = None
    bits: int = 32
    block: int = 0
    across: bool = False


Key = tuple[int | None, str, str]  # layer, kind and part, as in `core.tensors.TensorSpec`


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """A tensor of the model found in the graph: `key`, and the rows (elements of a vector) [start, stop) of `held` that are it.

    Of rows that several take in turn it is every `step`th. Of an expert the kind in the key ends with its number: `ffn_up_exps.17`.

    `order`: which inputs the columns are multiplied by, None where those are 0, 1, ….
    """

    key: Key
    held: Matrix | OnnxTensor
    start: int
    stop: int
    node: str
    order: OnnxTensor | None = None
    step: int = 1

    @property
    def rows(self) -> int:
        """How many rows it has."""
        return len(range(self.start, self.stop, self.step))


@dataclass(frozen=True, slots=True)
class Count:
    """An integer that follows from the mask: `what` it counts."""

    what: str


@dataclass(frozen=True, slots=True)
class Place:
    """Something at `stage`: after so many additions to the residual stream, two a block. `last`: of the last position alone.

    `order`: its last axis was put in this order.
    """

    stage: int
    last: bool = False
    order: OnnxTensor | None = None


class Stream(Place):
    """The residual stream."""

    __slots__ = ()


class Normed(Place):
    """The norm of the residual stream."""

    __slots__ = ()


class Flat(Place):
    """The norm of the residual stream, a row for each token."""

    __slots__ = ()


class Mixed(Place):
    """The weighted sum of what experts made of the norm."""

    __slots__ = ()


class Attended(Place):
    """What the heads of an attention gathered."""

    __slots__ = ()


class Gated(Place):
    """silu(gate) · up."""

    __slots__ = ()


class Logits(Place):
    """The product of the head with the last norm."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """Rows [start, stop) of `matrix` times `of` in an `order`, plus as many of `bias`.

    `spelled`: scale and zero of the integers that `of` was rounded to before. `norm`: its heads were normalized with it. `form`: what
    was done to the product since ("heads", "sigmoid", "silu", "softmax").
    """

    of: Place
    matrix: Matrix
    node: str
    start: int
    stop: int
    bias: OnnxTensor | None = None
    norm: OnnxTensor | None = None
    form: str = ""
    spelled: tuple[OnnxTensor, OnnxTensor] | None = None
    order: OnnxTensor | None = None

    @property
    def rows(self) -> int:
        """How many rows it has."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class Spelled:
    """`of` as integers, with the `scale` and `zero` that they have."""

    of: Place
    scale: OnnxTensor
    zero: OnnxTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """The sides of values of a `width` for every position, or the `last` one."""

    width: int
    last: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """An `order` of inputs, repeated for every position of a value."""

    order: OnnxTensor
    extent: Extent


@dataclass(frozen=True, slots=True)
class Short(Place):
    """A norm, by `gamma`, of a short vector that a `product` has made: what latent attention makes queries or keys and values of."""

    product: Product | None = None
    gamma: OnnxTensor | None = None


@dataclass(frozen=True, slots=True)
class Made:
    """A formula, compared as a whole: what an `operator` makes of `parts`; `detail` are numbers, stored tensors, which output."""

    operator: str
    parts: tuple[Value, ...]
    detail: tuple[object, ...] = ()


Value = Count | Place | Product | Spelled | Matrix | Extent | Spread | Made
V = TypeVar("V", bound=Value)


class MisfitError(Exception):
    """An operator that does not belong here, or not so."""


@dataclass(slots=True)
class Reading:
    """The record of following a graph: `values` by name, `bound` tensors, rotary tables, and what is not as the model has it.

    `cache`: by block the scales of keys and values that are kept in 8 bits. `integers`: by name scale and zero of values that were
    integers; `inputs`: those of the inputs of a layer, None where they stay floats.
    """

    folder: OnnxFolder
    graph: OnnxGraph
    config: ModelConfig
    values: dict[str, Value] = field(default_factory=dict)
    constants: dict[str, OnnxTensor] = field(default_factory=dict)
    bound: list[Bound] = field(default_factory=list)
    rotary: list[tuple[OnnxTensor, OnnxTensor]] = field(default_factory=list)
    cache: dict[int, tuple[OnnxTensor, OnnxTensor]] = field(default_factory=dict)
    integers: dict[str, tuple[OnnxTensor, OnnxTensor]] = field(default_factory=dict)
    inputs: dict[tuple[int | None, str], tuple[OnnxTensor, OnnxTensor] | None] = field(default_factory=dict)
    defects: list[Defect] = field(default_factory=list)

    def say(self, where: str, what: str) -> None:
        """Add a defect that is no tensor's."""
        self.defects.append(Defect(where=f"{self.graph.path.name}: {where}", what=what))

    def is_spoilt(self, node: OnnxNode) -> bool:
        """Return whether an input has no meaning: then what is wrong was said before."""
        known = {*self.values, *self.constants, *self.graph.inputs, ""}
        return any(name not in known for name in node.inputs)

    def value(self, node: OnnxNode, index: int, kind: type[V]) -> V:
        """Return the meaning of input `index`, which must be of `kind`."""
        found = self.values.get(node.input(index))
        if not isinstance(found, kind):
            raise MisfitError(f"takes {node.input(index)!r}, which is not what belongs there")
        return found

    def held(self, node: OnnxNode, index: int) -> OnnxTensor:
        """Return the stored tensor that is input `index`."""
        name = node.input(index)
        if name not in self.constants:
            raise MisfitError(f"takes {name!r}, which is no stored tensor")
        return self.constants[name]

    def single(self, node: OnnxNode, index: int) -> float:
        """Return the one stored float32 that is input `index`."""
        tensor = self.held(node, index)
        if (tensor.dtype, tensor.size) != ("float32", 1):
            raise MisfitError(f"takes {tensor.name!r}, {tensor.dtype} {list(tensor.shape)}, not one float32")
        return float(self.folder.read(tensor).reshape(-1)[0])

    def numbers(self, node: OnnxNode, index: int) -> list[int]:
        """Return the stored integers that are input `index`."""
        tensor = self.held(node, index)
        if tensor.dtype not in ("int64", "int32") or tensor.size > MAX_LIST:
            raise MisfitError(f"takes {tensor.name!r}, which is no short list of integers")
        return [int(number) for number in self.folder.read(tensor).reshape(-1)]

    def settings(self, node: OnnxNode, wanted: Mapping[str, object], free: tuple[str, ...] = ()) -> None:
        """Say which attributes are not as `wanted`, and which others there are that are not their defaults nor `free`."""
        for name, want in wanted.items():
            have: Any = node.attributes.get(name, _DEFAULTS.get(name))
            close = isinstance(want, float) and isinstance(have, float) and np.float32(have) == np.float32(want)
            if have != want and not close:
                self.say(str(node), f"{name} is {_short(have)}, the model needs {_short(want)}")
        for name in sorted(set(node.attributes) - set(wanted) - set(free)):
            if node.attributes[name] != _DEFAULTS.get(name):
                self.say(str(node), f"has the attribute {name} {node.attributes[name]!r}")

    def make(self, node: OnnxNode, *values: Value | None) -> None:
        """Give the outputs of `node` their meanings."""
        for name, value in zip(node.outputs, values, strict=False):
            if name and value is not None:
                self.values[name] = value

    def bind(self, layer: int | None, kind: str, product: Product) -> None:
        """Note that a product is that layer's: its rows and its bias."""
        self.inputs[layer, kind] = product.spelled
        where = {"start": product.start, "stop": product.stop, "node": product.node}
        weight = Bound(key=(layer, kind, "weight"), held=product.matrix, order=product.order, **where)  # type: ignore[arg-type]
        self.bound.append(weight)
        if product.bias is not None:
            self.bound.append(Bound(key=(layer, kind, "bias"), held=product.bias, **where))  # type: ignore[arg-type]

    def bind_gamma(self, layer: int, kind: str, gamma: OnnxTensor, node: OnnxNode) -> None:
        """Note that `gamma` is the weight of a norm inside of attention."""
        key = (layer, kind, "weight")
        self.bound.append(Bound(key=key, held=gamma, start=0, stop=gamma.size, node=str(node)))

    def bind_norm(self, layer: int | None, kind: str, gamma: OnnxTensor, node: OnnxNode) -> None:
        """Note that `gamma` is the weight of a norm, and hold its operator against the model."""
        key = (layer, kind, "weight")
        self.bound.append(Bound(key=key, held=gamma, start=0, stop=gamma.size, node=str(node)))
        self.settings(node, {"epsilon": self.config.rms_norm_eps, "axis": -1, "stash_type": 1})


def blocks(reading: Reading, node: OnnxNode, at: Mapping[str, int], facts: tuple[object, ...]) -> Matrix:
    """Return a matrix in blocks whose tensors, inputs `at`, have the sizes that (rows, columns or −1, bits, block) ask for."""
    numbers = [fact for fact in facts if isinstance(fact, int)]
    codes, scales = reading.held(node, at["codes"]), reading.held(node, at["scales"])
    place = at.get("zeros", 3)
    zeros = reading.held(node, place) if node.input(place) else None
    if len(numbers) != 4 or numbers[2] not in (2, 4, 8) or min(numbers[0], numbers[3]) < 1:
        raise MisfitError(f"has the sizes {facts}")
    rows, columns, bits, block = numbers
    if columns == -1:
        columns = codes.size // rows * 8 // bits
    count = -(-columns // block)
    wanted = [(codes, "uint8", rows * count * (block * bits // 8)), (scales, "float32", rows * count)]
    if zeros is not None:
        wanted.append((zeros, "uint8", rows * -(-count * bits // 8)))
    for tensor, dtype, size in wanted:
        if (tensor.dtype, tensor.size) != (dtype, size):
            raise MisfitError(f"takes {tensor.name!r}, {tensor.dtype} {list(tensor.shape)}, not {size} of {dtype}")
    return Matrix(weight=codes, rows=rows, columns=columns, scales=scales, zeros=zeros, bits=bits, block=block)


def stated(config: object, *keys: str) -> Any:
    """Return what nested JSON objects say under `keys`, None where they do not."""
    for key in keys:
        config = config.get(key) if isinstance(config, Mapping) else None
    return config


def _short(value: object) -> object:
    return f"{value:.7g}" if isinstance(value, float) else value
