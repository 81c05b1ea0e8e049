"""How much memory a calibrated run takes, part by part, from shapes alone; and what it gives up where that is too much."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from r1q.core.errors import ResourceError, UsageError
from r1q.core.recipe import PlannedTensor
from r1q.models.config import ModelConfig
from r1q.quantize.engine import Engine

# Python with torch, numba and the compiled kernels, and the allocator's slack: measured on Linux, x86-64, torch 2.13 for CPUs.
PROGRAM = 400 << 20
_SLAB_COPIES = 6  # weights, targets, errors, panels and codes of the rows in work, in float32
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_TILES, _SLABS = (2048, 512), (1 << 24, 1 << 22, 1 << 20)


def parse_size(text: str) -> int:
    """Return the bytes that `6GiB`, `6GB`, `512 MiB` or a plain number mean; B without an i counts in thousands.

    Raises `UsageError` for anything else.

    >>> parse_size("6GiB"), parse_size("1.5GB")
    (6442450944, 1500000000)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if found is None or not float(found[1]):
        raise UsageError(f"{text!r} is no size; write it like 6GiB or 800MB")
    power = len("KMGT"[: "KMGT".index(found[2].upper()) + 1]) if found[2] else 0
    unit = 1024**power if found[3] or not text.strip().upper().endswith("B") else 1000**power
    return int(float(found[1]) * unit)


def memory_parts(config: ModelConfig, tensors: Sequence[PlannedTensor], engine: Engine, tokens: int) -> dict[str, int]:
    """Return the bytes of each part at the worst moment: while the widest layer of a block is coded, over `tokens` tokens."""
    hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim
    number, widest = (2 if engine.compute == "bfloat16" else 4), max(hidden, inner, heads)
    inside = [t for t in tensors if t.spec.layer == 0 and t.spec.is_matrix]
    weights = sum(t.spec.size for t in inside)
    largest = max((t.spec.size for t in inside), default=0)
    streams = 2 if engine.exact_stream else 1
    statistics = 4 * widest * widest * (2 if engine.passes else 1)
    if engine.exact_stream:
        statistics += 4 * max(hidden * hidden, hidden * widest)
    kept = 0 if engine.spill else tokens * (4 * streams * hidden + number * max(inner, heads))
    return {
        "program": PROGRAM,
        "hidden states and kept inputs": kept,
        "statistics of the widest layer": statistics,
        "a block's weights": weights * number * streams + sum(t.bytes for t in inside),
        "rows in work": 4 * _SLAB_COPIES * min(engine.slab, largest),
        "a tile of tokens": 4 * min(engine.tile, tokens) * (3 * inner + 6 * hidden + 3 * heads),
    }


def fit_engine(
    config: ModelConfig, tensors: Sequence[PlannedTensor], engine: Engine, tokens: int, limit: int | None
) -> Engine:
    """Return `engine`, giving up speed until it fits `limit` bytes: first hidden states go to files, then tiles and slabs shrink.

    Raises `ResourceError` with the least that would do. None is no limit.
    """
    if limit is None:
        return engine
    need = 0
    for candidate in _smaller(engine):
        need = sum(memory_parts(config, tensors, candidate, tokens).values())
        if need <= limit:
            return candidate
    raise ResourceError(
        f"this run needs about {need / (1 << 20):.0f} MiB at the least and may take {limit / (1 << 20):.0f} MiB; "
        "raise --max-ram, take --effort fast or fewer --samples"
    )


def _smaller(engine: Engine) -> Iterator[Engine]:
    yield engine
    for tile in _TILES:
        for slab in _SLABS:
            yield replace(engine, spill=True, tile=min(tile, engine.tile), slab=min(slab, engine.slab))


def tell(parts: Mapping[str, int]) -> str:
    """Return the parts as one line, the largest first."""
    listed = sorted(parts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in listed if size >= 1e6)
