"""How far 8-bit keys and values lead from float ones over a long window, same codes: divergence.py --text FILE FLOAT EIGHT …

Subjects come in pairs, RUNTIME:PATH or RUNTIME:PATH:CACHE, as onnxruntime:out/onnx and llama-cpp:out/model.gguf:q8_0. Prints JSON:
divergence at every position of one window of 8,192 tokens, and at its last 1,024.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from r1q.core.metrics import TokenScores, score, summarize
from r1q.runtimes.base import Options, Session
from r1q.runtimes.table import load_runtime

CONTEXT, LAST = 8192, 1024


def open_subject(subject: str) -> Session:
    """Open RUNTIME:PATH[:CACHE] with room for CONTEXT tokens."""
    runtime, path, *cache = subject.split(":")
    kind: Any = cache[0] if cache else "f16"
    return load_runtime(runtime).open(Path(path), Options(context=CONTEXT, cache=kind))


def main() -> None:
    """Score each pair: two tables of logits, 3.2 GB of memory for a vocabulary of 49,152."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("subjects", nargs="+")
    asked = parser.parse_args()
    for exact, eight in zip(asked.subjects[::2], asked.subjects[1::2], strict=True):
        found, tokens = [], np.zeros(0, dtype=np.int64)
        for subject in (exact, eight):
            began = time.perf_counter()
            with open_subject(subject) as session:
                tokens = np.array(session.encode(asked.text.read_text(encoding="utf-8"))[:CONTEXT])
                found.append(session.logits(tokens.tolist())[:-1])
            seconds = round(time.perf_counter() - began, 1)
            print(json.dumps({"subject": subject, "scored in seconds": seconds}), flush=True)
        scores = score(found[1], tokens[1:], found[0])
        floats = score(found[0], tokens[1:])
        assert scores.kld is not None
        assert scores.same_top is not None
        for name, part in (("all", slice(None)), (f"last {LAST}", slice(-LAST, None))):
            some = TokenScores(nll=scores.nll[part], kld=scores.kld[part], same_top=scores.same_top[part])
            line = {"subject": eight, "beside": exact, "positions": name}
            print(json.dumps({**line, **asdict(summarize(some, floats.nll[part]))}), flush=True)


if __name__ == "__main__":
    main()
