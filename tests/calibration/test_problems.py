"""Problems: every line of arithmetic is true, and every result is found again by brute force from the question alone."""

from __future__ import annotations

import ast
import contextlib
import datetime
import io
import itertools
import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest

from r1q.calibration.problems import Problem, all_kinds, draw_problem, is_chinese, is_right

EACH = 12
COUNT = EACH * len(all_kinds())
PROBLEMS = [draw_problem(7, index) for index in range(COUNT)]
# An expression with an equals sign; whatever has a letter in it is no arithmetic.
_CLAIM = re.compile(r"(?:[\d a-zA-Z^+\-×/()=]|(?<=\d)\.(?=\d))*=(?:[\d a-zA-Z^+\-×/()=]|(?<=\d)\.(?=\d))*")


def value(text: str) -> Fraction:
    """Return the value of an arithmetic expression, exactly."""

    def walk(node: ast.expr) -> Fraction:
        match node:
            case ast.BinOp(left, operator, right):
                a, b = walk(left), walk(right)
                match operator:
                    case ast.Add():
                        return a + b
                    case ast.Sub():
                        return a - b
                    case ast.Mult():
                        return a * b
                    case _:
                        return a / b
            case ast.UnaryOp(ast.USub(), operand):
                return -walk(operand)
            case ast.Constant(number):
                return Fraction(str(number))
        raise AssertionError(text)

    return walk(ast.parse(text.strip().replace("×", "*"), mode="eval").body)


def claims(text: str) -> list[list[str]]:
    """Return the chains of equals in `text` that hold numbers only, without the words around them."""
    found = []
    for claim in _CLAIM.findall(text):
        sides = claim.split("=")
        sides[0] = re.split(r"[a-zA-Z] +(?=[^a-zA-Z]*$)", sides[0])[-1]
        sides[-1] = re.split(r" +(?=[a-zA-Z])", sides[-1])[0]
        # What begins with an operator was cut from a term with a letter in it.
        if not re.search("[a-zA-Z^]|^ *(?:[+×/]|- )", "=".join(sides)) and all(
            re.search(r"\d", side) for side in sides
        ):
            found.append(sides)
    return found


def test_every_line_of_arithmetic_is_true() -> None:
    checked = 0
    for problem in PROBLEMS:
        for sides in claims(problem.thoughts + "\n" + problem.answer):
            assert len({value(side) for side in sides}) == 1, (problem.kind, sides)
            checked += 1
    assert checked > 3 * COUNT  # they are found at all


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"-?\d+", text)]


def only(found: Any) -> Any:
    (one,) = found
    return one


def solve_equation(question: str) -> int:
    parts = re.findall(r"(\d+)x( [+-] \d+)", question)
    (a, b), (c, d) = [(int(x), int(n.replace(" ", ""))) for x, n in parts]
    return int(only(x for x in range(-99, 100) if a * x + b == c * x + d))


def solve_quadratic(question: str) -> int:
    middle = re.search(r"x\^2 ([+-]) (\d*)x", question)
    b = int(middle[1] + (middle[2] or "1")) if middle else 0
    c = int("".join(re.search(r"([+-]) (\d+) = 0", question).groups()))  # type: ignore[union-attr]
    return max(x for x in range(-99, 100) if x * x + b * x + c == 0)


def solve_meeting(question: str) -> float:
    distance, first, second = numbers(question)
    time = 0.0
    while first * time + second * time < distance:
        time += 0.5
    return first * time


def solve_draws(question: str) -> Fraction:
    red, blue = numbers(question)[:2]
    pairs = list(itertools.permutations(["r"] * red + ["b"] * blue, 2))
    return Fraction(sum(a == b for a, b in pairs), len(pairs))


def solve_committee(question: str) -> int:
    women, men, some, others = numbers(question)
    return len(list(itertools.combinations(range(women), some))) * len(list(itertools.combinations(range(men), others)))


def run_code(question: str) -> str:
    code = re.search(r"```python\n(.*?)```", question, re.DOTALL)
    assert code
    called = re.search(r"What does (f\(\d+\)) return", question)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code[1] + (f"\nprint({called[1]})" if called else ""), {})
    return printed.getvalue().strip()


def solve_weekday(question: str) -> str:
    name = re.search(r"Today is (\w+)", question)
    day = datetime.date(2024, 1, 1)
    while name and day.strftime("%A") != name[1]:
        day += datetime.timedelta(1)
    return (day + datetime.timedelta(numbers(question)[0])).strftime("%A")


def solve_order(question: str) -> str:
    pairs = re.findall(r"(\w+) is \w+ than (\w+)", question)
    people = sorted({name for pair in pairs for name in pair})
    fits = only(p for p in itertools.permutations(people) if all(p.index(a) < p.index(b) for a, b in pairs))
    ordinal = re.search(r"Who is the (\w+)", question)
    assert ordinal
    return str(fits[("first", "second", "third", "fourth", "fifth").index(ordinal[1])])


def solve_knights(question: str) -> str:
    said = re.findall(r"says: «(.*?)»", question)

    def holds(claim: str, me: str, other: str) -> bool:
        knaves = (me, other).count("knave")
        return {
            "we are both of the same kind": knaves != 1,
            "exactly one of us is a knave": knaves == 1,
            "we are both knaves": knaves == 2,
            "at least one of us is a knave": knaves > 0,
            "the other one is a knave": other == "knave",
            "the other one is a knight": other == "knight",
        }[claim]

    worlds = itertools.product(("knight", "knave"), repeat=2)
    fits = [
        (a, b) for a, b in worlds if holds(said[0], a, b) == (a == "knight") and holds(said[1], b, a) == (b == "knight")
    ]
    return str(only(fits)[1])


def solve_letters(question: str) -> int:
    letter = re.search("«(.)»", question)
    words = re.search("in the words (.*) together", question)
    assert letter
    assert words
    return words[1].replace(" and ", "").count(letter[1])


def solve_series(question: str) -> int:
    first, _, _, last, step = numbers(question)
    return sum(range(first, last + 1, step))


def solve_path(question: str) -> int:
    long, wide, edge = numbers(question)
    cells = itertools.product(range(-edge, long + edge), range(-edge, wide + edge))
    return sum(not (0 <= x < long and 0 <= y < wide) for x, y in cells)


def solve_cage(question: str) -> int:
    heads, feet = numbers(question)[:2]
    return int(only(n for n in range(heads + 1) if 4 * n + 2 * (heads - n) == feet))


def solve_remainders(question: str) -> int:
    numbers_ = numbers(question)
    (r, a, s, b) = numbers_ if not is_chinese(question) else (numbers_[i] for i in (1, 0, 3, 2))
    return next(n for n in itertools.count(1) if n % a == r and n % b == s)


def solve_overlap(question: str) -> int:
    total, a, b, both = numbers(question)
    return total - len(set(range(a)) | set(range(a - both, a - both + b)))


def solve_ages(question: str) -> int:
    gap, years, times = numbers(question)
    return int(only(n for n in range(200) if n - years == times * (n - gap - years)))


def solve_chase(question: str) -> float:
    slow, fast, lead = numbers(question)
    time = 0.0
    while fast * time < slow * time + lead:
        time += 0.5
    return fast * time


def solve_shared(question: str) -> int:
    each, left, more, missing = numbers(question)
    return int(only(n * each + left for n in range(1000) if n * each + left == n * more - missing))


def solve_sequence(question: str) -> int:
    terms = numbers(question)
    order = [terms]
    while any(order[-1]):
        order.append([b - a for a, b in itertools.pairwise(order[-1])])
    return sum(row[-1] for row in order)


SOLVERS: dict[str, Callable[[str], Any]] = {
    "equation": solve_equation,
    "meeting": solve_meeting,
    "discount": lambda q: Fraction(numbers(q)[0] * (100 - numbers(q)[1]) * (100 - numbers(q)[2]), 10_000),
    "divisor": lambda q: math.lcm(*numbers(q)),
    "power": lambda q: pow(*numbers(q)),
    "legs": solve_cage,
    "series": solve_series,
    "committee": solve_committee,
    "draws": solve_draws,
    "quadratic": solve_quadratic,
    "shopping": lambda q: numbers(q)[4] - numbers(q)[0] * numbers(q)[1] - numbers(q)[2] * numbers(q)[3],
    "pipes": lambda q: 1 / (Fraction(1, numbers(q)[0]) + Fraction(1, numbers(q)[1])),
    "remainders": solve_remainders,
    "path": solve_path,
    "mean": lambda q: numbers(q)[-1] * numbers(q)[-2] - sum(numbers(q)[:-3]),
    "order": solve_order,
    "knights": solve_knights,
    "weekday": solve_weekday,
    "overlap": solve_overlap,
    "sequence": solve_sequence,
    "program": run_code,
    "letters": solve_letters,
    "recursion": run_code,
    "ages": solve_ages,
    "cage": solve_cage,
    "chase": solve_chase,
    "sale": lambda q: Fraction(
        numbers(q)[0] * numbers(q)[1] * (10 - "〇一二三四五六七八九".index(q[q.index("打") + 1])), 10
    ),
    "together": lambda q: 1 / (Fraction(1, numbers(q)[0]) + Fraction(1, numbers(q)[1])),
    "stairs": lambda q: sum(numbers(q)[1] + numbers(q)[2] * n for n in range(numbers(q)[0])),
    "shared": solve_shared,
    "rest": solve_remainders,
}


@pytest.mark.parametrize("kind", all_kinds())
def test_every_result_is_found_again_from_the_question(kind: str) -> None:
    mine = [problem for problem in PROBLEMS if problem.kind == kind]
    assert len(mine) == EACH
    for problem in mine:
        if kind == "base":
            number, radix = numbers(problem.question)
            assert int(problem.result, radix) == number
            continue
        found = SOLVERS[kind](problem.question)
        expected = found if isinstance(found, str) else str(Fraction(found))
        assert problem.result in (expected, str(found)) or Fraction(problem.result) == Fraction(expected), problem


def test_problems_are_equal_for_a_seed_and_differ_between_seeds_and_places() -> None:
    assert [draw_problem(7, index) for index in range(40)] == PROBLEMS[:40]
    assert draw_problem(8, 3) != PROBLEMS[3]
    assert len({problem.question for problem in PROBLEMS}) > 0.97 * COUNT
    assert sum(is_chinese(problem.question) for problem in PROBLEMS) == 7 * EACH


def test_an_answer_is_judged_by_its_last_box_or_its_last_word() -> None:
    for problem in PROBLEMS:
        assert is_right(problem, problem.answer)
        wrong = f"{problem.result}9" if problem.result[-1].isdigit() else f"un{problem.result}"
        assert not is_right(problem, problem.answer.replace(f"{{{problem.result}}}", f"{{{wrong}}}"))
        assert not is_right(problem, "")
    half = Problem(kind="", question="", thoughts="", answer="", result="1/2")
    for right in (r"\boxed{1/2}", r"\boxed{\frac{3}{2}} is wrong, \boxed{\dfrac{1}{2}} right", "0.5", "I say 2/4."):
        assert is_right(half, right)
    for wrong in (r"\boxed{2}, which is 1/2", "1/2 is wrong, 3", r"\boxed{1/0}", r"\boxed{}"):
        assert not is_right(half, wrong)
    many = Problem(kind="", question="", thoughts="", answer="", result="1250")
    assert is_right(many, r"\boxed{1,250 \text{ dollars}}")
    assert is_right(many, "They have 1250.0")
