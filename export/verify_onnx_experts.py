"""What QMoE and the router before it mean: scores of a norm choose experts, their softmax weighs them; where each one's rows are."""

from __future__ import annotations

from dataclasses import replace

from r1q.core.onnx_graph import OnnxNode
from r1q.export.verify_onnx_values import Bound, Flat, MisfitError, Mixed, Normed, Product, Reading, blocks

# Biases, a third matrix and its zero points.
_UNUSED = (4, 7, 8, 9, 10, 13)
_SHARES = 14


def softmax(reading: Reading, node: OnnxNode) -> None:
    """Note scores as shares of all experts."""
    scores = reading.value(node, 0, Product)
    if not isinstance(scores.of, Flat) or scores.form:
        raise MisfitError("is not of a router's scores")
    reading.settings(node, {"axis": -1})
    reading.make(node, replace(scores, form="softmax"))


def mixture(reading: Reading, node: OnnxNode) -> None:
    """Note what experts add, and bind the router and each expert's three matrices: gate and up give rows in turn."""
    config, facts = reading.config, reading.config.experts
    if facts is None or facts.gating != "softmax" or facts.groups > 1 or facts.shared_inner or facts.scale != 1.0:
        raise MisfitError("mixes experts, and the model has none, or another router")
    x, scores = reading.value(node, 0, Normed), reading.value(node, 1, Product)
    of_router = scores.of == Flat(x.stage, x.last) and scores.rows == facts.count and not scores.form
    if x.stage % 2 != 1 or not of_router or reading.value(node, _SHARES, Product) != replace(scores, form="softmax"):
        raise MisfitError(f"does not take {facts.count} scores of what it mixes, and their softmax")
    if any(node.input(place) for place in _UNUSED) or len(node.inputs) > _SHARES + 1:
        raise MisfitError("takes more than scores, shares and two matrices")
    wanted: dict[str, object] = {"k": facts.used, "normalize_routing_weights": int(facts.normalized)}
    gated = {"activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0}
    reading.settings(node, wanted | gated, free=("expert_weight_bits", "block_size"))
    form = (node.attributes.get("expert_weight_bits", 4), node.attributes.get("block_size", -1))
    both, width = 2 * facts.inner, config.hidden_size
    inner = blocks(reading, node, {"codes": 2, "scales": 3, "zeros": 11}, (facts.count * both, width, *form))
    down = blocks(reading, node, {"codes": 5, "scales": 6, "zeros": 12}, (facts.count * width, facts.inner, *form))
    layer, name = x.stage // 2, str(node)
    reading.bind(layer, "ffn_gate_inp", scores)
    for expert in range(facts.count):
        first, stop = expert * both, (expert + 1) * both
        for place, kind in enumerate(("ffn_gate_exps", "ffn_up_exps")):
            key = (layer, f"{kind}.{expert}", "weight")
            reading.bound.append(Bound(key=key, held=inner, start=first + place, stop=stop, step=2, node=name))
        key, first = (layer, f"ffn_down_exps.{expert}", "weight"), expert * width
        reading.bound.append(Bound(key=key, held=down, start=first, stop=first + width, node=name))
    reading.make(node, Mixed(x.stage, x.last))
