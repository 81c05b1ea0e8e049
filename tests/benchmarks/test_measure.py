"""Speed in the child: what is fed to the session in which order, on the echo runtime and on llama.cpp."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from r1q.benchmarks import measure
from r1q.core.errors import InputError
from r1q.runtimes.base import Floats
from r1q.runtimes.echo import EchoSession

JOB = {
    "prompt": 3,
    "prefill": 7,
    "generate": 4,
    "depths": [0],
    "repetitions": 5,
    "seed": 1,
    "runtime": "echo",
    "options": {},
}


@pytest.mark.parametrize(
    ("depths", "decoding"),
    [
        ([0], [("drop", 0), *[("step", 1)] * 4]),
        # What the prefill left is the first depth; a greater one is filled anew, for decoding has written behind it.
        (
            [0, 7, 12],
            [*[("step", 1)] * 4, ("drop", 0), ("prefill", 12), *[("step", 1)] * 4, ("drop", 0), *[("step", 1)] * 4],
        ),
        # Deeper than what is there: only the rest is prefilled. Less deep: all of it.
        ([10], [("prefill", 3), *[("step", 1)] * 4]),
        ([2], [("drop", 0), ("prefill", 2), *[("step", 1)] * 4]),
    ],
)
def test_every_timing_starts_in_a_memory_of_its_own_depth(
    echo_file: Path, monkeypatch: pytest.MonkeyPatch, depths: list[int], decoding: list[tuple[str, int]]
) -> None:
    calls: list[tuple[str, int]] = []
    originals = (EchoSession.prefill, EchoSession.step, EchoSession.drop)

    def prefill(self: EchoSession, sequence: int, tokens: Sequence[int]) -> Floats:
        calls.append(("prefill", len(tokens)))
        return originals[0](self, sequence, tokens)

    def step(self: EchoSession, pairs: Sequence[tuple[int, int]]) -> Floats:
        calls.append(("step", len(pairs)))
        self._histories[0].append(pairs[0][1])  # type: ignore[index]
        return np.zeros((1, self.vocab), dtype=np.float32)

    def drop(self: EchoSession, sequence: int, start: int = 0) -> None:
        calls.append(("drop", start))
        originals[2](self, sequence, start)

    monkeypatch.setattr(EchoSession, "prefill", prefill)
    monkeypatch.setattr(EchoSession, "step", step)
    monkeypatch.setattr(EchoSession, "drop", drop)
    list(measure.speed({**JOB, "path": str(echo_file), "repetitions": 1, "depths": depths}))
    once = [("drop", 0), ("prefill", 3), ("drop", 0), ("prefill", 7), *decoding]
    assert calls == once * 2  # the warm-up and one repetition


def test_messages_carry_every_sample(echo_file: Path) -> None:
    opened, *rounds, last = measure.speed({**JOB, "path": str(echo_file), "depths": [0, 9]})
    assert last["warm_load"] >= 0
    assert opened["opened"]["threads"] == 1
    assert opened["opened"]["versions"]["r1q"]
    assert [message["repetition"] for message in rounds] == [0, 1, 2, 3, 4, 5]
    for message in rounds:
        assert set(message["seconds"]) == {"first_token", "prefill", "decode@0", "decode@9"}
        for name in ("decode@0", "decode@9"):
            assert len(message["latencies"][name]) == 4
            # Every token's time is a part of the whole; what is left is one argmax.
            assert sum(message["latencies"][name]) <= message["seconds"][name] + 1e-6
        assert min(message["seconds"].values()) > 0
        assert message["peak_memory"] >= opened["opened"]["base_memory"]


def test_a_logit_that_is_no_number_stops_the_measurement(echo_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EchoSession, "_after", lambda self, history: np.full(self.vocab, np.nan, dtype=np.float32))
    with pytest.raises(InputError, match="first_token ends in a logit that is not a number"):
        list(measure.speed({**JOB, "path": str(echo_file)}))


def test_the_same_seed_feeds_the_same_tokens(echo_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    original = EchoSession.prefill

    def prefill(self: EchoSession, sequence: int, tokens: Sequence[int]) -> Floats:
        seen.append(tuple(tokens))
        return original(self, sequence, tokens)

    monkeypatch.setattr(EchoSession, "prefill", prefill)
    for _ in range(2):
        list(measure.speed({**JOB, "path": str(echo_file), "repetitions": 1}))
    half = len(seen) // 2
    assert seen[:half] == seen[half:]
    assert all(0 <= token < 24 for tokens in seen for token in tokens)


@pytest.mark.runtime
def test_a_real_file(tiny_gguf: Path) -> None:
    job = {**JOB, "path": str(tiny_gguf), "runtime": "llama-cpp", "options": {"threads": 1, "context": 128}}
    opened, *rounds, _ = measure.speed(job)
    assert opened["opened"]["context"] == 128
    assert opened["opened"]["load_seconds"] > 0
    assert len(rounds) == 6
