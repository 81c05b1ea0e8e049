"""Holders: what a budget can be spent on in a format. The grids a matrix may have there, its bytes under each, and those of the whole.

Matrices that one product of the format computes have one grid: a stack is chosen as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from r1q.core.recipe import KV_B_HALVES, PlannedTensor
from r1q.core.scheme import Scheme
from r1q.core.tensors import TensorSpec
from r1q.models.source import ModelSource

GRIDS = ("q2_k", "q3_k", "iq4_xs", "iq4_nl", "q4_0", "q4_k", "q5_0", "q5_k", "q6_k", "q8_0")
"""What llama.cpp computes with on every device; of the two a byte apart the better one wins by itself."""
FAST_ON_ARM = ("iq4_nl", "q4_0", "q4_k", "q5_k", "q6_k", "q8_0")
"""What llama.cpp repacks for dotprod and i8mm (`ggml-cpu/repack.cpp`): the others read prompts several times slower on a phone."""
INTEGERS = (
    *(
        Scheme(grid="int4", group_size=size, symmetric=symmetric)
        for size in (32, 64, 128)
        for symmetric in (True, False)
    ),
    *(Scheme(grid="int8", group_size=size) for size in (32, 128)),
)
"""What MatMulNBits has kernels of integers for, and GatherBlockQuantized rows."""
_STACKS = {"attn_q": "qkv", "attn_k": "qkv", "attn_v": "qkv", "ffn_gate": "gate_up", "ffn_up": "gate_up"}
_SCALE = 4  # bytes of a float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A format with `schemes` to choose from, and `base` for what a recipe's rules do not name; kinds in `floats` stay bf16.

    `matrix_bytes(spec, scheme)`; `whole_bytes(source, planned tensors, recipe's name)` of the artifact; `stack(spec)` names the
    matrices that have one grid.
    """

    schemes: tuple[Scheme, ...]
    base: Scheme
    matrix_bytes: Callable[[TensorSpec, Scheme], int]
    whole_bytes: Callable[[ModelSource, tuple[PlannedTensor, ...], str], int]
    stack: Callable[[TensorSpec], str]
    floats: tuple[str, ...] = ()

    @property
    def words(self) -> list[str]:
        """The schemes, as a recipe's comment names them."""
        return [str(scheme) for scheme in self.schemes]


def gguf_holder(grids: Sequence[str] = GRIDS) -> Holder:
    """Return what a GGUF file holds, of `grids`."""
    return Holder(
        schemes=tuple(Scheme(grid=grid) for grid in grids),
        base=Scheme(grid="q8_0"),
        matrix_bytes=lambda spec, scheme: spec.rows * scheme.row_bytes(spec.columns),
        whole_bytes=_gguf_bytes,
        stack=lambda spec: spec.gguf_name,
    )


def onnx_holder(*, cache: bool = False) -> Holder:
    """Return what an ONNX folder holds: 4 and 8 bits, a float32 scale a block. `cache`: it keeps keys and values in 8 bits."""
    return Holder(
        schemes=INTEGERS,
        base=Scheme(grid="int8", group_size=32),
        matrix_bytes=_matrix_bytes,
        whole_bytes=partial(_folder_bytes, cache=cache),
        stack=_product,
        floats=KV_B_HALVES,  # multiplied head by head, as floats
    )


def _gguf_bytes(source: ModelSource, planned: tuple[PlannedTensor, ...], recipe: str) -> int:
    from r1q.export.gguf import file_bytes

    return file_bytes(source.path, planned, source.config.name, recipe)


def _folder_bytes(source: ModelSource, planned: tuple[PlannedTensor, ...], recipe: str, *, cache: bool) -> int:
    from r1q.export.onnx_size import folder_bytes

    return folder_bytes(source.path, source.config, source.sidecars(), planned, cache=cache)


def _product(spec: TensorSpec) -> str:
    if spec.expert is not None:
        return f"blk.{spec.layer}.experts"
    return spec.gguf_name if spec.kind not in _STACKS else f"blk.{spec.layer}.{_STACKS[spec.kind]}"


def _matrix_bytes(spec: TensorSpec, scheme: Scheme) -> int:
    """Return the bytes of a matrix in ONNX: codes, a scale a block, and without symmetry a row of packed zero points."""
    if scheme.facts.family == "float":
        return _SCALE * spec.size
    blocks, bits = spec.columns // scheme.group(spec.columns), scheme.facts.bits
    zeros = 0 if scheme.symmetric else -(-blocks * bits // 8)
    return spec.rows * (spec.columns * bits // 8 + _SCALE * blocks + zeros)
