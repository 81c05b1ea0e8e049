"""What QMoE and the router before it mean: scores of a norm choose experts and weigh them; where their rows are; what is added."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeGuard

from r1q.core.onnx_graph import OnnxNode, OnnxTensor
from r1q.export.verify_onnx_values import (
    Bound,
    Flat,
    Gated,
    Made,
    MisfitError,
    Mixed,
    Normed,
    Product,
    Reading,
    Value,
    blocks,
)
from r1q.models.config_moe import Experts

# Biases, a third matrix and its zero points.
_UNUSED = (4, 7, 8, 9, 10, 13)
_SHARES = 14
_ROUTED, _SCALED, _SHARED = "Routed", "scaled", "shared"
_CLOSED = -1e29  # above what closes an expert, below any score


def softmax(reading: Reading, node: OnnxNode) -> None:
    """Note scores as shares of all experts."""
    reading.settings(node, {"axis": -1})
    shares(reading, node, "softmax")


def shares(reading: Reading, node: OnnxNode, form: str) -> None:
    """Note scores as shares of some `form`."""
    scores = reading.value(node, 0, Product)
    if not isinstance(scores.of, Flat) or scores.form:
        raise MisfitError("is not of a router's scores")
    reading.make(node, replace(scores, form=form))


def mixture(reading: Reading, node: OnnxNode) -> None:
    """Note what experts add, and bind the router and each expert's three matrices: gate and up give rows in turn."""
    config, facts = reading.config, reading.config.experts
    if facts is None:
        raise MisfitError("mixes experts, and the model has none")
    x, weighing = reading.value(node, 0, Normed), reading.value(node, _SHARES, Product)
    scores = replace(weighing, form="")
    of_router = scores.of == Flat(x.stage, x.last) and scores.rows == facts.count and weighing.form == facts.gating
    if x.stage % 2 != 1 or not of_router:
        raise MisfitError(f"does not weigh by the {facts.gating} of {facts.count} scores of what it mixes")
    layer, name = x.stage // 2, str(node)
    _hold_choice(reading, node, facts, scores, layer)
    if any(node.input(place) for place in _UNUSED) or len(node.inputs) > _SHARES + 1:
        raise MisfitError("takes more than scores, shares and two matrices")
    wanted: dict[str, object] = {"k": facts.used, "normalize_routing_weights": int(facts.normalized)}
    gated = {"activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0}
    reading.settings(node, wanted | gated, free=("expert_weight_bits", "block_size"))
    form = (node.attributes.get("expert_weight_bits", 4), node.attributes.get("block_size", -1))
    both, width = 2 * facts.inner, config.hidden_size
    inner = blocks(reading, node, {"codes": 2, "scales": 3, "zeros": 11}, (facts.count * both, width, *form))
    down = blocks(reading, node, {"codes": 5, "scales": 6, "zeros": 12}, (facts.count * width, facts.inner, *form))
    reading.bind(layer, "ffn_gate_inp", scores)
    for expert in range(facts.count):
        first, stop = expert * both, (expert + 1) * both
        for place, kind in enumerate(("ffn_gate_exps", "ffn_up_exps")):
            key = (layer, f"{kind}.{expert}", "weight")
            reading.bound.append(Bound(key=key, held=inner, start=first + place, stop=stop, step=2, node=name))
        key, first = (layer, f"ffn_down_exps.{expert}", "weight"), expert * width
        reading.bound.append(Bound(key=key, held=down, start=first, stop=first + width, node=name))
    steps = (*([_SCALED] if facts.scale != 1.0 else []), *([_SHARED] if facts.shared_inner else []))
    reading.make(node, _mixed(Mixed(x.stage, x.last), steps))


def scaled(reading: Reading, node: OnnxNode, routed: Made) -> None:
    """Note that what routed experts add was multiplied by their scale."""
    facts, (mixed,), steps = reading.config.experts, routed.parts, routed.detail
    have = reading.single(node, 1)
    if facts is None or steps[:1] != (_SCALED,) or not isinstance(mixed, Mixed):
        raise MisfitError("multiplies what is not to be scaled")
    if have != facts.scale:
        reading.say(str(node), f"multiplies experts by {have:.7g}, the model needs {facts.scale:.7g}")
    reading.make(node, _mixed(mixed, steps[1:]))


def with_shared(reading: Reading, node: OnnxNode, routed: Made, shared: Product) -> None:
    """Note that the shared expert was added to what routed ones add."""
    (mixed,), steps = routed.parts, routed.detail
    if steps != (_SHARED,) or not isinstance(mixed, Mixed) or shared.of != Gated(mixed.stage, mixed.last):
        raise MisfitError("does not add the shared expert to the routed ones of its block")
    reading.bind(mixed.stage // 2, "ffn_down_shexp", shared)
    reading.make(node, mixed)


def is_routed(value: Value | None) -> TypeGuard[Made]:
    """Return whether a value is what routed experts add, still to be scaled, or the shared one added to it."""
    return isinstance(value, Made) and value.operator == _ROUTED


def _mixed(mixed: Mixed, steps: tuple[object, ...]) -> Value:
    return Made(_ROUTED, (mixed,), steps) if steps else mixed


def _hold_choice(reading: Reading, node: OnnxNode, facts: Experts, scores: Product, layer: int) -> None:
    """Hold what chooses experts against the formula of the model, and bind the correction in it."""
    have = reading.values.get(node.input(1))
    shared = replace(scores, form=facts.gating)
    choice: Value = scores if facts.gating == "softmax" and facts.groups == 1 else shared
    if facts.corrected:
        correction = _correction(have)
        if correction is None:
            raise MisfitError("chooses by scores without their correction")
        choice = Made("Add", (choice,), (correction,))
        key = (layer, "exp_probs_b", "bias")
        reading.bound.append(Bound(key=key, held=correction, start=0, stop=correction.size, node=str(node)))
    if facts.groups > 1:
        choice = _eligible(facts, choice, _closing(have))
    if have != choice:
        raise MisfitError(
            f"does not choose by the model's {facts.gating} of {facts.count} scores, in {facts.groups} groups"
        )


def _eligible(facts: Experts, choice: Value, closing: float) -> Value:
    """Return the formula of scores whose group is not among the best: `models/moe.py`, `route`."""
    grouped = Made("Reshape", (choice,), (-1, facts.groups, facts.count // facts.groups))
    best = Made("TopK", (grouped,), (facts.group_best, 0))
    sums = Made("ReduceSum", (best,), ((-1,), 0))
    least = Made("ReduceMin", (Made("TopK", (sums,), (facts.groups_used, 0)),), ((-1,), 1))
    closed = Made("Unsqueeze", (Made("Less", (sums, least)),), (-1,))
    return Made("Reshape", (Made("Where", (closed, grouped), (closing,)),), (-1, facts.count))


def _closing(value: Value | None) -> float:
    match value:
        case Made("Reshape", (Made("Where", _, (float() as closing,)),)) if closing < _CLOSED:
            return closing
    raise MisfitError("does not close experts of other groups")


def _correction(value: Value | None) -> OnnxTensor | None:
    """Return the vector that is added somewhere in a formula."""
    while isinstance(value, Made):
        if value.operator == "Add" and isinstance(value.detail[0], OnnxTensor):
            return value.detail[0]
        value = value.parts[-1]
    return None
