"""One GroupQueryAttention node alone, by type of cache: milliseconds of a step, and of 512 tokens of a prompt, as JSON lines.

9 heads that share 3 heads of keys and values, 64 numbers each, as in SmolLM2-135M. Types take turns; least and median of the runs.
"""

from __future__ import annotations

import json
import statistics
import time
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from r1q.runtimes.cores import physical_cores
from r1q.runtimes.ort import load_onnxruntime

ort = load_onnxruntime()
HEADS, SHARED, SIZE, CONTEXT = 9, 3, 64, 8192
SCALES = {"float32": None, "int8, one step for all": [1], "int8, a step a channel": [1, SHARED, 1, SIZE]}
WORK = ((1, 512), (1, 2048), (1, 8000), (512, 512), (512, 8000))  # new tokens, tokens with them


class Node:
    """A graph of one node, with a buffer bound as past and as present."""

    def __init__(self, shape: list[int] | None) -> None:
        inputs = ["query", "", "", "past_key", "past_value", "last", "length", "cos", "sin"]
        constants = [
            helper.make_tensor(name, TensorProto.FLOAT, [CONTEXT, SIZE // 2], np.ones(CONTEXT * SIZE // 2, np.float32))
            for name in ("cos", "sin")
        ]
        more: dict[str, object] = {}
        if shape:
            inputs += ["", "", "", "scale", "scale"]
            constants.append(helper.make_tensor("scale", TensorProto.FLOAT, shape, np.full(np.prod(shape), 0.01)))
            kind = "PER_TENSOR" if shape == [1] else "PER_CHANNEL"
            more = {"kv_cache_bit_width": 8, "k_quant_type": kind, "v_quant_type": kind}
        node = helper.make_node(
            "GroupQueryAttention", inputs, ["output", "present_key", "present_value"], domain="com.microsoft",
            num_heads=HEADS, kv_num_heads=SHARED, do_rotary=1, **more,
        )  # fmt: skip
        held, value = TensorProto.INT8 if shape else TensorProto.FLOAT, helper.make_tensor_value_info
        sides = ["batch", SHARED, "context", SIZE]
        asked = [value("query", TensorProto.FLOAT, ["batch", "tokens", (HEADS + 2 * SHARED) * SIZE])]
        asked += [value(f"past_{part}", held, sides) for part in ("key", "value")]
        asked += [value("last", TensorProto.INT32, ["batch"]), value("length", TensorProto.INT32, [])]
        made = [value("output", TensorProto.FLOAT, None)]
        made += [value(f"present_{part}", held, sides) for part in ("key", "value")]
        opsets = [helper.make_opsetid("", 22), helper.make_opsetid("com.microsoft", 1)]
        graph = helper.make_graph([node], "attention", asked, made, constants)
        options = ort.SessionOptions()
        options.intra_op_num_threads = physical_cores()
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        self.session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self.binding: Any = self.session.io_binding()
        for part in ("key", "value"):
            buffer = ort.OrtValue.ortvalue_from_numpy(
                np.ones((1, SHARED, CONTEXT, SIZE), np.int8 if shape else np.float32)
            )
            self.binding.bind_ortvalue_input(f"past_{part}", buffer)
            self.binding.bind_ortvalue_output(f"present_{part}", buffer)

    def run(self, query: np.ndarray[Any, np.dtype[np.float32]], length: int) -> float:
        """Return the milliseconds of one run."""
        self.binding.bind_cpu_input("query", query)
        self.binding.bind_cpu_input("last", np.array([length - 1], np.int32))
        self.binding.bind_cpu_input("length", np.array(length, np.int32))
        self.binding.bind_output("output")
        began = time.perf_counter()
        self.session.run_with_iobinding(self.binding)
        return 1e3 * (time.perf_counter() - began)


def main() -> None:
    """Time every type in turn."""
    nodes = {name: Node(shape) for name, shape in SCALES.items()}
    rng = np.random.default_rng(0)
    for tokens, length in WORK:
        query = rng.standard_normal((1, tokens, (HEADS + 2 * SHARED) * SIZE)).astype(np.float32)
        samples: dict[str, list[float]] = {name: [] for name in nodes}
        for _ in range(20 if tokens == 1 else 3):
            for name, node in nodes.items():
                samples[name].append(round(node.run(query, length), 3))
        for name, found in samples.items():
            line = {
                "cache": name,
                "new": tokens,
                "held": length,
                "least ms": min(found),
                "median ms": statistics.median(found),
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
