"""200 short requests at once, and one at a time, to r1q serve and to llama-cpp-python's own server: what is lost, who waits how long.

    python benchmarks/studies/serve/load.py MODEL.gguf [--peer-path FOLDER] > benchmarks/results/serve.jsonl

FOLDER: where llama-cpp-python's server extra (pydantic-settings, sse-starlette, starlette-context) is installed, if not here.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from client import Reply, post, question, server


async def burst(port: int, at_once: int, count: int) -> tuple[float, list[Reply]]:
    """Send all requests, `at_once` at a time."""
    gate = asyncio.Semaphore(at_once)

    async def one(number: int) -> Reply:
        async with gate:
            return await post(port, question(number))

    began = time.perf_counter()
    replies = await asyncio.gather(*(one(number) for number in range(count)))
    return time.perf_counter() - began, list(replies)


def measure(
    name: str, command: list[str], port: int, at_once: int, count: int, environment: dict[str, str] | None = None
) -> None:
    """Print one line of JSON."""
    with server(command, port, environment) as process:
        asyncio.run(burst_of(port, 4))  # warm-up
        before = process.memory_info().rss
        seconds, replies = asyncio.run(burst(port, at_once, count))
        after = process.memory_info().rss
    good = [reply for reply in replies if reply.status == 200]
    times = sorted(reply.seconds for reply in good)
    tokens = sum(reply.tokens for reply in good)
    right = sum(
        reply.text.strip().endswith(str(n % 83 + n % 47)) for n, reply in enumerate(replies) if reply.status == 200
    )
    line = {
        "what": name, "at_once": at_once, "requests": count, "lost": count - len(good), "right": right,
        "seconds": round(seconds, 3), "requests_per_second": round(len(good) / seconds, 1),
        "tokens_per_second": round(tokens / seconds, 1), "p50_seconds": round(statistics.median(times), 3),
        "p99_seconds": round(times[int(0.99 * (len(times) - 1))], 3), "rss_before": before, "rss_after": after,
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
    parser.add_argument("--only", default="")
    parser.add_argument("--count", type=int, default=200)
    asked = parser.parse_args()
    python, port = sys.executable, 18231
    count = asked.count
    own = [python, "-m", "r1q", "serve", asked.model, "--port", str(port), "--context", "256"]
    peer = [python, "-m", "llama_cpp.server", "--model", asked.model, "--port", str(port), "--n_ctx", "256"]
    peer += ["--interrupt_requests", "False"]
    runs = [
        ("r1q serve --parallel 16", [*own, "--parallel", "16"], count),
        ("r1q serve --parallel 16 --threads 1", [*own, "--parallel", "16", "--threads", "1"], count),
        ("r1q serve --parallel 4", [*own, "--parallel", "4"], count),
        ("r1q serve, one at a time", [*own, "--parallel", "4"], 1),
        ("llama_cpp.server", peer, count),
        ("llama_cpp.server --n_threads 1", [*peer, "--n_threads", "1"], count),
        ("llama_cpp.server, one at a time", peer, 1),
    ]
    for name, command, at_once in runs:
        if asked.only in name:
            extra = {"PYTHONPATH": f"{asked.peer_path}:{Path.cwd()}"} if asked.peer_path else None
            measure(name, command, port, at_once, count, extra)


if __name__ == "__main__":
    main()
