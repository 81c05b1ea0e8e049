"""The messages of an ONNX file that this program reads, by the field numbers of onnx.proto, and ONNX's tensor types.

What could run code of its own, reach outside the folder, or hold weights where nobody looks (subgraphs, functions, sparse tensors,
training graphs, types other than tensors) is in the tables as refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from r1q.core.protobuf import Field, Schema


def _refused(key: str, reason: str) -> Field:
    return Field(key, "refuse", reason=reason)


_SKIP = Field("text", "skip", many=True)
_PAIR: Schema = {1: Field("key", "text"), 2: Field("value", "text")}
TENSOR: Schema = {
    1: Field("dims", "ints", many=True),
    2: Field("data_type", "int32"),
    3: _refused("segment", "a segment: only whole tensors are read"),
    4: Field("float_data", "floats", many=True),
    5: Field("int32_data", "ints", many=True),
    6: _refused("string_data", "strings as values: only numbers are read"),
    7: Field("int64_data", "ints", many=True),
    8: Field("name", "text"),
    9: Field("raw_data", "bytes"),
    10: Field("double_data", "doubles", many=True),
    11: Field("uint64_data", "ints", many=True),
    12: _SKIP,
    13: Field("external_data", "message", many=True, schema=_PAIR),
    14: Field("data_location", "int32"),
    16: _SKIP,
}
_DIMENSION: Schema = {1: Field("dim_value", "int"), 2: Field("dim_param", "text"), 3: _SKIP}
_SHAPE: Schema = {1: Field("dim", "message", many=True, schema=_DIMENSION)}
_TENSOR_TYPE: Schema = {1: Field("elem_type", "int32"), 2: Field("shape", "message", schema=_SHAPE)}
_TYPE: Schema = {
    1: Field("tensor_type", "message", schema=_TENSOR_TYPE),
    4: _refused("sequence_type", "a sequence type: only tensors are read"),
    5: _refused("map_type", "a map type: only tensors are read"),
    6: _SKIP,
    7: _refused("opaque_type", "an opaque type: only tensors are read"),
    8: _refused("sparse_tensor_type", "a sparse type: only dense tensors are read"),
    9: _refused("optional_type", "an optional type: only tensors are read"),
}
_VALUE: Schema = {1: Field("name", "text"), 2: Field("type", "message", schema=_TYPE), 3: _SKIP, 4: _SKIP}
_SUBGRAPH = "a subgraph (If, Loop, Scan …): only plain graphs are read"
_ATTRIBUTE: Schema = {
    1: Field("name", "text"),
    2: Field("f", "float"),
    3: Field("i", "int"),
    4: Field("s", "bytes"),
    5: Field("t", "message", schema=TENSOR),
    6: _refused("g", _SUBGRAPH),
    7: Field("floats", "floats", many=True),
    8: Field("ints", "ints", many=True),
    9: Field("strings", "bytes", many=True),
    10: _refused("tensors", "a list of tensors: one at most is read"),
    11: _refused("graphs", _SUBGRAPH),
    13: _SKIP,
    14: _refused("tp", "a type as an attribute"),
    15: _refused("type_protos", "types as an attribute"),
    20: Field("type", "int32"),
    21: _refused("ref_attr_name", "a reference to a function's attribute: functions are not read"),
    22: _refused("sparse_tensor", "a sparse tensor: only dense ones are read"),
    23: _refused("sparse_tensors", "sparse tensors: only dense ones are read"),
}
NODE: Schema = {
    1: Field("input", "text", many=True),
    2: Field("output", "text", many=True),
    3: Field("name", "text"),
    4: Field("op_type", "text"),
    5: Field("attribute", "message", many=True, schema=_ATTRIBUTE),
    6: _SKIP,
    7: Field("domain", "text"),
    8: _refused("overload", "an overload: functions are not read"),
    9: _SKIP,
    10: _refused("device_configurations", "a device configuration: graphs for one device are read"),
}
_GRAPH: Schema = {
    1: Field("node", "message", many=True, schema=NODE),
    2: Field("name", "text"),
    5: Field("initializer", "message", many=True, schema=TENSOR),
    10: _SKIP,
    11: Field("input", "message", many=True, schema=_VALUE),
    12: Field("output", "message", many=True, schema=_VALUE),
    13: Field("value_info", "message", many=True, schema=_VALUE),
    14: _SKIP,  # quantization annotations: hints that no runtime here reads
    15: _refused("sparse_initializer", "a sparse initializer: only dense ones are read"),
    16: _SKIP,
}
MODEL: Schema = {
    1: Field("ir_version", "int"),
    2: Field("producer_name", "text"),
    3: Field("producer_version", "text"),
    4: Field("domain", "text"),
    5: Field("model_version", "int"),
    6: _SKIP,
    7: Field("graph", "message", schema=_GRAPH),
    8: Field("opset_import", "message", many=True, schema={1: Field("domain", "text"), 2: Field("version", "int")}),
    14: _SKIP,
    20: _refused("training_info", "a training graph: graphs for inference are read"),
    25: _refused("functions", "functions of its own: only the operators of onnx and com.microsoft are read"),
    26: _refused("configuration", "a device configuration: graphs for one device are read"),
}
# AttributeProto.type → the one field that may then hold the value.
ATTRIBUTE_FIELDS: Mapping[int, str] = MappingProxyType(
    {1: "f", 2: "i", 3: "s", 4: "t", 6: "floats", 7: "ints", 8: "strings"}
)
# TensorProto.DataType → name, bits a value, numpy's dtype of the stored form: its bits where numpy has none, bytes below 8 bits.
_TYPES: tuple[tuple[int, str, int, str], ...] = (
    (1, "float32", 32, "<f4"), (2, "uint8", 8, "u1"), (3, "int8", 8, "i1"), (4, "uint16", 16, "<u2"), (5, "int16", 16, "<i2"),
    (6, "int32", 32, "<i4"), (7, "int64", 64, "<i8"), (9, "bool", 8, "u1"), (10, "float16", 16, "<f2"), (11, "float64", 64, "<f8"),
    (12, "uint32", 32, "<u4"), (13, "uint64", 64, "<u8"), (16, "bfloat16", 16, "<u2"), (17, "float8e4m3fn", 8, "u1"),
    (18, "float8e4m3fnuz", 8, "u1"), (19, "float8e5m2", 8, "u1"), (20, "float8e5m2fnuz", 8, "u1"), (21, "uint4", 4, "u1"),
    (22, "int4", 4, "u1"), (23, "float4e2m1", 4, "u1"), (24, "float8e8m0", 8, "u1"), (25, "uint2", 2, "u1"), (26, "int2", 2, "u1"),
)  # fmt: skip
TYPES: Mapping[int, str] = MappingProxyType({number: name for number, name, _, _ in _TYPES})
BITS: Mapping[str, int] = MappingProxyType({name: bits for _, name, bits, _ in _TYPES})
STORED: Mapping[str, np.dtype[np.generic]] = MappingProxyType({name: np.dtype(kind) for _, name, _, kind in _TYPES})
# Which typed field may hold a tensor's values in the graph file itself, and its numbers' dtype (onnx.proto, TensorProto).
TYPED_FIELDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "float_data": ("float32",),
        "double_data": ("float64",),
        "int64_data": ("int64",),
        "uint64_data": ("uint32", "uint64"),
        "int32_data": tuple(name for name, bits in BITS.items() if bits <= 32 and name not in ("float32", "uint32")),
    }
)
