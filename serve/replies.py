"""What clients receive: OpenAI's response bodies and stream chunks, as plain dictionaries."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from r1q.serve.jobs import Piece, Usage
from r1q.serve.sampling import LogProbability
from r1q.serve.vocabulary import Vocabulary

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Form(ABC):
    """What all bodies of one request share. `scored`: whether log-probabilities were asked for."""

    id: str
    created: int
    model: str
    vocabulary: Vocabulary
    scored: bool
    usage_chunk: bool

    @abstractmethod
    def body(self, answer: Piece) -> dict[str, Any]:
        """Return the body of an answer that is not streamed."""

    def opening(self) -> bytes:
        """Return what a stream begins with."""
        return b""

    @abstractmethod
    def chunk(self, piece: Piece) -> bytes:
        """Return a piece as a server-sent event; the last one is followed by the usage, where asked for, and the end mark."""

    def _event(self, kind: str, choices: list[dict[str, Any]], usage: Usage | None = None) -> bytes:
        told = {"usage": None if usage is None else usage_body(usage)} if self.usage_chunk else {}
        return event({**self._head(kind), "choices": choices, **told})

    def _ended(self, kind: str, piece: Piece) -> bytes:
        if piece.ending is None:
            return b""
        return (self._event(kind, [], piece.usage) if self.usage_chunk else b"") + DONE

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


class ChatForm(Form):
    """Bodies of /v1/chat/completions; the thought is `reasoning_content`, as DeepSeek's own server has it."""

    def body(self, answer: Piece) -> dict[str, Any]:
        """Return a chat.completion."""
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        if answer.thought:
            message["reasoning_content"] = answer.thought
        choice = {
            "index": 0,
            "message": message,
            "logprobs": self._scores(answer.scores),
            "finish_reason": answer.ending,
        }
        usage = {"usage": usage_body(answer.usage)} if answer.usage else {}
        return {**self._head("chat.completion"), "choices": [choice], **usage}

    def opening(self) -> bytes:
        """Return the chunk that names the role."""
        return self._event(_CHUNK, [_chat_choice({"role": "assistant", "content": ""}, None, None)])

    def chunk(self, piece: Piece) -> bytes:
        """Return the piece's thought, then its text, then its end, each as a chunk."""
        deltas = [{"reasoning_content": piece.thought}] if piece.thought else []
        deltas += [{"content": piece.text}] if piece.text else []
        scores = self._scores(piece.scores)
        if scores is not None and not deltas and piece.scores:
            deltas = [{"content": ""}]
        choices = [_chat_choice(delta, None, scores if i == 0 else None) for i, delta in enumerate(deltas)]
        if piece.ending is not None:
            choices.append(_chat_choice({}, piece.ending, None))
        return b"".join(self._event(_CHUNK, [choice]) for choice in choices) + self._ended(_CHUNK, piece)

    def _scores(self, scores: Sequence[LogProbability]) -> dict[str, Any] | None:
        if not self.scored:
            return None
        content = [
            {**self._score(score.token, score.value), "top_logprobs": [self._score(*top) for top in score.top]}
            for score in scores
        ]
        return {"content": content, "refusal": None}

    def _score(self, token: int, value: float) -> dict[str, Any]:
        spelled = self.vocabulary.spell(token)
        return {"token": self.vocabulary.name(token), "logprob": value, "bytes": list(spelled)}


class TextForm(Form):
    """Bodies of /v1/completions."""

    def body(self, answer: Piece) -> dict[str, Any]:
        """Return a text_completion."""
        choice = {
            "index": 0,
            "text": answer.text,
            "logprobs": self._scores(answer.scores),
            "finish_reason": answer.ending,
        }
        usage = {"usage": usage_body(answer.usage)} if answer.usage else {}
        return {**self._head("text_completion"), "choices": [choice], **usage}

    def chunk(self, piece: Piece) -> bytes:
        """Return the piece as one chunk."""
        choice = {
            "index": 0,
            "text": piece.text,
            "logprobs": self._scores(piece.scores),
            "finish_reason": piece.ending,
        }
        return self._event("text_completion", [choice]) + self._ended("text_completion", piece)

    def _scores(self, scores: Sequence[LogProbability]) -> dict[str, Any] | None:
        if not self.scored:
            return None
        name = self.vocabulary.name
        return {
            "tokens": [name(score.token) for score in scores],
            "token_logprobs": [score.value for score in scores],
            "top_logprobs": [{name(token): value for token, value in score.top} for score in scores],
        }


_CHUNK = "chat.completion.chunk"


def _chat_choice(delta: dict[str, Any], ending: str | None, scores: dict[str, Any] | None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": scores, "finish_reason": ending}


def usage_body(usage: Usage) -> dict[str, Any]:
    """Return the usage in OpenAI's form."""
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.answer,
        "total_tokens": usage.prompt + usage.answer,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
        "completion_tokens_details": {"reasoning_tokens": usage.thought},
    }


def event(value: dict[str, Any]) -> bytes:
    """Return one server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
