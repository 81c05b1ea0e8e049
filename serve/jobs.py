"""What passes between requests and the engine: a job, the events of its answer, and the errors that end it early."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from r1q.serve.sampling import LogProbability, Sampling
from r1q.serve.speech import Speech

Ending = Literal["stop", "length"]


class Refused(Exception):
    """A request that is turned away or given up, as HTTP says it: status, OpenAI's type and code, one sentence for the client."""

    def __init__(
        self, status: int, kind: str, message: str, *, code: str | None = None, param: str | None = None, retry: int = 0
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.message = status, kind, message
        self.code, self.param, self.retry = code, param, retry

    def body(self) -> dict[str, object]:
        """Return the error in OpenAI's form."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of a request: `cached` of the prompt were still held from an earlier one, `thought` of the answer were thinking."""

    prompt: int
    answer: int
    thought: int
    cached: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Part of an answer: what is ready of thought and text, and for each token so far drawn its log-probability, if asked for.

    `ending` and `usage` are those of the last piece, None before.
    """

    thought: str = ""
    text: str = ""
    scores: tuple[LogProbability, ...] = ()
    ending: Ending | None = None
    usage: Usage | None = None


Event = Piece | Refused


def join(pieces: Sequence[Piece]) -> Piece:
    """Return pieces that follow each other as one."""
    return Piece(
        thought="".join(piece.thought for piece in pieces),
        text="".join(piece.text for piece in pieces),
        scores=tuple(score for piece in pieces for score in piece.scores),
        ending=pieces[-1].ending,
        usage=pieces[-1].usage,
    )


@dataclass(slots=True, eq=False, kw_only=True)
class Job:
    """One request for one answer. The upper fields are what is asked; the lower ones are the engine's and touched by nobody else.

    `limit`: most tokens of the answer. `top`: how many likeliest tokens to score beside each drawn one, None for no scores.
    `deliver` is called with every event, on the thread that the engine was given to post to; with `whole`, with one piece at the end.
    """

    prompt: list[int]
    limit: int
    sampling: Sampling
    speech: Speech
    chance: np.random.Generator
    deliver: Callable[[Event], None]
    top: int | None = None
    ignore_ends: bool = False
    whole: bool = False

    cancelled: bool = False
    sequence: int = -1
    fed: int = 0  # tokens of the prompt that the sequence holds
    cached: int = 0
    said: int = 0
    thought: int = 0
    counts: Counter[int] = field(default_factory=Counter)
    kept: list[Piece] = field(default_factory=list)  # of a whole answer
    next: int = -1  # the token drawn last, not yet fed
    arrived: float = 0.0
    began: float = 0.0
    first: float = 0.0
    latest: float = 0.0

    @property
    def prefilled(self) -> bool:
        """Whether the whole prompt has been read."""
        return self.fed == len(self.prompt)

    def usage(self) -> Usage:
        """Return the tokens counted so far."""
        return Usage(prompt=len(self.prompt), answer=self.said, thought=self.thought, cached=self.cached)
