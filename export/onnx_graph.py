"""The decoder as an ONNX graph for ONNX Runtime's kernels: opset 22 and `com.microsoft`, one node where a fused one exists.

Inputs and outputs are named as onnxruntime-genai expects. Operators, as ONNX Runtime's `contrib_ops` defines them: MatMulNBits,
GroupQueryAttention (rotary inside; keys and values in one shared buffer, float32 or int8), SkipSimplifiedLayerNormalization,
GatherBlockQuantized and QMoE.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from r1q import __version__
from r1q.export.onnx_data import Blocks, Columns, Placed
from r1q.export.onnx_weights import Experts, Linear, Weights
from r1q.models.config import ModelConfig

OPSET, IR_VERSION, MICROSOFT = 22, 10, "com.microsoft"
IDS, MASK, LOGITS = "input_ids", "attention_mask", "logits"
PAST, PRESENT = "past_key_values.{}.{}", "present.{}.{}"
_TYPES = {
    "uint8": TensorProto.UINT8,
    "int8": TensorProto.INT8,
    "int32": TensorProto.INT32,
    "float32": TensorProto.FLOAT,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a graph is to be: `every` position's logits or the last one's; `accuracy_level` of MatMulNBits (4: int8 activations)."""

    every: bool
    accuracy_level: int = 4


@dataclass(frozen=True, slots=True)
class _Nodes:
    """Nodes and small constants as they are added; each method returns the name of what its node computes."""

    weights: Weights
    shape: Shape
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, onnx.TensorProto] = field(default_factory=dict)
    ordered: dict[tuple[str, str], str] = field(default_factory=dict)
    extents: dict[int, str] = field(default_factory=dict)

    def add(self, operator: str, name: str, inputs: Sequence[str], outputs: Sequence[str] = (), **more: Any) -> str:
        """Add a node; without `outputs` it has one, named after the node."""
        names = list(outputs) or [f"{name}/output_0"]
        self.nodes.append(helper.make_node(operator, list(inputs), names, name=name, **more))
        return names[0]

    def integers(self, *values: int) -> str:
        """Return a constant int64 vector."""
        return self._constant(np.asarray(values, dtype=np.int64))

    def integer(self, value: int) -> str:
        """Return a constant int64 scalar."""
        return self._constant(np.asarray(value, dtype=np.int64))

    def _constant(self, array: np.ndarray[Any, np.dtype[np.int64]]) -> str:
        values = array.reshape(-1).tolist()
        name = f"/model/constants/{'scalar' if array.ndim == 0 else 'vector'}/{'_'.join(map(str, values))}"
        self.constants[name] = helper.make_tensor(name, TensorProto.INT64, array.shape, values)
        return name

    def linear(self, name: str, stem: str, x: str) -> str:
        """Multiply `x` by the transposed matrix of `stem` and add its bias."""
        layer = self.weights.linears[stem]
        x = self.put_in_order(name, x, layer)
        if isinstance(layer.matrix, str):
            product = self.add("FusedMatMul", f"{name}/MatMul", [x, layer.matrix], domain=MICROSOFT, transB=1)
            return self.add_bias(name, product, layer.bias)
        if isinstance(layer.matrix, Columns):
            return self.add_bias(name, self.integer_product(name, x, layer.matrix), layer.bias)
        blocks = layer.matrix
        inputs = [x, blocks.weight, blocks.scales, blocks.zeros or "", "", layer.bias or ""]
        while not inputs[-1]:
            inputs.pop()
        return self.add(
            "MatMulNBits", f"{name}/MatMul", inputs, domain=MICROSOFT, K=blocks.columns, N=blocks.rows,
            bits=blocks.form.bits, block_size=blocks.form.block, accuracy_level=self.shape.accuracy_level,
        )  # fmt: skip

    def put_in_order(self, name: str, x: str, layer: Linear) -> str:
        """Put the inputs `x` of a layer in the order of its columns, once for all layers that want the same.

        GatherElements takes numbers one by one where Gather copies slices: in ONNX Runtime 1.31 a fifth of the time for a prompt. It
        wants an index for every number, so the order is spread over all positions, whose shape layers of one width share.
        """
        if layer.order is None or not isinstance(layer.matrix, Blocks):
            return x
        if (x, layer.order) not in self.ordered:
            width = layer.matrix.columns
            if width not in self.extents:
                self.extents[width] = self.add("Shape", f"{name}/order/Shape", [x])
            indices = self.add("Expand", f"{name}/order/Expand", [layer.order, self.extents[width]])
            gathered = self.add("GatherElements", f"{name}/order/GatherElements", [x, indices], axis=-1)
            self.ordered[x, layer.order] = gathered
        return self.ordered[x, layer.order]

    def add_bias(self, name: str, product: str, bias: str | None) -> str:
        """Add a layer's bias where it has one."""
        return product if bias is None else self.add("Add", f"{name}/Add", [product, bias])

    def integer_product(self, name: str, x: str, matrix: Columns) -> str:
        """Multiply in 8-bit integers: ONNX's own operators around MatMul, which ONNX Runtime fuses into one kernel."""
        spelled = [matrix.input_scale, matrix.input_zero]
        codes = self.add("QuantizeLinear", f"{name}/QuantizeLinear", [x, *spelled])
        inputs = self.add("DequantizeLinear", f"{name}/DequantizeLinear", [codes, *spelled])
        weights = self.add(
            "DequantizeLinear", f"{name}/weight/DequantizeLinear", [matrix.weight, matrix.scales], axis=1
        )
        return self.add("MatMul", f"{name}/MatMul", [inputs, weights])

    def embed(self, name: str, ids: str) -> str:
        """Look `ids` up in the embedding."""
        table = self.weights.embedding
        if isinstance(table, str):
            return self.add("Gather", name, [table, ids])
        inputs = [table.weight, ids, table.scales, *([table.zeros] if table.zeros else [])]
        return self.add(
            "GatherBlockQuantized", name, inputs, domain=MICROSOFT, bits=table.form.bits,
            block_size=table.form.block, gather_axis=0, quantize_axis=1,
        )  # fmt: skip

    def normalize(self, name: str, x: str, gamma: str, epsilon: float) -> str:
        """Divide the last axis of `x` by its root mean square and multiply by `gamma`."""
        return self.add("SimplifiedLayerNormalization", name, [x, gamma], axis=-1, epsilon=epsilon, stash_type=1)

    def split(self, name: str, x: str, parts: Sequence[int]) -> list[str]:
        """Cut the last axis of `x` into `parts`."""
        outputs = [f"{name}/output_{index}" for index in range(len(parts))]
        self.add("Split", name, [x, self.integers(*parts)], outputs, axis=-1)
        return outputs


def build_graph(
    config: ModelConfig, weights: Weights, placed: Mapping[str, Placed], location: str, shape: Shape
) -> onnx.ModelProto:
    """Return the model whose weights are `placed` in the data file `location`; it refers to them and holds none."""
    nodes = _Nodes(weights, shape)
    lengths = _lengths(nodes)
    residual, branch = "", nodes.embed("/model/embed_tokens/Gather", IDS)
    for layer in range(config.num_layers):
        residual, branch = _block(nodes, config, layer, residual, branch, lengths)
    _, normed = _norm(nodes, config, "/model/norm", "model.norm.weight", residual, branch)
    nodes.linear("/lm_head", "lm_head", normed)
    nodes.nodes[-1].output[0] = LOGITS
    used = {name for node in nodes.nodes for name in node.input}
    initializers = [_external(placed[name], location) for name in placed if name in used]
    graph = helper.make_graph(
        nodes.nodes,
        config.name,
        *_values(config, weights, shape),
        initializer=[*nodes.constants.values(), *initializers],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(
        graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="r1q", producer_version=__version__
    )


def _lengths(nodes: _Nodes) -> tuple[str, str]:
    """Return each row's last position (int32 [batch]) and the total length (int32 scalar), both from the attention mask."""
    name = "/model/attn_mask"
    total = nodes.add("ReduceSum", f"{name}/ReduceSum", [MASK, nodes.integers(1)], keepdims=0)
    last = nodes.add("Sub", f"{name}/Sub", [total, nodes.integers(1)])
    length = nodes.add("Gather", f"{name}/Gather", [nodes.add("Shape", f"{name}/Shape", [MASK]), nodes.integer(1)])
    return (
        nodes.add("Cast", f"{name}/last/Cast", [last], to=TensorProto.INT32),
        nodes.add("Cast", f"{name}/length/Cast", [length], to=TensorProto.INT32),
    )


def _block(
    nodes: _Nodes, config: ModelConfig, layer: int, residual: str, branch: str, lengths: tuple[str, str]
) -> tuple[str, str]:
    """Add block `layer`; return the residual stream and the branch that the next norm will add to it."""
    name, tensor = f"/model/layers.{layer}", f"model.layers.{layer}"
    residual, x = _norm(nodes, config, f"{name}/input_layernorm", f"{tensor}.input_layernorm.weight", residual, branch)
    heads = _attention(nodes, config, layer, x, lengths)
    if layer == config.num_layers - 1 and not nodes.shape.every:
        # What follows works on each position alone, and only the last one's logits are wanted.
        last = nodes.integers(-1)
        nodes.extents.clear()
        heads = nodes.add("Gather", f"{name}/attn/last/Gather", [heads, last], axis=1)
        residual = nodes.add("Gather", f"{name}/residual/last/Gather", [residual, last], axis=1)
    branch = nodes.linear(f"{name}/attn/o_proj", f"{tensor}.attn.o_proj", heads)
    norm = "post_attention_layernorm"
    residual, x = _norm(nodes, config, f"{name}/{norm}", f"{tensor}.{norm}.weight", residual, branch)
    experts = nodes.weights.experts.get(layer)
    if experts is not None:
        return residual, _experts(nodes, config, f"{name}/mlp", experts, x)
    return residual, _mlp(nodes, f"{name}/mlp", f"{tensor}.mlp", x)


def _norm(nodes: _Nodes, config: ModelConfig, name: str, weight: str, residual: str, branch: str) -> tuple[str, str]:
    """Add `branch` to the residual stream and normalize; return both sums. The first norm has nothing to add to."""
    gamma = nodes.weights.vectors[weight]
    if not residual:
        return branch, nodes.normalize(f"{name}/LayerNorm", branch, gamma, config.rms_norm_eps)
    outputs = [f"{name}/output_0", "", "", f"{name}/output_3"]
    skip = f"{name}/SkipLayerNorm"
    inputs = [residual, branch, gamma]
    if name == "/model/norm":
        outputs = outputs[:1]
    nodes.add("SkipSimplifiedLayerNormalization", skip, inputs, outputs, domain=MICROSOFT, epsilon=config.rms_norm_eps)
    return outputs[-1], outputs[0]


def _attention(nodes: _Nodes, config: ModelConfig, layer: int, x: str, lengths: tuple[str, str]) -> str:
    name = f"/model/layers.{layer}/attn"
    last, length = lengths
    outputs = [f"{name}/output_0", PRESENT.format(layer, "key"), PRESENT.format(layer, "value")]
    past = [PAST.format(layer, "key"), PAST.format(layer, "value")]
    inputs = [*_query_key_value(nodes, config, layer, x), *past, last, length, *nodes.weights.rotary]
    quantized: dict[str, int | str] = {}
    if nodes.weights.cache:
        # Between rotary tables and scales stand position_ids, attention_bias and head_sink.
        inputs += ["", "", "", *nodes.weights.cache[layer]]
        quantized = {"kv_cache_bit_width": 8, "k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"}
    return nodes.add(
        "GroupQueryAttention", f"{name}/GroupQueryAttention", inputs, outputs, domain=MICROSOFT,
        num_heads=config.num_heads, kv_num_heads=config.num_kv_heads, scale=1 / math.sqrt(config.head_dim),
        do_rotary=1, rotary_interleaved=0, local_window_size=-1, softcap=0.0, **quantized,
    )  # fmt: skip


def _query_key_value(nodes: _Nodes, config: ModelConfig, layer: int, x: str) -> list[str]:
    """Return the attention's first three inputs: all three packed in the first, or each its own."""
    name, tensor = f"/model/layers.{layer}/attn", f"model.layers.{layer}.attn"
    widths = [heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
    if f"{tensor}.qkv_proj" in nodes.weights.linears:
        packed = nodes.linear(f"{name}/qkv_proj", f"{tensor}.qkv_proj", x)
        if not config.qk_norm:
            return [packed, "", ""]
        found = nodes.split(f"{name}/qkv_proj/Split", packed, widths)
    else:
        found = [nodes.linear(f"{name}/{part}_proj", f"{tensor}.{part}_proj", x) for part in "qkv"]
    if config.qk_norm:
        for index, part in enumerate("qk"):
            found[index] = _head_norm(nodes, config, layer, part, found[index], widths[index])
    return found


def _head_norm(nodes: _Nodes, config: ModelConfig, layer: int, part: str, x: str, width: int) -> str:
    """Normalize every head of `x` [batch, length, width] by itself."""
    name = f"/model/layers.{layer}/attn/{part}_norm"
    gamma = nodes.weights.vectors[f"model.layers.{layer}.self_attn.{part}_norm.weight"]
    heads = nodes.add("Reshape", f"{name}/Reshape_1", [x, nodes.integers(0, 0, -1, config.head_dim)])
    normed = nodes.normalize(f"{name}/LayerNorm", heads, gamma, config.rms_norm_eps)
    return nodes.add("Reshape", f"{name}/Reshape_2", [normed, nodes.integers(0, 0, width)])


def _mlp(nodes: _Nodes, name: str, stem: str, x: str) -> str:
    """SwiGLU: down(silu(gate(x)) · up(x)). QuickGelu with alpha 1 is silu in one node."""
    if f"{stem}.gate_up_proj" in nodes.weights.linears:
        both = nodes.linear(f"{name}/gate_up_proj", f"{stem}.gate_up_proj", x)
        gate, up = nodes.split(f"{name}/gate_up_proj/Split", both, nodes.weights.linears[f"{stem}.gate_up_proj"].rows)
    else:
        gate, up = (nodes.linear(f"{name}/{part}_proj", f"{stem}.{part}_proj", x) for part in ("gate", "up"))
    active = nodes.add("QuickGelu", f"{name}/act_fn/QuickGelu", [gate], domain=MICROSOFT, alpha=1.0)
    return nodes.linear(f"{name}/down_proj", f"{stem}.down_proj", nodes.add("Mul", f"{name}/Mul", [active, up]))


def _experts(nodes: _Nodes, config: ModelConfig, name: str, experts: Experts, x: str) -> str:
    """Add what the chosen experts make of `x`. Scores choose, and their softmax, over all experts, weighs.

    QMoE of ONNX Runtime 1.31 computes 4 bits in float32, 2 and 8 bits with int8 activations; `accuracy_level` does not reach it.
    """
    facts, inner, down = config.experts, experts.inner, experts.down
    if facts is None:
        raise ValueError("the model has no experts")
    rows = nodes.add("Reshape", f"{name}/router/Reshape", [x, nodes.integers(-1, config.hidden_size)])
    matrix = [rows, experts.router]
    scores = nodes.add("FusedMatMul", f"{name}/router/MatMul", matrix, domain=MICROSOFT, transB=1)
    shares = nodes.add("Softmax", f"{name}/router/Softmax", [scores], axis=-1)
    inputs = [x, scores, inner.weight, inner.scales, "", down.weight, down.scales, *4 * [""]]
    inputs += [inner.zeros or "", down.zeros or "", "", shares]
    return nodes.add(
        "QMoE", f"{name}/QMoE", inputs, domain=MICROSOFT, k=facts.used, normalize_routing_weights=int(facts.normalized),
        expert_weight_bits=inner.form.bits, block_size=inner.form.block,
        # gate and up in turn, silu(gate) · (up + 0)
        activation_type="swiglu", swiglu_fusion=1, activation_alpha=1.0, activation_beta=0.0,
    )  # fmt: skip


def _external(placed: Placed, location: str) -> onnx.TensorProto:
    tensor = TensorProto(name=placed.name, data_type=_TYPES[placed.dtype], data_location=TensorProto.EXTERNAL)
    tensor.dims.extend(placed.shape)
    for key, value in (("location", location), ("offset", placed.offset), ("length", placed.length)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def _values(
    config: ModelConfig, weights: Weights, shape: Shape
) -> tuple[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto]]:
    """Return the graph's inputs and outputs; a name stands for an axis that is free."""
    kept = TensorProto.INT8 if weights.cache else TensorProto.FLOAT

    def value(name: str, kind: int, *dims: int | str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, dims)

    def caches(pattern: str, when: str) -> list[onnx.ValueInfoProto]:
        heads, length = config.num_kv_heads, f"{when}_sequence_length"
        return [
            value(pattern.format(layer, part), kept, "batch_size", heads, length, config.head_dim)
            for layer in range(config.num_layers)
            for part in ("key", "value")
        ]

    inputs = [
        value(IDS, TensorProto.INT64, "batch_size", "sequence_length"),
        value(MASK, TensorProto.INT64, "batch_size", "total_sequence_length"),
        *caches(PAST, "past"),
    ]
    positions = "sequence_length" if shape.every else 1
    logits = value(LOGITS, TensorProto.FLOAT, "batch_size", positions, config.vocab_size)
    return inputs, [logits, *caches(PRESENT, "total")]
