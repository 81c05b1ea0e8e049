"""How fast this machine multiplies and codes: a probe of a few seconds, and the time of a calibrated run from counted work."""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from r1q.calibration.moments import add_second_moment
from r1q.core.qtensor import Floats
from r1q.core.recipe import PlannedTensor
from r1q.core.scheme import Scheme
from r1q.core.tensors import TensorSpec
from r1q.models import fp8
from r1q.models.config import ModelConfig
from r1q.models.linear import rms_norm
from r1q.models.source import is_finite, widened
from r1q.quantize.computing import computing, engine_dtype
from r1q.quantize.engine import Engine
from r1q.quantize.gptq import gptq
from r1q.quantize.gptq.factor import Factor, factorize
from r1q.quantize.refine import refine
from r1q.quantize.rtn import rtn
from r1q.quantize.storing import store_rows, values_of

_SIDE, _TOKENS, _ROWS = 1024, 2048, 4096
_SECONDS = 0.5
_BLOCK = (128, 128)
_SPREAD = 0.5
_PASSED = 1.6  # norms that take as long as what else is done to a number that a matrix reads or makes (counted in a run of 135M)
_ATTENDED = 6.5  # multiply-adds of a product that take as long as one position seen by one number of a head
_HASHED = 6  # times that a stored byte is: in its part, at each of the part's readings, of its tensor, of its file
_SHARE, _MOST = 0.02, 4  # a grid that fewer weights have is not probed, nor more grids than this
_PLAIN = ("attn_k_b",)  # kinds that are rounded without second moments
# The first of every group of layers that read the same.
_FIRST = (
    *("attn_q", "attn_q_a", "attn_q_b", "attn_v_b", "attn_output", "ffn_gate", "ffn_down"),
    *("ffn_gate_shexp", "ffn_down_shexp", "ffn_gate_exps", "ffn_down_exps"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GridPace:
    """Of one grid, weights a second: coded by GPTQ, rounded, refined once, stored with their error, made of what is stored.

    `refined` is infinite where the engine refines nothing.
    """

    coded: float
    rounded: float
    refined: float
    stored: float
    restored: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Multiply-adds a second in the engine's dtype and in float32, numbers normalized, weights read, bytes hashed; and by grid.

    Reading is making float32 of what the model stores; the disk is not asked.
    """

    products: float
    exact_products: float
    normalized: float
    read: float
    hashed: float
    grids: Mapping[Scheme, GridPace]

    def of(self, scheme: Scheme) -> GridPace:
        """Return the pace of a grid, or, where it was not measured, of the first that was."""
        return self.grids.get(scheme) or next(iter(self.grids.values()))


def probe(engine: Engine, schemes: Sequence[Scheme], dtype: str = "BF16") -> Pace:
    """Measure for three seconds, and three or more for each of `schemes`, after kernels are compiled; weights are stored as `dtype`.

    No weight is read: what is coded is noise, in arrays too large for a processor's caches, as a model's are.
    """
    random = np.random.default_rng(0)
    with computing(engine):
        inputs = torch.from_numpy(random.standard_normal((_TOKENS, _SIDE), dtype=np.float32))
        weights = random.standard_normal((_ROWS, _SIDE), dtype=np.float32)
        narrow, wide = inputs.to(engine_dtype(engine)), torch.from_numpy(weights)
        matrix = wide.to(narrow.dtype)
        moment = torch.zeros(_SIDE, _SIDE)
        add_second_moment(moment, inputs, torch.float32)
        factor = factorize(moment, keep=True)
        if factor is None:
            raise ValueError("second moments of noise are positive definite")
        codes = random.integers(0, 120, (_ROWS, _SIDE)).astype(np.uint8 if dtype == fp8.DTYPE else np.uint16)
        scales = np.ones((_ROWS // _BLOCK[0], _SIDE // _BLOCK[1]), np.float32)
        work = _TOKENS * _ROWS * _SIDE
        return Pace(
            products=_rate(lambda: narrow @ matrix.T, work),
            exact_products=_rate(lambda: inputs @ wide.T, work),
            normalized=_rate(lambda: rms_norm(inputs, wide[0], 1e-6), inputs.numel()),
            read=_rate(lambda: _read(codes, scales), weights.size),
            hashed=_rate(lambda: hashlib.sha256(codes.data).digest(), codes.nbytes),
            grids={scheme: _grid_pace(engine, scheme, weights, factor) for scheme in schemes},
        )


def _grid_pace(engine: Engine, scheme: Scheme, weights: Floats, factor: Factor) -> GridPace:
    importance = np.random.default_rng(0).gamma(1.0, size=weights.shape[1:]).astype(np.float32)
    coded = gptq(weights, factor, scheme, threads=engine.threads)
    slabs = store_rows(weights, coded, scheme)

    def refined() -> None:
        refine(coded, weights, factor, passes=1, threads=engine.threads)

    def restored() -> None:
        for slab in slabs:
            torch.from_numpy(values_of(scheme, slab.stored, weights.shape[1])).to(engine_dtype(engine))

    return GridPace(
        coded=_rate(lambda: gptq(weights, factor, scheme, threads=engine.threads), weights.size),
        rounded=_rate(lambda: rtn(weights, scheme, importance), weights.size),
        refined=_rate(refined, weights.size) if engine.passes else math.inf,
        stored=_rate(lambda: store_rows(weights, coded, scheme), weights.size),
        restored=_rate(restored, weights.size),
    )


def _read(codes: NDArray[Any], scales: Floats) -> None:
    """Make float32 of 8-bit floats, or bits of bfloat16, and look whether all are finite, as a source does."""
    if codes.dtype == np.uint8:
        is_finite(fp8.dequantize(codes, scales, 0, _BLOCK))
    else:
        is_finite(codes)
        widened(codes)


def main_schemes(tensors: Sequence[PlannedTensor]) -> tuple[list[Scheme], str] | None:
    """Return the grids that most weights are coded in, and the dtype most are stored in; None where nothing is coded."""
    sizes: Counter[Scheme] = Counter()
    dtypes: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.spec.is_matrix and tensor.scheme.facts.family != "float":
            sizes[tensor.scheme] += tensor.spec.size
            dtypes[tensor.spec.dtype] += tensor.spec.size
    if not sizes:
        return None
    found = [scheme for scheme, size in sizes.most_common(_MOST) if size >= _SHARE * sizes.total()]
    return found, dtypes.most_common(1)[0][0]


def seconds(
    config: ModelConfig,
    tensors: Sequence[PlannedTensor],
    engine: Engine,
    tokens: int,
    length: int,
    pace: Pace,
    workers: int = 1,
) -> float:
    """Return the time of a calibrated run on `tokens` in windows of `length`: forward passes, statistics, factors, all coding.

    Coding, and all of an expert's statistics, is shared by so many `workers`, of which each goes at this pace. How many experts see
    tokens enough for second moments nobody knows before: see `_chance`.
    """
    parts = [_Part.of(config, t, engine, tokens) for t in tensors if t.spec.is_matrix and t.spec.layer is not None]
    experts = [part for part in parts if part.spec.expert is not None]
    others = [part for part in parts if part.spec.expert is None]
    outside = [_Part(t.spec, t.scheme, 0.0, 0.0, 0.0) for t in tensors if t.spec.is_matrix and t.spec.layer is None]
    alone = _passes(parts, engine, tokens, length, pace) + _statistics(others, engine, tokens, pace)
    alone += sum(part.coding(pace, engine) for part in outside)
    feedback = sum(part.fitted * part.spec.size * part.spec.columns for part in parts)
    feedback *= (3 if engine.exact_stream else 1) * (1 + engine.passes) / 2
    shared = _statistics(experts, engine, tokens, pace) + feedback / pace.exact_products
    shared += sum(part.coding(pace, engine) for part in parts)
    return alone + shared / workers


def _passes(parts: Sequence[_Part], engine: Engine, tokens: int, length: int, pace: Pace) -> float:
    """Return the time of forward passes: products, attention, and what is done to every number besides."""
    run = sum(part.sent * part.spec.size for part in parts)
    products = tokens * run * (2.3 if engine.exact_stream else 1)
    mixed = sum(part.spec.columns for part in parts if part.spec.kind == "attn_output")
    passed = _PASSED * sum(part.sent * (part.spec.rows + part.spec.columns) for part in parts)
    walks = tokens * (1 + engine.exact_stream)
    return (products + walks * _ATTENDED * length * mixed) / pace.products + walks * passed / pace.normalized


def _statistics(parts: Sequence[_Part], engine: Engine, tokens: int, pace: Pace) -> float:
    """Return the time of second moments, and of their factors."""
    first = [part for part in parts if part.spec.kind in _FIRST]  # one of each group that reads the same
    moments = sum(part.fitted * part.seen * part.spec.columns**2 for part in first)
    cubes = sum(part.fitted * part.spec.columns**3 for part in first)
    # K³/6 multiply-adds of a factorisation, at half the pace of a product.
    return tokens * moments * (1.3 if engine.exact_stream else 0.6) / pace.products + cubes / 3 / pace.exact_products


@dataclass(frozen=True, slots=True)
class _Part:
    """A matrix: the shares of all tokens `sent` through it and `seen` for its statistics, and the chance that it is `fitted`."""

    spec: TensorSpec
    scheme: Scheme
    sent: float
    seen: float
    fitted: float

    @classmethod
    def of(cls, config: ModelConfig, tensor: PlannedTensor, engine: Engine, tokens: int) -> _Part:
        spec, experts = tensor.spec, config.experts
        if tensor.scheme.facts.family == "float" or spec.kind in _PLAIN:
            return cls(spec, tensor.scheme, 1.0, 0.0, 0.0)
        if spec.expert is None or experts is None:
            return cls(spec, tensor.scheme, 1.0, 1.0, 1.0)
        sent = experts.used / experts.count
        if engine.experts == "all":
            return cls(spec, tensor.scheme, sent, 1.0, 1.0)
        if engine.experts == "hybrid" and tokens >= engine.few:
            return cls(spec, tensor.scheme, sent, max(sent, engine.few / tokens), 1.0)
        return cls(spec, tensor.scheme, sent, sent, _chance(sent * tokens, engine.few))

    def coding(self, pace: Pace, engine: Engine) -> float:
        """Return the seconds of all that is done to the weights but products: read, coded, stored, read again for the forward pass."""
        # The float model that runs beside is blocks alone.
        grid, read = pace.of(self.scheme), (1 + (engine.exact_stream and self.spec.layer is not None)) / pace.read
        coding = self.fitted * (1 / grid.coded + engine.passes / grid.refined) + (1 - self.fitted) / grid.rounded
        hashed = _HASHED * self.scheme.row_bytes(self.spec.columns) / self.spec.columns / pace.hashed
        # An expert's first two matrices are made of what is stored for the third one's inputs, and again for the block's results.
        restored = 1 if self.spec.expert is None or self.spec.kind.startswith("ffn_down") else 2
        return self.spec.size * (read + coding + 1 / grid.stored + restored / grid.restored + hashed)


def _chance(mean: float, few: int) -> float:
    """Return the share of experts that see at least `few` tokens where they see `mean` on average.

    Loads are taken as log-normal with a spread of e^±0.5, as routers that were trained for balance have them within a factor of two.
    """
    if not mean:
        return 0.0
    return 0.5 * (1 + math.erf(math.log(mean / max(few, 1)) / (_SPREAD * math.sqrt(2))))


def _rate(call: Callable[[], object], work: int) -> float:
    """Return work a second, from as many calls as fit into the time, after one that does not count."""
    call()
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < _SECONDS:
        call()
        count += 1
    return count * work / (time.perf_counter() - began)
