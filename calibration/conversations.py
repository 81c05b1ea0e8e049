r"""Conversations as a model was trained on them: its own chat template, with the reasoning that templates drop put back.

A template is written for chatting, where thoughts of earlier turns are left out: DeepSeek-R1's keeps what follows `</think>` only,
Qwen3's keeps the thoughts of the last turn. A model calibrated on that never sees itself think. So a conversation is rendered with
marks in place of thoughts and answers, and the marks are then replaced; thoughts without a mark go before their answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

from r1q.core.errors import InputError

OPEN, CLOSE = "<think>", "</think>"
# Some templates write today's date; the same conversation shall be the same tokens tomorrow.
DATE = datetime(2025, 1, 20, tzinfo=UTC)
# What a template puts before an answer whose thoughts it left out: nothing, an opened, a closed or an empty pair of tags.
_EMPTY_TAGS = re.compile(rf"(?:{OPEN}\s*)?(?:{CLOSE}\s*)?\Z")


class Templated(Protocol):
    """What is needed of a tokenizer: `models.tokenizer.Tokenizer` has it."""

    @property
    def chat_template(self) -> str | None:
        """The template's text, None where the model has none."""

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, now: datetime | None = None
    ) -> str:
        """Return the conversation as text."""


@dataclass(frozen=True, slots=True)
class _Turn:
    """An assistant's turn with thoughts in it: its place in the conversation, and what stands for its two parts."""

    index: int
    thoughts: str
    answer: str
    thoughts_mark: str
    answer_mark: str

    @property
    def block(self) -> str:
        """The turn as DeepSeek-R1 writes it."""
        return f"{OPEN}\n{self.thoughts}\n{CLOSE}\n\n{self.answer}"


def render_conversation(tokenizer: Templated, messages: Sequence[Mapping[str, Any]]) -> str:
    """Return `messages` as text in which every assistant's thoughts stand before its answer.

    Thoughts are a message's `reasoning_content`, or what its content has before `</think>`. Without a template, turns are joined by
    blank lines. Raises `InputError` for messages that are none, or that the template refuses, leaves out or repeats.
    """
    _check(messages)
    turns = [turn for turn in (_turn(index, message) for index, message in enumerate(messages)) if turn]
    if tokenizer.chat_template is None:
        blocks = {turn.index: turn.block for turn in turns}
        texts = [blocks.get(index) or str(message.get("content") or "") for index, message in enumerate(messages)]
        return "\n\n".join(text for text in texts if text)
    text = tokenizer.render_chat(_marked(messages, turns), add_generation_prompt=False, now=DATE)
    for turn in turns:
        text = _restored(text, turn)
    return text


def split_thoughts(content: str) -> tuple[str, str]:
    """Return what `content` has before and after `</think>`, both without tags and outer white space.

    >>> split_thoughts("<think>\\n1 + 1 = 2\\n</think>\\n\\nTwo.")
    ('1 + 1 = 2', 'Two.')
    >>> split_thoughts("Two.")
    ('', 'Two.')
    """
    before, tag, after = content.partition(CLOSE)
    if not tag:
        return "", content.strip()
    return before.strip().removeprefix(OPEN).strip(), after.strip()


def _check(messages: Sequence[Mapping[str, Any]]) -> None:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise InputError("messages is not a list of messages")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(f"message {index} has no role")
        for key in ("content", "reasoning_content"):
            if not isinstance(message.get(key), str | None):
                raise InputError(f"{key} of message {index} is not text")


def _turn(index: int, message: Mapping[str, Any]) -> _Turn | None:
    """Return the turn of an assistant's message that holds thoughts, None for any other."""
    if message["role"] != "assistant":
        return None
    content, given = message.get("content") or "", (message.get("reasoning_content") or "").strip()
    thoughts, answer = split_thoughts(content)
    if given and thoughts and given != thoughts:
        raise InputError(f"message {index} holds two different reasonings, in reasoning_content and in content")
    if not (thoughts or given):
        return None
    return _Turn(index, thoughts or given, answer, f"[r1q thoughts {index}]", f"[r1q answer {index}]")


def _marked(messages: Sequence[Mapping[str, Any]], turns: Sequence[_Turn]) -> list[dict[str, Any]]:
    marked = [dict(message) for message in messages]
    for turn in turns:
        marked[turn.index] |= {"content": turn.answer_mark, "reasoning_content": turn.thoughts_mark}
    return marked


def _restored(text: str, turn: _Turn) -> str:
    """Return `text` with the marks of `turn` replaced by what they stand for."""
    before, _, after = text.partition(turn.answer_mark)
    if text.count(turn.answer_mark) != 1 or text.count(turn.thoughts_mark) > 1 or turn.thoughts_mark in after:
        raise InputError(
            f"the chat template does not write message {turn.index} once, its reasoning first; give the conversation as text"
        )
    if turn.thoughts_mark in before:
        return before.replace(turn.thoughts_mark, turn.thoughts) + turn.answer + after
    return _EMPTY_TAGS.sub("", before, count=1) + turn.block + after
