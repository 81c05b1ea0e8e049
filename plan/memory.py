"""How much memory a calibrated run takes, part by part, from shapes alone; and what it gives up where that is too much.

A run is fullest inside a block: while a stage's statistics are summed up, or while its matrices are coded. With T tokens in all and n
in a tile, D hidden and K inputs of the stage, b bytes for a number of the engine's dtype, what is alive then is

    program                    the interpreter, torch, numba and its compiler
    hidden states and inputs   4·T·D, twice where the float model runs beside; b·T·K of what adds to them, until it is added
    statistics                 4·K², twice where what is coded is refined, and the drift
    a block's weights          b for each one coded so far, and for each exact one where the float model runs beside; of the routed
                               experts, those of one
    a tile of tokens           some arrays of n·K numbers, or
    rows in work               some arrays of a slab's weights
    workers                    with several of them, for each the program and what it has in work: rows, or an expert

The first line but the program is in files, which the system may take back from memory, when hidden states are spilled; so is what
workers share. Codes are on disk as soon as they are made. Nothing depends on the number of layers, or of experts but for the tokens
that each reads. `tests/plan/test_memory_measured.py` holds the sum against measured peaks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import psutil

from r1q.core.errors import ResourceError, UsageError
from r1q.core.recipe import PlannedTensor
from r1q.models.config import ModelConfig
from r1q.plan.surroundings import memory_limit
from r1q.quantize.engine import Engine

PROGRAM = 375_000_000
"""Measured on Linux, x86-64, torch 2.13 for CPUs. The first run of all, which compiles the kernels, takes up to 160 MB more."""
ROUNDING = 240_000_000
"""The same without torch, with the slabs of a run that rounds to nearest."""
TOKENIZER = 2500
"""Bytes for each token of the vocabulary while the tokenizer of a finished GGUF file is proved (measured)."""
# Bytes for each number [n, K] of a tile: gate, silu, up and their product; queries, keys, values, turned and mixed; a norm's copies.
_GATED, _MIXED, _NORMED = 12, 28, 20
_BESIDE = 4  # the coded model's inputs, while the exact ones are made
_PANEL = 768  # columns of a product before it is added to its sum
# Bytes for each weight of a slab: as read, moved, missed and coded; and of the rows that are refined, or packed, at a time.
_READ, _MOVED, _CODED, _REFINED, _PACKED = 4, 4, 5, 33, 36
_REFINED_WEIGHTS, _PACKED_WEIGHTS = 1 << 22, 1 << 20
_TILES, _SLABS = (2048, 1024, 512, 256), (1 << 22, 1 << 20)
_STAGES = (
    ("attn_q", "attn_k", "attn_v"),
    ("attn_q_a", "attn_kv_a_mqa"),
    ("attn_q_b",),
    ("attn_v_b",),
    ("attn_output",),
    ("ffn_gate", "ffn_up"),
    ("ffn_down",),
    ("ffn_gate_shexp", "ffn_up_shexp"),
    ("ffn_down_shexp",),
    ("ffn_gate_exps", "ffn_up_exps"),
    ("ffn_down_exps",),
)
_ADDING = ("attn_output", "ffn_down", "ffn_down_shexp")
_WEIGHTS = "a block's weights"


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What a calibrated run is over: a model's blocks, `windows` of `length` tokens; and how many `workers` code beside it here."""

    config: ModelConfig
    tensors: Sequence[PlannedTensor]
    windows: int
    length: int
    workers: int = 0


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


def memory_parts(work: Workload, engine: Engine) -> dict[str, int]:
    """Return the bytes of each part at the fullest moment of a run, the largest first."""
    blocks: dict[int, list[PlannedTensor]] = {}
    for tensor in work.tensors:
        if tensor.spec.layer is not None and tensor.spec.is_matrix:
            blocks.setdefault(tensor.spec.layer, []).append(tensor)
    moments: list[dict[str, int]] = [{"tokenizer": TOKENIZER * work.config.vocab_size}]
    # Blocks of the same kinds of layers differ by their grids alone: the one with the most stored bytes stands for all.
    alike: dict[frozenset[str], list[PlannedTensor]] = {}
    for block in blocks.values():
        kinds = frozenset(tensor.spec.kind for tensor in block)
        alike[kinds] = max(alike.get(kinds, []), block, key=lambda some: sum(t.bytes for t in some))
    for block in alike.values():
        moments += [moment.parts(work.workers) for moment in _moments(work, block, engine)]
    most = max(moments, key=lambda parts: sum(parts.values()))
    return dict(sorted({"program": PROGRAM, **most}.items(), key=lambda part: -part[1]))


def rounding_parts(config: ModelConfig, formats: Sequence[str]) -> dict[str, int]:
    """Return the bytes of each part of a run that rounds to nearest."""
    return {"program": ROUNDING} | ({"tokenizer": TOKENIZER * config.vocab_size} if "gguf" in formats else {})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Moment:
    """Bytes alive at a time, by part: in the run's own process, and in whoever codes, which may be the same."""

    run: Mapping[str, int]
    coder: Mapping[str, int]

    def parts(self, workers: int) -> dict[str, int]:
        """Return the bytes of each part with so many workers, none if the run codes itself."""
        if workers:
            return {**self.run, "workers": workers * (PROGRAM + sum(self.coder.values()))}
        return {part: self.run.get(part, 0) + self.coder.get(part, 0) for part in (*self.run, *self.coder)}


def _moments(work: Workload, block: Sequence[PlannedTensor], engine: Engine) -> Iterator[_Moment]:
    """Yield what is alive while each stage's statistics are summed, while its matrices are coded, and when they are read again."""
    hidden, tokens, number = work.config.hidden_size, work.windows * work.length, _number(engine)
    weights = {t.spec.kind: t for t in block}  # of the experts, the last one stands for all: one is in memory at a time
    dense = sum(t.spec.size for t in block if t.spec.expert is None)
    exact = number * dense if engine.exact_stream else 0
    streams = 4 * tokens * hidden * (2 if engine.exact_stream else 1)
    before = 0
    for kinds in _STAGES:
        planned = [weights[kind] for kind in kinds if kind in weights]
        if not planned:
            continue
        columns, adds = planned[0].spec.columns, kinds[0] in _ADDING
        routed = planned[0].spec.expert is not None
        if kinds[0] == "ffn_gate_exps":
            streams += number * tokens * hidden * (2 if engine.exact_stream else 1)  # what all experts read
        made = sum(number * t.spec.size for t in planned)
        kept = 0 if engine.spill else streams + (number * tokens * columns if adds else 0)
        always = {"hidden states and inputs": kept, _WEIGHTS: exact + before}
        square = 4 * columns * columns
        drift = 4 * columns * (hidden if adds else columns) if engine.exact_stream else 0
        sums = {"statistics": square + drift}
        tile = {"a tile of tokens": _tile(work, engine, kinds[0], columns)}
        factors = {"statistics": square * (2 if engine.passes else 1) + drift}
        rows = {"rows in work": max(_rows(engine, t, columns) for t in planned)}
        if routed:
            # Of its expert, whoever codes the second stage holds gate and up as coded, and all of the float model's.
            own = 0 if kinds[0] == "ffn_gate_exps" else _expert(weights, engine, coded=2)
            yield _Moment(run=always, coder={**sums, **tile, _WEIGHTS: own})
            yield _Moment(run=always, coder={**factors, **rows})
            held = {**always, _WEIGHTS: exact + before + _expert(weights, engine, coded=3)}
            yield _Moment(run={**held, **tile}, coder={})  # what it makes is added
            continue
        yield _Moment(run={**always, **sums, **tile}, coder={})
        yield _Moment(run={**always, **factors}, coder=rows)
        yield _Moment(run={**always, **factors, _WEIGHTS: exact + before + made}, coder={})
        before += made


def _expert(weights: Mapping[str, PlannedTensor], engine: Engine, *, coded: int) -> int:
    """Return the bytes of so many matrices of an expert as coded, and of the float model's three where it runs beside."""
    largest = max(t.spec.size for t in weights.values() if t.spec.expert is not None)
    return _number(engine) * largest * (coded + (3 if engine.exact_stream else 0))


def _number(engine: Engine) -> int:
    return 2 if engine.compute == "bfloat16" else 4


def _tile(work: Workload, engine: Engine, kind: str, columns: int) -> int:
    windows = min(max(1, engine.tile // work.length), work.windows)
    gated = dict.fromkeys(("ffn_down", "ffn_down_shexp", "ffn_down_exps"), _GATED)
    each = {**gated, "attn_output": _MIXED}.get(kind, _NORMED)
    if engine.exact_stream and each != _NORMED:
        each += _BESIDE
    summed = 8 + _number(engine)
    tokens = windows * work.length
    return max(each * tokens * columns, summed * tokens * columns + 2 * _number(engine) * _PANEL * columns)


def _rows(engine: Engine, planned: PlannedTensor, columns: int) -> int:
    size = planned.spec.size
    slab = min(max(engine.slab, columns), size)
    refined = _REFINED * min(slab, _REFINED_WEIGHTS) if engine.passes else 0
    packed = planned.bytes * slab // size + _PACKED * min(slab, _PACKED_WEIGHTS)
    moved = _MOVED if engine.exact_stream else 0
    coding = (_READ + moved) * slab + max(_CODED * slab, slab + refined, slab + packed)
    return max(coding, 8 * 512 * columns)  # the panels of the factorisation


def ceiling(asked: str | None) -> int:
    """Return the bytes that a run may take: what --max-ram says, else what is available here and in its control group."""
    if asked is not None:
        return parse_size(asked)
    limit, available = memory_limit(), int(psutil.virtual_memory().available)
    return available if limit is None else min(limit, available)


def fit_engine(work: Workload, engine: Engine, limit: int) -> Engine:
    """Return `engine`, giving up speed until it fits `limit` bytes: hidden states go to files, then tiles shrink, then slabs.

    Raises `ResourceError` with the least that would do.
    """
    need = 0
    for candidate in _smaller(work, engine):
        need = sum(memory_parts(work, candidate).values())
        if need <= limit:
            return candidate
    raise ResourceError(short_of(need, limit))


def short_of(need: int, limit: int) -> str:
    """Return the sentence for a run that needs `need` bytes and may take `limit`."""
    return (
        f"this run needs about {_mebibytes(need)} MiB ({need} bytes) at the least and may take {_mebibytes(limit)} MiB; "
        "raise --max-ram, free memory, or ask for less: --effort fast, a smaller --seq-len"
    )


def _mebibytes(size: int) -> int:
    return -(-size // (1 << 20))


def _smaller(work: Workload, engine: Engine) -> Iterator[Engine]:
    yield engine
    smallest = replace(engine, spill=True)
    yield smallest
    for tile in (*(tile for tile in _TILES if tile > work.length), work.length):
        if tile < smallest.tile:
            smallest = replace(smallest, tile=tile)
            yield smallest
    yield from (replace(smallest, slab=slab) for slab in _SLABS if slab < engine.slab)


def tell(parts: Mapping[str, int]) -> str:
    """Return the parts as one line."""
    return ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in parts.items() if size >= 1e6)
