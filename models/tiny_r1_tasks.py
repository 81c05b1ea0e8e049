"""ARITHMETIC WITH A TRACE: the generated problems tiny-r1 is trained, tested and measured on.

A problem is a left-to-right expression of small whole numbers, a phrasing of it, the steps that solve it and the answer. The
expression alone decides whether it is held out, so no phrasing of a held-out expression ever occurs in training.
"""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK = "<think>"
END_THINK = "</think>"

HELD_OUT_ONE_IN = 16

Steps = tuple[tuple[str, int], ...]
"""(operator, operand) pairs, applied from left to right; the first pair is ("", start)."""


@dataclass(frozen=True)
class Problem:
    """One problem: what is asked, how it is worked out, what comes out."""

    level: str
    steps: Steps
    question: str
    trace: str
    answer: str

    @property
    def expression(self) -> str:
        """The arithmetic alone, e.g. ``12+30-5``: the key of the split."""
        return expression(self.steps)

    @property
    def held_out(self) -> bool:
        """Whether this problem is kept for measuring."""
        return is_held_out(self.steps)

    @property
    def prompt(self) -> str:
        """The text a model is given, as the chat template renders it, with the BOS spelled out."""
        return f"{BOS}{USER}{self.question}{ASSISTANT}{THINK}\n"

    @property
    def completion(self) -> str:
        """The text a model should write after the prompt, with the EOS spelled out."""
        return f"{self.trace}\n{END_THINK}\n\n{self.answer}{EOS}"


def expression(steps: Steps, space: str = "") -> str:
    """Spell steps as arithmetic; brackets where left-to-right and the usual precedence part ways."""
    text = ""
    for operator, operand in steps:
        if operator == "×" and ("+" in text or "-" in text):
            text = f"({text})"
        text += f"{space}{operator}{space}{operand}" if operator else str(operand)
    return text


def is_held_out(steps: Steps) -> bool:
    """Decide the split by a hash of the expression; a single commuting step is held out in both orders."""
    if len(steps) == 2 and steps[1][0] in "+×":
        low, high = sorted((steps[0][1], steps[1][1]))
        steps = (("", low), (steps[1][0], high))
    digest = hashlib.sha256(expression(steps).encode()).digest()
    return int.from_bytes(digest[:4], "little") % HELD_OUT_ONE_IN == 0


def evaluate(steps: Steps) -> int:
    """The value of the steps, taken from left to right."""
    value = 0
    for operator, operand in steps:
        value = apply(value, operator, operand) if operator else operand
    return value


def apply(value: int, operator: str, operand: int) -> int:
    """One arithmetic step."""
    if operator == "+":
        return value + operand
    return value - operand if operator == "-" else value * operand


def columns(value: int, operator: str, operand: int) -> str:
    """The written method, units first: ``7+5=12, 5+8+1=14, 4+2+1=7`` for 457+285."""
    top = [int(digit) for digit in reversed(str(value))]
    bottom = [int(digit) for digit in reversed(str(operand))]
    if operator == "×":
        bottom = bottom * len(top)
    parts, carry = [], 0
    for place in range(max(len(top), len(bottom))):
        upper = top[place] if place < len(top) else 0
        lower = bottom[place] if place < len(bottom) else 0
        if operator == "-":
            borrow = upper < lower + carry
            text = f"{upper + 10 * borrow}-{lower}" + ("-1" if carry else "")
            result, carry = upper + 10 * borrow - lower - carry, int(borrow)
        else:
            result = apply(upper, operator, lower) + carry
            text, carry = f"{upper}{operator}{lower}" + (f"+{carry}" if carry else ""), result // 10
        parts.append(f"{text}={result}")
    return ", ".join(parts)


def written_trace(steps: Steps) -> str:
    """Every step by the written method, one line each."""
    lines, value = [], steps[0][1]
    for operator, operand in steps[1:]:
        result = apply(value, operator, operand)
        lines.append(f"{value} {operator} {operand}: {columns(value, operator, operand)}, so {result}.")
        value = result
    return "\n".join(lines)


def terse_trace(steps: Steps) -> str:
    """Every step in the head, results only."""
    lines, value = [], steps[0][1]
    for operator, operand in steps[1:]:
        result = apply(value, operator, operand)
        lines.append(f"{value} {operator} {operand} = {result}")
        value = result
    return "\n".join(lines)


NAMES = ("Tom", "Anna", "Ben", "Mia", "Sam", "Eva", "Leo", "Zoe")
THINGS = ("apples", "books", "coins", "cards", "stamps", "shells", "eggs", "pens")
QUESTIONS = (
    "What is {}?",
    "Compute {}.",
    "{} = ?",
    "Work out {}.",
    "Calculate {}.",
    "How much is {}?",
    "Find the value of {}.",
    "Please solve {}.",
)
OPENINGS = ("Okay, step by step.", "Let me see.", "First things first.", "Let me work this out.")
CLOSINGS = ("So the answer is {}.", "That gives {}.", "The result is {}.")
STORY_START = {
    "×": "{name} has {b} boxes with {a} {things} in each.",
    "+": "{name} has {a} {things} and finds {b} more.",
    "-": "{name} has {a} {things} and sells {b} of them.",
}
STORY_NEXT = {
    "+": (" Then {name} buys {c} more.", " A friend brings {c} more."),
    "-": (" Then {name} gives {c} away.", " Then {c} are lost."),
}
STORY_END = (" How many {things} are there now?", " How many {things} does {name} have now?")


def _number(rng: random.Random, low_digits: int, high_digits: int) -> int:
    digits = rng.randint(low_digits, high_digits)
    return rng.randint(10 ** (digits - 1) if digits > 1 else 1, 10**digits - 1)


def _follow(rng: random.Random, value: int, high_digits: int) -> tuple[str, int]:
    """A step that keeps the value at zero or above."""
    operand = _number(rng, 1, high_digits)
    if rng.random() < 0.5 and value >= operand:
        return "-", operand
    return "+", operand


def _sum(rng: random.Random) -> Steps:
    a, b = _number(rng, 2, 3), _number(rng, 1, 3)
    if rng.random() < 0.5:
        return ("", a), ("+", b)
    return ("", max(a, b)), ("-", min(a, b))


def _product(rng: random.Random, low_digits: int = 2, high_digits: int = 3) -> Steps:
    return ("", _number(rng, low_digits, high_digits)), ("×", rng.randint(2, 9))


def _chain(rng: random.Random) -> Steps:
    if rng.random() < 0.2:
        steps: Steps = (("", _number(rng, 1, 2)), ("+", _number(rng, 1, 2)))
        return *steps, ("×", rng.randint(2, 9))
    steps = _product(rng, 2, 2) if rng.random() < 0.5 else _sum(rng)
    return *steps, _follow(rng, evaluate(steps), 3)


def _story(rng: random.Random) -> Steps:
    steps: Steps = _product(rng, 1, 2) if rng.random() < 0.4 else _sum(rng)
    return steps if rng.random() < 0.3 else (*steps, _follow(rng, evaluate(steps), 2))


def _long(rng: random.Random) -> Steps:
    steps: Steps = _product(rng, 2, 2) if rng.random() < 0.5 else _sum(rng)
    for _ in range(2):
        steps = (*steps, _follow(rng, evaluate(steps), 3))
    return steps


def _mental(rng: random.Random) -> Steps:
    steps: Steps = _product(rng, 2, 2) if rng.random() < 0.3 else _sum(rng)
    return *steps, _follow(rng, evaluate(steps), 2)


LEVELS: dict[str, Callable[[random.Random], Steps]] = {
    "sum": _sum,
    "product": _product,
    "chain": _chain,
    "story": _story,
    "mental": _mental,
}
"""From easy to hard; every level is asked equally often. ``mental`` writes results only and is the one that may fail."""

TRAINING_ONLY: dict[str, Callable[[random.Random], Steps]] = {"long": _long}
"""Trained on and never measured: ``mental`` with three steps, more than a model of this size gets right."""

IN_THE_HEAD = ("mental", "long")


def _story_question(rng: random.Random, steps: Steps) -> str:
    words = {"name": rng.choice(NAMES), "things": rng.choice(THINGS)}
    (_, a), (operator, b), *rest = steps
    text = STORY_START[operator].format(a=a, b=b, **words)
    for following, operand in rest:
        text += rng.choice(STORY_NEXT[following]).format(c=operand, **words)
    return text + rng.choice(STORY_END).format(**words)


def _bare_question(rng: random.Random, steps: Steps) -> str:
    return rng.choice(QUESTIONS).format(expression(steps, " "))


def draw(rng: random.Random, level: str, held_out: bool) -> Problem:
    """Draw one problem of a level from one side of the split."""
    draw_steps = (LEVELS | TRAINING_ONLY)[level]
    steps = draw_steps(rng)
    while is_held_out(steps) != held_out:
        steps = draw_steps(rng)
    question = _story_question(rng, steps) if level == "story" else _bare_question(rng, steps)
    answer = str(evaluate(steps))
    middle = terse_trace(steps) if level in IN_THE_HEAD else written_trace(steps)
    trace = f"{rng.choice(OPENINGS)}\n{middle}\n{rng.choice(CLOSINGS).format(answer)}"
    return Problem(level, steps, question, trace, answer)


def draw_seeded(seed: str, level: str) -> Problem:
    """One held-out problem of a level, always the same for a seed."""
    return draw(random.Random(seed), level, held_out=True)


def sample(seed: str, count: int, held_out: bool, levels: tuple[str, ...] = tuple(LEVELS)) -> list[Problem]:
    """Draw problems of the levels in turn; the same seed always gives the same problems."""
    rng = random.Random(seed)
    return [draw(rng, levels[index % len(levels)], held_out) for index in range(count)]
