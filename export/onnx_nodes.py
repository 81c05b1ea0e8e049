"""Nodes of an ONNX graph as they are added: products, norms, attention and SwiGLU, one node where ONNX Runtime has a fused one.

Operators are as ONNX Runtime's `contrib_ops` defines them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from r1q.export.onnx_data import Blocks, Columns
from r1q.export.onnx_weights import Linear, Weights

MICROSOFT = "com.microsoft"
PAST, PRESENT = "past_key_values.{}.{}", "present.{}.{}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a graph is to be: `every` position's logits or the last one's; `accuracy_level` of MatMulNBits (4: int8 activations)."""

    every: bool
    accuracy_level: int = 4


@dataclass(frozen=True, slots=True)
class Nodes:
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

    def number(self, value: float) -> str:
        """Return a constant float32 scalar."""
        name = f"/model/constants/float/{value!r}"
        self.constants[name] = helper.make_tensor(name, TensorProto.FLOAT, (), [value])
        return name

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

    def gated(self, name: str, stem: str, x: str) -> str:
        """SwiGLU: down(silu(gate(x)) · up(x)). QuickGelu with alpha 1 is silu in one node."""
        linears = self.weights.linears
        if f"{stem}.gate_up_proj" in linears:
            both = self.linear(f"{name}/gate_up_proj", f"{stem}.gate_up_proj", x)
            gate, up = self.split(f"{name}/gate_up_proj/Split", both, linears[f"{stem}.gate_up_proj"].rows)
        else:
            gate, up = (self.linear(f"{name}/{part}_proj", f"{stem}.{part}_proj", x) for part in ("gate", "up"))
        active = self.add("QuickGelu", f"{name}/act_fn/QuickGelu", [gate], domain=MICROSOFT, alpha=1.0)
        return self.linear(f"{name}/down_proj", f"{stem}.down_proj", self.add("Mul", f"{name}/Mul", [active, up]))

    def attend(self, layer: int, queries: Sequence[str], lengths: tuple[str, str], **facts: Any) -> str:
        """Add the attention of a block on `queries`, keys and values (all packed in the first: the others empty) and its caches."""
        name, (last, length) = f"/model/layers.{layer}/attn", lengths
        outputs = [f"{name}/output_0", PRESENT.format(layer, "key"), PRESENT.format(layer, "value")]
        past = [PAST.format(layer, "key"), PAST.format(layer, "value")]
        inputs = [*queries, *past, last, length, *self.weights.rotary]
        if self.weights.cache:
            # Between rotary tables and scales stand position_ids, attention_bias and head_sink.
            inputs += ["", "", "", *self.weights.cache[layer]]
            facts |= {"kv_cache_bit_width": 8, "k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"}
        return self.add(
            "GroupQueryAttention", f"{name}/GroupQueryAttention", inputs, outputs, domain=MICROSOFT,
            do_rotary=1, local_window_size=-1, softcap=0.0, **facts,
        )  # fmt: skip
