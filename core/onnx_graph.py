"""OnnxGraph: one ONNX graph as checked values: nodes, initializers, inputs and outputs, every name defined once and before its use.

Only what a decoder needs is read: operators of onnx and com.microsoft, dense tensors of numbers, no subgraphs, no functions. External
data is described here and looked at in `core/onnx_file.py`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from r1q.core.errors import InputError
from r1q.core.onnx_schema import ATTRIBUTE_FIELDS, BITS, MODEL, STORED, TYPED_FIELDS, TYPES
from r1q.core.protobuf import WireReader

MAX_NODES = 1 << 18
MAX_TENSORS = 1 << 18
MAX_VALUES = 1 << 16
MAX_AXES = 8
MAX_SIDE = 1 << 40
MAX_BYTES = 1 << 48
DOMAINS = ("", "com.microsoft")
IR_VERSIONS = range(4, 64)  # below 4 every initializer is an input too, which a caller may replace
_ALIASES = {"ai.onnx": ""}
_EXTERNAL_KEYS = {"location", "offset", "length", "checksum"}
_LOADS_FILES = {"EPContext"}  # names a file of compiled code for a device
_MEND = "download or export it again"

Array = NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OnnxTensor:
    """An initializer or a tensor attribute: `dtype` in numpy's words (plus bfloat16, uint4, …), `shape`, `nbytes` stored bytes.

    Its bytes are `inline`, or [offset, offset + nbytes) of the file `location`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    location: str | None = None
    offset: int = 0
    inline: memoryview | bytes = field(default=b"", repr=False)

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    def array(self, stored: memoryview | bytes | Array) -> Array:
        """Return stored bytes [nbytes] as an array of `shape`.

        bfloat16 comes as uint16 and float8 as uint8 bits; types below 8 bits as their packed bytes [nbytes].
        """
        values = np.frombuffer(stored, dtype=STORED[self.dtype])
        return values if BITS[self.dtype] < 8 else values.reshape(self.shape)


Attribute = int | float | str | tuple[int, ...] | tuple[float, ...] | tuple[str, ...] | OnnxTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxNode:
    """One operator: `inputs` and `outputs` are names, "" where an optional one is left out; `domain` "" is onnx's own."""

    name: str
    op_type: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Attribute]

    def input(self, index: int) -> str:
        """Return the name of input `index`, "" where it is left out."""
        return self.inputs[index] if index < len(self.inputs) else ""

    def __str__(self) -> str:
        """Return what messages call it: its name, or its operator and first output."""
        return self.name or f"{self.op_type} → {next(filter(None, self.outputs), '?')}"


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxValue:
    """An input or output of a graph; a side of `shape` is a number, a name, or "" where nothing is said; None: any shape."""

    name: str
    dtype: str
    shape: tuple[int | str, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OnnxGraph:
    """A checked graph. Nodes are in an order in which each one's inputs are known."""

    path: Path
    ir_version: int
    opsets: Mapping[str, int]
    producer: str
    nodes: tuple[OnnxNode, ...]
    initializers: Mapping[str, OnnxTensor]
    inputs: Mapping[str, OnnxValue]
    outputs: Mapping[str, OnnxValue]


def parse_graph(path: Path, data: bytes) -> OnnxGraph:
    """Return the graph that the bytes of an .onnx file hold; raises `InputError` naming `path`, the defect and its place."""
    reader = WireReader(path, data)
    model = reader.read(MODEL, 0, len(data), "the model")
    return _Parser(path).graph(model)


class _Parser:
    def __init__(self, path: Path) -> None:
        self.path = path

    def fail(self, what: str) -> NoReturn:
        raise InputError(f"{self.path}: {what}; {_MEND}")

    def graph(self, model: Mapping[str, Any]) -> OnnxGraph:
        graph, version = model.get("graph"), model.get("ir_version", 0)
        if graph is None:
            self.fail("not an ONNX model: it has no graph")
        if version not in IR_VERSIONS:
            self.fail(f"IR version {version}: {IR_VERSIONS.start} and later are read")
        nodes, tensors = graph.get("node", []), graph.get("initializer", [])
        counts = {
            "nodes": (len(nodes), MAX_NODES),
            "initializers": (len(tensors), MAX_TENSORS),
            "inputs": (len(graph.get("input", [])), MAX_VALUES),
            "outputs": (len(graph.get("output", [])), MAX_VALUES),
        }
        for what, (count, most) in counts.items():
            if count > most:
                self.fail(f"{count} {what}; {most} is the most")
        for value in graph.get("value_info", []):
            self.value(value, "value_info")
        found = OnnxGraph(
            path=self.path,
            ir_version=version,
            opsets=MappingProxyType(self.opsets(model.get("opset_import", []))),
            producer=" ".join(str(model.get(key, "")) for key in ("producer_name", "producer_version")).strip(),
            nodes=tuple(self.node(node, index) for index, node in enumerate(nodes)),
            initializers=self.named([self.tensor(tensor) for tensor in tensors], "initializer"),
            inputs=self.named([self.value(value, "input") for value in graph.get("input", [])], "input"),
            outputs=self.named([self.value(value, "output") for value in graph.get("output", [])], "output"),
        )
        self.check_names(found)
        return found

    def opsets(self, entries: Sequence[Mapping[str, Any]]) -> dict[str, int]:
        found: dict[str, int] = {}
        for entry in entries:
            domain, version = self.domain(entry), entry.get("version", 0)
            if domain in found or not 1 <= version <= 1 << 20:
                self.fail(f"opset {domain or 'ai.onnx'!r} {version} is imported twice or is no version")
            found[domain] = version
        if "" not in found:
            self.fail("no opset of ai.onnx is imported")
        return found

    def domain(self, entry: Mapping[str, Any]) -> str:
        stated = str(entry.get("domain", ""))
        return _ALIASES.get(stated, stated)

    def named(self, items: Sequence[Any], kind: str) -> Mapping[str, Any]:
        table = {item.name: item for item in items}
        if "" in table:
            self.fail(f"an {kind} has no name")
        if len(table) < len(items):
            twice = Counter(item.name for item in items).most_common(1)[0][0]
            self.fail(f"two {kind}s are named {twice!r}")
        return MappingProxyType(table)

    def value(self, value: Mapping[str, Any], kind: str) -> OnnxValue:
        name = value.get("name", "")
        tensor = value.get("type", {}).get("tensor_type")
        if tensor is None:
            if kind != "value_info":
                self.fail(f"{kind} {name!r} has no type")
            return OnnxValue(name=name, dtype="", shape=None)
        number = tensor.get("elem_type", 0)
        if number not in TYPES and (number or kind != "value_info"):
            self.fail(f"{kind} {name!r} has the unsupported element type {number}")
        shape = tensor.get("shape")
        dims = None if shape is None else tuple(self.side(dim, name) for dim in shape.get("dim", []))
        if dims is not None and len(dims) > MAX_AXES:
            self.fail(f"{kind} {name!r} has {len(dims)} axes; {MAX_AXES} is the most")
        return OnnxValue(name=name, dtype=TYPES.get(number, ""), shape=dims)

    def side(self, dim: Mapping[str, Any], name: str) -> int | str:
        if "dim_value" in dim and ("dim_param" in dim or not 0 <= dim["dim_value"] <= MAX_SIDE):
            self.fail(f"value {name!r} has an impossible side {dim}")
        side: int | str = dim.get("dim_value", dim.get("dim_param", ""))
        return side

    def node(self, node: Mapping[str, Any], index: int) -> OnnxNode:
        op_type, domain = str(node.get("op_type", "")), self.domain(node)
        label = f"node {node.get('name') or index!r} ({op_type})"
        if domain not in DOMAINS:
            self.fail(
                f"{label} is an operator of {domain!r}, which needs code of its own; onnx and com.microsoft are read"
            )
        if not op_type or op_type in _LOADS_FILES:
            self.fail(f"{label} has no operator or one that loads a file of code")
        entries = node.get("attribute", [])
        attributes = {str(entry.get("name", "")): self.attribute(entry, label) for entry in entries}
        if len(attributes) < len(entries) or "" in attributes:
            self.fail(f"{label} has an attribute twice or without a name")
        return OnnxNode(
            name=str(node.get("name", "")),
            op_type=op_type,
            domain=domain,
            inputs=tuple(node.get("input", [])),
            outputs=tuple(node.get("output", [])),
            attributes=MappingProxyType(attributes),
        )

    def attribute(self, entry: Mapping[str, Any], label: str) -> Attribute:
        what = f"attribute {entry.get('name', '')!r} of {label}"
        kind = ATTRIBUTE_FIELDS.get(entry.get("type", 0))
        others = set(entry) - {"name", "type", "text", kind}
        if kind is None or others - {"text"}:
            self.fail(f"{what} has the type {entry.get('type', 0)} and the values {sorted(others)}")
        # Absent: zero, as protobuf leaves it out, or an empty list.
        value: Any = entry.get(kind, {"f": 0.0, "i": 0, "s": b""}.get(kind, ()))
        if kind == "t":
            if not value:
                self.fail(f"{what} has no tensor")
            tensor = self.tensor(value)
            if tensor.location is not None:
                self.fail(f"{what} lies in the external file {tensor.location!r}; only initializers may")
            return tensor
        if kind == "floats":
            value = tuple(np.frombuffer(bytes(value), dtype="<f4").tolist())
        if kind in ("f", "floats") and not all(math.isfinite(number) for number in np.atleast_1d(value)):
            self.fail(f"{what} is not finite")
        if kind in ("s", "strings"):
            try:
                texts = tuple(str(bytes(part), "utf-8") for part in ((value,) if kind == "s" else value))
            except UnicodeDecodeError:
                self.fail(f"{what} is not UTF-8")
            return texts[0] if kind == "s" else texts
        return tuple(value) if kind == "ints" else value

    def tensor(self, entry: Mapping[str, Any]) -> OnnxTensor:
        name, number = str(entry.get("name", "")), entry.get("data_type", 0)
        if number not in TYPES:
            self.fail(f"tensor {name!r} has the unsupported element type {number}")
        dtype, shape = TYPES[number], tuple(entry.get("dims", []))
        if len(shape) > MAX_AXES or not all(0 <= side <= MAX_SIDE for side in shape):
            self.fail(f"tensor {name!r} has the impossible shape {list(shape)[: MAX_AXES + 1]}")
        # Sides of 0 must not hide ones that numpy could not address.
        nbytes = -(-math.prod(shape) * BITS[dtype] // 8)
        if math.prod(side for side in shape if side) > MAX_BYTES:
            self.fail(f"tensor {name!r} has the impossible shape {list(shape)}")
        external = entry.get("data_location", 0)
        fields = [key for key in ("raw_data", *TYPED_FIELDS) if key in entry]
        if external not in (0, 1) or (external == 1 and fields) or (external == 0 and "external_data" in entry):
            self.fail(f"tensor {name!r} does not say clearly whether its data is in the graph or beside it")
        if external:
            location, offset = self.external(entry.get("external_data", []), name, nbytes)
            return OnnxTensor(name=name, dtype=dtype, shape=shape, nbytes=nbytes, location=location, offset=offset)
        inline = self.inline(entry, fields, name, dtype)
        if len(inline) != nbytes:
            self.fail(f"tensor {name!r}, {dtype} {list(shape)}, needs {nbytes} bytes and has {len(inline)}")
        return OnnxTensor(name=name, dtype=dtype, shape=shape, nbytes=nbytes, inline=inline)

    def external(self, entries: Sequence[Mapping[str, str]], name: str, nbytes: int) -> tuple[str, int]:
        """Return the file and the offset of an external tensor; the file itself is not looked at."""
        facts = {entry.get("key", ""): entry.get("value", "") for entry in entries}
        if len(facts) < len(entries) or not set(facts) <= _EXTERNAL_KEYS or "location" not in facts:
            self.fail(
                f"the external data of tensor {name!r} is described by {sorted(facts)}, not a location and a range"
            )
        numbers = {}
        for key, default in (("offset", 0), ("length", nbytes)):
            text = facts.get(key, str(default))
            if not (text.isascii() and text.isdigit() and len(text) <= 18):
                self.fail(f"the {key} {text[:40]!r} of tensor {name!r} is no number of bytes")
            numbers[key] = int(text)
        if numbers["length"] != nbytes:
            self.fail(f"tensor {name!r} needs {nbytes} bytes and claims {numbers['length']} of {facts['location']!r}")
        return facts["location"], numbers["offset"]

    def inline(self, entry: Mapping[str, Any], fields: Sequence[str], name: str, dtype: str) -> memoryview | bytes:
        """Return a tensor's stored bytes from the graph file, whichever way they are spelled."""
        if len(fields) > 1:
            self.fail(f"tensor {name!r} has its values twice: {', '.join(fields)}")
        key = fields[0] if fields else "raw_data"
        if key == "raw_data":
            raw: memoryview = entry.get(key, memoryview(b""))
            return raw
        if dtype not in TYPED_FIELDS[key]:
            self.fail(f"tensor {name!r} of {dtype} has its values in {key}")
        values = entry[key]
        if isinstance(values, bytearray):
            return bytes(values)
        stored = np.dtype("<u2") if dtype == "float16" else STORED[dtype]  # as its bits
        numbers = np.array([value % (1 << 64) for value in values], dtype=np.uint64)
        if key != "int32_data":
            return numbers.astype(stored).tobytes()
        signed = numbers.view(np.int64)
        narrowed = signed.astype(stored)
        if (narrowed.astype(np.int64) != signed).any():
            self.fail(f"tensor {name!r} has values that do not fit {dtype}")
        return narrowed.tobytes()

    def check_names(self, graph: OnnxGraph) -> None:
        """Refuse a name that is defined twice, used before it is known, or promised as an output and never made."""
        known = set(graph.inputs)
        for name in graph.initializers:
            if name in known:
                self.fail(f"{name!r} is an initializer and an input: whoever runs the graph could replace it")
        known |= set(graph.initializers)
        for node in graph.nodes:
            for name in node.inputs:
                if name and name not in known:
                    self.fail(f"node {node} uses {name!r} before anything made it")
            for name in filter(None, node.outputs):
                if name in known:
                    self.fail(f"node {node} makes {name!r}, which something else made already")
                known.add(name)
        for name in graph.outputs:
            if name not in known:
                self.fail(f"nothing makes the output {name!r}")
