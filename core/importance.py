"""Importance by part: tensors that a GGUF file stacks (experts, the heads of latent attention) have a row of it for each part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from r1q.core.qtensor import Floats
from r1q.core.tensors import TensorSpec

Importance = Mapping[str, Floats]
"""Mean squared inputs by GGUF tensor name: [columns], or [parts, columns] for a stack."""


def row_slabs(importance: Importance, spec: TensorSpec, step: int) -> Iterator[tuple[int, int, Floats | None]]:
    """Yield all rows of a tensor as (start, stop, importance [columns]), at most `step` at a time and none across two parts.

    An expert is one part of its stack; else the rows of a stack are cut into equal parts. Without importance there is None.
    """
    found = importance.get(spec.gguf_name)
    parts = found if found is not None and found.ndim == 2 and spec.expert is None else None
    height = spec.rows if parts is None else spec.rows // len(parts)
    own = found[spec.expert] if found is not None and found.ndim == 2 and spec.expert is not None else found
    for first in range(0, spec.rows, height):
        mine = own if parts is None else parts[first // height]
        for start in range(first, first + height, step):
            yield start, min(start + step, first + height), mine


def stack_sizes(tensors: tuple[TensorSpec, ...]) -> dict[str, int]:
    """Return the number of parts of every tensor that a GGUF file stacks, by GGUF name: experts, and heads of k_b and v_b."""
    sizes: dict[str, int] = {}
    ranks = {spec.layer: spec.columns for spec in tensors if spec.kind == "attn_v_b"}
    for spec in tensors:
        if spec.expert is not None:
            sizes[spec.gguf_name] = max(sizes.get(spec.gguf_name, 0), spec.expert + 1)
        elif spec.kind == "attn_k_b":
            heads = spec.rows // ranks[spec.layer]
            sizes[spec.gguf_name] = sizes[spec.gguf_name.replace("attn_k_b", "attn_v_b")] = heads
    return sizes
