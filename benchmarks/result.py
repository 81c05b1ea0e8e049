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

from r1q.benchmarks.machine import Machine
from r1q.core.errors import InputError
from r1q.core.metrics import Estimate, Fidelity, TokenScores, sample_deviation, summarize

SCHEMA = 1
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """One timing, repeated: `seconds` for `tokens` tokens each time; `warm_up` was timed too and counts for nothing."""

    tokens: int
    seconds: tuple[float, ...]
    warm_up: tuple[float, ...] = ()

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """`load_seconds`: the runtime's own time to open the file, once, in a fresh process. `first_token`: a prompt in an empty memory.

    Memory in bytes, of the process that measured: `base_memory` before the file was opened, `peak_memory` the most it ever had.
    """

    load_seconds: float
    context: int
    first_token: Samples
    prefill: Samples
    decode: Samples
    base_memory: int
    peak_memory: int


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

    def fidelity(self) -> Fidelity:
        """Return perplexity, divergence and agreement with their standard errors."""
        return summarize(
            TokenScores(
                nll=np.asarray(self.nll, dtype=np.float64),
                kld=None if self.kld is None else np.asarray(self.kld, dtype=np.float64),
                same_top=None if self.same_top is None else np.asarray(self.same_top, dtype=np.bool_),
            )
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
    """One artifact, measured. `speed` and `quality` are None where nothing came of them, and `failures` says why."""

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
    failures: tuple[Failure, ...] = ()
    notes: tuple[str, ...] = ()
    schema: int = SCHEMA

    @property
    def exit_code(self) -> int:
        """0, or that of the worst failure."""
        return max((failure.exit_code for failure in self.failures), default=0)

    def summary(self) -> dict[str, Any]:
        """Return the numbers a table shows: rates in tokens/s, times in seconds, memory in bytes, top-1 as a fraction."""
        found: dict[str, Any] = {}
        if self.speed is not None:
            found |= {
                "load_seconds": self.speed.load_seconds,
                "first_token_seconds": _plain(self.speed.first_token.duration),
                "prefill_tokens_per_second": _plain(self.speed.prefill.rate),
                "decode_tokens_per_second": _plain(self.speed.decode.rate),
                "peak_memory": self.speed.peak_memory,
            }
        if self.quality is not None:
            fidelity = self.quality.fidelity()
            found |= {
                "scored_tokens": fidelity.tokens,
                "perplexity": _plain(fidelity.perplexity),
                "reference_perplexity": _plain(self.quality.reference_perplexity()),
                "mean_kld": _plain(fidelity.kld),
                "median_kld": fidelity.kld_median,
                "max_kld": fidelity.kld_max,
                "top1_agreement": _plain(fidelity.top1),
            }
        return found

    def to_json(self) -> str:
        """Return one line of JSON with every raw sample, and the `summary`."""
        return json.dumps({**dataclasses.asdict(self), "summary": self.summary()}, ensure_ascii=False, allow_nan=False)

    @staticmethod
    def from_json(line: str) -> BenchResult:
        """Return the result that `to_json` wrote. Raises InputError for a line that is not one."""
        try:
            data = json.loads(line)
            if data["schema"] != SCHEMA:
                raise InputError(f"a bench result of schema {data['schema']}: this r1q reads schema {SCHEMA}")
            return _build(BenchResult, data)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"not a line of r1q bench --json: {error}") from error


def _plain(estimate: Estimate | None) -> dict[str, float | None] | None:
    return None if estimate is None else dataclasses.asdict(estimate)


def _build(kind: type[T], data: Mapping[str, Any]) -> T:
    """Return the dataclass `kind` from plain JSON values; keys that it does not have are left aside."""
    hints = typing.get_type_hints(kind)
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    return kind(**{field.name: _value(hints[field.name], data[field.name]) for field in fields})


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
