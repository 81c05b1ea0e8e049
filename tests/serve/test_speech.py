"""Text out of tokens: however a text is cut into tokens, what is said is what the whole text says."""

from __future__ import annotations

from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1q.serve.speech import Speech, partial_end

Thinking = Literal["open", "maybe", "never"]


def said(pieces: list[bytes], thinking: Thinking, stops: tuple[str, ...] = ()) -> tuple[str, str, list[str]]:
    """Return the thought, the text, and the texts one after another."""
    speech = Speech(thinking, stops)
    found = [speech.add(piece) for piece in pieces] + [speech.finish()]
    return "".join(s.thought for s in found), "".join(s.text for s in found), [s.text for s in found if s.text]


def expected(text: str, thinking: Thinking, stops: tuple[str, ...]) -> tuple[str, str]:
    """Return thought and answer of a whole text, the obvious way."""
    if thinking == "maybe":
        bare = text.lstrip()
        thinking, text = ("open", bare[len("<think>") :]) if bare.startswith("<think>") else ("never", text)
    thought, closed, answer = text.partition("</think>") if thinking == "open" else ("", "", text)
    if thinking == "open":
        thought, answer = thought.strip(), answer.lstrip() if closed else ""
    cuts = [place for stop in stops if (place := answer.find(stop)) >= 0]
    return thought, answer[: min(cuts, default=len(answer))]


FRAGMENTS = [
    "</think>",
    "<think>",
    "</thin",
    "<",
    "\n\n",
    " ",
    "é",
    "思考",
    "🤔",
    "STOP",
    "ST",
    "a b",
    "</think >",
    "x",
]


@given(
    parts=st.lists(st.sampled_from(FRAGMENTS), max_size=12),
    thinking=st.sampled_from(["open", "maybe", "never"]),
    stops=st.sampled_from([(), ("STOP",), ("TOP", "STOP"), ("\n\n", "xé")]),
    cuts=st.lists(st.integers(1, 5), min_size=1, max_size=8),
)
def test_any_cut_into_tokens_says_what_the_whole_text_says(
    parts: list[str], thinking: Thinking, stops: tuple[str, ...], cuts: list[int]
) -> None:
    text = "".join(parts)
    data = text.encode()
    pieces: list[bytes] = []
    while data:  # cut anywhere, in the middle of characters too
        size = cuts[len(pieces) % len(cuts)]
        pieces.append(data[:size])
        data = data[size:]
    assert said(pieces, thinking, stops)[:2] == expected(text, thinking, stops)


def test_the_end_of_a_thought_may_lie_across_tokens_and_nothing_is_held_longer_than_needed() -> None:
    speech = Speech("open")
    # Held back: white space that may stand before </think>, and what may be its beginning.
    steps = [
        (b"so", "so", ""),
        (b" 4\n</th", " 4", ""),
        (b"ree", "\n</three", ""),
        (b"\n</", "", ""),
        (b"think>\n", "", ""),
    ]
    for piece, thought, text in steps:
        told = speech.add(piece)
        assert (told.thought, told.text) == (thought, text)
    assert not speech.thinking
    assert speech.add(b"\n42 ").text == "42 "
    assert speech.finish().text == ""


def test_a_character_of_four_bytes_comes_out_whole_and_half_of_one_does_not() -> None:
    data = "🤔".encode()
    assert said([data[:1], data[1:3], data[3:]], "never") == ("", "🤔", ["🤔"])
    assert said([b"ok", data[:3]], "never")[1] == "ok"
    assert said([b"a\xffb"], "never")[1] == "a\ufffdb"


def test_stop_strings_are_looked_for_in_the_answer_alone() -> None:
    assert said([b"one\n\ntwo</think>yes\n", b"\nno"], "open", ("\n\n",))[:2] == ("one\n\ntwo", "yes")


@pytest.mark.parametrize(("text", "size"), [("so</th", 4), ("<", 1), ("</think>", 0), ("", 0), ("</think></think", 7)])
def test_partial_end(text: str, size: int) -> None:
    assert partial_end(text, ("</think>",)) == size
