r"""Problems to think about: drawn from a seed, worked out step by step in prose, and checkable.

They serve twice. A model's own answers to them are what it is best calibrated on (`calibration/traces.py`); and, worked out here, they
are the reasoning of the built-in text, for whoever has no traces yet.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
BOXED_CHINESE = "请一步一步地推理，并把最终答案写在\\boxed{}里。"


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What is asked, how it is worked out, what is answered, and the bare result (`42`, `3/7`, `Tuesday`)."""

    kind: str
    question: str
    thoughts: str
    answer: str
    result: str


@dataclass(frozen=True, slots=True)
class Worked:
    """A problem as its generator leaves it: the sentence that answers it comes before the boxed result."""

    question: str
    thoughts: list[str]
    sentence: str
    result: str


Generator = Callable[[random.Random], Worked]


def draw_problem(seed: int | str, index: int) -> Problem:
    """Return problem `index` of `seed`, always the same; the kinds take turns."""
    kinds = list(all_kinds())
    kind = kinds[index % len(kinds)]
    rng = random.Random(f"{seed}/{index}")
    worked = all_kinds()[kind](rng)
    chinese = is_chinese(worked.question)
    hint, ending = (BOXED_CHINESE, "答案：") if chinese else (BOXED, "**Answer:** ")
    gap = "\n\n" if worked.question.endswith("```") else "" if chinese else " "
    question = worked.question if rng.random() < 0.4 else worked.question + gap + hint
    return Problem(
        kind=kind,
        question=question,
        thoughts=("\n" if rng.random() < 0.5 else "\n\n").join(worked.thoughts),
        answer=f"{worked.sentence}\n\n{ending}\\boxed{{{worked.result}}}",
        result=worked.result,
    )


def all_kinds() -> Mapping[str, Generator]:
    """Return every generator by the name of its kind, in the order they take turns."""
    from r1q.calibration import problems_chinese, problems_mathematics, problems_puzzles

    tables = (problems_mathematics.KINDS, problems_puzzles.KINDS, problems_chinese.KINDS)
    longest = max(len(table) for table in tables)
    turns = [list(table.items())[turn : turn + 1] for turn in range(longest) for table in tables]
    return MappingProxyType(dict(entry for turn in turns for entry in turn))


def is_chinese(text: str) -> bool:
    """Return whether `text` has a Chinese character in it."""
    return any("\u4e00" <= character <= "\u9fff" for character in text)


def is_right(problem: Problem, answer: str) -> bool:
    r"""Return whether the last number (or word) of `answer` is the result: of its last \boxed{}, if it has one.

    >>> half = Problem(kind="", question="", thoughts="", answer="", result="1/2")
    >>> is_right(half, r"So it is \boxed{\frac{1}{2}}."), is_right(half, "It is 2/4."), is_right(half, "It is 2.")
    (True, True, False)
    """
    boxes = re.findall(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}", answer)
    text = re.sub(r"\\[dt]?frac\{?(\d+)\}?\{(\d+)\}", r"\1/\2", boxes[-1] if boxes else answer).replace("−", "-")
    result = _number(problem.result)
    if result is None:
        words = re.findall(r"[^\W\d_]+", text)
        return words[-1:] == [problem.result]
    numbers = re.findall(r"-?\d+(?:[.,/]\d+)*", text)
    return bool(numbers) and _number(numbers[-1]) == result


def _number(word: str) -> Fraction | None:
    try:
        return Fraction(word.replace(",", ""))
    except (ValueError, ZeroDivisionError):
        return None


def opening(rng: random.Random) -> str:
    """Return a first sentence of thinking."""
    return rng.choice(
        (
            "Okay, let me think about this step by step.",
            "Alright, let's see what is being asked here.",
            "Hmm, okay. First I should write down what I know.",
            "Let me work through this carefully.",
            "So, I need to figure this out. Let me start with what is given.",
            "Okay, so I have this problem. Let me break it down.",
        )
    )


def checking(rng: random.Random) -> str:
    """Return words that begin a check."""
    return rng.choice(
        (
            "Let me double-check:",
            "Wait, let me verify that:",
            "To be sure, I'll check it the other way round:",
            "Let me make sure this is right:",
            "Checking:",
        )
    )


def concluding(rng: random.Random) -> str:
    """Return a sentence that ends a check that came out well."""
    return rng.choice(
        (
            "That matches, so I'm confident in this.",
            "Yes, that works.",
            "Good, both agree.",
            "Great, this is consistent.",
            "That checks out.",
        )
    )


def signed(number: int) -> str:
    """Return a number as it is written inside an expression: negative ones in brackets."""
    return f"({number})" if number < 0 else str(number)


def plus(number: int) -> str:
    """Return ` + 5` or ` - 5`."""
    return f" + {number}" if number >= 0 else f" - {-number}"


def plain(value: Fraction) -> str:
    """Return a fraction as a whole number, a short decimal, or a/b."""
    if value.denominator == 1:
        return str(value.numerator)
    if 100 % value.denominator == 0:
        return f"{float(value):.2f}".rstrip("0").rstrip(".")
    return f"{value.numerator}/{value.denominator}"
