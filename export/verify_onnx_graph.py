"""What an ONNX decoder computes, followed value by value from its inputs: a matrix is known by its use, not by its name.

Every value gets a meaning (the residual stream after so many additions, its norm, rows of a product, …), every operator a rule that
says which meanings it takes and what it makes of them. A graph is a Llama or Qwen decoder exactly when the rules carry `logits` to the
product of the head with the last norm. A value that no rule explains has no meaning, nor has what is made from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from r1q.core.onnx_file import OnnxFolder
from r1q.core.onnx_graph import OnnxGraph, OnnxNode, OnnxTensor
from r1q.export import verify_onnx_formulas as formulas
from r1q.export.verify_onnx_attention import attention, cut
from r1q.export.verify_onnx_experts import is_routed, mixture, scaled, shares, softmax, with_shared
from r1q.export.verify_onnx_integers import dequantize, quantize
from r1q.export.verify_onnx_latent import values_made
from r1q.export.verify_onnx_order import gather, shape, spread
from r1q.export.verify_onnx_values import (
    INT32,
    LOGITS,
    Attended,
    Bound,
    Count,
    Flat,
    Gated,
    Logits,
    Made,
    Matrix,
    MisfitError,
    Mixed,
    Normed,
    Place,
    Product,
    Reading,
    Short,
    Stream,
    blocks,
)  # fmt: skip

if TYPE_CHECKING:
    from r1q.models.config import ModelConfig

IDS, MASK = "input_ids", "attention_mask"


def follow(folder: OnnxFolder, graph: OnnxGraph, config: ModelConfig) -> Reading:
    """Follow a graph from input_ids to logits."""
    reading = Reading(folder, graph, config)
    reading.constants.update(graph.initializers)
    for name in (IDS, MASK):
        if name not in graph.inputs:
            reading.say(name, "is no input")
    for node in graph.nodes:
        rule = _RULES.get((node.domain, node.op_type))
        try:
            if rule is None or not node.outputs:
                raise MisfitError("is no step of this decoder")
            rule(reading, node)
        except MisfitError as misfit:
            if not reading.is_spoilt(node):
                reading.say(str(node), f"{node.op_type} {misfit}")
    _end(reading)
    return reading


def _end(reading: Reading) -> None:
    """Settle the logits, count the blocks, and name what nothing uses."""
    config, graph = reading.config, reading.graph
    head, stage = reading.values.get(LOGITS), 2 * config.num_layers
    if isinstance(head, Product) and _is_whole(head) and isinstance(head.of, Normed) and head.of.stage == stage:
        reading.bind(None, "output", head)
        reading.values[LOGITS] = Logits(stage, head.of.last)
    elif not reading.defects:
        reading.say(LOGITS, f"is not the head's product with the norm after {config.num_layers} blocks")
    used = {name for node in graph.nodes for name in node.inputs}
    for name in sorted(set(graph.initializers) - used):
        reading.say(name, "is in the file, but nothing uses it")


def _constant(reading: Reading, node: OnnxNode) -> None:
    tensor = node.attributes.get("value")
    if not isinstance(tensor, OnnxTensor):
        raise MisfitError("holds no tensor")
    reading.constants[node.outputs[0]] = tensor


def _shape(reading: Reading, node: OnnxNode) -> None:
    if node.input(0) != MASK:
        shape(reading, node)
        return
    if node.attributes:
        raise MisfitError(f"of {node.input(0)!r} is not expected")
    reading.make(node, Count("sides"))


def _reduce_sum(reading: Reading, node: OnnxNode) -> None:
    if node.input(0) != MASK:
        formulas.reduce(reading, node)
        return
    if reading.numbers(node, 1) not in ([1], [-1]):
        raise MisfitError("does not count the mask")
    reading.settings(node, {"keepdims": 0})
    reading.make(node, Count("tokens"))


def _sub(reading: Reading, node: OnnxNode) -> None:
    if reading.value(node, 0, Count) != Count("tokens") or reading.numbers(node, 1) != [1]:
        raise MisfitError("does not give the last position")
    reading.make(node, Count("last"))


def _cast(reading: Reading, node: OnnxNode) -> None:
    found = reading.value(node, 0, Count)
    reading.settings(node, {"to": INT32}, free=("saturate", "round_mode"))
    reading.make(node, found)


def _gather(reading: Reading, node: OnnxNode) -> None:
    axis = node.attributes.get("axis", 0)
    if node.input(1) == IDS:
        table = reading.held(node, 0)
        if len(table.shape) != 2 or axis != 0 or table.dtype != "float32":
            raise MisfitError(f"looks rows up in {table.name!r}, {table.dtype} {list(table.shape)}")
        _look_up(reading, node, Matrix(weight=table, rows=table.shape[0], columns=table.shape[1]))
        return
    found, indices = reading.values.get(node.input(0)), reading.numbers(node, 1)
    if found == Count("sides") and indices == [1] and axis == 0:
        reading.make(node, Count("length"))
    elif isinstance(found, Stream | Normed | Attended) and indices == [-1] and axis == 1:
        reading.make(node, replace(found, last=True))
    else:
        raise MisfitError(f"of {indices} from {node.input(0)!r} is not expected")


def _gather_blocks(reading: Reading, node: OnnxNode) -> None:
    data = reading.held(node, 0)
    bits, block = node.attributes.get("bits", 4), node.attributes.get("block_size", 128)
    if node.input(1) != IDS or len(data.shape) != 2 or data.dtype != "uint8" or bits not in (2, 4, 8):
        raise MisfitError(f"looks {node.input(1)!r} up in {data.dtype} {list(data.shape)}")
    reading.settings(node, {"gather_axis": 0, "quantize_axis": 1}, free=("bits", "block_size"))
    _look_up(reading, node, blocks(reading, node, {"codes": 0, "scales": 2}, (data.shape[0], -1, bits, block)))


def _look_up(reading: Reading, node: OnnxNode, table: Matrix) -> None:
    key = (None, "token_embd", "weight")
    reading.bound.append(Bound(key=key, held=table, start=0, stop=table.rows, node=str(node)))
    reading.make(node, Stream(0))


def _matmul_blocks(reading: Reading, node: OnnxNode) -> None:
    if node.input(4):
        raise MisfitError(f"has a g_idx, {node.input(4)!r}")
    defaults = {"N": 0, "K": 0, "bits": 4, "block_size": 0}
    reading.settings(node, {"accuracy_level": 4}, free=tuple(defaults))
    facts = tuple(node.attributes.get(name, default) for name, default in defaults.items())
    matrix = blocks(reading, node, {"codes": 1, "scales": 2}, facts)
    _multiply(reading, node, matrix, reading.held(node, 5) if node.input(5) else None)


def _matmul(reading: Reading, node: OnnxNode) -> None:
    integers = reading.values.get(node.input(1))
    if isinstance(integers, Matrix):
        _multiply(reading, node, integers, None)
        return
    if isinstance(reading.values.get(node.input(0)), Made):
        formulas.matmul(reading, node)
        return
    weight, across = reading.held(node, 1), node.attributes.get("transB", 0) == 0
    reading.settings(node, {"alpha": 1.0, "transA": 0}, free=("transB",))
    if len(weight.shape) != 2 or weight.dtype != "float32":
        raise MisfitError(f"takes {weight.name!r}, {weight.dtype} {list(weight.shape)}, not a float32 matrix")
    rows, columns = weight.shape[::-1] if across else weight.shape
    _multiply(reading, node, Matrix(weight=weight, rows=rows, columns=columns, across=across), None)


def _multiply(reading: Reading, node: OnnxNode, matrix: Matrix, bias: OnnxTensor | None) -> None:
    of = reading.value(node, 0, Place)
    if not isinstance(of, Normed | Flat | Short | Attended | Gated):
        raise MisfitError("multiplies what is neither normalized nor attended nor gated")
    if of.order is not None and of.order.size != matrix.columns:
        raise MisfitError(
            f"has {matrix.columns} columns and takes {of.order.size} inputs in the order {of.order.name!r}"
        )
    product = Product(of=replace(of, order=None), matrix=matrix, node=str(node), start=0, stop=matrix.rows)
    product = replace(product, spelled=reading.integers.get(node.input(0)), order=of.order)
    reading.make(node, product if bias is None else _biased(product, bias))


def _biased(product: Product, bias: OnnxTensor) -> Product:
    if product.bias or not _is_whole(product) or bias.dtype != "float32" or bias.size != product.matrix.rows:
        raise MisfitError(f"adds {bias.name!r}, {bias.dtype} {list(bias.shape)}")
    return replace(product, bias=bias)


def _is_whole(product: Product) -> bool:
    return (product.start, product.stop, product.form, product.norm) == (0, product.matrix.rows, "", None)


def _add(reading: Reading, node: OnnxNode) -> None:
    for product, other in ((0, 1), (1, 0)):
        found = reading.values.get(node.input(product))
        beside = reading.values.get(node.input(other))
        if is_routed(found) and isinstance(beside, Product) and _is_whole(beside):
            with_shared(reading, node, found, beside)
            return
        if isinstance(found, Product) and node.input(other) in reading.constants:
            if isinstance(found.of, Flat) and found.form:
                formulas.add(reading, node, reading.held(node, 1))
            else:
                reading.make(node, _biased(found, reading.held(node, other)))
            return
    reading.make(node, _sum(reading, node))


def _sum(reading: Reading, node: OnnxNode) -> Stream:
    """Return the residual stream after a block's branch, inputs 0 and 1 in either order, is added to it."""
    kinds = {Attended: "attn_output", Gated: "ffn_down"}
    for stream, other in ((0, 1), (1, 0)):
        residual, branch = (reading.values.get(node.input(index)) for index in (stream, other))
        if isinstance(residual, Stream) and branch == Mixed(residual.stage, residual.last):
            return Stream(residual.stage + 1, residual.last)
        if not isinstance(residual, Stream) or not isinstance(branch, Product) or not _is_whole(branch):
            continue
        kind = kinds.get(type(branch.of))
        if kind is not None and (branch.of.stage, branch.of.last) == (residual.stage, residual.last):
            reading.bind(residual.stage // 2, kind, branch)
            return Stream(residual.stage + 1, residual.last)
    raise MisfitError("does not add a block's branch to the residual stream it came from")


def _skip_norm(reading: Reading, node: OnnxNode) -> None:
    if node.input(3):
        raise MisfitError(f"adds {node.input(3)!r}")
    added = _sum(reading, node)
    reading.make(node, _norm(reading, node, added, reading.held(node, 2)), None, None, added)


def _norm(reading: Reading, node: OnnxNode, stream: Stream, gamma: OnnxTensor) -> Normed:
    layer, half = divmod(stream.stage, 2)
    last = stream.stage == 2 * reading.config.num_layers
    reading.bind_norm(None if last else layer, "output_norm" if last else ("attn_norm", "ffn_norm")[half], gamma, node)
    return Normed(stream.stage, stream.last)


def _simple_norm(reading: Reading, node: OnnxNode) -> None:
    found, gamma = reading.values.get(node.input(0)), reading.held(node, 1)
    if isinstance(found, Stream):
        reading.make(node, _norm(reading, node, found, gamma))
    elif isinstance(found, Product) and found.form == "heads" and found.norm is None:
        reading.settings(node, {"epsilon": reading.config.rms_norm_eps, "axis": -1, "stash_type": 1})
        reading.make(node, replace(found, norm=gamma))
    elif isinstance(found, Product) and isinstance(found.of, Normed) and not found.form and reading.config.latent:
        reading.settings(node, {"epsilon": reading.config.rms_norm_eps, "axis": -1, "stash_type": 1})
        reading.make(node, Short(found.of.stage, product=found, gamma=gamma))
    else:
        raise MisfitError("normalizes neither the residual stream nor heads")


def _reshape(reading: Reading, node: OnnxNode) -> None:
    found, shape = reading.values.get(node.input(0)), reading.numbers(node, 1)
    if node.input(0) in reading.constants:
        tensor = reading.held(node, 0)
        if math.prod(shape) != tensor.size or min(shape, default=0) < 1:
            raise MisfitError(f"gives {tensor.name!r} the shape {shape}")
        reading.constants[node.outputs[0]] = replace(tensor, shape=tuple(shape))
    elif isinstance(found, Normed) and found.order is None and shape == [-1, reading.config.hidden_size]:
        reading.make(node, Flat(found.stage, found.last))
    elif isinstance(found, Product) and not found.form and shape == [0, 0, -1, reading.config.head_dim]:
        reading.make(node, replace(found, form="heads"))
    elif isinstance(found, Product) and found.form == "heads" and shape in ([0, 0, found.rows], [0, 0, -1]):
        reading.make(node, replace(found, form=""))
    elif isinstance(found, Made | Product) and (reading.config.latent or reading.config.experts):
        reading.make(node, values_made(reading, node, formulas.noted(reading, node, *shape)))
    else:
        raise MisfitError(f"gives {node.input(0)!r} the shape {shape}")


def _split(reading: Reading, node: OnnxNode) -> None:
    if isinstance(reading.values.get(node.input(0)), Made):
        formulas.split(reading, node)
        return
    whole, parts = reading.value(node, 0, Product), reading.numbers(node, 1)
    fits = sum(parts) == whole.rows and len(parts) == len(node.outputs) and min(parts) > 0
    if whole.form or whole.norm or not fits or node.attributes.get("axis", 0) != -1:
        raise MisfitError(f"cuts {whole.rows} rows into {parts}")
    reading.make(node, *cut(whole, parts))


def _activate(form: str) -> Callable[[Reading, OnnxNode], None]:
    def rule(reading: Reading, node: OnnxNode) -> None:
        found = reading.value(node, 0, Product)
        if isinstance(found.of, Flat) and form == "sigmoid":
            shares(reading, node, form)
            return
        if found.form or found.norm or not isinstance(found.of, Normed):
            raise MisfitError("is not of a gate")
        # x · sigmoid(alpha · x), and alpha is 1.702 where nothing is said.
        if form == "silu" and node.attributes.get("alpha", 1.702) != 1.0:
            reading.say(str(node), f"alpha is {node.attributes.get('alpha', 1.702)}, the model needs 1")
        reading.make(node, replace(found, form=form))

    return rule


def _mul(reading: Reading, node: OnnxNode) -> None:
    routed = reading.values.get(node.input(0))
    if is_routed(routed):
        scaled(reading, node, routed)
        return
    plain, formed = sorted((reading.value(node, index, Product) for index in (0, 1)), key=lambda product: product.form)
    if plain.form or formed.form not in ("sigmoid", "silu") or plain.of != formed.of or plain.of.stage % 2 != 1:
        raise MisfitError("is not of a gate and what it gates")
    if formed.form == "sigmoid":
        if replace(formed, form="") != plain:
            raise MisfitError("is not of a value and its own sigmoid")
        reading.make(node, replace(formed, form="silu"))
        return
    layer = plain.of.stage // 2
    shared = "_shexp" if reading.config.is_sparse(layer) else ""
    reading.bind(layer, f"ffn_gate{shared}", formed)
    reading.bind(layer, f"ffn_up{shared}", plain)
    reading.make(node, Gated(plain.of.stage, plain.of.last))


_MICROSOFT = "com.microsoft"
_RULES: Mapping[tuple[str, str], Callable[[Reading, OnnxNode], None]] = {
    ("", "Constant"): _constant,
    ("", "Shape"): _shape,
    ("", "ReduceSum"): _reduce_sum,
    ("", "Sub"): _sub,
    ("", "Cast"): _cast,
    ("", "Gather"): _gather,
    ("", "Expand"): spread,
    ("", "GatherElements"): gather,
    ("", "Reshape"): _reshape,
    ("", "Split"): _split,
    ("", "Add"): _add,
    ("", "Mul"): _mul,
    ("", "Sigmoid"): _activate("sigmoid"),
    ("", "Softmax"): softmax,
    ("", "MatMul"): _matmul,
    ("", "QuantizeLinear"): quantize,
    ("", "DequantizeLinear"): dequantize,
    ("", "SimplifiedLayerNormalization"): _simple_norm,
    (_MICROSOFT, "GatherBlockQuantized"): _gather_blocks,
    (_MICROSOFT, "MatMulNBits"): _matmul_blocks,
    (_MICROSOFT, "FusedMatMul"): _matmul,
    (_MICROSOFT, "QuickGelu"): _activate("silu"),
    (_MICROSOFT, "SkipSimplifiedLayerNormalization"): _skip_norm,
    (_MICROSOFT, "GroupQueryAttention"): attention,
    (_MICROSOFT, "QMoE"): mixture,
    **{("", operator): rule for operator, rule in formulas.RULES.items()},
}
