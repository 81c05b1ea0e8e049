"""Metrics: how far one model's predictions are from the text and from another model's. Pure numpy, sums in float64.

The quantities are those of llama-perplexity (llama.cpp, tools/perplexity): perplexity, the Kullback–Leibler divergence of a model from
a reference, and how often both would choose the same next token. Standard errors take tokens as independent, as it does; tokens of
one text are not quite, so the true errors are somewhat larger.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from r1q.core.errors import InputError

Doubles = NDArray[np.float64]
Logits = NDArray[np.float32]

ROWS = 32  # rows of logits in float64 at a time: 40 MB for a vocabulary of 150,000


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenScores:
    """What every scored token says, raw. Shapes: `nll` [n]; `kld` and `same_top` [n], or None where there was no reference.

    `nll` is −ln p(token); `kld` is Σ p_ref·(ln p_ref − ln p) over the vocabulary, in nats; `same_top` says whether both put the same
    token first.
    """

    nll: Doubles
    kld: Doubles | None = None
    same_top: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        if (self.kld is None) != (self.same_top is None):
            raise ValueError("kld and same_top come together")
        if self.kld is not None and not self.nll.shape == self.kld.shape == self.same_top.shape:  # type: ignore[union-attr]
            raise ValueError("nll, kld and same_top have one entry for each token")


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean and its standard error; the error is None where one sample cannot tell it."""

    value: float
    error: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """The summary of scores. `perplexity` is exp of the mean nll; `top1` a fraction of 1 with its binomial error.

    `perplexity_ratio` is to the reference's, `rms_delta` the root mean square of p(token) − p_ref(token); both need its nll.
    """

    tokens: int
    perplexity: Estimate
    kld: Estimate | None = None
    kld_median: float | None = None
    kld_p90: Estimate | None = None
    kld_p99: Estimate | None = None
    kld_max: float | None = None
    top1: Estimate | None = None
    perplexity_ratio: Estimate | None = None
    rms_delta: Estimate | None = None


def log_softmax(logits: Logits | Doubles) -> Doubles:
    """Return ln softmax over the last axis, [n, vocab] → [n, vocab]. The largest logit is taken out first: exp cannot overflow."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return wide


def score(logits: Logits, targets: NDArray[np.integer], reference: Logits | None = None) -> TokenScores:
    """Score predictions [n, vocab] against the tokens [n] that came next, and against a reference's predictions [n, vocab].

    Raises InputError where a logit is not finite, ValueError where shapes disagree.
    """
    count = len(targets)
    if logits.ndim != 2 or len(logits) != count or (reference is not None and reference.shape != logits.shape):
        shapes = [logits.shape, targets.shape, None if reference is None else reference.shape]
        raise ValueError(f"logits, targets and reference do not belong together: {shapes}")
    nll = np.empty(count)
    kld = np.empty(count)
    same = np.empty(count, dtype=np.bool_)
    for start in range(0, count, ROWS):
        part = slice(start, start + ROWS)
        own = log_softmax(_finite(logits[part], start, "the model"))
        nll[part] = -np.take_along_axis(own, np.asarray(targets[part])[:, None].astype(np.intp), axis=1)[:, 0]
        if reference is not None:
            truth = log_softmax(_finite(reference[part], start, "the reference"))
            kld[part] = (np.exp(truth) * (truth - own)).sum(axis=1)
            same[part] = reference[part].argmax(axis=1) == logits[part].argmax(axis=1)
    return TokenScores(nll=nll) if reference is None else TokenScores(nll=nll, kld=kld, same_top=same)


def merge(parts: Iterable[TokenScores]) -> TokenScores:
    """Return the scores of several windows as one; all of them or none have a reference. Raises ValueError for none at all."""
    parts = list(parts)
    if not parts:
        raise ValueError("there are no scores to merge")
    nll = np.concatenate([part.nll for part in parts])
    klds = [part.kld for part in parts if part.kld is not None]
    tops = [part.same_top for part in parts if part.same_top is not None]
    if len(klds) not in (0, len(parts)):
        raise ValueError("some scores have a reference and some do not")
    return (
        TokenScores(nll=nll, kld=np.concatenate(klds), same_top=np.concatenate(tops)) if klds else TokenScores(nll=nll)
    )


def summarize(scores: TokenScores, reference_nll: Doubles | None = None) -> Fidelity:
    """Return perplexity, divergence and agreement of `scores` with their standard errors.

    `reference_nll` [n] is the reference's own −ln p(token) of the same tokens; ValueError where they are not as many.
    """
    nll = mean(scores.nll)
    value = math.exp(nll.value)
    # The error of exp(x) to first order: exp(x)·error(x), as llama-perplexity gives it.
    perplexity = Estimate(value=value, error=None if nll.error is None else value * nll.error)
    ratio = None if reference_nll is None else perplexity_ratio(scores.nll, reference_nll)
    delta = None if reference_nll is None else rms_delta(scores.nll, reference_nll)
    bare = Fidelity(tokens=len(scores.nll), perplexity=perplexity, perplexity_ratio=ratio, rms_delta=delta)
    if scores.kld is None or scores.same_top is None:
        return bare
    return replace(
        bare,
        kld=mean(scores.kld),
        kld_median=float(np.median(scores.kld)),
        kld_p90=quantile(scores.kld, 0.90),
        kld_p99=quantile(scores.kld, 0.99),
        kld_max=float(scores.kld.max()),
        top1=mean(scores.same_top.astype(np.float64)),
    )


def perplexity_ratio(nll: Doubles, reference_nll: Doubles) -> Estimate:
    """Return exp(mean(nll − reference_nll)) and its standard error, exp(·)·error(·), of the differences token by token.

    Paired: where both find the same tokens hard, the ratio is known much better than either perplexity.
    """
    _require_pairs(nll, reference_nll)
    difference = mean(nll - reference_nll)
    value = math.exp(difference.value)
    return Estimate(value=value, error=None if difference.error is None else value * difference.error)


def rms_delta(nll: Doubles, reference_nll: Doubles) -> Estimate:
    """Return √mean(Δp²), Δp = p(token) − p_ref(token) = e^−nll − e^−reference_nll, and its error, error(mean Δp²)/(2·rms)."""
    _require_pairs(nll, reference_nll)
    squares = mean((np.exp(-nll) - np.exp(-reference_nll)) ** 2)
    value = math.sqrt(squares.value)
    # To first order, as llama-perplexity gives it; at zero there is no first order, and no spread either.
    return Estimate(value=value, error=None if squares.error is None else squares.error / (2 * value) if value else 0.0)


def quantile(samples: Doubles, share: float) -> Estimate:
    """Return the quantile of `samples` [n ≥ 1] below which `share` of them lie, interpolated, and its standard error.

    The error is half the distance between the order statistics one binomial deviation, √(n·share·(1−share)), below and above;
    None where they lie outside the samples.
    """
    if len(samples) == 0:
        raise ValueError("no samples")
    ordered = np.sort(samples)
    place, spread = share * (len(ordered) - 1), math.sqrt(len(ordered) * share * (1 - share))
    low, high = round(place - spread), round(place + spread)
    inside = low >= 0 and high < len(ordered) and low < high
    error = float(ordered[high] - ordered[low]) / 2 if inside else None
    return Estimate(value=float(np.quantile(ordered, share)), error=error)


def mean(samples: Doubles) -> Estimate:
    """Return the mean of `samples` [n ≥ 1] and its standard error, √(Σ(x−mean)²/(n·(n−1))).

    For a series of 0 and 1 with mean p that is the binomial √(p(1−p)/(n−1)).
    """
    if len(samples) == 0:
        raise ValueError("no samples")
    value = float(samples.mean())
    if len(samples) == 1:
        return Estimate(value=value, error=None)
    return Estimate(value=value, error=float(samples.std(ddof=1) / math.sqrt(len(samples))))


def sample_deviation(samples: Iterable[float]) -> float | None:
    """Return the sample standard deviation, √(Σ(x−mean)²/(n−1)), None for fewer than two samples. llama-bench's ±."""
    values = np.asarray(list(samples), dtype=np.float64)
    return float(values.std(ddof=1)) if len(values) > 1 else None


def _require_pairs(one: Doubles, other: Doubles) -> None:
    if one.shape != other.shape:
        raise ValueError(
            f"{one.shape} scores of the model and {other.shape} of the reference are not of the same tokens"
        )


def _finite(rows: Logits, start: int, who: str) -> Logits:
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(bad):
        raise InputError(
            f"{who} gives a logit that is not a number at scored position {start + int(bad[0])}: its weights or scales are damaged"
        )
    return rows
