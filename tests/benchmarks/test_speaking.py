"""Speaking: luck belongs to the answer, time is shared out whole, and every way to end is told apart."""

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from r1q.benchmarks.speaking import Answer, at, luck, speak
from r1q.runtimes.base import Options
from r1q.runtimes.echo import Echo, EchoSession


@pytest.fixture
def session(tmp_path: Path) -> EchoSession:
    return opened(tmp_path, 1)


def opened(folder: Path, sequences: int, context: int = 64) -> EchoSession:
    path = folder / f"{sequences}.echo"
    path.write_text('{"vocab": 24, "context": 64}')
    return Echo().open(path, Options(sequences=sequences, context=context))


def some(count: int, **settings: object) -> list[Answer]:
    given = {"max_tokens": 30, "temperature": 4.0, **settings}
    return [Answer(asked=[1 + i % 5, 2], key=luck(f"question {i}", i), **given) for i in range(count)]  # type: ignore[arg-type]


def said(session: EchoSession, answers: Sequence[Answer]) -> list[list[int]]:
    ended = list(speak(session, answers, vocab=24, ends={0, 7}))
    assert len(ended) == len(answers)
    return [answer.said for answer in answers]


def test_neither_order_nor_company_changes_an_answer(tmp_path: Path) -> None:
    alone, together = (opened(tmp_path, sequences) for sequences in (1, 5))
    expected = said(alone, some(12))
    assert said(together, some(12)) == expected
    assert said(together, some(12)[::-1]) == expected[::-1]
    assert [said(alone, [answer])[0] for answer in some(12)] == expected
    assert len({tuple(words) for words in expected}) > 8
    assert {len(words) < 30 for words in expected} == {True, False}


def test_luck_is_by_text_seed_and_position() -> None:
    keys = {luck(text, seed) for text in "ab" for seed in range(3)}
    assert len(keys) == 6
    drawn = [at(luck("a", 0), position).random() for position in range(2000)]
    assert drawn == [at(luck("a", 0), position).random() for position in range(2000)]
    assert abs(np.mean(drawn) - 0.5) < 5 * np.sqrt(1 / 12 / 2000)
    assert abs(np.corrcoef(drawn[1:], drawn[:-1])[0, 1]) < 5 / np.sqrt(2000)


def test_tokens_come_as_often_as_they_are_likely(session: EchoSession) -> None:
    answers = [Answer(asked=[3], key=luck("x", seed), max_tokens=1, temperature=4.0, top_p=1.0) for seed in range(3000)]
    found = Counter(answer.said[0] for answer in speak(session, answers, vocab=24, ends=()))
    row = session.prefill(0, [3])
    chances = np.exp(row / 4.0) / np.exp(row / 4.0).sum()
    expected = 3000 * chances
    statistic = sum((found[token] - expected[token]) ** 2 / expected[token] for token in range(24))
    assert statistic < 23 + 5 * np.sqrt(46)  # chi-squared of 23 degrees


def test_how_answers_end(tmp_path: Path) -> None:
    session = opened(tmp_path, 2, context=20)
    cut, full, stopped, greedy = (
        Answer(asked=[5], key=1, max_tokens=4, temperature=0),
        Answer(asked=[5], key=1, max_tokens=400, temperature=0),
        Answer(asked=[5], key=1, max_tokens=400, temperature=0, stop=lambda said: len(said) == 3),
        Answer(asked=[7], key=1, max_tokens=4, temperature=0),
    )
    list(speak(session, [cut, full, stopped, greedy], vocab=24, ends={7}))
    assert (cut.said, cut.finished) == ([5] * 4, False)
    assert (full.said, full.finished) == ([5] * 19, False)
    assert (stopped.said, stopped.finished) == ([5] * 3, True)
    assert (greedy.said, greedy.finished) == ([], True)


def test_padding_beyond_the_tokenizer_is_never_said(session: EchoSession) -> None:
    answers = some(6)
    list(speak(session, answers, vocab=3, ends=()))
    assert {token for answer in answers for token in answer.said} <= {0, 1, 2}


def test_time_is_shared_out_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session, ticks = opened(tmp_path, 2), itertools.count()
    monkeypatch.setattr("r1q.benchmarks.speaking.time.perf_counter", lambda: next(ticks))
    answers = some(5)
    list(speak(session, answers, vocab=24, ends={0, 7}))
    # Two looks at the clock, one tick apart, for every prefill and every step.
    assert sum(answer.seconds for answer in answers) == pytest.approx(next(ticks) / 2)
