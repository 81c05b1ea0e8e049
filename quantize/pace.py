"""How fast this machine multiplies and codes: a probe of a few seconds, and the time of a calibrated run from counted work."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from r1q.calibration.moments import add_second_moment
from r1q.core.recipe import PlannedTensor
from r1q.core.scheme import Scheme
from r1q.models.config import ModelConfig
from r1q.quantize.calibrated import computing
from r1q.quantize.engine import Engine
from r1q.quantize.gptq import gptq
from r1q.quantize.gptq.factor import factorize
from r1q.quantize.refine import refine

_SIDE, _TOKENS, _ROWS = 1024, 2048, 512
_SECONDS = 1.0
# The first of every group of layers that read the same.
_FIRST = (
    *("attn_q", "attn_q_a", "attn_q_b", "attn_v_b", "attn_output", "ffn_gate", "ffn_down"),
    *("ffn_gate_shexp", "ffn_down_shexp", "ffn_gate_exps", "ffn_down_exps"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Multiply-adds a second in the engine's dtype and in float32, weights coded a second, weights refined a second and pass."""

    products: float
    exact_products: float
    coded: float
    refined: float


def probe(engine: Engine, scheme: Scheme) -> Pace:
    """Measure for about five seconds, after kernels are compiled."""
    random = np.random.default_rng(0)
    with computing(engine):
        inputs = torch.from_numpy(random.standard_normal((_TOKENS, _SIDE), dtype=np.float32))
        weights = random.standard_normal((_ROWS, _SIDE), dtype=np.float32)
        narrow, wide = inputs.to(getattr(torch, engine.compute)), torch.from_numpy(weights)
        matrix = wide.to(narrow.dtype)
        moment = torch.zeros(_SIDE, _SIDE)
        add_second_moment(moment, inputs, torch.float32)
        factor = factorize(moment, keep=True)
        if factor is None:
            raise ValueError("second moments of noise are positive definite")
        coded = gptq(weights, factor, scheme, threads=engine.threads)
        work = _TOKENS * _ROWS * _SIDE
        return Pace(
            products=_rate(lambda: narrow @ matrix.T, work),
            exact_products=_rate(lambda: inputs @ wide.T, work),
            coded=_rate(lambda: gptq(weights, factor, scheme, threads=engine.threads), weights.size),
            refined=_rate(lambda: refine(coded, weights, factor, passes=1, threads=engine.threads), weights.size),
        )


def seconds(config: ModelConfig, tensors: Sequence[PlannedTensor], engine: Engine, tokens: int, pace: Pace) -> float:
    """Return the time of a calibrated run: products of the forward passes and statistics, factors, coding, refining."""
    matrices = [t.spec for t in tensors if t.spec.is_matrix and t.spec.layer is not None]
    weights = sum(spec.size for spec in matrices)
    sent = 1.0 if config.experts is None else config.experts.used / config.experts.count
    share = {True: sent, False: 1.0}  # of the tokens, by whether a matrix is an expert's
    first = [spec for spec in matrices if spec.kind in _FIRST]  # one of each group that reads the same
    moments = sum(share[spec.expert is not None] * spec.columns**2 for spec in first)
    cubes = sum(spec.columns**3 for spec in first)
    read = sum(share[spec.expert is not None] * spec.size for spec in matrices)
    feedback = sum(spec.size * spec.columns for spec in matrices)
    forward = tokens * (read + 0.6 * moments)
    if engine.exact_stream:
        forward += tokens * (1.3 * read + 0.7 * moments)
        feedback += 2 * feedback
    products = forward / pace.products + (cubes / 6 + feedback / 2 * (1 + engine.passes)) / pace.exact_products
    return products + weights / pace.coded + engine.passes * weights / pace.refined


def _rate(call: Callable[[], object], work: int) -> float:
    """Return work a second, from as many calls as fit into the time, after one that does not count."""
    call()
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < _SECONDS:
        call()
        count += 1
    return count * work / (time.perf_counter() - began)
