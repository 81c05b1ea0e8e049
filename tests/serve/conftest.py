"""The embedded model in four bits, opened here and served by a process of its own."""

from __future__ import annotations

import functools
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from r1q.plan.job import Job, open_job, plan_job, run_job
from r1q.serve.run import Opened, Settings, open_artifact

ROOT = Path(__file__).resolve().parents[2]
NAME = "Tiny-R1-4.9M-Q4_K_M"


Key = tuple[str, frozenset[tuple[str, str]]]


class Running:
    """`r1q serve` as a process: its address, and its process for signals."""

    def __init__(self, artifact: Path, *options: str) -> None:
        command = [sys.executable, "-m", "r1q", "serve", str(artifact), "--port", "0", "--threads", "1", *options]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=dict(os.environ)
        )
        assert self.process.stdout is not None
        self.about = self.process.stdout.readline().strip()
        line = self.process.stdout.readline().strip()
        assert line.startswith("ready: "), self.process.communicate(timeout=20)
        self.url = line.removeprefix("ready: ")
        self.root = self.url.removesuffix("/v1")
        self.port = int(self.root.rpartition(":")[2])

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=60)

    def raw(self, method: str, path: str, body: object = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
        """Send one request by Python's own client and return status, headers and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, named)  # type: ignore[arg-type]
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def ask(self, **more: object) -> socket.socket:
        """Send a chat request that goes on to the end of the context and return its connection, whose answer is not read."""
        said = [{"role": "user", "content": "What is 17 + 25?"}]
        body = json.dumps({"messages": said, "ignore_eos": True, **more}).encode()
        link = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        head = ("POST /v1/chat/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json")
        link.sendall("\r\n".join((*head, f"Content-Length: {len(body)}", "", "")).encode() + body)
        return link

    def samples(self) -> dict[Key, float]:
        """Return every sample of /metrics, read by Prometheus' own parser, by name and labels."""
        families = text_string_to_metric_families(self.raw("GET", "/metrics")[2].decode())
        return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}

    @staticmethod
    def key(series: str, *, name: str = NAME, **labels: str) -> Key:
        """Return the key of a sample of the model called `name`."""
        return series, frozenset({"model_name": name, **labels}.items())

    def sample(self, series: str, **labels: str) -> float:
        """Return one sample."""
        return self.samples()[self.key(series, **labels)]

    def wait(self, series: str, value: float, **labels: str) -> None:
        """Wait until a sample has a value."""
        for _ in range(2000):
            if self.sample(series, **labels) == value:
                return
            time.sleep(0.01)
        raise AssertionError(f"{series} did not become {value}")

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str, str]:
        """Send a signal and return the exit code and what was written."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


@pytest.fixture(scope="session")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output folder of `r1q quantize --bits 4` on the embedded model. Shared: do not write to it."""
    folder = tmp_path_factory.mktemp("serve") / "tiny"
    opened = open_job(Job(bits=4, output=folder))
    list(run_job(opened, plan_job(opened)))
    return folder


@pytest.fixture(scope="session")
def tiny(output: Path) -> Path:
    """Return the embedded model as a GGUF file in four bits."""
    pytest.importorskip("llama_cpp")
    return output / f"{NAME}.gguf"


@pytest.fixture
def opened(tiny: Path) -> Iterator[Opened]:
    """Open it in this process for four answers at once."""
    found = open_artifact(tiny, Settings(threads=1, parallel=4))
    yield found
    found.session.close()


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[Running]:
    """Return a running server; at the end it must have stopped in order, without a word of complaint."""
    running = Running(tiny, "--parallel", "4")
    yield running
    code, _, err = running.end()
    assert (code, err) == (0, "")


@pytest.fixture
def run() -> Iterator[Callable[..., Running]]:
    """Return `run(artifact, *options)`, which runs a server of the test's own; what is left of it at the end is killed."""
    started: list[Running] = []

    def start(artifact: Path, *options: str) -> Running:
        started.append(Running(artifact, *options))
        return started[-1]

    yield start
    for running in started:
        if running.process.poll() is None:
            running.process.kill()
        running.process.communicate()


@pytest.fixture
def start(tiny: Path, run: Callable[..., Running]) -> Callable[..., Running]:
    """Return `start(*options)`, which runs one on the embedded model."""
    return functools.partial(run, tiny)
