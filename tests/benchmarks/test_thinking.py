"""Thinking: what becomes of what a model says, circles, and the embedded model on its own problems."""

import json
import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from r1q.benchmarks.formats import to_markdown
from r1q.benchmarks.result import BenchResult
from r1q.benchmarks.speaking import luck
from r1q.benchmarks.tasks import Task, load_tasks
from r1q.benchmarks.thinking import WAITS, _Pair, _record, end_ids, loops, think
from r1q.cli import main
from r1q.core.errors import InputError, UsageError
from r1q.models.embedded import EMBEDDED
from r1q.models.tokenizer import Tokenizer

TASK = Task(kind="sum", prompt="12 + 30?", answer="42")


@pytest.fixture(scope="module")
def r1() -> Tokenizer:
    return Tokenizer.open(EMBEDDED)


def recorded(tokenizer: Tokenizer, text: str, *, finished: bool) -> dict[str, Any]:
    ids = tokenizer.encode(text, add_special=False)
    pair = _Pair(problem=3, seed=1, asked=[1], key=0, max_tokens=9, said=ids, seconds=1.23456789, finished=finished)
    return _record(tokenizer, TASK, pair)


@pytest.mark.parametrize(
    ("text", "finished", "said", "right", "truncated"),
    [
        ("Wait, 12 + 30.\n</think>\n\n42", True, "42", True, False),
        ("So 42.\n</think>\n\n43", True, "43", False, False),
        ("So 42.\n</think>\n\n", True, "", False, False),
        # Cut off in the thoughts: no answer, even where it was on the way. In the answer: what is there counts.
        ("So it is 42", False, "", False, True),
        ("So 42.\n</think>\n\n42", False, "42", True, True),
        # Ended without closing the thoughts: it answered in them.
        ("So it is 42.", True, "So it is 42.", True, False),
        ("", True, "", False, False),
    ],
)
def test_what_becomes_of_what_is_said(
    r1: Tokenizer, text: str, finished: bool, said: str, right: bool, truncated: bool
) -> None:
    found = recorded(r1, text, finished=finished)
    assert (found["said"], found["right"], found["truncated"]) == (said, right, truncated)
    assert (found["problem"], found["seed"], found["seconds"], found["loop"]) == (3, 1, 1.23457, False)
    thoughts, closed, answer = text.partition("</think>")
    assert found["thinking"] == len(r1.encode(thoughts, add_special=False))
    assert found["answer"] == (1 + len(r1.encode(answer, add_special=False)) if closed else 0)
    assert found["waits"] == text.count("Wait")


def test_a_closing_tag_that_is_spelled_out_is_found(r1: Tokenizer) -> None:
    ids = [*r1.encode("So 42.", False), *(r1.encode(part, False)[0] for part in "</think>"), *r1.encode("\n42", False)]
    assert r1.token_id("</think>") not in ids
    found = _record(r1, TASK, _Pair(problem=0, seed=0, asked=[1], key=0, max_tokens=9, said=ids, finished=True))
    # Cut before the last letter of the tag.
    assert (found["said"], found["thinking"], found["answer"]) == (
        "42",
        len(ids) - len(r1.encode("\n42", False)) - 1,
        4,
    )


def slow_loops(ids: Sequence[int]) -> bool:
    """The definition, letter by letter."""

    def worn(place: int) -> bool:
        gram = ids[place : place + 16]
        return sum(ids[before : before + 16] == gram for before in range(place)) >= 2

    found = [worn(place) for place in range(len(ids) - 15)]
    return any(sum(found[start : start + 113]) * 2 >= 113 for start in range(len(ids) - 127))


def test_loops_are_what_the_definition_says() -> None:
    rng = random.Random(5)
    found = []
    for length in (1, 2, 7, 20, 40) * 4:
        block = [rng.randrange(500) for _ in range(length)]
        rounds = rng.randint(1, 1 + 260 // length)
        ids = [*(rng.randrange(500) for _ in range(60)), *block * rounds, *(rng.randrange(500) for _ in range(30))]
        if rng.random() < 0.5:  # words vary in between
            for place in range(60, len(ids), 25):
                ids[place] = rng.randrange(500)
        assert loops(ids) == slow_loops(ids), (length, rounds)
        found.append(loops(ids))
    assert {True, False} == set(found)


def test_checking_once_is_no_circle_and_a_circle_is_seen_in_its_third_round() -> None:
    paragraph, other = list(range(100)), list(range(1000, 1200))
    assert not loops([*paragraph, *other, *paragraph])
    assert not loops(paragraph * 2)
    assert loops([*other, *paragraph * 4])
    assert not loops([*other, *[7] * 60, *other[:50]])  # a row of dashes
    assert loops([*other, *[7] * 128])
    assert not loops([])


def test_wait_markers() -> None:
    text = "Wait, that is wrong. But then… Hmm. wait: the butter waits. Alternatively, actually. 等等，不对。"
    assert WAITS.findall(text) == ["Wait", "But", "Hmm", "wait", "Alternatively", "等等", "不对"]


def test_every_end_of_turn_ends(r1: Tokenizer) -> None:
    assert end_ids(r1) == {501}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "out"
    done = CliRunner().invoke(
        main, ["quantize", "--scheme", "q8_0", "-o", str(folder), "--quiet"], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    (path,) = folder.glob("*.gguf")
    return path


def job(path: Path, **settings: Any) -> dict[str, Any]:
    tasks = [asdict(task) for task in load_tasks("tiny", 10).tasks]
    given = {"path": str(path), "runtime": "llama-cpp", "options": {"threads": 2}, "tokenizer": str(EMBEDDED)}
    how = {"temperature": 0.6, "top_p": 0.95, "max_tokens": 200, "sequences": 4, "context": 1024, "seeds": 2}
    return {**given, **how, "tasks": tasks, **settings}


@pytest.mark.runtime
def test_the_embedded_model_thinks_and_is_mostly_right(tiny: Path) -> None:
    opened, *rest = think(job(tiny))
    assert opened["opened"]["sequences"] == 4
    found = [message["answer"] for message in rest]
    assert {(one["problem"], one["seed"]) for one in found} == {(p, s) for p in range(10) for s in range(2)}
    assert sum(one["right"] for one in found) >= 16
    assert all(10 < one["thinking"] < 150 and one["answer"] > 1 for one in found)
    # Greedy, seeds make no difference.
    _, *greedy = think(job(tiny, temperature=0, tasks=job(tiny)["tasks"][:2]))
    by_problem = sorted((one["answer"]["problem"], one["answer"]["thinking"]) for one in greedy)
    assert by_problem[0] == by_problem[1]


@pytest.mark.runtime
def test_a_limit_cuts_off_and_says_so(tiny: Path) -> None:
    _, *rest = think(job(tiny, max_tokens=5, seeds=1))
    found = [message["answer"] for message in rest]
    assert all(one["truncated"] and not one["right"] and one["said"] == "" for one in found)
    assert {one["thinking"] for one in found} == {5}


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "small.echo"
    path.write_text('{"vocab": 24, "context": 1024}')
    with pytest.raises(InputError, match="another model's"):
        list(think(job(path, runtime="echo")))
    with pytest.raises(InputError, match=r"problem \d+ has \d+ tokens, and the context is 8"):
        list(think(job(path, runtime="echo", context=8)))
    with pytest.raises(UsageError, match="no runtime"):
        list(think(job(path, runtime="none")))


def test_artifacts_share_their_luck() -> None:
    assert luck(TASK.prompt, 0) == luck("12 + 30?", 0) != luck("12 + 30?", 1)


@pytest.mark.runtime
def test_the_bench_asks_and_the_result_comes_back_from_its_line(tiny: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs.jsonl"
    fast = "--runtime llama-cpp --repetitions 2 --windows 1 --prompt 8 --prefill 16 --generate 4 --depths 0 --no-noise-floor"
    asked = ["--json", "-o", str(runs), "-q", "--seeds", "2", "--reasoning", "3"]
    done = CliRunner().invoke(main, ["bench", str(tiny), *fast.split(), *asked], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    line = runs.read_text(encoding="utf-8").splitlines()[0]
    result = BenchResult.from_json(line)
    assert result.reasoning is not None
    assert (result.reasoning.tasks, result.reasoning.seeds, result.reasoning.reference) == ("tiny", 2, None)
    assert result.reasoning.answers.problem == (0, 0, 1, 1, 2, 2)
    assert json.loads(line)["summary"]["reasoning"]["accuracy"]["value"] > 0.5
    assert any("flips and token inflation need its BF16 file" in note for note in result.notes)
    assert "right % [95 %]" in to_markdown([result])
