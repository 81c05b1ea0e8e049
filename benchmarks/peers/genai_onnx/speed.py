"""Decode and prefill of ONNX folders and GGUF files in several runtimes, taking turns: speed.py [--rounds N] RUNTIME:PATH …

A JSON line for each: tokens/s of every round, and the median of its ratios to the first one, round by round.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np

from r1q.runtimes.base import Options, Session
from r1q.runtimes.table import load_runtime

DEPTH, TOKENS = 512, 32


def measure(session: Session, tokens: list[int]) -> dict[str, float]:
    """Return tokens/s of a prefill of 512, of 32 steps behind it, and of 32 steps in an empty memory."""
    session.drop(0)
    began = time.perf_counter()
    session.prefill(0, tokens[:DEPTH])
    prefilled = time.perf_counter()
    for token in tokens[DEPTH:]:
        session.step([(0, token)])
    deep = time.perf_counter()
    session.drop(0)
    session.prefill(0, tokens[:1])
    started = time.perf_counter()
    for token in tokens[DEPTH:]:
        session.step([(0, token)])
    shallow = time.perf_counter()
    return {
        "prefill 512": DEPTH / (prefilled - began),
        "decode at 0": TOKENS / (shallow - started),
        "decode at 512": TOKENS / (deep - prefilled),
    }


def main() -> None:
    """Open every subject, measure them in turn, print one line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("subjects", nargs="+", metavar="RUNTIME:PATH")
    asked = parser.parse_args()
    sessions = {}
    for subject in asked.subjects:
        runtime, _, path = subject.partition(":")
        sessions[subject] = load_runtime(runtime).open(Path(path), Options(context=1024))
    rng = np.random.default_rng(0)
    samples: dict[str, list[dict[str, float]]] = {subject: [] for subject in sessions}
    for number in range(asked.rounds + 1):
        tokens = rng.integers(100, 30000, DEPTH + TOKENS).tolist()
        for subject, session in sessions.items():
            found = measure(session, tokens)
            if number:  # the first round warms up
                samples[subject].append(found)
    first = samples[asked.subjects[0]]
    for subject, rounds in samples.items():
        ratios = {
            name: statistics.median(mine[name] / base[name] for mine, base in zip(rounds, first, strict=True))
            for name in rounds[0]
        }
        rates = {name: [round(each[name], 1) for each in rounds] for name in rounds[0]}
        medians = {name: statistics.median(values) for name, values in rates.items()}
        print(json.dumps({"subject": subject, "median": medians, "ratio_to_first": ratios, "samples": rates}))


if __name__ == "__main__":
    main()
