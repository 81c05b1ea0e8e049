"""The server as its clients meet it: the real openai client, raw bytes, keys, metrics and signals, against a process of its own."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from r1q.serve.guard import host_name, is_loopback
from r1q.serve.run import is_exposed

pytestmark = pytest.mark.runtime
NAME = "Tiny-R1-4.9M-Q4_K_M"
Start = Callable[..., Any]


def question(text: str = "What is 17 + 25?") -> list[ChatCompletionMessageParam]:
    return [{"role": "user", "content": text}]


def test_the_openai_client_gets_thought_and_answer_apart(server: Any) -> None:
    with server.client() as client:
        assert [model.id for model in client.models.list()] == [NAME]
        assert client.models.retrieve(NAME).id == NAME
        answer = client.chat.completions.create(model=NAME, messages=question(), seed=3, temperature=0)
        message = answer.choices[0].message
        assert message.content == "42"
        thought = message.model_extra["reasoning_content"]
        assert "17 + 25" in thought
        assert "think>" not in thought
        assert answer.choices[0].finish_reason == "stop"
        usage = answer.usage
        assert usage is not None
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        assert 0 < usage.completion_tokens_details.reasoning_tokens < usage.completion_tokens


def test_a_stream_says_what_the_whole_answer_says(server: Any) -> None:
    with server.client() as client:
        asked: dict[str, Any] = {"model": NAME, "messages": question(), "temperature": 0}
        whole = client.chat.completions.create(**asked)
        chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    *said, last = chunks
    assert last.choices == []
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    deltas = [chunk.choices[0].delta for chunk in said]
    assert deltas[0].role == "assistant"
    thoughts = [(delta.model_extra or {}).get("reasoning_content") for delta in deltas]
    assert "".join(filter(None, thoughts)) == whole.choices[0].message.model_extra["reasoning_content"]
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in said][-1] == "stop"
    assert sum(bool(thought) for thought in thoughts) > 10, "it is not streamed, but sent at the end"


def test_completions_stops_seeds_and_log_probabilities(server: Any) -> None:
    with server.client() as client:
        first = client.completions.create(model=NAME, prompt="What is", max_tokens=12, seed=7, temperature=1.0)
        again = client.completions.create(model=NAME, prompt="What is", max_tokens=12, seed=7, temperature=1.0)
        assert first.choices[0].text == again.choices[0].text
        assert first.choices[0].finish_reason == "length"
        assert first.usage.completion_tokens == 12
        stopped = client.chat.completions.create(model=NAME, messages=question(), temperature=0, stop=["2"])
        assert (stopped.choices[0].message.content, stopped.choices[0].finish_reason) == ("4", "stop")
        scored = client.chat.completions.create(
            model=NAME, messages=question(), temperature=0, logprobs=True, top_logprobs=2, max_completion_tokens=5
        )
        tokens = scored.choices[0].logprobs.content
        assert len(tokens) == 5
        assert all(token.logprob == token.top_logprobs[0].logprob <= 0 for token in tokens)
        texted = client.completions.create(model=NAME, prompt="What is", max_tokens=3, logprobs=1, temperature=0)
        assert len(texted.choices[0].logprobs.tokens) == 3
        ids = client.completions.create(model=NAME, prompt=[500, 40, 41], max_tokens=1)
        assert ids.usage.prompt_tokens == 3


def test_a_conversation_that_goes_on_is_not_read_again(server: Any) -> None:
    with server.client() as client:
        messages = question("What is 31 + 46?")
        first = client.chat.completions.create(model=NAME, messages=messages, temperature=0)
        again = client.chat.completions.create(model=NAME, messages=messages, temperature=0)
        assert again.usage.prompt_tokens_details.cached_tokens == first.usage.prompt_tokens - 1
        assert again.choices[0].message.content == first.choices[0].message.content


@pytest.mark.parametrize(
    ("change", "status", "code", "param"),
    [
        ({"model": "gpt-4"}, 404, "model_not_found", "model"),
        ({"messages": []}, 400, None, "messages"),
        ({"messages": [{"role": "user", "content": "one " * 3000}]}, 400, "context_length_exceeded", "messages"),
        ({"max_tokens": 5000}, 400, "context_length_exceeded", "max_tokens"),
        ({"temperature": -1}, 400, None, "temperature"),
        ({"temperature": "warm"}, 400, None, "temperature"),
        ({"n": 2}, 400, None, "n"),
        ({"tools": [{"type": "function"}]}, 400, None, "tools"),
        ({"response_format": {"type": "json_object"}}, 400, None, "response_format.type"),
        ({"logit_bias": {"999999": 1}}, 400, None, "logit_bias"),
        ({"stop": [""]}, 400, None, None),
        ({"chat_template_kwargs": {"messages": 1}}, 400, None, None),
        ({"messages": [{"role": "user", "content": "half \ud800"}]}, 400, None, None),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            400,
            None,
            None,
        ),
    ],
)
def test_what_cannot_be_answered_is_said_in_openais_form(
    change: dict[str, Any], status: int, code: str | None, param: str | None, server: Any
) -> None:
    body = json.dumps({"messages": question(), **change}).encode()
    found, _, told = server.raw("POST", "/v1/chat/completions", body, content_type="application/json")
    error = json.loads(told)["error"]
    assert (found, error["code"], error["type"]) == (status, code, "invalid_request_error")
    assert error["message"]
    assert param is None or error["param"] == param


def test_the_client_raises_its_own_errors(server: Any) -> None:
    with server.client() as client:
        with pytest.raises(openai.BadRequestError, match="context is 1024 tokens") as told:
            client.chat.completions.create(model=NAME, messages=question("one " * 3000))
        assert told.value.code == "context_length_exceeded"
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="another", messages=question())


GARBAGE = [
    b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"messages": NaN}', b'{"messages": "' + b"[" * 9, b"[" * 100_000,
    b'{"messages":[{"role":"user","content":"x"}],"temperature":NaN}', b'{"messages":[{"role":"user","content":"x"}],"seed":1e400}',
]  # fmt: skip


@pytest.mark.parametrize("body", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_is_a_bad_request(body: bytes, server: Any) -> None:
    status, _, told = server.raw("POST", "/v1/chat/completions", body, content_type="application/json")
    assert status == 400
    assert json.loads(told)["error"]["type"] == "invalid_request_error"


def test_other_kinds_of_bodies_sizes_and_methods(server: Any) -> None:
    good = json.dumps({"messages": question(), "max_tokens": 1}).encode()
    # What a web page may send without asking first is not taken for JSON.
    assert server.raw("POST", "/v1/chat/completions", good, content_type="text/plain")[0] == 400
    assert server.raw("GET", "/v1/chat/completions")[0] == 405
    assert server.raw("GET", "/nothing")[0] == 404
    assert json.loads(server.raw("GET", "/nothing")[2])["error"]["message"] == "Not Found"
    large = server.raw("POST", "/v1/chat/completions", b" " * (5 << 20), content_type="application/json")
    assert large[0] == 413
    assert large[1]["connection"] == "close"

    def pieces() -> Any:
        for _ in range(80):
            yield b" " * (1 << 16)

    # Without a stated length the bytes are counted as they come; the server may hang up on the rest.
    try:
        status = server.raw("POST", "/v1/chat/completions", pieces(), content_type="application/json")[0]
    except OSError:
        status = 413
    assert status == 413
    assert server.raw("GET", "/health")[0] == 200


def test_a_page_from_elsewhere_cannot_use_a_local_server(server: Any) -> None:
    for host, status in (("evil.example", 403), ("evil.example:80", 403), ("localhost", 200), ("[::1]:99", 200)):
        assert server.raw("GET", "/v1/models", Host=host)[0] == status


def test_raw_bytes_do_no_harm(server: Any) -> None:
    for junk in (
        b"\0" * 500,
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/models HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"\x16\x03\x01",
    ):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as link:
            link.sendall(junk)
            link.shutdown(socket.SHUT_WR)
            link.settimeout(10)
            answer = link.recv(4096)
            assert answer == b"" or re.match(rb"HTTP/1.1 4\d\d", answer)
    assert server.raw("GET", "/health")[0] == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_is_forgotten(stream: bool, server: Any) -> None:
    name, reason = "vllm:request_success_total", {"finished_reason": "abort"}
    before = server.samples()[server.key(name, **reason)]
    links = [server.ask(stream=stream) for _ in range(100)]  # four are answered, the others wait
    for link in links:
        link.close()
    server.wait(name, before + 100, **reason)
    after = server.samples()
    assert after[server.key("vllm:num_requests_running")] == after[server.key("vllm:num_requests_waiting")] == 0


@pytest.mark.parametrize(
    ("host", "exposed"),
    [
        ("127.0.0.1", False),
        ("localhost", False),
        ("::1", False),
        ("0.0.0.0", True),
        ("192.168.1.5", True),
        ("box.lan", True),
    ],
)
def test_who_can_reach_a_host(host: str, exposed: bool) -> None:
    assert is_exposed(host) is exposed


def test_names_in_host_headers() -> None:
    assert [host_name(header) for header in (b"[::1]:80", b"LocalHost:1", b"", b"127.0.0.1")] == [
        "::1",
        "localhost",
        "",
        "127.0.0.1",
    ]
    assert not is_loopback("localhost.evil.example")
    assert not is_loopback("")
