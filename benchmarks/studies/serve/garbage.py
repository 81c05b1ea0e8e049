"""2,000 requests that nobody would send, 2,000 connections of raw bytes, 400 clients that leave: the server and its memory stay.

    python benchmarks/studies/serve/garbage.py MODEL.gguf

Prints a line of JSON after each part: what was sent, the statuses, and the server's resident memory.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import sys
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from client import post, question, server

PORT = 18232
ROOT = f"http://127.0.0.1:{PORT}"


def generated(count: int) -> Counter[int]:
    """Send what schemathesis makes of the OpenAPI document; return the statuses. Raises on any answer of 500 and above."""
    schema = schemathesis.openapi.from_url(f"{ROOT}/openapi.json")
    paths = (("/v1/chat/completions", "POST"), ("/v1/completions", "POST"), ("/v1/models/{name}", "GET"))
    seen: Counter[int] = Counter()
    for path, method in paths:
        examples = count // 2 if method == "POST" else count // 10
        seen += _send(schema[path][method], examples)
    return seen


def _send(operation: Any, examples: int) -> Counter[int]:
    seen: Counter[int] = Counter()
    checks = list(HealthCheck)

    @settings(
        max_examples=examples, deadline=None, phases=[Phase.generate], suppress_health_check=checks, database=None
    )
    @given(data=st.data())
    def send(data: st.DataObject) -> None:
        case = data.draw(operation.as_strategy())
        if isinstance(case.body, dict):
            case.body["max_tokens"] = 2
        answer = case.call(timeout=60)
        seen[answer.status_code] += 1
        assert answer.status_code < 500, (answer.status_code, case.body)

    send()
    return seen


def raw_bytes(count: int) -> Counter[str]:
    """Send junk, and real requests with some bytes exchanged or cut off; return how the answers begin."""
    rng = random.Random(3)
    body = json.dumps(question(1)).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    good = head.encode() + body
    seen: Counter[str] = Counter()
    for _ in range(count):
        if rng.random() < 0.3:
            data = rng.randbytes(rng.randrange(1, 2000))
        else:
            changed = bytearray(good)
            for _ in range(rng.randrange(1, 6)):
                changed[rng.randrange(len(changed))] = rng.randrange(256)
            data = bytes(changed[: rng.randrange(1, len(changed) + 1)])
        try:
            with socket.create_connection(("127.0.0.1", PORT), timeout=20) as link:
                link.sendall(data)
                link.shutdown(socket.SHUT_WR)
                answer = link.recv(1 << 16)
                seen[answer[9:12].decode("ascii", "replace") or "closed"] += 1
        except OSError:
            seen["reset"] += 1
    return seen


async def leave(count: int) -> int:
    """Let `count` clients ask for long answers, half of them streamed, and leave at a random moment."""
    rng = random.Random(4)

    async def one(number: int) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", PORT)
        body = json.dumps(
            {**question(number), "max_tokens": 900, "ignore_eos": True, "stream": number % 2 == 0}
        ).encode()
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        writer.write(f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
        await asyncio.sleep(rng.random() * 3)
        writer.transport.abort()

    await asyncio.gather(*(one(number) for number in range(count)))
    return count


def metric(name: str) -> float:
    """Return the sum of a metric's samples."""
    with urllib.request.urlopen(f"{ROOT}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + "{"))


def report(what: str, process: psutil.Process, **more: object) -> None:
    """Print one line of JSON."""
    running = metric("vllm:num_requests_running") + metric("vllm:num_requests_waiting")
    print(json.dumps({"what": what, "rss": process.memory_info().rss, "still_at_hand": running, **more}), flush=True)


def main() -> None:
    """Send everything to one server and report after each part."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--count", type=int, default=2000)
    asked = parser.parse_args()
    command = [
        sys.executable,
        "-m",
        "r1q",
        "serve",
        asked.model,
        "--port",
        str(PORT),
        "--parallel",
        "4",
        "--threads",
        "1",
    ]

    async def some(count: int) -> list[int]:
        return [reply.status for reply in await asyncio.gather(*(post(PORT, question(n)) for n in range(count)))]

    with server(command, PORT) as process:
        generated(200)
        raw_bytes(200)
        asyncio.run(leave(200))
        asyncio.run(some(50))
        report("warm", process)
        report("generated", process, statuses=generated(asked.count))
        report("raw bytes", process, answers=raw_bytes(asked.count))
        for _ in range(2):
            asyncio.run(leave(200))
            for _ in range(100):
                if not metric("vllm:num_requests_running") + metric("vllm:num_requests_waiting"):
                    break
                asyncio.run(asyncio.sleep(0.05))
            report("200 clients left", process)
        report("50 answered", process, statuses=Counter(asyncio.run(some(50))))


if __name__ == "__main__":
    main()
