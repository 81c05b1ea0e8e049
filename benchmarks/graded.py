"""Graded problems: three kinds in five levels, where a level is one more step or one more digit than the one before."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from fractions import Fraction
from types import MappingProxyType

LEVELS = 5


def draw_graded(seed: str, index: int) -> tuple[str, str, str]:
    """Return (kind with its level, question, answer) number `index` of a seed, always the same; kinds and levels take turns."""
    rng = random.Random(f"{seed}/graded/{index}")
    kind = list(KINDS)[index % len(KINDS)]
    level = 1 + index // len(KINDS) % LEVELS
    question, answer = KINDS[kind](rng, level)
    return f"{kind} {level}", question, answer


def chain(rng: random.Random, level: int) -> tuple[str, str]:
    """Sums, differences and products from left to right, `level` + 1 of them, every step in brackets."""
    value = rng.randint(12, 99)
    text = str(value)
    for step in range(level + 1):
        operator = rng.choice("+-×") if value < 10**5 else "-"
        operand = rng.randint(3, 9) if operator == "×" else rng.randint(11, 999)
        text = f"{f'({text})' if step else text} {operator} {operand}"
        value = value + operand if operator == "+" else value - operand if operator == "-" else value * operand
    return f"What is {text}?", str(value)


def fractions(rng: random.Random, level: int) -> tuple[str, str]:
    """A sum of `level` + 1 fractions."""
    parts = [Fraction(rng.randint(1, 11), rng.randint(2, 6 + level)) for _ in range(level + 1)]
    text = " + ".join(f"{part.numerator}/{part.denominator}" for part in parts)
    return f"What is {text}? Give a fraction in lowest terms.", str(sum(parts))


def divisor(rng: random.Random, level: int) -> tuple[str, str]:
    """The greatest common divisor of two numbers of about `level` + 1 digits."""
    common = rng.randint(2, 3 * 10 ** (level // 2 + level % 2))
    one, two = (common * rng.randint(2, max(3, 10 ** (level + 1) // common)) for _ in range(2))
    return f"What is the greatest common divisor of {one} and {two}?", str(math.gcd(one, two))


KINDS: Mapping[str, Callable[[random.Random, int], tuple[str, str]]] = MappingProxyType(
    {"chain": chain, "fractions": fractions, "divisor": divisor}
)
