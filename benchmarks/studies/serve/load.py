"""200 short requests at once, and one at a time, to r1q serve and to llama-cpp-python's own server: what is lost, who waits how long.

    python benchmarks/studies/serve/load.py MODEL.gguf [--peer-path FOLDER] [--rounds 2] >> benchmarks/results/serve.jsonl

Every round runs each server once, in turn. A line of JSON holds every request's seconds.

FOLDER: where llama-cpp-python's server extra (pydantic-settings, sse-starlette, starlette-context) is installed, if not here.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from client import Reply, post, question, server

PORT = 18231


@dataclass(frozen=True, slots=True)
class Run:
    """One way of serving: its name, its command, and how many requests are sent at once, None for all."""

    name: str
    command: list[str]
    at_once: int | None = None


async def burst(port: int, at_once: int, count: int) -> tuple[float, list[Reply]]:
    """Send all requests, `at_once` at a time."""
    gate = asyncio.Semaphore(at_once)

    async def one(number: int) -> Reply:
        async with gate:
            return await post(port, question(number))

    began = time.perf_counter()
    replies = await asyncio.gather(*(one(number) for number in range(count)))
    return time.perf_counter() - began, list(replies)


def measure(run: Run, model: str, port: int, count: int, environment: dict[str, str] | None) -> None:
    """Print one line of JSON."""
    with server(run.command, port, environment) as process:
        asyncio.run(burst_of(port, 8))  # warm-up
        before, began = process.memory_info().rss, process.cpu_times()
        seconds, replies = asyncio.run(burst(port, run.at_once or count, count))
        after, ended = process.memory_info().rss, process.cpu_times()
    good = [reply for reply in replies if reply.status == 200]
    times = sorted(reply.seconds for reply in good)
    tokens = sum(reply.tokens for reply in good)
    right = sum(
        reply.text.strip().endswith(str(n % 83 + n % 47)) for n, reply in enumerate(replies) if reply.status == 200
    )
    cpu = ended.user + ended.system - began.user - began.system
    line = {
        "model": Path(model).stem, "what": run.name, "at_once": run.at_once or count, "requests": count,
        "lost": count - len(good), "right": right, "seconds": round(seconds, 3), "cpu_seconds": round(cpu, 2),
        "requests_per_second": round(len(good) / seconds, 1), "tokens_per_second": round(tokens / seconds, 1),
        "p50_seconds": round(statistics.median(times), 3), "p99_seconds": round(times[int(0.99 * (len(times) - 1))], 3),
        "rss_before": before, "rss_after": after, "samples": [round(reply.seconds, 3) for reply in replies],
    }  # fmt: skip
    print(json.dumps(line), flush=True)


async def burst_of(port: int, count: int) -> None:
    """Send a few requests whose times do not count."""
    await asyncio.gather(*(post(port, question(1000 + number)) for number in range(count)))


def main() -> None:
    """Measure each way of serving the same file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--peer-path", default="")
    parser.add_argument("--only", default="", help="runs whose name has this in it")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=1)
    asked = parser.parse_args()
    extra = {"PYTHONPATH": f"{asked.peer_path}:{Path.cwd()}"} if asked.peer_path else None
    for _ in range(asked.rounds):
        for run in runs_of(asked.model):
            if asked.only in run.name:
                measure(run, asked.model, PORT, asked.count if run.at_once is None else min(asked.count, 60), extra)


def runs_of(model: str) -> list[Run]:
    """Return the ways of serving a file, ours and theirs in turn."""
    port = str(PORT)
    own = [sys.executable, "-m", "r1q", "serve", model, "--port", port, "--context", "256"]
    peer = [sys.executable, "-m", "llama_cpp.server", "--model", model, "--port", port, "--n_ctx", "256"]
    peer += ["--interrupt_requests", "False"]
    return [
        Run("r1q serve --parallel 16", [*own, "--parallel", "16"]),
        Run("llama_cpp.server --n_threads 2", [*peer, "--n_threads", "2"]),
        Run("r1q serve --parallel 16 --threads 1", [*own, "--parallel", "16", "--threads", "1"]),
        Run("llama_cpp.server --n_threads 1", [*peer, "--n_threads", "1"]),
        Run("r1q serve --parallel 16 --threads 2", [*own, "--parallel", "16", "--threads", "2"]),
        Run("r1q serve, one at a time", [*own, "--parallel", "4"], at_once=1),
        Run("llama_cpp.server, one at a time", peer, at_once=1),
    ]


if __name__ == "__main__":
    main()
