"""What makes an ONNX decoder slow or heavy on a CPU, read from its graph and genai_config.json.

What ONNX Runtime does with the inputs of MatMulNBits is from its `matmul_nbits.cc` and `qnbitgemm.cpp`; figures are those of the
issues and pull requests that the lines name.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1q.core.onnx_file import OnnxFolder
from r1q.core.onnx_graph import OnnxGraph, OnnxNode, OnnxTensor
from r1q.export.lint import Finding, megabytes

BLOCKS = (16, 32, 64, 128, 256)  # block sizes of the CPU kernel
TWO_BIT_BLOCKS = (32, 64, 128)
SANE_LENGTH = 4096
LONGEST_ANSWER = 32768  # R1's own limit of an answer; positions beyond it are rarely used
PROMPT = 1024
_VIEWS = ("Transpose", "Reshape", "Cast", "Identity")
_FLOATS = ("float32", "float16", "bfloat16", "float64")
_ANEW = "quantize again with r1q quantize … --to onnx"


@dataclass(frozen=True, slots=True)
class _Model:
    """A graph with what findings ask of it."""

    folder: OnnxFolder
    graph: OnnxGraph
    makers: Mapping[str, OnnxNode]
    stored: Mapping[str, OnnxTensor]

    def held(self, name: str) -> OnnxTensor | None:
        """Return the stored tensor that `name` is, perhaps turned or under another shape or type."""
        while (node := self.makers.get(name)) is not None and node.op_type in _VIEWS:
            name = node.input(0)
        return self.stored.get(name)

    def of(self, operator: str) -> list[OnnxNode]:
        """Return the nodes of an operator."""
        return [node for node in self.graph.nodes if node.op_type == operator]

    def says(self, *keys: str) -> Any:
        """Return what genai_config.json says, None where it does not."""
        value: Any = self.folder.config
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    @property
    def matrices(self) -> list[OnnxNode]:
        """Products with a block-quantized matrix."""
        return self.of("MatMulNBits")

    @property
    def max_length(self) -> int:
        """How many positions genai makes room for."""
        for keys in (("search", "max_length"), ("model", "context_length")):
            if type(found := self.says(*keys)) is int:
                return found
        return SANE_LENGTH


def lint_onnx(path: Path) -> Iterator[Finding]:
    """Yield what makes the generating graph of a folder slow or heavy. Raises `InputError` for a folder that our reader refuses."""
    folder = OnnxFolder.open(path)
    graph = folder.graph
    makers = {name: node for node in graph.nodes for name in node.outputs if name}
    model = _Model(folder, graph, makers, graph.initializers)
    for rule in _RULES:
        yield from rule(model)


def _whole_matrices(model: _Model) -> Iterator[Finding]:
    """Operators that unpack the whole matrix to float32 at every call."""
    slow: dict[str, tuple[Callable[[OnnxNode], bool], str]] = {
        "MatMulNBits with a g_idx": (
            lambda node: bool(node.input(4)),
            "quantize without act-order, or r1q export the GPTQ folder --to onnx, which makes it a permutation of inputs",
        ),
        "MatMulNBits with float zero points": (
            lambda node: not node.input(4) and _dtype(model, node.input(3)) in _FLOATS,
            f"store them packed as uint8: {_ANEW}",
        ),
    }
    for what, (is_so, mend) in slow.items():
        found = [node for node in model.matrices if is_so(node)]
        if found:
            size = 4 * sum(_size(node) for node in found)
            cost = f"{megabytes(size)} are unpacked to float32 for every token, about 20 × slower (onnxruntime #28552)"
            yield Finding(what=what, count=len(found), cost=cost, mend=mend)


def _levels(model: _Model) -> Iterator[Finding]:
    lacking = [node for node in model.matrices if node.attributes.get("accuracy_level", 0) != 4]
    for eight, cost in (
        (True, "8-bit kernels exist for int8 activations alone: the matrix is unpacked to float32 instead"),
        (False, "computed with float32 activations, 2.3 × slower on an M1 (onnxruntime/mobius #402)"),
    ):
        found = [node for node in lacking if (node.attributes.get("bits", 4) == 8) == eight]
        if found:
            what = f"{'8-bit ' * eight}MatMulNBits without accuracy_level 4"
            mend = f"set the attribute accuracy_level=4, or {_ANEW}"
            yield Finding(what=what, count=len(found), cost=cost, mend=mend)


def _orders(model: _Model) -> Iterator[Finding]:
    """Inputs that are put in another order before a product: what act-order costs once it is no g_idx."""
    found = [
        node for node in (*model.of("Gather"), *model.of("GatherElements"))
        if node.attributes.get("axis", 0) in (-1, 2) and _order(model, node) is not None
    ]  # fmt: skip
    if found:
        copied = sum(tensor.size for node in found if (tensor := _order(model, node)) is not None)
        cost = f"{copied} numbers are copied one by one for every token of a prompt and of an answer"
        mend = "quantize without act-order: desc_act false, or gptqmodel's act_group_aware, which needs no order"
        yield Finding(what="inputs of a product put in order (act-order)", count=len(found), cost=cost, mend=mend)


def _order(model: _Model, node: OnnxNode) -> OnnxTensor | None:
    """Return the stored numbers that a node gathers by, perhaps spread over all positions."""
    maker = model.makers.get(node.input(1))
    tensor = model.held(maker.input(0) if maker is not None and maker.op_type == "Expand" else node.input(1))
    return tensor if tensor is not None and tensor.dtype in ("int64", "int32") else None


def _block_sizes(model: _Model) -> Iterator[Finding]:
    mend = f"{_ANEW} --group-size 32 (64, 128)"
    sizes = Counter(node.attributes.get("block_size") for node in model.matrices)
    for block, count in sizes.items():
        if block not in BLOCKS:
            cost = f"the CPU kernel has {', '.join(map(str, BLOCKS))} alone and refuses the file"
            yield Finding(what=f"MatMulNBits with blocks of {block}", count=count, cost=cost, mend=mend)
    two = Counter(node.attributes.get("block_size") for node in model.matrices if node.attributes.get("bits", 4) == 2)
    for block, count in two.items():
        if block in BLOCKS and block not in TWO_BIT_BLOCKS:
            cost = "no int8 kernel: unpacked to float32 at every call (onnxruntime #29064 has 32, 64 and 128)"
            yield Finding(what=f"2-bit MatMulNBits with blocks of {block}", count=count, cost=cost, mend=mend)


def _embedding(model: _Model) -> Iterator[Finding]:
    for node in model.of("Gather"):
        table = model.held(node.input(0))
        if node.input(1) == "input_ids" and table is not None and table.dtype in _FLOATS:
            cost = f"{megabytes(table.nbytes)}, in 8 bits {megabytes(table.size * 1.125)}"
            yield Finding(what=f"embedding in {table.dtype}", count=1, cost=cost, mend=f"code it in 8 bits: {_ANEW}")


def _float_matrices(model: _Model) -> Iterator[Finding]:
    head = _head(model)
    found: list[OnnxTensor] = []
    scores = {node.input(1) for node in model.of("QMoE")}  # of routers, which stay float
    for node in model.graph.nodes:
        table = model.held(node.input(1))
        if node.op_type not in ("MatMul", "FusedMatMul", "Gemm") or table is None or table.dtype not in _FLOATS:
            continue
        if scores.intersection(node.outputs):
            continue
        if node is head:
            cost = f"{megabytes(table.nbytes)} are read for every token, in 8 bits {megabytes(table.size * 1.125)}"
            source = "; a quantized one doubled an M1's decoding (onnxruntime/mobius #402)"
            yield Finding(
                what=f"head in {table.dtype}", count=1, cost=cost + source, mend=f"code it in 8 bits: {_ANEW}"
            )
        elif len(table.shape) == 2:
            found.append(table)
    if found:
        size = sum(table.nbytes for table in found)
        cost = f"{megabytes(size)} are read for every token, in 4 bits about {megabytes(sum(t.size for t in found) * 0.625)}"
        yield Finding(what="float matrix", count=len(found), cost=cost, mend=_ANEW)


def _logits(model: _Model) -> Iterator[Finding]:
    """Walk back from the logits to the last attention; whoever cuts positions does so in between."""
    vocabulary = model.graph.outputs["logits"].shape if "logits" in model.graph.outputs else None
    waiting, seen = ["logits"], set()
    while waiting:
        node = model.makers.get(waiting.pop())
        if node is None or id(node) in seen or node.op_type == "GroupQueryAttention":
            continue
        seen.add(id(node))
        if node.op_type in ("Slice", "GatherND", "GatherElements") or (
            node.op_type == "Gather" and node.attributes.get("axis", 0) == 1
        ):
            return
        waiting += node.inputs
    size = vocabulary[-1] if vocabulary and isinstance(vocabulary[-1], int) else model.says("model", "vocab_size")
    if isinstance(size, int) and model.of("GroupQueryAttention"):
        cost = f"{megabytes(4 * PROMPT * size)} and the head's work {PROMPT} times over for a prompt of {PROMPT} tokens"
        mend = "cut to the last position before the head: r1q's export does, or genai's builder with prune_lm_head"
        yield Finding(what="logits of every position", count=1, cost=cost, mend=mend)


def _rotary(model: _Model) -> Iterator[Finding]:
    context, length = model.says("model", "context_length"), model.max_length
    enough = max(LONGEST_ANSWER, length if length != context else 0)
    names = {name for node in model.of("GroupQueryAttention") for name in (node.input(7), node.input(8)) if name}
    tables = [model.stored[name] for name in sorted(names) if name in model.stored]
    large = [table for table in tables if table.shape and table.shape[0] > enough]
    if large:
        rows, size = large[0].shape[0], sum(table.nbytes for table in large)
        spare = sum(table.nbytes // table.shape[0] * (table.shape[0] - enough) for table in large)
        cost = f"{megabytes(size)} for {rows} positions, {megabytes(spare)} of it beyond {enough}"
        yield Finding(what="rotary table", count=len(large), cost=cost, mend="export it for the context that is used")


def _lengths(model: _Model) -> Iterator[Finding]:
    context, length = model.says("model", "context_length"), model.says("search", "max_length")
    if type(length) is int and length == context and length > SANE_LENGTH:
        size = _cache_bytes(model, length)
        cost = (
            f"{megabytes(size)} are reserved for keys and values at once" if size else "room for all of it is reserved"
        )
        mend = f"set search.max_length in genai_config.json to what is used, such as {SANE_LENGTH}"
        yield Finding(what=f"max_length = context_length = {length}", count=1, cost=cost, mend=mend)
    if model.says("search", "past_present_share_buffer") is False:
        size = _cache_bytes(model, min(model.max_length, SANE_LENGTH))
        cost = f"keys and values are copied for every token, up to {megabytes(size)} at {SANE_LENGTH} tokens"
        mend = "set search.past_present_share_buffer to true in genai_config.json"
        yield Finding(what="past_present_share_buffer is false", count=1, cost=cost, mend=mend)


def _caches(model: _Model) -> Iterator[Finding]:
    kinds = Counter(model.graph.inputs[name].dtype for name in _cache_names(model))
    size, length = _cache_bytes(model, model.max_length), model.max_length
    if kinds.get("float16"):
        cost = "x86 has no kernels for it: values are widened to float32 at every call"
        yield Finding(what="keys and values in float16", count=kinds["float16"], cost=cost, mend="export with float32")
    elif kinds.get("float32") and size > model.folder.nbytes and length <= SANE_LENGTH:
        cost = f"{megabytes(size)} at {length} tokens, more than the model's {megabytes(model.folder.nbytes)}; in int8 a quarter"
        mend = "r1q export … --to onnx --kv int8, or a smaller search.max_length"
        yield Finding(what="keys and values in float32", count=kinds["float32"], cost=cost, mend=mend)


_RULES = (
    _whole_matrices, _orders, _levels, _block_sizes, _embedding, _float_matrices, _logits, _rotary, _lengths, _caches,
)  # fmt: skip


def _head(model: _Model) -> OnnxNode | None:
    """Return the product that makes the logits, casts and biases aside."""
    node = model.makers.get("logits")
    while node is not None and node.op_type in ("Cast", "Add", "Identity"):
        node = model.makers.get(node.input(0)) or model.makers.get(node.input(1))
    return node


def _cache_names(model: _Model) -> list[str]:
    names = {name for node in model.of("GroupQueryAttention") for name in (node.input(3), node.input(4))}
    return sorted(names & set(model.graph.inputs))


def _cache_bytes(model: _Model, length: int) -> int:
    """Return the bytes of keys and values of `length` positions; sides come from the graph, or genai_config.json."""
    total = 0
    for name in _cache_names(model):
        value = model.graph.inputs[name]
        sides = value.shape or ()
        heads = sides[1] if len(sides) == 4 else ""
        width = sides[3] if len(sides) == 4 else ""
        heads = heads if isinstance(heads, int) else model.says("model", "decoder", "num_key_value_heads")
        width = width if isinstance(width, int) else model.says("model", "decoder", "head_size")
        if type(heads) is int and type(width) is int:
            total += heads * width * length * {"float32": 4, "float16": 2, "bfloat16": 2}.get(value.dtype, 1)
    return total


def _dtype(model: _Model, name: str) -> str:
    tensor = model.held(name)
    return tensor.dtype if tensor is not None else ""


def _size(node: OnnxNode) -> int:
    sides = [node.attributes.get(name, 0) for name in ("N", "K")]
    return math.prod(side for side in sides if isinstance(side, int))
