"""Integer inputs beside weight-only, perplexity and speed: w8a8.py --text FILE FOLDER … (others are held against the first)

Prints a JSON line for each ONNX folder: perplexity and divergence from the first over the second halves of 512-token windows, how many
of its linears multiply integers, then tokens/s of prefills of 512 and of decoding behind them, round by round, folders taking turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from r1q.core.activations import STAGES
from r1q.core.checkpoint import QuantizedCheckpoint
from r1q.core.metrics import merge, score, summarize
from r1q.runtimes.base import Options, Session
from r1q.runtimes.table import load_runtime

LENGTH, STEPS = 512, 32


def scored(session: Session, windows: NDArray[np.int64]) -> list[NDArray[np.float32]]:
    """Return the logits of each window's second half, [LENGTH / 2, vocab], the last position left out."""
    return [session.logits(window.tolist(), first=LENGTH // 2 - 1)[:-1] for window in windows]


def linears(folder: Path) -> dict[str, int]:
    """Return how many linears the checkpoint beside an ONNX folder has in blocks, and how many of them are weight-only."""
    checkpoint = QuantizedCheckpoint.open(folder.parent / "checkpoint")
    count = sum(
        spec.kind in {kind for kinds in STAGES.values() for kind in kinds} and spec.is_matrix
        for spec in checkpoint.tensors
    )
    found = checkpoint.activations
    if found is None:
        return {"linears": count, "weight-only": count}
    return {
        "linears": count,
        "weight-only": sum(len(STAGES[stage]) for (_, stage), r in found.ranges.items() if not r.static),
    }


def turn(session: Session, tokens: list[int]) -> tuple[float, float]:
    """Return tokens/s of a prefill of LENGTH and of STEPS steps behind it."""
    session.drop(0)
    began = time.perf_counter()
    session.prefill(0, tokens[:LENGTH])
    filled = time.perf_counter()
    for token in tokens[LENGTH:]:
        session.step([(0, token)])
    return LENGTH / (filled - began), STEPS / (time.perf_counter() - filled)


def main() -> None:
    """Score every folder, then time them in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=12)
    asked = parser.parse_args()
    sessions = {folder: load_runtime("onnxruntime").open(folder, Options(context=640)) for folder in asked.folders}
    if asked.text is not None:
        ids = next(iter(sessions.values())).encode(asked.text.read_text(encoding="utf-8"))
        windows = np.array(ids[: asked.windows * LENGTH], dtype=np.int64).reshape(-1, LENGTH)
        targets, first = windows[:, LENGTH // 2 :], None
        for folder, session in sessions.items():
            rows = scored(session, windows)
            first = rows if first is None else first
            parts = [score(own, aim, truth) for own, aim, truth in zip(rows, targets, first, strict=True)]
            line = {"folder": str(folder), **linears(folder), **asdict(summarize(merge(parts)))}
            print(json.dumps(line), flush=True)
    rng = np.random.default_rng(0)
    samples: dict[Path, list[tuple[float, float]]] = {folder: [] for folder in sessions}
    for number in range(asked.rounds + 1 if asked.rounds else 0):
        tokens = rng.integers(10, min(session.vocab for session in sessions.values()), LENGTH + STEPS).tolist()
        for folder, session in sessions.items():
            found = turn(session, tokens)
            if number:  # the first round warms up
                samples[folder].append(found)
    for folder, found in samples.items() if asked.rounds else ():
        rates = {name: [round(each[index], 1) for each in found] for index, name in enumerate(("prefill", "decode"))}
        medians = {name: statistics.median(values) for name, values in rates.items()}
        print(json.dumps({"folder": str(folder), "median": medians, "samples": rates}), flush=True)


if __name__ == "__main__":
    main()
