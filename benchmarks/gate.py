"""Gate: two results of one kind compared, number by number with a confidence interval; and limits that a change may not pass.

A limit is passed only where the change is beyond it *and* its 95 % interval excludes no change at all: a machine that trembles fails
no build. Speeds are compared by Welch's interval over their repetitions (unequal variances, Student's t); scores of the same tokens
are paired, token by token; what is counted and not sampled (bytes) has no interval, and every change is real.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from r1q.benchmarks.result import BenchResult
from r1q.core.errors import UsageError, unknown_name

Doubles = NDArray[np.float64]
Kind = Literal["speed", "scores", "count"]
Sample = Callable[[BenchResult], Sequence[float] | None]

# Student's t at 0.975 for 1, 2, … degrees of freedom; beyond the table the normal deviate.
T975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
Z975 = 1.960


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One number that can be compared: how its samples are found, of which `kind`; `speed` depends on the machine."""

    about: str
    kind: Kind
    samples: Sample


def _rates(name: str) -> Sample:
    def samples(result: BenchResult) -> Sequence[float] | None:
        if result.speed is None:
            return None
        timing = getattr(result.speed, name)
        return [timing.tokens / seconds for seconds in timing.seconds]

    return samples


def _score(name: str) -> Sample:
    return lambda result: None if result.quality is None else getattr(result.quality, name)


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "decode": Metric(about="tokens/s of decoding", kind="speed", samples=_rates("decode")),
        "prefill": Metric(about="tokens/s of prefill", kind="speed", samples=_rates("prefill")),
        "ttft": Metric(
            about="seconds to the first token",
            kind="speed",
            samples=lambda result: None if result.speed is None else result.speed.first_token.seconds,
        ),
        "memory": Metric(
            about="bytes of peak RSS",
            kind="count",
            samples=lambda result: None if result.speed is None else (result.speed.peak_memory,),
        ),
        "bytes": Metric(about="bytes of the artifact", kind="count", samples=lambda result: (result.bytes,)),
        "kld": Metric(about="mean KL divergence", kind="scores", samples=_score("kld")),
        "nll": Metric(about="mean −ln p(token), the logarithm of perplexity", kind="scores", samples=_score("nll")),
        "top1": Metric(about="top-1 agreement", kind="scores", samples=_score("same_top")),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """A change of `metric` that is too much: below −5 % for `percent` −5, above +20 % for 20."""

    metric: str
    percent: float

    def __str__(self) -> str:
        return f"{self.metric}={self.percent:+g}%"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """`metric` was `before` and is `after`; `low` and `high` bound the relative change with 95 %, None where samples cannot tell."""

    metric: str
    before: float
    after: float
    low: float | None
    high: float | None

    @property
    def relative(self) -> float:
        """The change as a fraction of what it was; infinite where that was 0 and is not any more."""
        if self.before == self.after:
            return 0.0
        return (self.after - self.before) / abs(self.before) if self.before else math.inf

    @property
    def real(self) -> bool:
        """Whether the interval excludes no change."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    def passes(self, limit: Limit) -> bool:
        """Whether the change is beyond `limit` and real."""
        share = limit.percent / 100
        return self.real and (self.relative < share if share < 0 else self.relative > share)


def parse_limits(text: str) -> list[Limit]:
    """Return the limits of `decode=-5%,kld=+20%`. Raises UsageError for an unknown metric or a number without sign."""
    limits = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        found = re.fullmatch(r"(\w+)\s*=\s*([+-]\d+(?:\.\d+)?)\s*%", part)
        if found is None:
            raise UsageError(f"{part!r} is no limit: write it like decode=-5% or kld=+20%, with a sign")
        if found[1] not in METRICS:
            raise UsageError(unknown_name("metric", found[1], METRICS))
        limits.append(Limit(metric=found[1], percent=float(found[2])))
    if not limits:
        raise UsageError("--fail-on names no limit: write it like decode=-5%,kld=+20%")
    return limits


def pairs(before: Sequence[BenchResult], after: Sequence[BenchResult]) -> list[tuple[BenchResult, BenchResult]]:
    """Return the rows of both that are of the same model, format, grid, runtime and target, in the order of `after`."""
    known = {_key(result): result for result in before}
    return [(known[_key(result)], result) for result in after if _key(result) in known]


def compare(before: BenchResult, after: BenchResult) -> list[Change]:
    """Return the change of every metric that both have."""
    found = (_change(name, metric, before, after) for name, metric in METRICS.items())
    return [change for change in found if change is not None]


def same_machine(before: BenchResult, after: BenchResult) -> bool:
    """Whether speeds of the two can be compared: the same processor with as many threads."""
    return (before.machine.cpu, before.threads, before.device) == (after.machine.cpu, after.threads, after.device)


def _key(result: BenchResult) -> tuple[str, ...]:
    return (result.name, result.format, result.grid, result.runtime, result.target)


def _change(name: str, metric: Metric, before: BenchResult, after: BenchResult) -> Change | None:
    samples = [metric.samples(result) for result in (before, after)]
    if samples[0] is None or samples[1] is None or not len(samples[0]) or not len(samples[1]):
        return None
    old, new = (np.asarray(values, dtype=np.float64) for values in samples)
    if metric.kind == "count":
        error: float | None = 0.0
    elif metric.kind == "scores" and _same_tokens(before, after):
        error = _paired(old, new)
    else:
        error = _welch(old, new)
    difference, scale = float(new.mean() - old.mean()), abs(float(old.mean()))
    low, high = _bounds(difference, error, scale)
    return Change(metric=name, before=float(old.mean()), after=float(new.mean()), low=low, high=high)


def _bounds(difference: float, error: float | None, scale: float) -> tuple[float | None, float | None]:
    """Return the interval of the relative change; from 0 every real change is infinite."""
    if error is None:
        return None, None
    ends = (difference - error, difference + error)
    if scale:
        return ends[0] / scale, ends[1] / scale
    low, high = (math.copysign(math.inf, end) if end else 0.0 for end in ends)
    return low, high


def _same_tokens(before: BenchResult, after: BenchResult) -> bool:
    one, two = before.quality, after.quality
    if one is None or two is None:
        return False
    return (one.text_sha256, one.windows, one.length, len(one.nll)) == (
        two.text_sha256,
        two.windows,
        two.length,
        len(two.nll),
    )


def _paired(old: Doubles, new: Doubles) -> float | None:
    """Return half the width of the 95 % interval of the mean difference of pairs."""
    count = len(old)
    return None if count < 2 else _t(count - 1) * float((new - old).std(ddof=1)) / math.sqrt(count)


def _welch(old: Doubles, new: Doubles) -> float | None:
    """Return half the width of the 95 % interval of the difference of two means (Welch 1947)."""
    if len(old) < 2 or len(new) < 2:
        return None
    one, two = (float(values.var(ddof=1)) / len(values) for values in (old, new))
    if one + two == 0:
        return 0.0
    freedom = (one + two) ** 2 / (one**2 / (len(old) - 1) + two**2 / (len(new) - 1))
    return _t(freedom) * math.sqrt(one + two)


def _t(freedom: float) -> float:
    """Return Student's t at 0.975; of a fraction of a degree of freedom, that of the whole one below, which is larger."""
    index = int(freedom) - 1
    return T975[max(0, index)] if index < len(T975) else Z975 if freedom > 200 else T975[-1]
