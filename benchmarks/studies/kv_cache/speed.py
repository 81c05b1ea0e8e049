"""Decoding and reading behind a long context, subjects in turn: speed.py [--context 8192] [--rounds 8] SUBJECT … Prints JSON lines.

A subject is RUNTIME:PATH or RUNTIME:PATH:CACHE, as onnxruntime:out/onnx or llama-cpp:out/model.gguf:q8_0. The context is filled with
copies of 512 tokens' keys and values, each computed with nothing before it: what a step costs does not depend on what the numbers are.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import llama_cpp
import numpy as np

from r1q.runtimes import llama_log
from r1q.runtimes.base import Options
from r1q.runtimes.cores import physical_cores
from r1q.runtimes.onnxruntime import OnnxRuntime, OnnxSession

PART, STEPS, READ = 512, 16, 64
LLAMA_TYPES = {"f16": llama_cpp.GGML_TYPE_F16, "f32": llama_cpp.GGML_TYPE_F32, "q8_0": llama_cpp.GGML_TYPE_Q8_0}


class Filled(Protocol):
    """A context that holds `depth` tokens."""

    depth: int

    def append(self, tokens: Sequence[int]) -> None:
        """Compute `tokens` behind what is held."""

    def back(self) -> None:
        """Forget everything behind `depth`."""


class FilledOnnx:
    """Our own loop; the buffers it binds are written to directly."""

    def __init__(self, path: Path, context: int, depth: int, tokens: Sequence[int]) -> None:
        session = OnnxRuntime().open(path, Options(context=context))
        assert isinstance(session, OnnxSession)
        self.session, self.depth = session, depth
        session.prefill(0, tokens)
        for buffer, _ in session._cache._buffers:
            for start in range(PART, depth, PART):
                stop = min(start + PART, depth)
                buffer[:, :, start:stop] = buffer[:, :, : stop - start]
        session._held[0] = depth

    def append(self, tokens: Sequence[int]) -> None:
        """Compute `tokens` behind what is held."""
        if len(tokens) == 1:
            self.session.step([(0, tokens[0])])
        else:
            self.session.prefill(0, tokens)

    def back(self) -> None:
        """Forget everything behind `depth`."""
        self.session.drop(0, self.depth)


class FilledLlama:
    """llama.cpp with one store for all sequences: each part is computed as a sequence of its own, then given to sequence 0."""

    def __init__(self, path: Path, context: int, depth: int, tokens: Sequence[int], cache: str) -> None:
        llama_log.capture()
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        params: Any = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context, PART, PART
        params.n_seq_max, params.kv_unified = context // PART + 1, True
        params.n_threads = params.n_threads_batch = physical_cores()
        params.type_k = params.type_v = LLAMA_TYPES[cache]
        self.pointer = llama_cpp.llama_init_from_model(self.model, params)
        self.memory = llama_cpp.llama_get_memory(self.pointer)
        self.batch = llama_cpp.llama_batch_init(PART, 0, 1)
        self.depth = self.held = depth
        for sequence, start in enumerate(range(0, depth, PART), 1):
            self._decode(tokens[: min(PART, depth - start)], start, sequence)
            llama_cpp.llama_memory_seq_cp(self.memory, sequence, 0, -1, -1)
            llama_cpp.llama_memory_seq_rm(self.memory, sequence, -1, -1)
        assert llama_cpp.llama_memory_seq_pos_max(self.memory, 0) == depth - 1

    def append(self, tokens: Sequence[int]) -> None:
        """Compute `tokens` behind what is held."""
        self._decode(tokens, self.held, 0)
        self.held += len(tokens)

    def back(self) -> None:
        """Forget everything behind `depth`."""
        llama_cpp.llama_memory_seq_rm(self.memory, 0, self.depth, -1)
        self.held = self.depth

    def _decode(self, tokens: Sequence[int], start: int, sequence: int) -> None:
        self.batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            self.batch.token[index], self.batch.pos[index] = token, start + index
            self.batch.n_seq_id[index], self.batch.seq_id[index][0] = 1, sequence
            self.batch.logits[index] = index == len(tokens) - 1
        assert llama_cpp.llama_decode(self.pointer, self.batch) == 0, llama_log.reason()
        llama_cpp.llama_synchronize(self.pointer)


def open_filled(subject: str, context: int, depth: int, tokens: Sequence[int]) -> Filled:
    """Open and fill RUNTIME:PATH[:CACHE]."""
    runtime, path, *cache = subject.split(":")
    if runtime == "onnxruntime":
        return FilledOnnx(Path(path), context, depth, tokens)
    return FilledLlama(Path(path), context, depth, tokens, cache[0] if cache else "f16")


def rate(count: int, work: Callable[[], None]) -> float:
    """Return how many of `count` tokens a second `work` makes."""
    began = time.perf_counter()
    work()
    return count / (time.perf_counter() - began)


def main() -> None:
    """Fill every subject, then time them in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("subjects", nargs="+")
    asked = parser.parse_args()
    rng = np.random.default_rng(0)
    tokens = rng.integers(100, 400, PART).tolist()
    depth = asked.context - max(STEPS, READ)
    filled = {subject: open_filled(subject, asked.context, depth, tokens) for subject in asked.subjects}
    steps: dict[str, list[float]] = {subject: [] for subject in filled}
    reads: dict[str, list[float]] = {subject: [] for subject in filled}

    def decode(subject: Filled) -> None:
        for token in tokens[:STEPS]:
            subject.append([token])

    for number in range(asked.rounds + 1):
        for name, subject in filled.items():
            decoded = rate(STEPS, lambda subject=subject: decode(subject))
            subject.back()
            read = rate(READ, lambda subject=subject: subject.append(tokens[:READ])) if number <= 2 else None
            subject.back()
            if number:  # the first round warms up
                steps[name].append(round(decoded, 2))
                reads[name] += [] if read is None else [round(read, 1)]
    for name in filled:
        line = {"subject": name, "depth": depth, "decode": round(statistics.median(steps[name]), 2)}
        line |= {"read": statistics.median(reads[name]), "decode samples": steps[name], "read samples": reads[name]}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
