"""Tasks: what is asked is new to a calibrated model, is judged as people would, and a user's file is refused by its line."""

import json
import math
import random
import re
from fractions import Fraction
from pathlib import Path

import pytest

from r1q.benchmarks.graded import draw_graded
from r1q.benchmarks.tasks import MAX_BYTES, Task, default_spec, judge, load_tasks
from r1q.calibration.problems import draw_problem
from r1q.core.errors import InputError, UsageError
from r1q.models.embedded import EMBEDDED
from r1q.models.tiny_r1_tasks import draw

TEXTS = Path(__file__).resolve().parents[2] / "calibration" / "texts" / "reasoning.jsonl"


def question(prompt: str) -> str:
    return re.split(r"\s*(?:Please reason|请一步)", prompt)[0].strip()


def test_no_builtin_problem_is_in_what_models_are_calibrated_on() -> None:
    tasks = load_tasks("builtin", 300).tasks
    asked = {question(task.prompt) for task in tasks}
    assert len(asked) == 300
    lines = [json.loads(line) for line in TEXTS.read_text(encoding="utf-8").splitlines()]
    assert not asked & {question(line["messages"][0]["content"]) for line in lines}
    assert not asked & {question(draw_problem(0, index).question) for index in range(256)}
    assert all(task.prompt.count("boxed") == 1 for task in tasks)


def test_tiny_problems_are_of_the_side_that_was_held_out() -> None:
    tasks = load_tasks("tiny", 100).tasks
    assert {task.kind for task in tasks} == {"sum", "product", "chain", "story", "mental"}
    rng = random.Random(0)
    trained = {draw(rng, kind, held_out=False).question for kind in ("sum", "product") * 2000}
    assert not {task.prompt for task in tasks} & trained


def test_more_problems_begin_with_the_fewer_and_the_hash_tells_them_apart() -> None:
    for spec in ("builtin", "graded", "tiny"):
        few, more = load_tasks(spec, 7), load_tasks(spec, 40)
        assert more.tasks[:7] == few.tasks
        assert load_tasks(spec, 7).sha256 == few.sha256 != more.sha256


@pytest.mark.parametrize("index", range(45))
def test_graded_problems_by_another_way(index: int) -> None:
    kind, asked, answer = draw_graded("test", index)
    text = re.sub(r"^What is |\?.*$", "", asked)
    if kind.startswith("chain"):
        expected = eval(text.replace("×", "*"))
        assert len(re.findall(r" [-+×] ", text)) == int(kind[-1]) + 1
    elif kind.startswith("fractions"):
        terms = [Fraction(term) for term in text.split(" + ")]
        expected = sum(terms[1:], terms[0])
        assert len(terms) == int(kind[-1]) + 1
    else:
        one, two = map(int, re.findall(r"\d+", asked))
        expected = max(d for d in range(1, min(one, two) + 1) if one % d == 0 == two % d) if one < 10**5 else None
        expected = expected or math.gcd(one, two)
    assert answer == str(expected)


def test_the_tasks_suit_the_model(tmp_path: Path) -> None:
    assert default_spec(EMBEDDED) == "tiny"
    (tmp_path / "tokenizer.json").write_text("{}")
    assert default_spec(tmp_path) == "builtin"


@pytest.mark.parametrize(
    ("answer", "regex", "text", "said", "right"),
    [
        ("42", None, "So it is \\boxed{42}.", "42", True),
        ("1/2", None, "\\boxed{\\frac{2}{4}}", "\\frac{2}{4}", True),
        ("1200", None, "There are 1,200 of them.", "There are 1,200 of them.", True),
        ("42", None, "It is 41", "It is 41", False),
        ("42", None, "I cannot say.", "", False),
        ("42", None, "", "", False),
        ("Tuesday", None, "It will be **Tuesday**.", "It will be **Tuesday**.", True),
        ("Tuesday", None, "\\boxed{\\text{tuesday}}", "\\text{tuesday}", True),
        ("New York", None, "The city is New York.", "The city is New York.", True),
        ("York", None, "It is Yorkshire", "It is Yorkshire", False),
        ("Tuesday", None, "…", "", False),
        ("B", r"choice ([A-D])", "choice A, no: choice B", "B", True),
        ("B", r"choice ([A-D])", "It is B", "", False),
        ("7", r"\d+", "1 then 7.0", "0", False),
        ("0.5", r"[\d/.]+$", "1/2", "1/2", True),
    ],
)
def test_judged_as_people_would(answer: str, regex: str | None, text: str, said: str, right: bool) -> None:
    assert judge(Task(kind="", prompt="", answer=answer, regex=regex), text) == (said, right)


def test_every_generators_own_solution_is_right() -> None:
    for index in range(64):
        problem = draw_problem("solutions", index)
        task = Task(kind=problem.kind, prompt=problem.question, answer=problem.result)
        assert judge(task, problem.answer)[1], problem
        assert not judge(task, problem.answer.replace(f"\\boxed{{{problem.result}}}", "\\boxed{9999 x}"))[1]


def test_a_users_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(
        '{"prompt": "1+1?", "answer": 2}\n\n{"prompt": "q", "answer": " B ", "regex": "([AB])", "kind": "letters"}\n'
    )
    found = load_tasks(str(path), 10)
    assert found.name == "mine.jsonl"
    assert found.tasks == (
        Task(kind="own", prompt="1+1?", answer="2"),
        Task(kind="letters", prompt="q", answer="B", regex="([AB])"),
    )
    assert len(load_tasks(str(path), 1).tasks) == 1


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON"),
        ("[1]", "line 2 is not an object"),
        ('{"prompt": "q"}', "line 2: answer is missing"),
        ('{"prompt": " ", "answer": "1"}', "line 2: prompt is missing, empty"),
        ('{"prompt": "q", "answer": true}', "line 2: answer is missing, empty, not text"),
        ('{"prompt": "q", "answer": "1", "regex": "("}', "line 2: the regex is not one"),
        ('{"prompt": "q", "answer": "1", "regex": 5}', "line 2: regex is missing"),
    ],
)
def test_a_line_that_is_no_problem_is_named(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(f'{{"prompt": "1+1?", "answer": "2"}}\n{line}\n')
    with pytest.raises(InputError, match=reason):
        load_tasks(str(path), 10)


def test_what_cannot_be_asked_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no task set named 'bultin'; did you mean builtin"):
        load_tasks("bultin", 5)
    with pytest.raises(UsageError, match="between 1 and"):
        load_tasks("tiny", 0)
    with pytest.raises(InputError, match="cannot be read"):
        load_tasks(str(tmp_path / "absent.jsonl"), 5)
    empty, huge = tmp_path / "empty.jsonl", tmp_path / "huge.jsonl"
    empty.write_text("\n")
    with pytest.raises(InputError, match="has no problems"):
        load_tasks(str(empty), 5)
    with open(huge, "wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(InputError, match="more than 16 MiB"):
        load_tasks(str(huge), 5)
