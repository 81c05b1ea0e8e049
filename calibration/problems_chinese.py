"""Problems in Chinese: R1 thinks in two languages, and a model that is calibrated in one forgets the other first."""

from __future__ import annotations

import random
from collections.abc import Mapping
from fractions import Fraction
from types import MappingProxyType

from r1q.calibration.problems import Generator, Worked, plain

NAMES = ("小明", "小红", "小刚", "小丽", "王芳", "李雷", "张伟", "陈静")
TENTHS = "〇一二三四五六七八九"
THINGS = ("苹果", "本子", "铅笔", "橙子", "贺卡", "书签")


def begin(rng: random.Random) -> str:
    """Return a first sentence of thinking."""
    return rng.choice(
        (
            "好的，我先看看题目给了哪些条件。",
            "嗯，让我一步一步来想。",
            "首先，我需要弄清楚题目在问什么。",
            "好，这道题可以先列出已知的数。",
        )
    )


def check(rng: random.Random) -> str:
    """Return words that begin a check."""
    return rng.choice(("让我检验一下：", "等一下，再验算一遍：", "验证：", "为了保险，再算一次："))


def cage(rng: random.Random) -> Worked:
    """Chickens and rabbits in one cage."""
    rabbits, hens = rng.randint(4, 30), rng.randint(4, 30)
    heads, feet = rabbits + hens, 4 * rabbits + 2 * hens
    return Worked(
        f"鸡和兔关在同一个笼子里，一共有{heads}个头、{feet}只脚。兔有多少只？",
        [
            begin(rng),
            f"假设全都是鸡，那么应该有 2 × {heads} = {2 * heads} 只脚。",
            f"实际上有{feet}只脚，多出 {feet} - {2 * heads} = {feet - 2 * heads} 只。",
            f"每把一只鸡换成一只兔，就多两只脚，所以兔有 {feet - 2 * heads} / 2 = {rabbits} 只，"
            f"鸡有 {heads} - {rabbits} = {hens} 只。",
            f"{check(rng)}4 × {rabbits} + 2 × {hens} = {feet}，没有问题。",
        ],
        f"假设全是鸡，多出的{feet - 2 * heads}只脚都来自兔，所以兔有{rabbits}只。",
        str(rabbits),
    )


def chase(rng: random.Random) -> Worked:
    """One follows another and catches up."""
    slow, difference, hours = rng.randint(4, 15), rng.randint(2, 9), rng.randint(2, 8)
    fast, lead = slow + difference, difference * hours
    one, two = rng.sample(NAMES, 2)
    return Worked(
        f"{one}每小时走{slow}千米，{two}每小时走{fast}千米。{one}在{two}前面{lead}千米，两人同时同向出发。{two}追上{one}时，走了多少千米？",
        [
            begin(rng),
            f"两人同向走，每小时距离缩短 {fast} - {slow} = {difference} 千米。",
            f"开始时相差{lead}千米，所以追上需要 {lead} / {difference} = {hours} 小时。",
            f"{two}在这段时间走了 {fast} × {hours} = {fast * hours} 千米。",
            f"{check(rng)}{one}走了 {slow} × {hours} = {slow * hours} 千米，"
            f"再加上开始的距离，{slow * hours} + {lead} = {fast * hours}，两边一致。",
        ],
        f"{two}用{hours}小时追上{one}，一共走了{fast * hours}千米。",
        str(fast * hours),
    )


def sale(rng: random.Random) -> Worked:
    """A discount in the Chinese manner: eight tenths of the price."""
    tenths, count, price = rng.randint(5, 9), rng.randint(2, 9), 10 * rng.randint(2, 20)
    name, thing = rng.choice(NAMES), rng.choice(("书包", "台灯", "球鞋", "词典"))
    now, spoken = price * tenths // 10, TENTHS[tenths]
    return Worked(
        f"一种{thing}原价{price}元，现在打{spoken}折。{name}买了{count}个，比原价一共便宜多少元？",
        [
            begin(rng),
            f"打{spoken}折就是按原价的十分之{spoken}卖，现价是 {price} × {tenths} / 10 = {now} 元。",
            f"每个便宜 {price} - {now} = {price - now} 元，{count}个一共便宜 {price - now} × {count} = {(price - now) * count} 元。",
            f"{check(rng)}原价 {price} × {count} = {price * count}，现价 {now} × {count} = {now * count}，"
            f"相差 {price * count} - {now * count} = {(price - now) * count}，对得上。",
        ],
        f"每个便宜{price - now}元，{count}个便宜{(price - now) * count}元。",
        str((price - now) * count),
    )


def together(rng: random.Random) -> Worked:
    """Two teams at work together."""
    a, b = rng.choice(((3, 6), (4, 12), (6, 12), (10, 15), (12, 24), (20, 30), (6, 30), (8, 24)))
    days = Fraction(a * b, a + b)
    return Worked(
        f"一项工程，甲队单独做{a}天完成，乙队单独做{b}天完成。两队合作，需要多少天完成？",
        [
            begin(rng),
            f"把整个工程看作1。甲队每天做 1/{a}，乙队每天做 1/{b}。",
            f"两队合作，每天做 1/{a} + 1/{b} = {1 / days}。",
            f"所以需要的天数是 1 除以 {1 / days}，也就是 {plain(days)} 天。",
            f"{check(rng)}甲队{plain(days)}天做 {plain(days)} / {a} = {days / a}，乙队做 {plain(days)} / {b} = {days / b}，"
            f"{days / a} + {days / b} = 1，正好做完。",
        ],
        f"合作每天完成{1 / days}，所以需要{plain(days)}天。",
        plain(days),
    )


def stairs(rng: random.Random) -> Worked:
    """The sum of an arithmetic series, as seats in a theatre."""
    first, step, rows = rng.randint(10, 30), rng.randint(1, 5), rng.randint(8, 25)
    last = first + step * (rows - 1)
    total = rows * (first + last) // 2
    return Worked(
        f"一个剧场有{rows}排座位，第一排有{first}个座位，后面每一排都比前一排多{step}个。这个剧场一共有多少个座位？",
        [
            begin(rng),
            f"先求最后一排：从第一排到最后一排增加了 {rows} - 1 = {rows - 1} 次，"
            f"所以最后一排有 {first} + {rows - 1} × {step} = {last} 个座位。",
            f"各排组成等差数列，和等于首项加末项，乘以项数，再除以2：({first} + {last}) × {rows} / 2 = {total}。",
            f"{check(rng)}平均每排 ({first} + {last}) / 2 = {plain(Fraction(first + last, 2))} 个，"
            f"{plain(Fraction(first + last, 2))} × {rows} = {total}，结果一样。",
        ],
        f"最后一排有{last}个座位，一共有{total}个座位。",
        str(total),
    )


def shared(rng: random.Random) -> Worked:
    """Some are left over one way, some are missing the other way."""
    people, each, more = rng.randint(5, 30), rng.randint(3, 8), rng.randint(1, 3)
    left = rng.randint(1, people * more - 1)
    total, missing = people * each + left, people * more - left
    thing = rng.choice(THINGS)
    return Worked(
        f"老师把一些{thing}分给同学。每人分{each}个，还剩{left}个；每人分{each + more}个，又差{missing}个。一共有多少个{thing}？",
        [
            begin(rng),
            f"两种分法，每人相差 {each + more} - {each} = {more} 个。",
            f"总数相差 {left} + {missing} = {left + missing} 个，所以同学有 {left + missing} / {more} = {people} 人。",
            f"{thing}一共有 {people} × {each} + {left} = {total} 个。",
            f"{check(rng)}按第二种分法，{people} × {each + more} - {missing} = {total}，一致。",
        ],
        f"同学有{people}人，{thing}一共有{total}个。",
        str(total),
    )


def rest(rng: random.Random) -> Worked:
    """Sun Tzu's kind of question: a number from its remainders."""
    a, b = rng.choice(((3, 5), (5, 7), (4, 7), (3, 8), (5, 9), (7, 8)))
    answer = rng.choice([n for n in range(max(a, b), a * b) if n % a and n % b])
    r, s = answer % a, answer % b
    lines = [f"{n} = {n // a} × {a} + {n % a}" for n in range(s, answer + 1, b)]
    return Worked(
        f"有一个数，除以{a}余{r}，除以{b}余{s}。满足条件的最小正整数是多少？",
        [
            begin(rng),
            f"除以{b}余{s}的数，从小到大每次增加{b}。我逐个看它们除以{a}的余数，直到余数是{r}：",
            "\n".join(lines),
            f"{answer}除以{a}余{r}，而前面的数都不满足，所以最小的就是{answer}。",
        ],
        f"从小到大逐个检验，第一个满足两个条件的数是{answer}。",
        str(answer),
    )


KINDS: Mapping[str, Generator] = MappingProxyType(
    {made.__name__: made for made in (cage, chase, sale, together, stairs, shared, rest)}
)
