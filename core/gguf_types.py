"""Every number a GGUF file may use: value types of the metadata, and tensor types with their block sizes.

Numbers and sizes are those of ggml (`ggml.h`, `ggml-common.h`); `tests/core/test_gguf_file.py` checks them against libggml.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

STRING, ARRAY, BOOL = 8, 9, 7
# number -> (short name, numpy dtype); strings and arrays have no fixed size.
SCALARS: Mapping[int, tuple[str, str]] = MappingProxyType(
    {
        0: ("u8", "<u1"),
        1: ("i8", "<i1"),
        2: ("u16", "<u2"),
        3: ("i16", "<i2"),
        4: ("u32", "<u4"),
        5: ("i32", "<i4"),
        6: ("f32", "<f4"),
        BOOL: ("bool", "<u1"),
        10: ("u64", "<u8"),
        11: ("i64", "<i8"),
        12: ("f64", "<f8"),
    }
)


@dataclass(frozen=True, slots=True)
class TensorType:
    """One tensor type: `block` elements along a row share `block_bytes` bytes."""

    number: int
    name: str
    block: int
    block_bytes: int


def _tensor_types() -> Mapping[int, TensorType]:
    plain = [(0, "f32", 4), (1, "f16", 2), (24, "i8", 1), (25, "i16", 2), (26, "i32", 4), (27, "i64", 8)]
    plain += [(28, "f64", 8), (30, "bf16", 2)]
    blocks_of_32 = [(2, "q4_0", 18), (3, "q4_1", 20), (6, "q5_0", 22), (7, "q5_1", 24), (8, "q8_0", 34)]
    blocks_of_32 += [(9, "q8_1", 36), (20, "iq4_nl", 18), (39, "mxfp4", 17)]
    blocks_of_256 = [(10, "q2_k", 84), (11, "q3_k", 110), (12, "q4_k", 144), (13, "q5_k", 176), (14, "q6_k", 210)]
    blocks_of_256 += [(15, "q8_k", 292), (16, "iq2_xxs", 66), (17, "iq2_xs", 74), (18, "iq3_xxs", 98)]
    blocks_of_256 += [(19, "iq1_s", 50), (21, "iq3_s", 110), (22, "iq2_s", 82), (23, "iq4_xs", 136)]
    blocks_of_256 += [(29, "iq1_m", 56), (34, "tq1_0", 54), (35, "tq2_0", 66)]
    rows = [TensorType(n, name, 1, size) for n, name, size in plain]
    rows += [TensorType(n, name, 32, size) for n, name, size in blocks_of_32]
    rows += [TensorType(n, name, 256, size) for n, name, size in blocks_of_256]
    rows += [TensorType(40, "nvfp4", 64, 36), TensorType(41, "q1_0", 128, 18), TensorType(42, "q2_0", 64, 18)]
    return MappingProxyType({row.number: row for row in sorted(rows, key=lambda row: row.number)})


TENSOR_TYPES: Mapping[int, TensorType] = _tensor_types()
TENSOR_TYPE_NUMBERS: Mapping[str, int] = MappingProxyType({row.name: row.number for row in TENSOR_TYPES.values()})
