"""Attention in an ONNX decoder: whose rows queries, keys and values are, its caches, lengths, rotary tables and attributes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise

import numpy as np

from r1q.core.onnx_graph import OnnxNode
from r1q.export.verify_onnx_latent import latent_attention
from r1q.export.verify_onnx_values import Attended, Count, MisfitError, Normed, Product, Reading, stated

# genai_config.json's keys for the caches, and the names that it takes for granted: inputs 3 and 4, outputs 1 and 2 of an attention.
_CACHES = (
    ("inputs", 3, "past_key_names", "past_key_values.%d.key"),
    ("inputs", 4, "past_value_names", "past_key_values.%d.value"),
    ("outputs", 1, "present_key_names", "present.%d.key"),
    ("outputs", 2, "present_value_names", "present.%d.value"),
)


def attention(reading: Reading, node: OnnxNode) -> None:
    """Bind what an attention's queries, keys and values are products of, and hold its operator against the model."""
    config = reading.config
    if config.latent is not None:
        latent_attention(reading, node, config.latent, hold_attention)
        return
    widths = [heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
    first = reading.value(node, 0, Product)
    if node.input(1) or node.input(2):
        parts = [first, *(reading.value(node, index, Product) for index in (1, 2))]
    else:
        parts = cut(first, widths) if first.rows == sum(widths) and not first.norm else [first]
    source = first.of
    stray = not isinstance(source, Normed) or source.stage % 2 or source.last
    if stray or [part.rows for part in parts] != widths or any(part.form or part.of != source for part in parts):
        raise MisfitError(f"takes {[part.rows for part in parts]} rows, the model's q, k and v have {widths}")
    layer = source.stage // 2
    for part, kind in zip(parts, ("attn_q", "attn_k", "attn_v"), strict=True):
        reading.bind(layer, kind, part)
        if part.norm is not None:
            reading.bind_gamma(layer, f"{kind}_norm", part.norm, node)
    heads = {"num_heads": config.num_heads, "kv_num_heads": config.num_kv_heads, "rotary_interleaved": 0}
    hold_attention(reading, node, layer, heads, 1 / math.sqrt(config.head_dim))
    reading.make(node, Attended(source.stage))


def hold_attention(reading: Reading, node: OnnxNode, layer: int, heads: Mapping[str, object], scale: float) -> None:
    """Hold caches, lengths, rotary tables and attributes of an attention against the model."""
    if (reading.value(node, 5, Count), reading.value(node, 6, Count)) != (Count("last"), Count("length")):
        raise MisfitError("takes other lengths than the mask's")
    for side, index, key, default in _CACHES:
        pattern = stated(reading.folder.config, "model", "decoder", side, key) or default
        name = str(pattern).replace("%d", str(layer))
        have, known = (node.inputs, reading.graph.inputs) if side == "inputs" else (node.outputs, reading.graph.outputs)
        if have[index : index + 1] != (name,) or name not in known:
            reading.say(str(node), f"keeps keys or values as {have[index : index + 1]}, not {name!r}")
    for index, what in enumerate(("position_ids", "attention_bias", "head_sink"), 9):
        if node.input(index):
            reading.say(str(node), f"has {what} {node.input(index)!r}")
    reading.rotary.append((reading.held(node, 7), reading.held(node, 8)))
    eight: dict[str, object] = {}
    if node.input(12) or node.input(13):
        reading.cache[layer] = (reading.held(node, 12), reading.held(node, 13))
        eight = {"kv_cache_bit_width": 8, "k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"}
    plain = {"do_rotary": 1, "local_window_size": -1, "softcap": 0.0}
    # 0 is 1/√(length of a head), spelled otherwise.
    stretched = {} if node.attributes.get("scale", 0.0) == 0.0 and reading.config.latent is None else {"scale": scale}
    reading.settings(node, {**heads, **stretched, **plain, **eight})


def cut(whole: Product, parts: list[int]) -> list[Product]:
    """Return a product's rows in so many parts."""
    ends = [whole.start + int(end) for end in np.cumsum([0, *parts])]
    return [replace(whole, start=start, stop=stop) for start, stop in pairwise(ends)]
