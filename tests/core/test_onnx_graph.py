"""The bytes of an .onnx file: protobuf's own defects are named, and inline tensors are read however they are spelled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from r1q.core import protobuf
from r1q.core.errors import InputError
from r1q.core.onnx_graph import parse_graph


def model_of(*tensors: Any) -> bytes:
    graph = helper.make_graph([], "tensors", [], [], list(tensors))
    data: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10
    ).SerializeToString()
    return data


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (TensorProto.FLOAT, [1.5, -0.0, 3e38]), (TensorProto.DOUBLE, [1.5, 1e300]), (TensorProto.FLOAT16, [0.5, -65504.0]),
        (TensorProto.INT64, [-1, 1 << 62, -(1 << 63)]), (TensorProto.UINT64, [0, (1 << 64) - 1]), (TensorProto.INT32, [-5, 7]),
        (TensorProto.UINT32, [0, (1 << 32) - 1]), (TensorProto.INT8, [-128, 127]), (TensorProto.UINT8, [0, 255]),
        (TensorProto.BOOL, [1, 0]), (TensorProto.UINT16, [65535, 1]), (TensorProto.INT16, [-32768, 1]),
    ],
)  # fmt: skip
def test_inline_tensors_are_read_whichever_way_they_are_spelled(kind: int, values: list[float], raw: bool) -> None:
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    data: Any = np.array(values, dtype=dtype)
    tensor = helper.make_tensor("t", kind, data.shape, data.tobytes() if raw else data, raw=raw)
    read = parse_graph(Path("m.onnx"), model_of(tensor)).initializers["t"]
    found = read.array(read.inline)
    assert found.tobytes() == numpy_helper.to_array(tensor).tobytes()
    assert read.dtype == str(dtype)


def test_the_number_of_fields_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = model_of(*(helper.make_tensor(f"t{i}", TensorProto.FLOAT, [1], [1.0]) for i in range(20)))
    parse_graph(Path("m.onnx"), data)
    monkeypatch.setattr(protobuf, "MAX_FIELDS", 100)
    with pytest.raises(InputError, match="more than 100 fields"):
        parse_graph(Path("m.onnx"), data)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\x08" + b"\xff" * 10 + b"\x01", "without an end"),
        (b"\x08" + b"\xff" * 9 + b"\x03", "more than 64 bits"),
        (b"\x08\x80", "ends inside a number"),
        (b"\x08\x01\x08\x02", "two fields ir_version"),
        (b"\x0b", "wire type 3"),
        (b"\x3a\x05", "ends beyond it"),
        (b"\xfa\x07\x00", "a field 127"),
        (b"\x12\x01\xff", "not UTF-8"),
        (b"", "no graph"),
    ],
)
def test_wire_defects_are_named(data: bytes, said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse_graph(Path("m.onnx"), data)
