"""Speed, in the child: load, time to first token, prefill and decode at several depths, after the manner of llama-bench.

Random tokens; one warm-up apart; all timings take turns, so that a machine that slows down slows all of them. Tokenizing and sampling
are not timed: decode feeds tokens that were drawn before, and every token has its own time. The first load is from the disk where the
system can be asked to forget the file, the last from memory.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from r1q.benchmarks.cold import forget
from r1q.benchmarks.energy import Counters, find_counters
from r1q.benchmarks.machine import resident, versions
from r1q.core.errors import InputError
from r1q.runtimes.base import Floats, Options, Runtime, Session
from r1q.runtimes.table import load_runtime

Tokens = list[int]


def speed(job: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Measure one artifact; the job: path, files, runtime, options, prompt, prefill, generate, depths (tokens), repetitions, seed.

    Yields `opened` once; a message for the warm-up and for each repetition with its seconds, every token's seconds in decoding, joules
    where they are counted, and the peak of memory so far; last the seconds of a `warm_load`.
    """
    runtime = load_runtime(job["runtime"])
    base, _ = resident()
    cold = forget(map(Path, job.get("files", ())))
    with _open(runtime, job) as session:
        yield {
            "opened": {
                "load_seconds": session.load_seconds,
                "cold": cold,
                "base_memory": base,
                "device": session.device,
                "threads": session.threads,
                "context": session.context,
                "versions": versions(runtime.versions()),
            }
        }
        bench = _Bench(session, find_counters(), _texts(session, job), job["generate"])
        for repetition in range(job["repetitions"] + 1):
            yield {"repetition": repetition, **bench.round(job["depths"]), "peak_memory": resident()[1]}
    with _open(runtime, job) as again:
        yield {"warm_load": again.load_seconds}


def _open(runtime: Runtime, job: Mapping[str, Any]) -> Session:
    return runtime.open(Path(job["path"]), Options(**job["options"]))


def _texts(session: Session, job: Mapping[str, Any]) -> dict[str, Tokens]:
    rng = np.random.default_rng(job["seed"])

    def text(length: int) -> Tokens:
        tokens: Tokens = rng.integers(0, session.vocab, length).tolist()
        return tokens if session.bos is None or not tokens else [session.bos, *tokens[1:]]

    long = text(max(job["prefill"], *job["depths"], 1))
    return {
        "prompt": text(job["prompt"]),
        "prefill": long[: job["prefill"]],
        "long": long,
        "decode": text(job["generate"]),
    }


@dataclass(slots=True)
class _Bench:
    """A session, what is fed to it, and how many of `texts["long"]` its memory holds from the beginning; −1: something else."""

    session: Session
    counters: Counters
    texts: Mapping[str, Tokens]
    generate: int
    held: int = field(default=-1)

    def round(self, depths: Sequence[int]) -> dict[str, Any]:
        """Take every timing once."""
        seconds = {"first_token": self._prefill("prompt"), "prefill": self._prefill("prefill")}
        self.held = len(self.texts["prefill"])
        latencies: dict[str, list[float]] = {}
        joules: dict[str, float] = {}
        # The depth that is in memory already comes first: it needs no tokens of its own.
        for depth in sorted(depths, key=lambda depth: (depth < self.held, depth)):
            self._fill(depth)
            before = self.counters.read()
            started, stamps, row = time.perf_counter(), [], None
            for token in self.texts["decode"]:
                row = self.session.step([(0, token)])
                stamps.append(time.perf_counter())
            best = int(row.argmax()) if row is not None else 0
            seconds[f"decode@{depth}"] = time.perf_counter() - started
            if self.counters.folders:
                joules[f"decode@{depth}"] = self.counters.joules(before, self.counters.read())
            if row is not None:
                _require_finite(row, "decode", best)
            latencies[f"decode@{depth}"] = np.diff([started, *stamps]).round(7).tolist()
            self.held = -1
        return {"seconds": seconds, "latencies": latencies, "joules": joules}

    def _prefill(self, name: str) -> float:
        self.session.drop(0)
        self.held = -1
        started = time.perf_counter()
        row = self.session.prefill(0, self.texts[name])
        best = int(row.argmax())  # the first token is known when the largest logit is
        seconds = time.perf_counter() - started
        _require_finite(row, name, best)
        return seconds

    def _fill(self, depth: int) -> None:
        """Bring the memory to the first `depth` tokens of the long text; not timed."""
        if self.held < 0 or self.held > depth:
            self.session.drop(0)
            self.held = 0
        if self.held < depth:
            self.session.prefill(0, self.texts["long"][self.held : depth])
            self.held = depth


def _require_finite(row: Floats, name: str, best: int) -> None:
    if not np.isfinite(row).all():
        what = "first_token" if name == "prompt" else name
        raise InputError(
            f"{what} ends in a logit that is not a number (token {best}): the artifact's weights or scales are damaged"
        )
