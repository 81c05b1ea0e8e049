"""The decoder as an ONNX graph for ONNX Runtime's kernels: opset 22 and `com.microsoft`, one node where a fused one exists.

Inputs and outputs are named as onnxruntime-genai expects. Operators, as ONNX Runtime's `contrib_ops` defines them: MatMulNBits,
GroupQueryAttention (rotary inside; keys and values in one shared buffer, float32 or int8), SkipSimplifiedLayerNormalization,
GatherBlockQuantized and QMoE.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import onnx
from onnx import TensorProto, helper

from r1q import __version__
from r1q.export.onnx_data import Placed
from r1q.export.onnx_latent import latent_attention
from r1q.export.onnx_mixture import mixture
from r1q.export.onnx_nodes import MICROSOFT, PAST, PRESENT, Nodes, Shape
from r1q.export.onnx_weights import Weights
from r1q.models.config import ModelConfig

OPSET, IR_VERSION = 22, 10
IDS, MASK, LOGITS = "input_ids", "attention_mask", "logits"
_TYPES = {
    "uint8": TensorProto.UINT8,
    "int8": TensorProto.INT8,
    "int32": TensorProto.INT32,
    "float32": TensorProto.FLOAT,
}


def build_graph(
    config: ModelConfig, weights: Weights, placed: Mapping[str, Placed], location: str, shape: Shape
) -> onnx.ModelProto:
    """Return the model whose weights are `placed` in the data file `location`; it refers to them and holds none."""
    nodes = Nodes(weights, shape)
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


def _lengths(nodes: Nodes) -> tuple[str, str]:
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
    nodes: Nodes, config: ModelConfig, layer: int, residual: str, branch: str, lengths: tuple[str, str]
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
        return residual, mixture(nodes, config, f"{name}/mlp", f"{tensor}.mlp", experts, x)
    return residual, nodes.gated(f"{name}/mlp", f"{tensor}.mlp", x)


def _norm(nodes: Nodes, config: ModelConfig, name: str, weight: str, residual: str, branch: str) -> tuple[str, str]:
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


def _attention(nodes: Nodes, config: ModelConfig, layer: int, x: str, lengths: tuple[str, str]) -> str:
    if config.latent is not None:
        return latent_attention(nodes, config, config.latent, layer, x, lengths)
    return nodes.attend(
        layer, _query_key_value(nodes, config, layer, x), lengths, num_heads=config.num_heads,
        kv_num_heads=config.num_kv_heads, scale=1 / math.sqrt(config.head_dim), rotary_interleaved=0,
    )  # fmt: skip


def _query_key_value(nodes: Nodes, config: ModelConfig, layer: int, x: str) -> list[str]:
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


def _head_norm(nodes: Nodes, config: ModelConfig, layer: int, part: str, x: str, width: int) -> str:
    """Normalize every head of `x` [batch, length, width] by itself."""
    name = f"/model/layers.{layer}/attn/{part}_norm"
    gamma = nodes.weights.vectors[f"model.layers.{layer}.self_attn.{part}_norm.weight"]
    heads = nodes.add("Reshape", f"{name}/Reshape_1", [x, nodes.integers(0, 0, -1, config.head_dim)])
    normed = nodes.normalize(f"{name}/LayerNorm", heads, gamma, config.rms_norm_eps)
    return nodes.add("Reshape", f"{name}/Reshape_2", [normed, nodes.integers(0, 0, width)])


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
        (heads, size), length = config.cached_heads, f"{when}_sequence_length"
        return [
            value(pattern.format(layer, part), kept, "batch_size", heads, length, size)
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
