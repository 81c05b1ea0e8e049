"""Mathematics in words: equations, rates, shares, counting, remainders, each worked out as one would on paper."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from fractions import Fraction
from types import MappingProxyType

from r1q.calibration.problems import Generator, Worked, checking, concluding, opening, plain, plus, signed

NAMES = ("Anna", "Ben", "Chloe", "Daniel", "Elif", "Farid", "Grace", "Hiro", "Ines", "Jonas", "Kavya", "Liang", "Maria")
THINGS = ("apples", "notebooks", "tickets", "stamps", "marbles", "cookies", "postcards", "pencils", "oranges", "shells")


def equation(rng: random.Random) -> Worked:
    """Solve ax + b = cx + d for a whole x."""
    x, c, b = rng.randint(-12, 20), rng.randint(2, 8), rng.randint(-20, 30)
    a = c + rng.randint(1, 7)
    d = (a - c) * x + b
    left, right = f"{a}x{plus(b)}", f"{c}x{plus(d)}"
    ask = rng.choice(("Solve for x: {} = {}.", "Find the value of x if {} = {}.", "For which x is {} equal to {}?"))
    return Worked(
        ask.format(left, right),
        [
            opening(rng),
            f"The equation is {left} = {right}. I want all the x terms on one side, so I subtract {c}x from both sides. "
            f"{a}x - {c}x is {a - c}x, which gives {a - c}x{plus(b)} = {d}.",
            f"Now I move the constant: {d} - {signed(b)} = {d - b}, so {a - c}x = {d - b}.",
            f"Dividing by {a - c}: x = {d - b} / {a - c} = {x}." if a - c > 1 else f"So x is {x} already.",
            f"{checking(rng)} the left side is {a} × {signed(x)} + {signed(b)} = {a * x + b}, and the right side is "
            f"{c} × {signed(x)} + {signed(d)} = {c * x + d}. {concluding(rng)}",
        ],
        f"Bringing the terms with x to one side gives {a - c}x = {d - b}, so x = {x}.",
        str(x),
    )


def meeting(rng: random.Random) -> Worked:
    """Two travellers start towards each other; when do they meet, and where."""
    hours, first, second = rng.randint(2, 6), 5 * rng.randint(8, 24), 5 * rng.randint(8, 24)
    distance = (first + second) * hours
    who = rng.choice(("trains", "cars", "buses"))
    return Worked(
        f"Two {who} start at the same time from two cities {distance} km apart and travel towards each other. One goes at "
        f"{first} km/h, the other at {second} km/h. How many kilometres has the first one travelled when they meet?",
        [
            opening(rng),
            f"They move towards each other, so the distance between them shrinks by both speeds together: "
            f"{first} + {second} = {first + second} km every hour.",
            f"At the start they are {distance} km apart. The time until they meet is {distance} / {first + second} = {hours} hours.",
            f"In that time the first one covers {first} × {hours} = {first * hours} km.",
            f"{checking(rng)} the second one covers {second} × {hours} = {second * hours} km, and together that is "
            f"{first * hours} + {second * hours} = {distance} km. {concluding(rng)}",
        ],
        f"They close in at {first + second} km/h and meet after {hours} hours; by then the first has gone {first * hours} km.",
        str(first * hours),
    )


def discount(rng: random.Random) -> Worked:
    """A price after two changes in percent, which do not simply add up."""
    price, first, second = 20 * rng.randint(3, 30), 10 * rng.randint(1, 5), 10 * rng.randint(1, 4)
    after = Fraction(price * (100 - first), 100)
    final = after * (100 - second) / 100
    item = rng.choice(("jacket", "bicycle", "lamp", "chair", "camera", "backpack"))
    return Worked(
        f"A {item} costs {price} dollars. Its price is lowered by {first}%, and a week later the new price is lowered by another "
        f"{second}%. What does it cost now, in dollars?",
        [
            opening(rng),
            f"It would be tempting to add the percentages and take off {first + second}%, but that is wrong: the second discount "
            "applies to the price that was already lowered. So I do it in two steps.",
            f"First step: {first}% of {price} is {price} × {first} / 100 = {plain(price - after)}. The price becomes "
            f"{price} - {plain(price - after)} = {plain(after)}.",
            f"Second step: {second}% of {plain(after)} is {plain(after)} × {second} / 100 = {plain(after - final)}. "
            f"The price becomes {plain(after)} - {plain(after - final)} = {plain(final)}.",
            f"{checking(rng)} with factors it is {price} × {plain(Fraction(100 - first, 100))} × "
            f"{plain(Fraction(100 - second, 100))} = {plain(final)}. {concluding(rng)}",
        ],
        f"After the first discount it costs {plain(after)} dollars, after the second {plain(final)} dollars.",
        plain(final),
    )


def divisor(rng: random.Random) -> Worked:
    """The greatest common divisor by Euclid's algorithm, then the least common multiple."""
    common = rng.randint(2, 18)
    a, b = common * rng.randint(5, 40), common * rng.randint(5, 40)
    high, low = max(a, b), min(a, b)
    steps, x, y = [], high, low
    while y:
        steps.append(f"{x} = {x // y} × {y} + {x % y}")
        x, y = y, x % y
    multiple = a * b // x
    return Worked(
        f"What is the least common multiple of {a} and {b}?",
        [
            opening(rng),
            "The least common multiple is the product divided by the greatest common divisor, and the greatest common divisor "
            "I can get with Euclid's algorithm:",
            "\n".join(steps),
            f"The last remainder that is not zero is {x}, so the greatest common divisor is {x}.",
            f"Then the least common multiple is {a} × {b} / {x}. I divide first to keep the numbers small: {a} / {x} = {a // x}, and "
            f"{a // x} × {b} = {multiple}.",
            f"{checking(rng)} {multiple} / {a} = {multiple // a} and {multiple} / {b} = {multiple // b} are both whole. "
            f"{concluding(rng)}",
        ],
        f"The greatest common divisor is {x}, so the least common multiple is {a} × {b} / {x} = {multiple}.",
        str(multiple),
    )


def power(rng: random.Random) -> Worked:
    """The remainder of a high power, through the cycle of remainders."""
    base, modulus, exponent = rng.randint(2, 9), rng.choice((7, 9, 10, 11, 13)), rng.randint(20, 150)
    seen, value = [], 1
    while (value := value * base % modulus) not in seen:
        seen.append(value)
    start = seen.index(value)
    period = len(seen) - start
    place = (exponent - 1 - start) % period + start
    lines = [
        f"{base}^1 leaves {seen[0]}",
        *(
            f"{base}^{n} leaves {v}, because {seen[n - 2]} × {base} = {seen[n - 2] * base}"
            for n, v in enumerate(seen[1:], 2)
        ),
    ]
    return Worked(
        f"What is the remainder when {base}^{exponent} is divided by {modulus}?",
        [
            opening(rng),
            f"{base}^{exponent} is far too large to write out, but remainders of powers repeat. So I look at the remainders modulo "
            f"{modulus} one after another, each time multiplying by {base}:",
            "\n".join(lines),
            f"The next one would be {value} again, so from there on the remainders repeat every {period} "
            f"step{'s' if period > 1 else ''}.",
            f"I need the exponent {exponent}. Its place in the cycle is the same as that of the exponent {place + 1}, because "
            f"{exponent} - {place + 1} = {exponent - place - 1}, and {exponent - place - 1} is a multiple of {period}.",
            f"So the remainder is the one of {base}^{place + 1}, which is {seen[place]}.",
        ],
        f"The remainders repeat every {period}, and {base}^{exponent} leaves the same as {base}^{place + 1}: {seen[place]}.",
        str(seen[place]),
    )


def legs(rng: random.Random) -> Worked:
    """Heads and legs: two unknowns, two equations."""
    four, two = rng.randint(5, 40), rng.randint(5, 40)
    heads, feet = four + two, 4 * four + 2 * two
    big, small = rng.choice((("cows", "hens"), ("goats", "ducks"), ("rabbits", "geese")))
    return Worked(
        f"A farm has {big} and {small}. Together they have {heads} heads and {feet} legs. How many {big} are there?",
        [
            opening(rng),
            f"Say all {heads} animals were {small}. Then there would be 2 × {heads} = {2 * heads} legs.",
            f"But there are {feet} legs, which is {feet} - {2 * heads} = {feet - 2 * heads} more.",
            f"Each of the {big} has two legs more than one of the {small}, so there are {feet - 2 * heads} / 2 = {four} {big}. "
            f"The rest are {small}: {heads} - {four} = {two}.",
            f"{checking(rng)} 4 × {four} + 2 × {two} = {feet} legs. {concluding(rng)}",
        ],
        f"If all were {small} there would be {2 * heads} legs; the {feet - 2 * heads} extra legs belong to {four} {big}.",
        str(four),
    )


def series(rng: random.Random) -> Worked:
    """The sum of an arithmetic series."""
    first, step, count = rng.randint(1, 20), rng.randint(2, 9), rng.randint(8, 40)
    last = first + step * (count - 1)
    total = count * (first + last) // 2
    return Worked(
        f"Find the sum {first} + {first + step} + {first + 2 * step} + ... + {last}, where each number is {step} more than the "
        "one before.",
        [
            opening(rng),
            f"First I need to know how many numbers there are. From {first} to {last} it is {last} - {first} = {last - first}, "
            f"in steps of {step}: {last - first} / {step} = {count - 1} steps. "
            f"With the first number itself that makes {count} numbers.",
            f"Now I pair the first with the last: {first} + {last} = {first + last}. Every such pair has the same sum.",
            f"The sum is {count} × {first + last} / 2 = {total}.",
            f"{checking(rng)} the average of the numbers is {first + last} / 2 = {plain(Fraction(first + last, 2))}, and "
            f"{plain(Fraction(first + last, 2))} × {count} = {total}. {concluding(rng)}",
        ],
        f"There are {count} numbers with the average {plain(Fraction(first + last, 2))}, so the sum is {total}.",
        str(total),
    )


def committee(rng: random.Random) -> Worked:
    """Choose some of each of two groups."""
    women, men, from_women, from_men = rng.randint(4, 9), rng.randint(4, 9), rng.randint(1, 3), rng.randint(1, 3)
    ways = math.comb(women, from_women), math.comb(men, from_men)

    def choose(n: int, k: int) -> str:
        above = " × ".join(str(n - i) for i in range(k))
        below = " × ".join(str(i) for i in range(k, 0, -1))
        return f"{above} / ({below}) = {math.comb(n, k)}" if k > 1 else f"{n}"

    return Worked(
        f"A club has {women} women and {men} men. In how many ways can it choose a committee of {from_women} of the women and "
        f"{from_men} of the men?",
        [
            opening(rng),
            "The order inside a committee does not matter, so these are combinations, not arrangements.",
            f"Choosing {from_women} of {women} women: {choose(women, from_women)} ways.",
            f"Choosing {from_men} of {men} men: {choose(men, from_men)} ways.",
            f"Every choice of women goes with every choice of men, so I multiply: {ways[0]} × {ways[1]} = {ways[0] * ways[1]}.",
        ],
        f"There are {ways[0]} ways for the women and {ways[1]} for the men, so {ways[0] * ways[1]} committees.",
        str(ways[0] * ways[1]),
    )


def draws(rng: random.Random) -> Worked:
    """Two balls drawn without putting back; the chance that both have one colour."""
    red, blue = rng.randint(2, 9), rng.randint(2, 9)
    total = red + blue
    chance = Fraction(red * (red - 1) + blue * (blue - 1), total * (total - 1))
    rest = 1 - chance
    return Worked(
        f"A bag holds {red} red and {blue} blue balls. Two are drawn at random without putting the first one back. What is the "
        "probability that both have the same colour? Give a fraction in lowest terms.",
        [
            opening(rng),
            f"There are {red} + {blue} = {total} balls. Two draws in order: {total} × {total - 1} = {total * (total - 1)} "
            "possibilities, all equally likely.",
            f"Both red: {red} × {red - 1} = {red * (red - 1)}. Both blue: {blue} × {blue - 1} = {blue * (blue - 1)}. "
            f"Together {red * (red - 1)} + {blue * (blue - 1)} = {red * (red - 1) + blue * (blue - 1)}.",
            f"The probability is {red * (red - 1) + blue * (blue - 1)}/{total * (total - 1)} = {chance}.",
            f"{checking(rng)} different colours happen in 2 × {red} × {blue} = {2 * red * blue} of the cases, that is "
            f"{2 * red * blue}/{total * (total - 1)} = {rest}, and {chance} + {rest} = 1. {concluding(rng)}",
        ],
        f"Of {total * (total - 1)} ordered draws, {red * (red - 1) + blue * (blue - 1)} give equal colours, which is {chance}.",
        str(chance),
    )


def base(rng: random.Random) -> Worked:
    """A number written in another base."""
    number, radix = rng.randint(60, 900), rng.choice((2, 3, 5, 8))
    lines, digits, value = [], "", number
    while value:
        lines.append(f"{value} = {value // radix} × {radix} + {value % radix}")
        digits = str(value % radix) + digits
        value //= radix
    terms = " + ".join(f"{d} × {radix**p}" for p, d in reversed(list(enumerate(reversed(digits)))) if d != "0")
    return Worked(
        f"Write the decimal number {number} in base {radix}.",
        [
            opening(rng),
            f"I divide by {radix} again and again and keep the remainders; they are the digits from right to left.",
            "\n".join(lines),
            f"Reading the remainders from the last to the first gives {digits}.",
            f"{checking(rng)} {terms} = {number}. {concluding(rng)}",
        ],
        f"Repeated division by {radix} gives the digits {digits}.",
        digits,
    )


def quadratic(rng: random.Random) -> Worked:
    """A quadratic with two whole roots; the larger is asked for."""
    p, q = sorted(rng.sample([n for n in range(-9, 13) if n], 2))
    total, product = p + q, p * q
    middle = "" if total == 0 else f"{plus(-total)}x".replace(" 1x", " x")
    return Worked(
        f"What is the larger solution of x^2{middle}{plus(product)} = 0?",
        [
            opening(rng),
            f"I try to factor it. I need two numbers whose sum is {total} and whose product is {product}.",
            f"Let me try {p} and {q}: {signed(p)} + {signed(q)} = {total}, and {signed(p)} × {signed(q)} = {product}. That fits.",
            f"So the equation is (x{plus(-p)})(x{plus(-q)}) = 0, and the solutions are {p} and {q}. The larger one is {q}.",
            f"{checking(rng)} {signed(q)} × {signed(q)} - {signed(total)} × {signed(q)} + {signed(product)} = 0. {concluding(rng)}",
        ],
        f"The left side factors into (x{plus(-p)})(x{plus(-q)}), so the solutions are {p} and {q}.",
        str(q),
    )


def shopping(rng: random.Random) -> Worked:
    """Several things bought, and the change."""
    name, (one, two) = rng.choice(NAMES), rng.sample(THINGS, 2)
    n, m, a, b = rng.randint(3, 12), rng.randint(2, 9), rng.randint(2, 9), rng.randint(3, 12)
    cost = n * a + m * b
    note = next(value for value in (50, 100, 200, 500) if value > cost)
    return Worked(
        f"{name} buys {n} {one} at {a} dollars each and {m} {two} at {b} dollars each, and pays with {note} dollars. How much "
        "change is due?",
        [
            opening(rng),
            f"The {one}: {n} × {a} = {n * a} dollars. The {two}: {m} × {b} = {m * b} dollars.",
            f"Together that is {n * a} + {m * b} = {cost} dollars.",
            f"{name} pays {note}, so the change is {note} - {cost} = {note - cost} dollars.",
            f"{checking(rng)} {cost} + {note - cost} = {note}. {concluding(rng)}",
        ],
        f"The purchase costs {cost} dollars, so {name} gets {note - cost} dollars back.",
        str(note - cost),
    )


def pipes(rng: random.Random) -> Worked:
    """Two at work together; how long it takes."""
    a, b = rng.sample((2, 3, 4, 5, 6, 8, 10, 12, 15, 20), 2)
    rate = Fraction(1, a) + Fraction(1, b)
    time = 1 / rate
    return Worked(
        f"One pump empties a pool in {a} hours, another in {b} hours. How many hours do both take together? "
        "Give a whole number or a fraction in lowest terms.",
        [
            opening(rng),
            f"I think in terms of what is done in one hour. The first pump does 1/{a} of the work, the second 1/{b}.",
            f"Together they do 1/{a} + 1/{b} = {rate} of the pool in an hour. I used the common denominator {math.lcm(a, b)}: "
            f"{math.lcm(a, b) // a}/{math.lcm(a, b)} + {math.lcm(a, b) // b}/{math.lcm(a, b)} = {rate}.",
            f"The time is one divided by that rate: {time}.",
            f"{checking(rng)} in that time the first does ({time}) / {a} = {time / a} and the second ({time}) / {b} = {time / b}, and "
            f"{time / a} + {time / b} = 1, the whole pool. {concluding(rng)}",
        ],
        f"Together they empty {rate} of the pool in an hour, so they take {time} hours.",
        str(time),
    )


def remainders(rng: random.Random) -> Worked:
    """The smallest number with two given remainders, found by listing."""
    a, b = rng.choice(((5, 7), (4, 9), (7, 9), (8, 11), (6, 13), (9, 10), (7, 12)))
    answer = rng.choice([n for n in range(max(a, b), a * b) if n % a and n % b])
    r, s = answer % a, answer % b
    listed = list(range(s, answer + 1, b))
    lines = [f"{n} = {n // a} × {a} + {n % a}" for n in listed]
    return Worked(
        f"What is the smallest positive number that leaves remainder {r} when divided by {a} and remainder {s} when divided by {b}?",
        [
            opening(rng),
            f"The numbers that leave {s} when divided by {b} go up in steps of {b}. I go through them from the smallest and see what "
            f"each leaves when divided by {a}, until one leaves {r}:",
            "\n".join(lines),
            f"There it is: {answer} leaves {r}. Since I went up from the smallest, nothing before it works.",
        ],
        f"Going through the numbers that leave {s} modulo {b}, the first that leaves {r} modulo {a} is {answer}.",
        str(answer),
    )


def path(rng: random.Random) -> Worked:
    """The area of a path of even width around a garden."""
    long, wide, edge = rng.randint(8, 30), rng.randint(5, 20), rng.randint(1, 3)
    outer, inner = (long + 2 * edge) * (wide + 2 * edge), long * wide
    return Worked(
        f"A rectangular garden measures {long} m by {wide} m. A path {edge} m wide runs all around it on the outside. "
        "What is the area of the path in square metres?",
        [
            opening(rng),
            f"The path lies outside on both ends, so each side grows by 2 × {edge} = {2 * edge} m, not just by {edge}. "
            f"Garden and path together measure {long} + {2 * edge} = {long + 2 * edge} m "
            f"by {wide} + {2 * edge} = {wide + 2 * edge} m.",
            f"Outer area: {long + 2 * edge} × {wide + 2 * edge} = {outer}. Garden: {long} × {wide} = {inner}.",
            f"The path is the difference: {outer} - {inner} = {outer - inner}.",
            f"{checking(rng)} two long strips, two short ones and four corners: 2 × {long} × {edge} + 2 × {wide} × {edge} + "
            f"4 × {edge} × {edge} = {outer - inner}. {concluding(rng)}",
        ],
        f"The outer rectangle has {outer} square metres and the garden {inner}, so the path has {outer - inner}.",
        str(outer - inner),
    )


def mean(rng: random.Random) -> Worked:
    """One value missing from a mean."""
    name, scores = rng.choice(NAMES), [rng.randint(60, 99) for _ in range(rng.randint(3, 5))]
    count = len(scores) + 1
    missing = rng.choice([n for n in range(60, 101) if (sum(scores) + n) % count == 0])
    average = (sum(scores) + missing) // count
    listed = ", ".join(str(score) for score in scores)
    return Worked(
        f"{name} scored {listed} in the first {len(scores)} tests. Which score in the next test brings the average of all {count} to "
        f"exactly {average}?",
        [
            opening(rng),
            f"An average of {average} over {count} tests means a total of {average} × {count} = {average * count}.",
            f"So far there are {' + '.join(str(score) for score in scores)} = {sum(scores)} points.",
            f"The next test must bring {average * count} - {sum(scores)} = {missing}.",
            f"{checking(rng)} ({sum(scores)} + {missing}) / {count} = {average}. {concluding(rng)}",
        ],
        f"{count} tests with the average {average} need {average * count} points; {sum(scores)} are there, so {missing} are missing.",
        str(missing),
    )


KINDS: Mapping[str, Generator] = MappingProxyType(
    {
        made.__name__: made
        for made in (
            equation, meeting, discount, divisor, power, legs, series, committee, draws, base, quadratic, shopping, pipes,
            remainders, path, mean,
        )
    }
)  # fmt: skip
