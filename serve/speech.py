r"""Text out of tokens, piece by piece: whole characters, thoughts apart from the answer, and nothing past a stop string.

Three small machines in a row, each of which holds back only what the next token could still change: bytes that are half a character,
text that may be the beginning of `</think>`, text that may be the beginning of a stop string.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

OPEN, CLOSE = "<think>", "</think>"
Thinking = Literal["open", "maybe", "never"]


@dataclass(frozen=True, slots=True)
class Said:
    """A piece of an answer that is ready: of the `thought`, of the answer's `text`, or of both."""

    thought: str = ""
    text: str = ""


class Thoughts:
    r"""Splits a stream of text at `</think>`; white space around either half belongs to neither.

    `open`: the prompt ended inside a thought. `maybe`: a thought begins if the text does with `<think>`. `never`: all is answer,
    untouched.
    """

    def __init__(self, thinking: Thinking) -> None:
        self._state: Literal["maybe", "thought", "answer"] = {"open": "thought", "maybe": "maybe", "never": "answer"}[
            thinking
        ]  # type: ignore[assignment]
        self._begun = thinking == "never"  # whether the half at hand has said anything but white space
        self._held = ""

    @property
    def thinking(self) -> bool:
        """Whether what comes next belongs to the thought."""
        return self._state == "thought"

    def add(self, text: str, *, last: bool = False) -> Said:
        """Return what `text` makes ready. With `last`, nothing is held back."""
        self._held += text
        thought = answer = ""
        if self._state == "maybe":
            self._decide(last)
        if self._state == "thought":
            thought = self._think(last)
        if self._state == "answer":
            answer = self._answer()
        return Said(thought, answer)

    def _decide(self, last: bool) -> None:
        seen = self._held.lstrip()
        if seen.startswith(OPEN):
            self._state, self._held = "thought", seen[len(OPEN) :]
        elif last or not OPEN.startswith(seen):
            self._state, self._begun = "answer", True  # nothing was thought: the answer is left as it is

    def _think(self, last: bool) -> str:
        if CLOSE[0] not in self._held and not self._held[-1:].isspace() and not last:  # nearly always
            return self._answer()
        thought, closed, rest = self._held.partition(CLOSE)
        if closed:
            self._state, self._held = "answer", rest
            ready = self._trimmed(thought).rstrip()
            self._begun = False
            return ready
        keep = 0 if last else partial_end(thought, (CLOSE,))
        ready = thought[: len(thought) - keep]
        # White space before </think> is dropped, so it waits for what follows it.
        stripped = ready.rstrip()
        self._held = "" if last else thought[len(stripped) :]
        return self._trimmed(stripped)

    def _answer(self) -> str:
        """Return all that is held; a thought's too, where nothing in it can be the end of the thought or space before it."""
        ready, self._held = self._trimmed(self._held), ""
        return ready

    def _trimmed(self, text: str) -> str:
        if not self._begun:
            text = text.lstrip()
            self._begun = bool(text)
        return text


class Stops:
    """Cuts a stream of text before the first stop string in it."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def add(self, text: str, *, last: bool = False) -> str:
        """Return what `text` makes ready; after a stop string has come (`found`), nothing."""
        if not self._stops:
            return text
        if self.found:
            return ""
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.found = True
            return self._held[: min(places)]
        keep = 0 if last else partial_end(self._held, self._stops)
        ready, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return ready


def partial_end(text: str, wanted: Sequence[str]) -> int:
    """Return the length of the longest end of `text` that begins one of `wanted` without being all of it.

    >>> partial_end("so</th", ["</think>"])
    4
    """
    longest = min(len(text), max(map(len, wanted)) - 1)
    end = text[len(text) - longest :]
    if not any(word[0] in end for word in wanted):  # nearly always
        return 0
    return next(
        (size for size in range(longest, 0, -1) if any(word.startswith(text[-size:]) for word in wanted)),
        0,
    )


class Speech:
    """One answer as it grows. Stop strings are looked for in the answer, not in the thought before it."""

    def __init__(self, thinking: Thinking, stops: Sequence[str] = ()) -> None:
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._thoughts = Thoughts(thinking)
        self._stops = Stops(stops)

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._stops.found

    @property
    def thinking(self) -> bool:
        """Whether what comes next belongs to the thought."""
        return self._thoughts.thinking

    def add(self, spelled: bytes) -> Said:
        """Return what the bytes of one more token make ready."""
        said = self._thoughts.add(self._characters.decode(spelled))
        return Said(said.thought, self._stops.add(said.text) if said.text else "")

    def finish(self) -> Said:
        """Return what was held back. A character that was cut in the middle is left out."""
        said = self._thoughts.add("", last=True)
        return Said(said.thought, self._stops.add(said.text, last=True))
