"""Experts in an ONNX graph: a router's scores, which experts are eligible, and QMoE, which mixes those that score best."""

from __future__ import annotations

from r1q.export.onnx_nodes import MICROSOFT, Nodes
from r1q.export.onnx_weights import Experts
from r1q.models.config import ModelConfig
from r1q.models.config_moe import Experts as Facts

_CLOSED = -1e30  # the score of an expert that is not eligible


def mixture(nodes: Nodes, config: ModelConfig, name: str, stem: str, experts: Experts, x: str) -> str:
    """Add what the chosen experts make of `x`, and the shared one. One score chooses, another weighs (`models/moe.py`).

    QMoE of ONNX Runtime 1.31 computes 4 bits in float32, 2 and 8 bits with int8 activations; `accuracy_level` does not reach it.
    """
    facts, inner, down = config.experts, experts.inner, experts.down
    if facts is None:
        raise ValueError("the model has no experts")
    rows = nodes.add("Reshape", f"{name}/router/Reshape", [x, nodes.integers(-1, config.hidden_size)])
    matrix = [rows, experts.router]
    scores = nodes.add("FusedMatMul", f"{name}/router/MatMul", matrix, domain=MICROSOFT, transB=1)
    if facts.gating == "sigmoid":
        choice = shares = nodes.add("Sigmoid", f"{name}/router/Sigmoid", [scores])
    else:
        shares = nodes.add("Softmax", f"{name}/router/Softmax", [scores], axis=-1)
        choice = shares if facts.groups > 1 else scores
    if experts.correction is not None:
        choice = nodes.add("Add", f"{name}/router/Add", [choice, experts.correction])
    if facts.groups > 1:
        choice = _eligible(nodes, facts, f"{name}/router", choice)
    inputs = [x, choice, inner.weight, inner.scales, "", down.weight, down.scales, *4 * [""]]
    inputs += [inner.zeros or "", down.zeros or "", "", shares]
    mixed = nodes.add(
        "QMoE", f"{name}/QMoE", inputs, domain=MICROSOFT, k=facts.used, normalize_routing_weights=int(facts.normalized),
        expert_weight_bits=inner.form.bits, block_size=inner.form.block,
        # gate and up in turn, silu(gate) · (up + 0)
        activation_type="swiglu", swiglu_fusion=1, activation_alpha=1.0, activation_beta=0.0,
    )  # fmt: skip
    if facts.scale != 1.0:
        mixed = nodes.add("Mul", f"{name}/scale/Mul", [mixed, nodes.number(facts.scale)])
    if facts.shared_inner:
        shared = nodes.gated(f"{name}/shared_experts", f"{stem}.shared_experts", x)
        mixed = nodes.add("Add", f"{name}/Add", [mixed, shared])
    return mixed


def _eligible(nodes: Nodes, facts: Facts, name: str, choice: str) -> str:
    """Close the experts of groups whose best ones score less together than those of the `groups_used` best groups."""
    sides = nodes.integers(-1, facts.groups, facts.count // facts.groups)
    grouped = nodes.add("Reshape", f"{name}/groups/Reshape", [choice, sides])

    def top(part: str, values: str, count: int) -> str:
        outputs = [f"{name}/{part}/TopK/output_{index}" for index in range(2)]
        return nodes.add("TopK", f"{name}/{part}/TopK", [values, nodes.integers(count)], outputs, axis=-1)

    best = top("experts", grouped, facts.group_best)
    sums = nodes.add("ReduceSum", f"{name}/groups/ReduceSum", [best, nodes.integers(-1)], keepdims=0)
    least = nodes.add(
        "ReduceMin", f"{name}/groups/ReduceMin", [top("groups", sums, facts.groups_used), nodes.integers(-1)]
    )
    closed = nodes.add("Less", f"{name}/groups/Less", [sums, least])
    closed = nodes.add("Unsqueeze", f"{name}/groups/Unsqueeze", [closed, nodes.integers(-1)])
    kept = nodes.add("Where", f"{name}/groups/Where", [closed, nodes.number(_CLOSED), grouped])
    return nodes.add("Reshape", f"{name}/Reshape_2", [kept, nodes.integers(-1, facts.count)])
