r"""A model's own answers to problems, thoughts and all: the text it is best calibrated on, because it is what it will write.

The settings are those its makers recommend for DeepSeek-R1: temperature 0.6, top-p 0.95, no system message, what is wanted said in the
question, and `<think>\n` written for the model, so that it cannot skip thinking. Several sequences run at once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from r1q.calibration.conversations import CLOSE, DATE, OPEN
from r1q.calibration.problems import Problem, is_right
from r1q.calibration.sampling import Floats, draw_token
from r1q.core.errors import UsageError
from r1q.models.tokenizer import Tokenizer

Trace = dict[str, object]
TEMPERATURE, TOP_P = 0.6, 0.95


class Speaker(Protocol):
    """What is needed of an opened model: every session of `runtimes` has it."""

    @property
    def context(self) -> int:
        """Tokens that one sequence can hold."""

    @property
    def sequences(self) -> int:
        """Sequences that can live at once, numbered from 0."""

    def prefill(self, sequence: int, tokens: Sequence[int]) -> Floats:
        """Append `tokens` to `sequence` and return the logits [vocab] after the last of them."""

    def step(self, pairs: Sequence[tuple[int, int]]) -> Floats:
        """Append one token to each of several different sequences; return their logits [pairs, vocab]."""

    def drop(self, sequence: int, start: int = 0) -> None:
        """Forget the tokens of `sequence` from position `start` on."""


@dataclass(slots=True)
class _Answer:
    """One sequence at work: the problem, how many tokens the question had, and the tokens said so far."""

    index: int
    problem: Problem
    asked: int
    rng: np.random.Generator
    said: list[int] = field(default_factory=list)


def generate_traces(
    session: Speaker,
    tokenizer: Tokenizer,
    problems: Iterable[tuple[int, Problem]],
    *,
    seed: int,
    max_tokens: int,
    temperature: float = TEMPERATURE,
    top_p: float = TOP_P,
    stops: Collection[int] = (),
) -> Iterator[Trace]:
    """Let the model answer numbered problems, `session.sequences` at a time; yield each trace when it ends, whatever the order.

    A trace has `messages` (user; assistant with `content` and `reasoning_content`), `index`, `kind`, `result`, `seed`, `tokens`,
    whether it is `finished` (ended by the model, not by `max_tokens` or the context) and `right`. One that never stopped
    thinking has its thoughts in `content`, after an open tag. The model ends a turn with its end-of-text token or one of `stops`.
    Chance comes from the seed and the index alone, so neither order nor company change what is drawn from equal logits.

    Raises `UsageError` for settings out of range, or a question that does not fit the context.
    """
    if max_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise UsageError(
            f"max_tokens {max_tokens}, temperature {temperature}, top_p {top_p}: at least 1, at least 0, and in (0, 1]"
        )
    ends = {*stops, *([] if tokenizer.eos_id is None else [tokenizer.eos_id])}
    waiting = iter(problems)
    free, busy = list(range(session.sequences)), dict[int, _Answer]()
    logits: dict[int, Floats] = {}
    while True:
        while free and (entry := next(waiting, None)) is not None:
            sequence = free.pop(0)
            busy[sequence], logits[sequence] = _begin(session, tokenizer, sequence, *entry, seed)
        if not busy:
            return
        for sequence, answer in list(busy.items()):
            row = logits[sequence][: tokenizer.vocab_size]  # rows beyond are padding, which spells nothing
            token = draw_token(row, answer.rng, temperature=temperature, top_p=top_p)
            if token not in ends:
                answer.said.append(token)
            full = len(answer.said) >= max_tokens or answer.asked + len(answer.said) >= session.context
            if token in ends or full:
                yield _trace(tokenizer, answer, seed, finished=token in ends)
                session.drop(sequence)
                del busy[sequence]
                free.append(sequence)
        if busy:
            rows = session.step([(sequence, answer.said[-1]) for sequence, answer in busy.items()])
            logits = dict(zip(busy, rows, strict=True))


def prompt_ids(tokenizer: Tokenizer, question: str) -> list[int]:
    r"""Return the ids of a question in the model's template, with `<think>\n` at the end whether the template writes it or not."""
    if tokenizer.chat_template is None:
        return tokenizer.encode(f"{question}\n\n{OPEN}\n", add_special=True)
    text = tokenizer.render_chat([{"role": "user", "content": question}], now=DATE, thinking=True, enable_thinking=True)
    if not text.rstrip().endswith(OPEN):
        text += f"{OPEN}\n"
    return tokenizer.encode(text, add_special=False)


def _begin(
    session: Speaker, tokenizer: Tokenizer, sequence: int, index: int, problem: Problem, seed: int
) -> tuple[_Answer, Floats]:
    asked = prompt_ids(tokenizer, problem.question)
    answer = _Answer(index, problem, len(asked), np.random.default_rng([seed, index]))
    return answer, session.prefill(sequence, asked)


def _trace(tokenizer: Tokenizer, answer: _Answer, seed: int, *, finished: bool) -> Trace:
    text = tokenizer.decode(answer.said)
    if not finished:
        text = text.rstrip("\ufffd")  # it may have been cut inside a character
    thoughts, closed, content = text.partition(CLOSE)
    assistant = {"role": "assistant", "content": f"{OPEN}\n{text}"}
    if closed:
        assistant |= {"content": content.strip(), "reasoning_content": thoughts.strip()}
    problem = answer.problem
    return {
        "messages": [{"role": "user", "content": problem.question}, assistant],
        "index": answer.index,
        "kind": problem.kind,
        "result": problem.result,
        "seed": seed,
        "tokens": len(answer.said),
        "finished": finished,
        "right": (finished or bool(closed)) and is_right(problem, content if closed else text),
    }
