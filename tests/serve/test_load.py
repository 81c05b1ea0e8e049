"""Under load: 200 requests at once by the real openai client, and what /metrics tells Prometheus while they are answered."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import openai
import pytest

pytestmark = pytest.mark.runtime
NAME = "Tiny-R1-4.9M-Q4_K_M"
PARALLEL, COUNT = 4, 200
Sample = tuple[str, frozenset[tuple[str, str]]]

GAUGES = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
COUNTERS = ("prompt_tokens", "generation_tokens", "prefix_cache_queries", "prefix_cache_hits")
HISTOGRAMS = tuple(
    f"vllm:{name}_seconds"
    for name in (
        "time_to_first_token", "inter_token_latency", "request_time_per_output_token", "e2e_request_latency",
        "request_queue_time", "request_prefill_time", "request_decode_time",
    )
)  # fmt: skip
ENDINGS = ("stop", "length", "abort", "error")


def series(server: Any) -> Iterator[Sample]:
    """Yield what must be there from the first scrape on, so that no dashboard waits for a first event."""
    yield from (server.key(name) for name in GAUGES)
    yield from (server.key(f"vllm:{name}_total") for name in COUNTERS)
    yield from (server.key("vllm:request_success_total", finished_reason=ending) for ending in ENDINGS)
    for name in HISTOGRAMS:
        yield from (server.key(f"{name}_sum"), server.key(f"{name}_count"), server.key(f"{name}_bucket", le="+Inf"))


async def ask(server: Any) -> list[int]:
    """Send all requests at once, every other one streamed; return the tokens of each answer."""
    async with openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=120) as client:

        async def one(number: int) -> int:
            asked: dict[str, Any] = {
                "model": NAME,
                "messages": [{"role": "user", "content": f"What is {number % 83} + {number % 47}?"}],
                "max_tokens": 5,
                "seed": number,
            }
            if number % 2:
                answer = await client.chat.completions.create(**asked)
                return int(answer.usage.completion_tokens)
            stream: Any = await client.chat.completions.create(
                **asked, stream=True, stream_options={"include_usage": True}
            )
            (tokens,) = [int(chunk.usage.completion_tokens) async for chunk in stream if chunk.usage]
            return tokens

        return list(await asyncio.gather(*(one(number) for number in range(COUNT))))


def scrape(server: Any, answers: Future[list[int]]) -> list[dict[Sample, float]]:
    """Read /metrics again and again, by Prometheus' own parser, until all answers are there and once more."""
    seen = [server.samples()]
    while not answers.done():
        seen.append(server.samples())
    return [*seen, server.samples()]


def test_none_of_200_is_lost_and_metrics_only_grow(server: Any) -> None:
    before = server.samples()
    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(asyncio.run, ask(server))
        seen = scrape(server, answers)
    tokens = answers.result()
    assert len(tokens) == COUNT
    wanted = set(series(server))
    for samples in (before, *seen):
        assert wanted <= set(samples)
        assert 0 <= samples[server.key(GAUGES[0])] <= PARALLEL
        assert 0 <= samples[server.key(GAUGES[1])] <= COUNT
        assert 0 <= samples[server.key(GAUGES[2])] <= 1
        _buckets_add_up(samples)
    for earlier, later in itertools.pairwise((before, *seen)):
        grows = [key for key in earlier if key[0].endswith(("_total", "_count", "_bucket", "_sum"))]
        assert not [key for key in grows if later[key] < earlier[key]]
    loaded = [samples for samples in seen if samples[server.key(GAUGES[1])] and samples[server.key(GAUGES[0])]]
    assert loaded, "no scrape fell into the load"
    _everything_is_counted(server, before, seen[-1], tokens)


def _buckets_add_up(samples: dict[Sample, float]) -> None:
    """The buckets of each histogram never fall from one bound to the next, and the last holds as many as there were."""
    for name in HISTOGRAMS:
        found = {dict(labels)["le"]: value for (key, labels), value in samples.items() if key == f"{name}_bucket"}
        bounds = sorted(found, key=float)
        assert all(found[low] <= found[high] for low, high in itertools.pairwise(bounds))
        assert math.isinf(float(bounds[-1]))
        assert found[bounds[-1]] == samples[f"{name}_count", frozenset({("model_name", NAME)})]


def _everything_is_counted(
    server: Any, before: dict[Sample, float], after: dict[Sample, float], tokens: list[int]
) -> None:
    def grown(name: str, **labels: str) -> float:
        return after[server.key(name, **labels)] - before[server.key(name, **labels)]

    assert grown("vllm:generation_tokens_total") == sum(tokens)
    assert grown("vllm:prompt_tokens_total") == grown("vllm:prefix_cache_queries_total") > COUNT
    assert sum(grown("vllm:request_success_total", finished_reason=ending) for ending in ("stop", "length")) == COUNT
    assert grown("vllm:inter_token_latency_seconds_count") == sum(tokens) - COUNT
    for name in HISTOGRAMS[3:]:
        assert grown(f"{name}_count") == COUNT
    assert 0 < grown(f"{HISTOGRAMS[0]}_sum") <= grown("vllm:e2e_request_latency_seconds_sum")
    assert after[server.key(GAUGES[0])] == after[server.key(GAUGES[1])] == 0
