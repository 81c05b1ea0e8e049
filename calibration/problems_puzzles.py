"""Puzzles in words: orders, truth-tellers, calendars, overlapping sets, sequences, and small programs read line by line."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping
from types import MappingProxyType

from r1q.calibration.problems import Generator, Worked, checking, concluding, opening

NAMES = ("Alma", "Bruno", "Carla", "David", "Emre", "Fatima", "Georg", "Hana", "Ivan", "Julia")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
WORDS = (
    "banana",
    "letter",
    "engine",
    "window",
    "basket",
    "summer",
    "planet",
    "garden",
    "copper",
    "silver",
    "bottle",
    "ribbon",
)


def order(rng: random.Random) -> Worked:
    """Put people in order from comparisons of neighbours."""
    people = rng.sample(NAMES, rng.randint(4, 6))
    more, least, most = rng.choice((("taller", "shortest", "tallest"), ("older", "youngest", "oldest")))
    clues = [f"{a} is {more} than {b}" for a, b in itertools.pairwise(people)]
    shuffled = rng.sample(clues, len(clues))
    place = rng.randrange(1, len(people) - 1)
    ordinal = ("second", "third", "fourth", "fifth")[place - 1]
    chain, lines = [people[0]], []
    for person in people[1:]:
        chain.append(person)
        lines.append(f"{chain[-2]} is {more} than {person}, so now I have {' > '.join(chain)}.")
    return Worked(
        f"{'. '.join(shuffled)}. Who is the {ordinal} {most} of them?",
        [
            opening(rng),
            f"I look for the {most} first: it must be somebody that nobody is {more} than. {people[0]} never appears "
            f"on the right-hand side of a comparison, so {people[0]} is the {most}.",
            "\n".join(lines),
            f"Everybody is in the chain: {' > '.join(people)}. Counting from the {most}, the {ordinal} is {people[place]}.",
            f"{checking(rng)} the {least} is {people[-1]}, and indeed nobody is said to be less. {concluding(rng)}",
        ],
        f"In order they are {', '.join(people)}, so the {ordinal} is {people[place]}.",
        people[place],
    )


# (what is said, whether it is true when the speaker and the other one are knights)
CLAIMS: tuple[tuple[str, Callable[[bool, bool], bool]], ...] = (
    ("we are both of the same kind", lambda me, other: me == other),
    ("exactly one of us is a knave", lambda me, other: me != other),
    ("we are both knaves", lambda me, other: not me and not other),
    ("at least one of us is a knave", lambda me, other: not me or not other),
    ("the other one is a knave", lambda me, other: not other),
    ("the other one is a knight", lambda me, other: other),
)


def knights(rng: random.Random) -> Worked:
    """Knights tell the truth, knaves lie; two statements leave one possibility."""
    while True:
        a, b = rng.sample(NAMES, 2)
        (said_a, true_a), (said_b, true_b) = rng.sample(CLAIMS, 2)
        worlds = list(itertools.product((True, False), repeat=2))
        left = [(x, y) for x, y in worlds if true_a(x, y) == x and true_b(y, x) == y]
        if len(left) == 1:
            break
    kind = {True: "knight", False: "knave"}
    lines = []
    for x, y in worlds:
        line = f"Suppose {a} is a {kind[x]} and {b} is a {kind[y]}. "
        for name, is_knight, claim in ((a, x, true_a(x, y)), (b, y, true_b(y, x))):
            line += f"What {name} says would be {'true' if claim else 'false'}"
            if claim != is_knight:
                line += f", but a {kind[is_knight]} {'always tells the truth' if is_knight else 'always lies'}. Contradiction."
                break
            line += f", as it should be for a {kind[is_knight]}. "
        lines.append(line.strip())
    x, y = left[0]
    return Worked(
        f"On an island, knights always tell the truth and knaves always lie. {a} says: «{said_a}». {b} says: «{said_b}». "
        f"What is {b}, a knight or a knave?",
        [
            opening(rng),
            "There are only four possibilities, so I can try them one by one.",
            *lines,
            f"Only one possibility is left: {a} is a {kind[x]} and {b} is a {kind[y]}.",
        ],
        f"The only assignment without a contradiction is that {a} is a {kind[x]} and {b} is a {kind[y]}.",
        kind[y],
    )


def weekday(rng: random.Random) -> Worked:
    """Which day of the week it is after many days."""
    start, days = rng.randrange(7), rng.randint(20, 400)
    rest = days % 7
    answer = DAYS[(start + rest) % 7]
    counted = " → ".join(DAYS[(start + n) % 7] for n in range(rest + 1))
    return Worked(
        f"Today is {DAYS[start]}. Which day of the week will it be in {days} days?",
        [
            opening(rng),
            f"The days of the week repeat every 7 days, so only the remainder of {days} modulo 7 matters.",
            f"{days} = {days // 7} × 7 + {rest}, so the remainder is {rest}.",
            f"Now I count {rest} days on from {DAYS[start]}: {counted}."
            if rest
            else f"The remainder is zero, so it is {DAYS[start]} again.",
        ],
        f"{days} days are {days // 7} whole weeks and {rest} days, so it will be {answer}.",
        answer,
    )


def overlap(rng: random.Random) -> Worked:
    """Two overlapping sets; how many are in neither."""
    both, only_a, only_b, neither = (rng.randint(2, 20) for _ in range(4))
    a, b, total = both + only_a, both + only_b, both + only_a + only_b + neither
    one, two = rng.choice((("tea", "coffee"), ("chess", "football"), ("French", "Spanish"), ("cats", "dogs")))
    return Worked(
        f"Of {total} people asked, {a} like {one}, {b} like {two}, and {both} like both. How many like neither?",
        [
            opening(rng),
            f"If I add {a} and {b}, those who like both are counted twice, so I have to take them off once: "
            f"{a} + {b} - {both} = {a + b - both} people like at least one of the two.",
            f"The others like neither: {total} - {a + b - both} = {neither}.",
            f"{checking(rng)} only {one}: {a} - {both} = {only_a}. Only {two}: {b} - {both} = {only_b}. All groups together: "
            f"{only_a} + {only_b} + {both} + {neither} = {total}. {concluding(rng)}",
        ],
        f"{a + b - both} people like at least one, so {neither} like neither.",
        str(neither),
    )


def sequence(rng: random.Random) -> Worked:
    """The next term of a sequence whose differences grow evenly."""
    first, step, growth = rng.randint(1, 15), rng.randint(2, 9), rng.randint(1, 6)
    differences = [step + growth * n for n in range(6)]
    terms = list(itertools.accumulate([first, *differences]))
    shown = ", ".join(str(term) for term in terms[:-1])
    listed = ", ".join(f"{y} - {x} = {y - x}" for x, y in itertools.pairwise(terms[:-1]))
    return Worked(
        f"Which number comes next? {shown}, ...",
        [
            opening(rng),
            f"Let me look at the differences: {listed}.",
            f"They are not constant, so it isn't a plain arithmetic sequence. "
            f"But the differences themselves go up by {growth} each time.",
            f"So the next difference is {differences[-2]} + {growth} = {differences[-1]}, and the next number is "
            f"{terms[-2]} + {differences[-1]} = {terms[-1]}.",
        ],
        f"The differences grow by {growth}; the next one is {differences[-1]}, which leads to {terms[-1]}.",
        str(terms[-1]),
    )


def program(rng: random.Random) -> Worked:
    """A loop in Python, run in the head."""
    start, stop, factor, modulus = rng.randint(0, 9), rng.randint(4, 7), rng.randint(2, 5), rng.randint(2, 3)
    total, lines = start, []
    for i in range(1, stop):
        if i % modulus == 0:
            lines.append(
                f"i = {i}: {i} % {modulus} is 0, so total becomes {total} + {i} × {factor} = {total + i * factor}."
            )
            total += i * factor
        else:
            lines.append(f"i = {i}: {i} % {modulus} is {i % modulus}, so total becomes {total} - 1 = {total - 1}.")
            total -= 1
    code = (
        f"total = {start}\nfor i in range(1, {stop}):\n    if i % {modulus} == 0:\n        total += i * {factor}\n"
        "    else:\n        total -= 1\nprint(total)"
    )
    return Worked(
        f"What does this Python program print?\n\n```python\n{code}\n```",
        [
            opening(rng),
            f"range(1, {stop}) stops before {stop}, so i takes the values {', '.join(str(i) for i in range(1, stop))}. "
            f"At the start total is {start}.",
            "\n".join(lines),
            f"After the loop total is {total}, and that is what is printed.",
        ],
        f"Going through the loop with i from 1 to {stop - 1}, total ends at {total}.",
        str(total),
    )


def letters(rng: random.Random) -> Worked:
    """How often a letter occurs in some words, counted one by one."""
    words = rng.sample(WORDS, 3)
    letter = rng.choice([c for c in "aeinrtlbsm" if any(c in word for word in words)])
    lines, total = [], 0
    for word in words:
        count = word.count(letter)
        spelled = "-".join(c.upper() if c == letter else c for c in word)
        lines.append(f"{word}: {spelled}, that is {count}. So far {total} + {count} = {total + count}.")
        total += count
    return Worked(
        f"How many times does the letter «{letter}» occur in the words {words[0]}, {words[1]} and {words[2]} together?",
        [opening(rng), "I'd better spell the words out and not guess:", "\n".join(lines), f"So the total is {total}."],
        f"Spelling the words out letter by letter, «{letter}» occurs {total} time{'s' * (total != 1)}.",
        str(total),
    )


def recursion(rng: random.Random) -> Worked:
    """A function that calls itself, unrolled."""
    a, b, n = rng.randint(1, 5), rng.randint(2, 4), rng.randint(4, 6)
    values = [a]
    for i in range(1, n + 1):
        values.append(b * values[-1] - i)
    lines = [f"f({i}) = {b} × {values[i - 1]} - {i} = {values[i]}" for i in range(1, n + 1)]
    code = f"def f(n):\n    if n == 0:\n        return {a}\n    return {b} * f(n - 1) - n"
    return Worked(
        f"Here is a function in Python:\n\n```python\n{code}\n```\n\nWhat does f({n}) return?",
        [
            opening(rng),
            f"f({n}) needs f({n - 1}), that needs f({n - 2}), and so on down to f(0), which is {a}. I'd rather go up from there:",
            "\n".join(lines),
            f"So f({n}) returns {values[n]}.",
        ],
        f"Starting from f(0) = {a} and applying the rule {n} times gives f({n}) = {values[n]}.",
        str(values[n]),
    )


def ages(rng: random.Random) -> Worked:
    """Ages now and then."""
    older, younger = rng.sample(NAMES, 2)
    times, years = rng.randint(2, 4), rng.randint(3, 15)
    then = rng.randint(4, 12)
    young, old = then + years, times * then + years
    gap = old - young
    return Worked(
        f"{older} is {gap} years older than {younger}. {years} years ago, {older} was {times} times as old as {younger}. "
        f"How old is {older} today?",
        [
            opening(rng),
            f"The difference in age never changes: it was {gap} years then, too.",
            f"{years} years ago, {older} was {times} times as old as {younger}, so the difference was {times} - 1 = {times - 1} times "
            f"{younger}'s age. Hence {younger} was {gap} / {times - 1} = {then}, and {older} was {times} × {then} = {times * then}.",
            f"Today {older} is {times * then} + {years} = {old}.",
            f"{checking(rng)} {younger} is {then} + {years} = {young} today, and {old} - {young} = {gap}. {concluding(rng)}",
        ],
        f"{years} years ago they were {times * then} and {then}, so {older} is {old} today.",
        str(old),
    )


KINDS: Mapping[str, Generator] = MappingProxyType(
    {made.__name__: made for made in (order, knights, weekday, overlap, sequence, program, letters, recursion, ages)}
)
