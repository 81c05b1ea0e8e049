"""The studies' own client: plain asyncio connections, so that on a small machine the client costs little beside the server."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One answer: HTTP status (0: the connection broke), seconds from connecting to its last byte, tokens, and the text."""

    status: int
    seconds: float
    tokens: int = 0
    text: str = ""


def question(number: int) -> dict[str, object]:
    """Return the body of a short request; its answer is number % 83 + number % 47."""
    asked = f"What is {number % 83} + {number % 47}?"
    return {
        "messages": [{"role": "user", "content": asked}],
        "max_tokens": 96,
        "temperature": 0.6,
        "top_p": 0.95,
        "seed": number,
    }


async def post(port: int, body: dict[str, object], path: str = "/v1/chat/completions") -> Reply:
    """Send one request on a connection of its own."""
    began = time.perf_counter()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        answer = await reader.read()
        writer.close()
    except OSError:
        return Reply(status=0, seconds=time.perf_counter() - began)
    seconds = time.perf_counter() - began
    head_bytes, _, rest = answer.partition(b"\r\n\r\n")
    if not head_bytes.startswith(b"HTTP/1.1 200"):
        return Reply(status=int(head_bytes.split(b" ")[1]) if b" " in head_bytes else 0, seconds=seconds)
    told = json.loads(rest)
    return Reply(
        status=200,
        seconds=seconds,
        tokens=told["usage"]["completion_tokens"],
        text=told["choices"][0]["message"]["content"] or "",
    )


@contextmanager
def server(command: list[str], port: int, environment: dict[str, str] | None = None) -> Iterator[psutil.Process]:
    """Run a server, wait until it lists its models, and end it by SIGTERM."""
    process = subprocess.Popen(
        command, env={**os.environ, **(environment or {})}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5).close()
                break
            except OSError:
                if process.poll() is not None:
                    sys.exit(f"{command} ended with {process.returncode}")
                time.sleep(0.1)
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(60)
