"""The engine: answers side by side are those given alone, nobody waits for a long prompt, and nobody is forgotten."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

from r1q.core.errors import MissingError, UsageError
from r1q.runtimes.base import Floats
from r1q.runtimes.echo import EchoSession
from r1q.serve.engine import SMALLEST_SLICE, Engine
from r1q.serve.jobs import Event, Job, Piece, Refused
from r1q.serve.pace import Adjustable
from r1q.serve.run import Opened
from r1q.serve.sampling import Sampling
from r1q.serve.speech import Speech
from r1q.serve.vocabulary import Vocabulary

END = 9
LETTERS = Vocabulary(
    model="gpt2", tokens=list("abcdefghijklmnop"), types=[1] * 16, ends=frozenset([END]), template=None, bos="", eos="",
    temperature=0.6, top_p=0.95,
)  # fmt: skip


class Talk:
    """A job and what was delivered for it."""

    def __init__(self, prompt: Sequence[int], limit: int = 5, **wish: object) -> None:
        self.events: list[Event] = []
        self.ended = threading.Event()
        self.job = Job(
            prompt=list(prompt), limit=limit, sampling=Sampling(temperature=0), speech=Speech("never"),
            chance=np.random.default_rng(0), deliver=self._add, **wish,  # type: ignore[arg-type]
        )  # fmt: skip

    def _add(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Refused) or event.ending is not None:
            self.ended.set()

    def wait(self) -> Event:
        assert self.ended.wait(20), "no end came"
        return self.events[-1]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Piece))


def deliver(events: Sequence[tuple[Job, Event]]) -> None:
    for job, event in events:
        job.deliver(event)


class Watched(EchoSession):
    """Echo, which notes what was called, and can be told to fail or to wait."""

    def __init__(self, sequences: int = 2, context: int = 1000) -> None:
        super().__init__(16, context, sequences, load_seconds=0)
        self.calls: list[tuple[str, int]] = []
        self.fail_steps = 0
        self.gate = threading.Event()
        self.gate.set()
        self.pause_at = 0  # the step before which it waits for the gate
        self.paused = threading.Event()

    def prefill(self, sequence: int, tokens: Sequence[int]) -> Floats:
        if threading.current_thread().name == "r1q-engine" and not self._stepping:
            self.gate.wait(20)
            self.calls.append(("prefill", len(tokens)))
        return super().prefill(sequence, tokens)

    _stepping = False

    def step(self, pairs: Sequence[tuple[int, int]]) -> Floats:
        self.gate.wait(20)
        self.calls.append(("step", len(pairs)))
        if sum(what == "step" for what, _ in self.calls) == self.pause_at:
            self.gate.clear()
            self.paused.set()
            self.gate.wait(20)
        if self.fail_steps:
            self.fail_steps -= 1
            raise MissingError("the runtime broke")
        self._stepping = True
        try:
            return super().step(pairs)
        finally:
            self._stepping = False


@pytest.fixture
def make() -> Iterator[Callable[..., tuple[Engine, Watched]]]:
    engines: list[Engine] = []

    def build(sequences: int = 2, queue: int = 8, start: bool = True) -> tuple[Engine, Watched]:
        session = Watched(sequences)
        engine = Engine(session, LETTERS, queue=queue, post=deliver)
        engines.append(engine)
        if start:
            engine.start()
        return engine, session

    yield build
    for engine in engines:
        engine.session.gate.set()  # type: ignore[attr-defined]
        engine.close()


Make = Callable[..., tuple[Engine, Watched]]


def test_an_answer_is_what_the_model_says_step_by_step(make: Make) -> None:
    engine, _ = make()
    talk = Talk([1, 2, 3], limit=4)
    engine.submit(talk.job)
    last = talk.wait()
    # Echo repeats what it read last.
    assert talk.text == "dddd"
    assert isinstance(last, Piece)
    assert last.ending == "length"
    assert last.usage is not None
    assert (last.usage.prompt, last.usage.answer, last.usage.cached) == (3, 4, 0)


def test_an_end_token_ends_and_says_nothing_unless_it_is_to_be_ignored(make: Make) -> None:
    engine, _ = make()
    ends, goes_on = Talk([END]), Talk([END], ignore_ends=True)
    engine.submit(ends.job)
    engine.submit(goes_on.job)
    last = ends.wait()
    assert isinstance(last, Piece)
    assert (ends.text, last.ending) == ("", "stop")
    goes_on.wait()
    assert goes_on.text == "jjjjj"


def test_many_at_once_answer_as_alone(opened: Opened) -> None:
    """The embedded model, seeded: eight requests over four sequences say what each says alone."""

    def ask(count: int, together: bool) -> list[str]:
        engine = Engine(opened.session, opened.vocabulary, queue=99, post=deliver)
        engine.start()
        talks = []
        for number in range(count):
            prompt = opened.session.encode(
                f"<｜begin▁of▁sentence｜><｜User｜>What is {number} + 21?<｜Assistant｜><think>\n"
            )
            talks.append(Talk(prompt, limit=60))
            engine.submit(talks[-1].job)
            if not together:
                talks[-1].wait()
        for talk in talks:
            talk.wait()
        engine._ended = True  # the session is another test's: end the thread alone
        engine.give_up()
        return [talk.text for talk in talks]

    together, alone = ask(8, together=True), ask(8, together=False)
    # Batches round differently, so that a near-tie may fall otherwise; an exchanged or leaking sequence breaks nearly all.
    assert sum(left == right for left, right in zip(together, alone, strict=True)) >= 7
    right = sum(text.partition("</think>")[2].strip() == str(number + 21) for number, text in enumerate(together))
    assert right >= 6


def test_steps_are_taken_together(make: Make) -> None:
    engine, session = make(sequences=4)
    session.gate.clear()
    talks = [Talk([number]) for number in range(4)]
    for talk in talks:
        engine.submit(talk.job)
    session.gate.set()
    for talk in talks:
        talk.wait()
    assert [talk.text for talk in talks] == ["aaaaa", "bbbbb", "ccccc", "ddddd"]
    steps = [count for what, count in session.calls if what == "step"]
    assert max(steps) == 4
    assert len(steps) < 4 * 4


def test_a_long_prompt_is_read_in_slices_between_the_steps_of_others(make: Make) -> None:
    engine, session = make()
    session.pause_at = 3
    talking = Talk([1], limit=40)
    engine.submit(talking.job)
    assert session.paused.wait(20)
    engine._rate = 1.0  # a slow machine: the smallest slices
    session.calls.clear()
    reading = Talk([2] * 200, limit=1)
    engine.submit(reading.job)
    session.pause_at = 0
    session.gate.set()
    reading.wait()
    talking.wait()
    slices = [count for what, count in session.calls if what == "prefill"]
    first = [index for index, (what, _) in enumerate(session.calls) if what == "prefill"]
    assert slices[0] == SMALLEST_SLICE
    assert sum(slices) == 200
    assert session.calls[first[0] + 1][0] == "step"  # a step came before the next slice


def test_what_a_sequence_holds_is_not_read_again(make: Make) -> None:
    engine, session = make()
    first = Talk([1, 2, 3, 4, 5, 6], limit=3)
    engine.submit(first.job)
    first.wait()
    session.calls.clear()
    again = Talk([1, 2, 3, 4, 5, 6, 6, 6, 7], limit=3)  # the prompt, the answer as far as it was fed, and more
    engine.submit(again.job)
    last = again.wait()
    assert isinstance(last, Piece)
    assert last.usage is not None
    assert last.usage.cached == 8
    assert ("prefill", 1) in session.calls
    other = Talk([1, 3, 3, 3, 3, 3, 3, 3, 3, 3], limit=1)
    engine.submit(other.job)
    other.wait()
    # One token in common is no reason to give up what another sequence holds: the unused one was taken.
    assert engine._held[again.job.sequence][:9] == again.job.prompt


def test_a_full_queue_refuses_with_a_time_to_come_back(make: Make) -> None:
    engine, session = make(sequences=1, queue=2)
    session.gate.clear()
    talks = [Talk([1]) for _ in range(3)]
    for talk in talks:
        engine.submit(talk.job)
    with pytest.raises(Refused) as refused:
        engine.submit(Talk([1]).job)
    assert (refused.value.status, refused.value.code) == (429, "queue_full")
    assert 1 <= refused.value.retry <= 60
    session.gate.set()
    for talk in talks:
        assert isinstance(talk.wait(), Piece)
    late = Talk([1])
    engine.submit(late.job)
    assert isinstance(late.wait(), Piece)


def test_a_client_that_leaves_gives_its_place_to_the_next(make: Make) -> None:
    engine, session = make(sequences=1)
    session.pause_at = 3
    endless, waiting, next_one = Talk([1], limit=900), Talk([2]), Talk([3])
    for talk in (endless, waiting, next_one):
        engine.submit(talk.job)
    assert session.paused.wait(20)
    engine.cancel(waiting.job)
    engine.cancel(endless.job)
    session.gate.set()
    assert isinstance(next_one.wait(), Piece)
    assert not waiting.events
    assert not endless.ended.is_set()
    assert engine.meters.text().count(b'finished_reason="abort"') == 2  # the count and its time of creation
    assert b'request_success_total{finished_reason="abort",model_name="model"} 2.0' in engine.meters.text()


def test_giving_up_tells_everybody_and_takes_nobody(make: Make) -> None:
    engine, session = make(sequences=1)
    session.pause_at = 3
    endless, waiting = Talk([1], limit=900), Talk([2])
    engine.submit(endless.job)
    engine.submit(waiting.job)
    assert session.paused.wait(20)
    engine.drain()
    assert not engine.healthy
    with pytest.raises(Refused, match="stopping"):
        engine.submit(Talk([1]).job)
    engine.give_up()
    session.gate.set()
    for talk in (endless, waiting):
        told = talk.wait()
        assert isinstance(told, Refused)
        assert told.status == 503


def test_a_model_that_fails_tells_those_at_hand_and_answers_the_next(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    engine, session = make()
    session.fail_steps = 1
    broken = Talk([1])
    engine.submit(broken.job)
    told = broken.wait()
    assert isinstance(told, Refused)
    assert told.status == 500
    assert "the runtime broke" not in told.message
    assert "the runtime broke" in caplog.text
    after = Talk([4], limit=3)
    engine.submit(after.job)
    after.wait()
    assert after.text == "eee"
    assert engine.healthy


def test_a_session_that_cannot_be_emptied_ends_the_engine(
    make: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, session = make()
    session.fail_steps, session.pause_at = 1, 1

    def stuck(sequence: int, start: int = 0) -> None:
        raise MissingError("gone")

    talk = Talk([1])
    engine.submit(talk.job)
    assert session.paused.wait(20)
    monkeypatch.setattr(session, "drop", stuck)
    session.gate.set()
    assert isinstance(talk.wait(), Refused)
    engine._thread.join(20)
    assert not engine.healthy
    with pytest.raises(Refused):
        engine.submit(Talk([1]).job)


def test_log_probabilities_come_with_every_token(make: Make) -> None:
    engine, _ = make()
    talk = Talk([1, 1, 2], limit=2, top=1)
    engine.submit(talk.job)
    talk.wait()
    scores = [score for event in talk.events if isinstance(event, Piece) for score in event.scores]
    assert [score.token for score in scores] == [2, 2]
    logits = np.zeros(16)
    logits[[1, 2]] = [2, 9]  # how often each was read, and 8 for the last
    assert scores[0].value == pytest.approx(9 - np.log(np.exp(logits).sum()), abs=1e-6)
    assert scores[0].top == ((2, scores[0].value),)


def test_a_closed_engine_closes_its_session() -> None:
    session = Watched()
    engine = Engine(session, LETTERS, queue=1, post=deliver)
    engine.start()
    engine.close()
    with pytest.raises(UsageError, match="closed"):
        session.drop(0)


class Paced(Watched):
    """One whose threads can be changed."""

    threads = 4

    def set_threads(self, count: int) -> None:
        """Note it."""
        self.calls.append(("threads", count))
        self.threads = count


@pytest.mark.parametrize("pace", [True, False])
def test_threads_change_only_where_they_may(pace: bool) -> None:
    session = Paced()
    engine = Engine(session, LETTERS, queue=8, post=deliver, pace=pace)
    engine.start()
    talk = Talk([1, 2, 3], limit=60)
    engine.submit(talk.job)
    talk.wait()
    engine.close()
    counts = {count for what, count in session.calls if what == "threads"}
    # It begins with one in a crowd, else a trial of two comes soon.
    assert bool(counts & {1, 2}) if pace else not counts
    assert talk.text == "d" * 60


def test_llama_cpp_computes_the_same_with_other_threads(opened: Opened) -> None:
    session = opened.session
    assert isinstance(session, Adjustable)
    session.prefill(0, [5, 6, 7])
    session.prefill(1, [5, 6, 7])
    one = session.step([(0, 8)])
    session.set_threads(2)
    two = session.step([(1, 8)])
    assert session.threads == 2
    np.testing.assert_array_equal(one, two)
