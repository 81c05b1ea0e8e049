"""Speaking: many answers written side by side in one session, each with its own luck.

The chance of a token is that of its answer's key and its position alone (a counter, not a stream). So neither the order nor the
company of answers changes what is drawn from equal logits, and two artifacts that are given the same keys are given the same luck.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from r1q.calibration.sampling import Floats, draw_token
from r1q.calibration.traces import TEMPERATURE, TOP_P, Speaker


@dataclass(slots=True, kw_only=True)
class Answer:
    """One answer at work: the ids `asked`, its luck, its settings, what was said so far, and the seconds that took.

    `stop` looks at what was said and tells whether that is enough. `finished`: the model, or `stop`, ended it and not `max_tokens`.
    """

    asked: Sequence[int]
    key: int
    max_tokens: int
    temperature: float = TEMPERATURE
    top_p: float = TOP_P
    stop: Callable[[Sequence[int]], bool] | None = None
    said: list[int] = field(default_factory=list)
    seconds: float = 0.0
    finished: bool = False


T = TypeVar("T", bound=Answer)


def speak(session: Speaker, answers: Sequence[T], *, vocab: int, ends: Collection[int]) -> Iterator[T]:
    """Write every answer, `session.sequences` at a time; yield each as it ends. One of `ends` ends it and is not kept.

    `vocab` is the tokenizer's: rows of logits beyond are padding, which spells nothing. An answer's seconds are its own prefill and
    its share of every step it was in: together they are the whole time.
    """
    waiting, free = deque(answers), list(range(session.sequences))
    busy: dict[int, T] = {}
    rows: dict[int, Floats] = {}
    while waiting or busy:
        while free and waiting:
            sequence, answer = free.pop(0), waiting.popleft()
            started = time.perf_counter()
            rows[sequence] = session.prefill(sequence, answer.asked)
            answer.seconds += time.perf_counter() - started
            busy[sequence] = answer
        started, company, ended = time.perf_counter(), list(busy.values()), []
        for sequence, answer in list(busy.items()):
            if _ends(answer, rows[sequence][:vocab], ends, session.context):
                ended.append(answer)
                session.drop(sequence)
                del busy[sequence]
                free.append(sequence)
        if busy:
            found = session.step([(sequence, answer.said[-1]) for sequence, answer in busy.items()])
            rows = dict(zip(busy, found, strict=True))
        share = (time.perf_counter() - started) / len(company)
        for answer in company:
            answer.seconds += share
        yield from ended


def luck(text: str, seed: int) -> int:
    """Return the 128-bit key of a text's luck at a seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{text}".encode()).digest()[:16], "little")


def at(key: int, position: int) -> np.random.Generator:
    """Return the chance of the token at a position: Philox, whose counter is the position (Salmon 2011)."""
    return np.random.Generator(np.random.Philox(key=key, counter=position))


def _ends(answer: Answer, row: Floats, ends: Collection[int], context: int) -> bool:
    """Draw the next token of `answer` and return whether that was the last."""
    rng = at(answer.key, len(answer.said))
    token = draw_token(row, rng, temperature=answer.temperature, top_p=answer.top_p)
    if token in ends:
        answer.finished = True
        return True
    answer.said.append(token)
    answer.finished = answer.stop is not None and answer.stop(answer.said)
    full = len(answer.said) >= answer.max_tokens or len(answer.asked) + len(answer.said) >= context
    return answer.finished or full
