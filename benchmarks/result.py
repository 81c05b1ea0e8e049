"""BenchResult: everything measured of one artifact, with every raw sample, the machine, the versions and the command. One JSON line.

What can be computed from samples (means, deviations, perplexity) is computed from them when asked; the JSON repeats it under `summary`
for readers that only want the numbers.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, get_args, get_origin

import numpy as np

from r1q.benchmarks.bandwidth import Bandwidth
from r1q.benchmarks.machine import Machine
from r1q.benchmarks.profiles import Prediction
from r1q.benchmarks.reasoning import Reasoning
from r1q.benchmarks.traffic import Traffic, utilization
from r1q.core.errors import InputError
from r1q.core.metrics import Estimate, Fidelity, TokenScores, sample_deviation, summarize

SCHEMA = 2
READ = (1, 2)  # what schema 1 lacks has a default
NOISY = 0.05  # of the mean: samples that deviate more say so
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """One timing, repeated: `seconds` for `tokens` tokens each time; `warm_up` was timed too and counts for nothing.

    Of decoding besides: `depth` tokens in memory when it began, `latencies` the seconds of every token of each repetition, and
    `joules` of each repetition where the processor counts them.
    """

    tokens: int
    seconds: tuple[float, ...]
    warm_up: tuple[float, ...] = ()
    depth: int = 0
    latencies: tuple[tuple[float, ...], ...] = ()
    joules: tuple[float, ...] = ()

    @property
    def rate(self) -> Estimate | None:
        """Tokens/s: the mean of the repetitions' rates, and their SAMPLE DEVIATION as error, as llama-bench. None without samples."""
        if not self.seconds:
            return None
        rates = [self.tokens / seconds for seconds in self.seconds]
        return Estimate(value=float(np.mean(rates)), error=sample_deviation(rates))

    @property
    def duration(self) -> Estimate | None:
        """Seconds: mean and sample deviation. None without samples."""
        if not self.seconds:
            return None
        return Estimate(value=float(np.mean(self.seconds)), error=sample_deviation(self.seconds))

    @property
    def variation(self) -> float | None:
        """Return the rates' sample deviation over their mean; None with fewer than two."""
        rate = self.rate
        return None if rate is None or rate.error is None else rate.error / rate.value

    @property
    def noisy(self) -> bool:
        """Whether the rates vary by more than 5 %."""
        return (self.variation or 0) > NOISY

    def latency(self, share: float) -> float | None:
        """Return the seconds within which `share` of all tokens came after the one before; None where that was not recorded."""
        every = [value for repetition in self.latencies for value in repetition]
        return float(np.quantile(every, share)) if every else None

    @property
    def joules_per_token(self) -> Estimate | None:
        """Energy of the whole processor for one token, mean and sample deviation; None where it was not measured."""
        if not self.joules:
            return None
        each = [value / self.tokens for value in self.joules]
        return Estimate(value=float(np.mean(each)), error=sample_deviation(each))


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """`load_seconds`: the runtime's own time to open the file, once, in a fresh process; `warm_load_seconds` again at the end.

    `cold` is None where nobody tried, else why the first load was not from the disk, empty where it was. `first_token`: a prompt in an
    empty memory; `decode` at the least depth, `deeper` at the others. Memory in bytes, of the process that measured: `base_memory`
    before the file was opened, `peak_memory` the most it ever had, `gpu_memory` the most in use on GPUs above what was before.
    """

    load_seconds: float
    context: int
    first_token: Samples
    prefill: Samples
    decode: Samples
    base_memory: int
    peak_memory: int
    warm_load_seconds: float | None = None
    cold: str | None = None
    deeper: tuple[Samples, ...] = ()
    gpu_memory: int | None = None

    @property
    def decodes(self) -> tuple[Samples, ...]:
        """Decoding at every depth, in order."""
        return (self.decode, *self.deeper)

    @property
    def noisy(self) -> tuple[str, ...]:
        """Which timings vary by more than 5 %: `first_token`, `prefill`, `decode`, `decode@512`, …"""
        timings = {"first_token": self.first_token, "prefill": self.prefill} | {
            f"decode@{one.depth}" if one.depth else "decode": one for one in self.decodes
        }
        return tuple(name for name, samples in timings.items() if samples.noisy)


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """The noise floor: the float model against itself with its hidden states rounded to bfloat16 after every block."""

    kld: Estimate
    kld_median: float
    kld_p99: float
    top1: Estimate
    perplexity_ratio: Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """Scores of every token from position `first` + 1 on in each of `windows` windows of `length` tokens.

    `kld`, `same_top` and `reference_nll` are None where there was no reference. `text` is the file's name, `text_sha256` its content.
    """

    text: str
    text_sha256: str
    windows: int
    length: int
    first: int
    nll: tuple[float, ...]
    kld: tuple[float, ...] | None = None
    same_top: tuple[bool, ...] | None = None
    reference: str | None = None
    reference_nll: tuple[float, ...] | None = None
    floor: Floor | None = None

    def fidelity(self) -> Fidelity:
        """Return perplexity, divergence and agreement with their standard errors."""
        return summarize(
            TokenScores(
                nll=np.asarray(self.nll, dtype=np.float64),
                kld=None if self.kld is None else np.asarray(self.kld, dtype=np.float64),
                same_top=None if self.same_top is None else np.asarray(self.same_top, dtype=np.bool_),
            ),
            None if self.reference_nll is None else np.asarray(self.reference_nll, dtype=np.float64),
        )

    def reference_perplexity(self) -> Estimate | None:
        """Return the reference's own perplexity on the same tokens."""
        if self.reference_nll is None:
            return None
        return summarize(TokenScores(nll=np.asarray(self.reference_nll, dtype=np.float64))).perplexity


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A measurement that ended early: which, the exit code its error stands for, and why."""

    stage: str
    exit_code: int
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchResult:
    """One artifact in one runtime, measured. `speed`, `quality` and `reasoning` are None where nothing came of them; see `failures`.

    `traffic` and `bandwidth` (bytes/s) tell how much of the memory's bandwidth decoding used; `compute_bytes` a weight where the
    runtime keeps floats whatever the file has. `emulated` says on what, `ceiling` how `memory_ceiling` bytes were held to.
    """

    artifact: str
    name: str
    format: str
    grid: str
    bytes: int
    weights: int
    bits_per_weight: float
    target: str
    runtime: str
    device: str
    threads: int
    machine: Machine
    versions: Mapping[str, str]
    command: tuple[str, ...]
    time: str
    speed: Speed | None = None
    quality: Quality | None = None
    reasoning: Reasoning | None = None
    failures: tuple[Failure, ...] = ()
    notes: tuple[str, ...] = ()
    context: int | None = None
    traffic: Traffic | None = None
    compute_bytes: int | None = None
    cache: str = "f16"
    bandwidth: Bandwidth | None = None
    emulated: str | None = None
    memory_ceiling: int | None = None
    ceiling: str | None = None
    gpu_layers: int = 0
    predictions: tuple[Prediction, ...] = ()
    schema: int = SCHEMA

    @property
    def exit_code(self) -> int:
        """0, or that of the worst failure."""
        return max((failure.exit_code for failure in self.failures), default=0)

    def bandwidth_use(self, decode: Samples | None = None) -> float | None:
        """Return the share of the measured memory bandwidth that decoding used (MBU), None where one of its parts is not known.

        `decode` is one of `speed.decodes`, by default the first. Above 1, caches served what memory did not have to.
        """
        decode = decode or (None if self.speed is None else self.speed.decode)
        rate = None if decode is None else decode.rate
        if decode is None or rate is None or self.traffic is None or self.bandwidth is None:
            return None
        middle = decode.depth + decode.tokens / 2
        touched = self.traffic.token_bytes(middle, cache=self.cache, compute_bytes=self.compute_bytes)
        return utilization(touched, rate.value, self.bandwidth.best)

    def summary(self) -> dict[str, Any]:
        """Return the numbers a table shows: rates in tokens/s, times in seconds, memory in bytes, top-1 as a fraction."""
        speed = {} if self.speed is None else self._speed_summary(self.speed)
        quality = {} if self.quality is None else _quality_summary(self.quality)
        return speed | quality | ({} if self.reasoning is None else {"reasoning": self.reasoning.summary()})

    def _speed_summary(self, speed: Speed) -> dict[str, Any]:
        return {
            "load_seconds": speed.load_seconds,
            "warm_load_seconds": speed.warm_load_seconds,
            "first_token_seconds": _plain(speed.first_token.duration),
            "prompt_tokens_per_second": _plain(speed.first_token.rate),
            "prefill_tokens_per_second": _plain(speed.prefill.rate),
            "decode_tokens_per_second": _plain(speed.decode.rate),
            "decode": [
                {
                    "depth": one.depth,
                    "tokens_per_second": _plain(one.rate),
                    **{f"latency_p{share}_seconds": one.latency(share / 100) for share in (50, 90, 99)},
                    "joules_per_token": _plain(one.joules_per_token),
                    "bandwidth_use": self.bandwidth_use(one),
                }
                for one in speed.decodes
            ],
            "peak_memory": speed.peak_memory,
            "noisy": list(speed.noisy),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return every field as JSON can hold it, and the `summary`."""
        return {**dataclasses.asdict(self), "summary": self.summary()}

    def to_json(self) -> str:
        """Return one line of JSON with every raw sample, and the `summary`."""
        return json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False)

    @staticmethod
    def from_json(line: str) -> BenchResult:
        """Return the result that `to_json` wrote. Raises InputError for a line that is not one."""
        try:
            data = json.loads(line)
            if data["schema"] not in READ:
                raise InputError(f"a bench result of schema {data['schema']}: this r1q reads schemas {READ}")
            return _build(BenchResult, {**data, "schema": SCHEMA})
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"not a line of r1q bench --json: {error}") from error


def _quality_summary(quality: Quality) -> dict[str, Any]:
    fidelity = quality.fidelity()
    return {
        "scored_tokens": fidelity.tokens,
        "perplexity": _plain(fidelity.perplexity),
        "reference_perplexity": _plain(quality.reference_perplexity()),
        "perplexity_ratio": _plain(fidelity.perplexity_ratio),
        "mean_kld": _plain(fidelity.kld),
        "median_kld": fidelity.kld_median,
        "p90_kld": _plain(fidelity.kld_p90),
        "p99_kld": _plain(fidelity.kld_p99),
        "max_kld": fidelity.kld_max,
        "top1_agreement": _plain(fidelity.top1),
        "rms_delta_p": _plain(fidelity.rms_delta),
        "noise_floor": None if quality.floor is None else dataclasses.asdict(quality.floor),
    }


def _plain(estimate: Estimate | None) -> dict[str, float | None] | None:
    return None if estimate is None else dataclasses.asdict(estimate)


def _build(kind: type[T], data: Mapping[str, Any]) -> T:
    """Return the dataclass `kind` from plain JSON values; keys it does not have are left aside, absent ones take their default."""
    hints = typing.get_type_hints(kind)
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    given = [field.name for field in fields if field.name in data or field.default is dataclasses.MISSING]
    return kind(**{name: _value(hints[name], data[name]) for name in given})


def _value(hint: Any, value: Any) -> Any:
    if get_origin(hint) is types.UnionType:
        options = [option for option in get_args(hint) if option is not types.NoneType]
        return None if value is None else _value(options[0], value)
    if get_origin(hint) is tuple:
        item = get_args(hint)[0]
        return tuple(_value(item, entry) for entry in value)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _build(hint, value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and not isinstance(value, hint):
        raise TypeError(f"{value!r} is not {hint.__name__}")
    return value
