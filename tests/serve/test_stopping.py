"""Keys, full queues and signals: who is let in, who is told to come back, and what becomes of those inside when the server stops."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

pytestmark = pytest.mark.runtime
NAME = "Tiny-R1-4.9M-Q4_K_M"
Start = Callable[..., Any]


def question(text: str = "What is 17 + 25?") -> list[ChatCompletionMessageParam]:
    return [{"role": "user", "content": text}]


CLOSED = (
    ("GET", "/v1/models"),
    ("OPTIONS", "/v1/chat/completions"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
    ("GET", "/nothing"),
    ("GET", "/health/"),
    ("GET", "//health"),
    ("GET", "/health%2f..%2fmetrics"),
    ("POST", "/v1/chat/completions"),
)


def test_a_wrong_key_gets_401_and_nothing_else(start: Start) -> None:
    running = start("--api-key", "right", "--name", "mine", "--parallel", "1", "--queue", "1")
    bodies = set()
    for key in (None, "Bearer wrong", "Bearer ", "right", "Basic right", "Bearer right2", "Bearer \xff"):
        headers = {} if key is None else {"Authorization": key}
        for method, path in CLOSED:
            status, told, body = running.raw(method, path, b"{" if method == "POST" else None, **headers)
            assert (status, told["www-authenticate"]) == (401, "Bearer")
            assert set(told) <= {"date", "content-type", "content-length", "www-authenticate"}
            bodies.add(body)
    assert len(bodies) == 1, "the answer tells one wrong key from another"
    assert running.raw("GET", "/health")[0] == 200
    assert running.raw("GET", "/v1/models", Authorization="Bearer right", Host="lan.example")[0] == 200
    counted = running.raw("GET", "/metrics", Authorization="Bearer right")[2].decode()
    assert f'r1q:requests_refused_total{{model_name="mine",status="401"}} {7 * len(CLOSED)}.0' in counted
    with running.client("wrong") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()
    with running.client("right") as client:
        assert (
            client.chat.completions.create(model="mine", messages=question(), temperature=0).choices[0].message.content
            == "42"
        )
        _fill_the_queue(running, client)


def _fill_the_queue(running: Any, client: openai.OpenAI) -> None:
    """One is answered, one waits: the third is told when to come again, and the openai client can be told to do so."""
    links = []
    try:
        for _ in range(2):
            body = json.dumps({"messages": question(), "ignore_eos": True, "stream": True}).encode()
            link = http.client.HTTPConnection("127.0.0.1", running.port, timeout=30)
            link.request(
                "POST",
                "/v1/chat/completions",
                body,
                {"Content-Type": "application/json", "Authorization": "Bearer right"},
            )
            links.append(link)
            assert link.getresponse().status == 200
        with pytest.raises(openai.RateLimitError) as told:
            client.chat.completions.create(model="mine", messages=question())
        assert 1 <= int(told.value.response.headers["retry-after"]) <= 60
    finally:
        for link in links:
            link.close()


def test_sigterm_finishes_what_is_at_hand(start: Start) -> None:
    running = start("--parallel", "2")
    answers: list[Any] = []

    def ask() -> None:
        with running.client() as client:
            answers.append(
                client.chat.completions.create(
                    model=NAME, messages=question(), max_tokens=600, extra_body={"ignore_eos": True}
                )
            )

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    running.wait("vllm:num_requests_running", 2)
    running.wait("vllm:num_requests_waiting", 1)
    code, out, err = running.end()
    for thread in threads:
        thread.join()
    assert (code, out, err) == (0, "stopped\n", "")
    assert [answer.usage.completion_tokens for answer in answers] == [600] * 3
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", running.port), timeout=5)


def test_after_the_grace_those_left_are_told(start: Start) -> None:
    """200 are at hand, one at a time is answered: when the grace is over, each has its answer or is told that it gets none."""
    running = start("--parallel", "1", "--grace", "0")
    links = [running.ask(stream=number % 2 == 0) for number in range(200)]
    while not _at_hand(running) >= len(links):
        pass
    code, _, err = running.end(signal.SIGINT)
    assert (code, err) == (0, "")
    told = []
    for number, link in enumerate(links):
        with link:
            answer = b"".join(iter(lambda: link.recv(1 << 16), b""))  # noqa: B023
        if number % 2:
            told.append(answer.startswith(b"HTTP/1.1 503"))
            assert told[-1] or b'"finish_reason":"length"' in answer
        else:
            told.append(b'"code":"stopping"' in answer)
            assert told[-1] != (b"[DONE]" in answer), "an answer that is not whole has no end mark"
    # When the signal came, most had not begun.
    assert sum(told) >= 100


def _at_hand(running: Any) -> float:
    """Return how many requests wait, are answered, or were."""
    samples = running.samples()
    ended = [value for (name, _), value in samples.items() if name == "vllm:request_success_total"]
    return float(sum(ended) + sum(samples[running.key(f"vllm:num_requests_{what}")] for what in ("running", "waiting")))


def test_a_port_that_is_taken_is_said(start: Start, tiny: Any) -> None:
    from click.testing import CliRunner

    from r1q.cli import main

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = CliRunner().invoke(main, ["serve", str(tiny), "--port", str(port)])
    assert result.exit_code == 2
    assert f"cannot listen on 127.0.0.1:{port}" in result.stderr
    assert len(result.stderr.splitlines()) == 1
