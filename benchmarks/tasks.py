r"""Tasks: problems whose answer can be checked, to be thought about. Generated ones, or the user's own file.

builtin      equations, rates, puzzles, programs, in English and Chinese: calibration's generators, at a seed that no traces have
graded       sums of fractions, chains and divisors in five levels: where does it begin to fail?
tiny         what the embedded model knows: the arithmetic it was trained for, on the side it has not seen
FILE.jsonl   {"prompt": …, "answer": …}, and if wanted "regex" (its last match is what was answered) and "kind"
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType

from r1q.benchmarks.graded import draw_graded
from r1q.calibration.problems import BOXED, BOXED_CHINESE, Problem, draw_problem, is_chinese, is_right
from r1q.core.errors import InputError, UsageError, unknown_name
from r1q.models.embedded import EMBEDDED
from r1q.models.tiny_r1_tasks import LEVELS, draw

MAX_TASKS, MAX_BYTES, MAX_PROMPT, MAX_ANSWER = 10_000, 16 << 20, 1 << 16, 1000
SEED = "reasoning"  # traces count their seeds in numbers, so a word is no seed of theirs
# Small kinds have few problems, and another seed draws some of them again: what calibration has likely seen is left out. Those are the
# problems of the built-in text (scripts/calibration_texts.py) and of r1q traces as it is called without --seed.
SEEN = ((20250120, 608), (0, 2048))
SHOWN = 60  # characters kept of what was answered
_BOX = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One problem: what is asked, and the answer. `regex`: its last match in an answer (its first group, if any) is compared."""

    kind: str
    prompt: str
    answer: str
    regex: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSet:
    """Tasks, what they are called, their content's sha256, and how many tokens an answer may have if nothing else is said."""

    name: str
    tasks: tuple[Task, ...]
    max_tokens: int

    @property
    def sha256(self) -> str:
        """The hash of every prompt and answer: two runs with the same were asked the same."""
        lines = "".join(json.dumps(asdict(task), sort_keys=True) + "\n" for task in self.tasks)
        return hashlib.sha256(lines.encode()).hexdigest()


def load_tasks(spec: str, count: int) -> TaskSet:
    """Return `count` tasks of a generated kind (`builtin`, `graded`, `tiny`), or the first `count` of a JSON-lines file.

    Raises UsageError for a name nobody knows or a count out of range, InputError naming the line of a file that is not sound.
    """
    if not 1 <= count <= MAX_TASKS:
        raise UsageError(f"{count} problems are asked for: between 1 and {MAX_TASKS} can be")
    if spec in GENERATED:
        tasks, max_tokens = GENERATED[spec]
        return TaskSet(name=spec, tasks=tuple(itertools.islice(_distinct(tasks()), count)), max_tokens=max_tokens)
    path = Path(spec)
    if path.suffix != ".jsonl" and not path.exists():
        raise UsageError(unknown_name("task set", spec, GENERATED) + ", or a .jsonl file of your own")
    return TaskSet(name=path.name, tasks=_read(path, count), max_tokens=4096)


def default_spec(tokenizer: Path) -> str:
    """Return the tasks that suit a model by its tokenizer's folder: the embedded model's own for that one, else `builtin`."""
    own, theirs = ((folder / "tokenizer.json").read_bytes() for folder in (EMBEDDED, tokenizer))
    return "tiny" if own == theirs else "builtin"


def judge(task: Task, text: str) -> tuple[str, bool]:
    r"""Return what `text` answers (at most 60 characters, empty where it answers nothing) and whether that is right.

    A regex's last match, else the last \boxed{}, else the last line. Numbers are compared by value (`1/2` is `0.5`), words without
    case and marks.

    >>> judge(Task(kind="", prompt="", answer="42"), "So it is \\boxed{42}.")
    ('42', True)
    """
    if task.regex is not None:
        found = list(re.finditer(task.regex, text))
        said = (found[-1].group(1 if found[-1].re.groups else 0) or "") if found else ""
        return said[:SHOWN], bool(said) and _same(said, task.answer)
    boxes = _BOX.findall(text)
    lines = text.strip().splitlines()
    said = (boxes[-1] if boxes else lines[-1] if lines else "").strip()
    if number(task.answer) is None:
        answered = any(character.isalnum() for character in said)
        return (said[-SHOWN:], _same(said, task.answer) or _ends(said, task.answer)) if answered else ("", False)
    if not any(character.isdigit() for character in (boxes[-1] if boxes else text)):
        return "", False
    problem = Problem(kind=task.kind, question="", thoughts="", answer="", result=task.answer)
    return said[-SHOWN:], is_right(problem, text)


def number(word: str) -> Fraction | None:
    """Return the value of a number as people write it (`1,200`, `3/7`, `0.5`), None for anything else."""
    try:
        return Fraction(word.strip().replace(",", "").replace("−", "-"))
    except (ValueError, ZeroDivisionError):
        return None


def _same(said: str, answer: str) -> bool:
    if number(said) is not None or number(answer) is not None:
        return number(said) == number(answer)
    return _words(said) == _words(answer)


def _ends(said: str, answer: str) -> bool:
    words, wanted = _words(said), _words(answer)
    return words[-len(wanted) :] == wanted


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", re.sub(r"\\text\w*|\\mathrm", "", text).casefold())


def _builtin(index: int) -> Task:
    problem = draw_problem(SEED, index)
    hint = BOXED_CHINESE if is_chinese(problem.question) else BOXED
    plain = _plain(problem.question)
    gap = "\n\n" if plain.endswith("```") else "" if is_chinese(plain) else " "
    return Task(kind=problem.kind, prompt=f"{plain}{gap}{hint}", answer=problem.result)


def _plain(question: str) -> str:
    """Return a question without the hint that some of calibration's have."""
    return question.removesuffix(BOXED).removesuffix(BOXED_CHINESE).strip()


def _graded(index: int) -> Task:
    kind, question, answer = draw_graded(SEED, index)
    return Task(kind=kind, prompt=f"{question} {BOXED}", answer=answer)


def _distinct(tasks: Iterator[Task]) -> Iterator[Task]:
    asked: set[str] = set()
    for task in tasks:
        if task.prompt not in asked:
            asked.add(task.prompt)
            yield task


def _all_builtin() -> Iterator[Task]:
    seen = {_plain(draw_problem(seed, index).question) for seed, count in SEEN for index in range(count)}
    tasks = (_builtin(index) for index in itertools.count())
    return (task for task in tasks if _plain(task.prompt) not in seen)


def _all_graded() -> Iterator[Task]:
    return (_graded(index) for index in itertools.count())


def _all_tiny() -> Iterator[Task]:
    rng = random.Random(SEED)
    for level in itertools.cycle(LEVELS):
        problem = draw(rng, level, held_out=True)
        yield Task(kind=problem.level, prompt=problem.question, answer=problem.answer)


GENERATED: Mapping[str, tuple[Callable[[], Iterator[Task]], int]] = MappingProxyType(
    {"builtin": (_all_builtin, 4096), "graded": (_all_graded, 4096), "tiny": (_all_tiny, 512)}
)


def _read(path: Path, count: int) -> tuple[Task, ...]:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise InputError(f"{path} has more than {MAX_BYTES >> 20} MiB: give fewer problems")
    tasks: list[Task] = []
    for place, line in enumerate(data.splitlines(), 1):
        if line.strip() and len(tasks) < count:
            tasks.append(_parse(f"{path}, line {place}", line))
    if not tasks:
        raise InputError(f'{path} has no problems: one a line, {{"prompt": "1 + 1?", "answer": "2"}}')
    return tuple(tasks)


def _parse(where: str, line: bytes) -> Task:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON: {error}") from error
    if not isinstance(value, Mapping):
        raise InputError(f'{where} is not an object: {{"prompt": "1 + 1?", "answer": "2"}} is one')
    if isinstance(value.get("answer"), int | float) and not isinstance(value["answer"], bool):
        value = {**value, "answer": json.dumps(value["answer"])}
    texts = {"prompt": MAX_PROMPT, "answer": MAX_ANSWER, "regex": MAX_ANSWER, "kind": MAX_ANSWER}
    for key, most in texts.items():
        text = value.get(key)
        if text is None and key in ("regex", "kind"):
            continue
        if not isinstance(text, str) or not text.strip() or len(text) > most:
            raise InputError(f"{where}: {key} is missing, empty, not text, or has more than {most} characters")
    regex = value.get("regex")
    try:
        re.compile(regex or "")
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(f"{where}: the regex is not one: {error}") from error
    return Task(kind=value.get("kind") or "own", prompt=value["prompt"], answer=value["answer"].strip(), regex=regex)
