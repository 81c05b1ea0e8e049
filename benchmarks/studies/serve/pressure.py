"""200 requests at hand: what /metrics says to Prometheus' own parser meanwhile, and what becomes of them when SIGTERM comes.

    python benchmarks/studies/serve/pressure.py MODEL.gguf

Prints a line of JSON for each part.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import signal
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path

import psutil
from prometheus_client.parser import text_string_to_metric_families

sys.path.insert(0, str(Path(__file__).parent))
from client import post, question, server

PORT, COUNT = 18233, 200
GROWING = ("_total", "_count", "_bucket", "_sum")
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scrape() -> Samples:
    """Return every sample of /metrics."""
    with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/metrics", timeout=60) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def total(samples: Samples, *names: str) -> float:
    """Return the sum of all samples of some names."""
    return sum(value for (name, _), value in samples.items() if name in names)


async def ask_all() -> list[int]:
    """Send all requests at once; return the statuses, 0 for a connection that was closed without an answer."""
    return [reply.status for reply in await asyncio.gather(*(post(PORT, question(n)) for n in range(COUNT)))]


async def scraped() -> None:
    """Ask, and scrape until all are answered."""
    answers = asyncio.ensure_future(ask_all())
    seen = [await asyncio.to_thread(scrape)]
    while not answers.done():
        seen.append(await asyncio.to_thread(scrape))
        await asyncio.sleep(0.02)
    seen.append(await asyncio.to_thread(scrape))
    fell = [
        key
        for one, two in itertools.pairwise(seen)
        for key in one
        if key[0].endswith(GROWING) and two.get(key, -1) < one[key]
    ]
    missing = {key for samples in seen for key in seen[-1].keys() - samples.keys()}
    waiting = [total(samples, "vllm:num_requests_waiting") for samples in seen]
    line = {
        "what": "scraped", "statuses": Counter(answers.result()), "scrapes": len(seen), "series": len(seen[-1]),
        "fell": len(fell), "missing": len(missing), "most_waiting": max(waiting), "parallel": 4,
        "most_running": max(total(samples, "vllm:num_requests_running") for samples in seen),
    }  # fmt: skip
    print(json.dumps(line), flush=True)


async def stopped(process: psutil.Process, grace: float) -> None:
    """Ask, and end the server when all are at hand."""
    answers = asyncio.ensure_future(ask_all())
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:request_success_total")
    while total(await asyncio.to_thread(scrape), *names) < COUNT:
        await asyncio.sleep(0.01)
    began = time.perf_counter()
    process.send_signal(signal.SIGTERM)
    statuses = await answers
    code = await asyncio.to_thread(process.wait, 60)
    seconds = round(time.perf_counter() - began, 2)
    line = {"what": "SIGTERM", "grace": grace, "statuses": Counter(statuses), "exit_code": code, "seconds": seconds}
    print(json.dumps(line), flush=True)


def main() -> None:
    """Do each part with a server of its own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    asked = parser.parse_args()
    command = [sys.executable, "-m", "r1q", "serve", asked.model, "--port", str(PORT), "--parallel", "4"]
    with server(command, PORT):
        asyncio.run(scraped())
    for grace in (60.0, 1.0):
        with server([*command, "--grace", str(grace)], PORT) as process:
            asyncio.run(stopped(process, grace))


if __name__ == "__main__":
    main()
