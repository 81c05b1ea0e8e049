"""Speed, in the child: load, time to first token, prefill and decode, after the manner of llama-bench.

Random tokens; an empty memory before each timing; one warm-up apart; the three timings take turns, so that a machine that slows
down slows all of them. Tokenizing and sampling are not timed: decode feeds tokens that were drawn before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from r1q.benchmarks.machine import resident, versions
from r1q.core.errors import InputError
from r1q.runtimes.base import Floats, Options, Session
from r1q.runtimes.table import load_runtime

TIMINGS = ("first_token", "prefill", "decode")


def speed(job: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Measure one artifact; the job: path, runtime, options, prompt, prefill, generate (tokens each), repetitions, seed.

    Yields `opened` once, then a message for the warm-up and for each repetition with its seconds and the peak of memory so far.
    """
    runtime = load_runtime(job["runtime"])
    base, _ = resident()
    with runtime.open(Path(job["path"]), Options(**job["options"])) as session:
        yield {
            "opened": {
                "load_seconds": session.load_seconds,
                "base_memory": base,
                "device": session.device,
                "threads": session.threads,
                "context": session.context,
                "versions": versions(runtime.versions()),
            }
        }
        timings = _timings(session, job)
        for repetition in range(job["repetitions"] + 1):
            seconds = {name: timing() for name, timing in timings.items()}
            yield {"repetition": repetition, "seconds": seconds, "peak_memory": resident()[1]}


def _timings(session: Session, job: Mapping[str, Any]) -> dict[str, Callable[[], float]]:
    rng = np.random.default_rng(job["seed"])

    def text(length: int) -> list[int]:
        tokens: list[int] = rng.integers(0, session.vocab, length).tolist()
        return tokens if session.bos is None else [session.bos, *tokens[1:]]

    prompt, prefill, generate = text(job["prompt"]), text(job["prefill"]), text(job["generate"])

    def decode() -> Floats:
        for token in generate:
            rows = session.step([(0, token)])
        return rows

    actions: dict[str, Callable[[], Floats]] = {
        # The first token is known when the largest logit is.
        "first_token": lambda: session.prefill(0, prompt),
        "prefill": lambda: session.prefill(0, prefill),
        "decode": decode,
    }
    return {name: lambda action=action, name=name: _time(session, name, action) for name, action in actions.items()}  # type: ignore[misc]


def _time(session: Session, name: str, action: Callable[[], Floats]) -> float:
    session.drop(0)
    started = time.perf_counter()
    row = action()
    best = int(row.argmax())
    seconds = time.perf_counter() - started
    if not np.isfinite(row).all():
        raise InputError(
            f"{name} ends in a logit that is not a number (token {best}): the artifact's weights or scales are damaged"
        )
    return seconds
