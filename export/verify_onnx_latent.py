"""Latent attention in an ONNX decoder, as a formula: queries moved to latents, one head of these, mixed latents moved to values.

What `export/verify_onnx_formulas.py` has noted of the operators around an attention is held against the one formula that it must be
(DeepSeek-V2, §2.1.2), with whatever products and matrices stand in it; these are then the model's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from r1q.core.onnx_graph import OnnxNode, OnnxTensor
from r1q.export.verify_onnx_values import (
    Attended,
    Bound,
    Made,
    Matrix,
    MisfitError,
    Normed,
    Place,
    Product,
    Reading,
    Short,
    Value,
)
from r1q.models.config_moe import Latent, score_scale

Hold = Callable[[Reading, OnnxNode, int, dict[str, object], float], None]
_SWAPPED = (0, 2, 1, 3)  # heads before positions, and back


def latent_attention(reading: Reading, node: OnnxNode, latent: Latent, hold: Hold) -> None:
    """Bind what an attention on latents reads; its result is a formula until values are made of it (`values_made`)."""
    heads, kept = reading.config.num_heads, latent.rope_dim + latent.rank
    queries, entry = reading.value(node, 0, Made), reading.value(node, 1, Made)
    if node.input(2) != node.input(1):
        raise MisfitError("mixes other values than its keys")
    match entry:
        case Made("Concat", (Product() as ending, Short(product=Product() as made, gamma=OnnxTensor() as gamma))):
            source = made.of
        case _:
            raise MisfitError("has keys that are not what turns and a latent")
    rest = replace(made, start=made.stop, stop=made.stop + latent.rope_dim)
    if made.rows != latent.rank or ending != rest or not isinstance(source, Normed) or source.stage % 2 or source.last:
        raise MisfitError(
            f"has keys that are not a latent of {latent.rank} and the {latent.rope_dim} numbers behind it"
        )
    first, keys = _of_queries(queries, latent, heads)
    layer, name = source.stage // 2, str(node)
    _bind_queries(reading, node, latent, first, source)
    reading.bind(layer, "attn_kv_a_mqa", replace(made, stop=ending.stop))
    reading.bind_gamma(layer, "attn_kv_a_norm", gamma, node)
    _bind_heads(reading, layer, "attn_k_b", keys, (heads, latent.rank, latent.key_dim), name)
    facts: dict[str, object] = {"num_heads": heads, "kv_num_heads": 1, "rotary_interleaved": 1}
    hold(reading, node, layer, facts, score_scale(latent, reading.config.yarn))
    reading.make(node, Made("Attention", (Attended(source.stage),), (kept,)))


def values_made(reading: Reading, node: OnnxNode, value: Made) -> Value:
    """Return what a formula is that ends with values made of mixed latents: what the heads gathered. Else return it as it is."""
    latent, heads = reading.config.latent, reading.config.num_heads
    match value:
        case Made(
            "Reshape",
            (Made("Transpose", (Made("MatMul", (Made("Transpose", (parted,)),), (OnnxTensor() as matrix,)),)),),
        ):
            pass
        case _:
            return value
    match parted:
        case Made("Split", (Made("Reshape", (Made("Attention", (Attended() as mixed,)) as whole,)),)) if latent:
            sides = (latent.rope_dim, latent.rank)
        case _:
            return value
    latents = Made("Split", (Made("Reshape", (whole,), (0, 0, heads, sum(sides))),), (sides, 1))
    if value != Made("Reshape", (_by_head(latents, matrix),), (0, 0, heads * latent.value_dim)):
        return value
    _bind_heads(reading, mixed.stage // 2, "attn_v_b", matrix, (heads, latent.value_dim, latent.rank), str(node))
    return mixed


def _of_queries(queries: Made, latent: Latent, heads: int) -> tuple[Product, OnnxTensor]:
    """Return the product that queries are made of, and the matrices that move them."""
    match queries:
        case Made(
            "Reshape",
            (
                Made(
                    "Concat",
                    (
                        Made("Split", (Made("Reshape", (Product() as first,)),)),
                        Made("Transpose", (Made("MatMul", _, (OnnxTensor() as keys,)),)),
                    ),
                ),
            ),
        ):
            pass
        case _:
            raise MisfitError("has queries that are not what turns and what was moved to latents")
    apart = Made("Reshape", (first,), (0, 0, heads, latent.key_dim + latent.rope_dim))
    plain, turning = (Made("Split", (apart,), ((latent.key_dim, latent.rope_dim), part)) for part in (0, 1))
    moved = Made("Concat", (turning, _by_head(plain, keys)))
    if queries != Made("Reshape", (moved,), (0, 0, heads * (latent.rope_dim + latent.rank))):
        raise MisfitError("has queries of another formula than the model's")
    return first, keys


def _by_head(x: Value, matrices: OnnxTensor) -> Made:
    return Made("Transpose", (Made("MatMul", (Made("Transpose", (x,), _SWAPPED),), (matrices,)),), _SWAPPED)


def _bind_queries(reading: Reading, node: OnnxNode, latent: Latent, first: Product, source: Place) -> None:
    layer, of = source.stage // 2, first.of
    if latent.query_rank is None:
        kind = "attn_q"
    else:
        match of:
            case Short(product=Product() as made, gamma=OnnxTensor() as gamma) if made.rows == latent.query_rank:
                kind, of = "attn_q_b", made.of
                reading.bind(layer, "attn_q_a", made)
                reading.bind_gamma(layer, "attn_q_a_norm", gamma, node)
            case _:
                raise MisfitError(f"has queries that are not made of {latent.query_rank} numbers, normed")
    size = latent.key_dim + latent.rope_dim
    if of != source or first.rows != reading.config.num_heads * size or first.form or first.norm:
        raise MisfitError(f"has queries of {first.rows} numbers, or of another input than its keys")
    reading.bind(layer, kind, first)


def _bind_heads(
    reading: Reading, layer: int, kind: str, held: OnnxTensor, sides: tuple[int, int, int], node: str
) -> None:
    if (held.shape, held.dtype) != (sides, "float32"):
        raise MisfitError(f"takes {held.name!r}, {held.dtype} {list(held.shape)}, not {list(sides)} of float32")
    rows = sides[0] * sides[1]
    matrix = Matrix(weight=replace(held, shape=(rows, sides[2])), rows=rows, columns=sides[2])
    reading.bound.append(Bound(key=(layer, kind, "weight"), held=matrix, start=0, stop=rows, node=node))
