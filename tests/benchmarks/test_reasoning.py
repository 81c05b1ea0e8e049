"""Reasoning: shares, flips and costs against columns worked out by hand; and the reasoner's order of asking."""

import io
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from r1q.benchmarks.reasoner import Entrant, Found, Reasoner, ReasoningPlan, find_tokenizer
from r1q.benchmarks.reasoning import Answers, Reasoning
from r1q.benchmarks.reasoning_table import reasoning_report, row_of
from r1q.core.errors import InputError, MissingError, UsageError
from r1q.models.embedded import EMBEDDED
from r1q.runtimes.table import RUNTIMES


def answers(**columns: tuple[object, ...]) -> Answers:
    given = {
        "problem": (0, 0, 1, 1, 2, 2),
        "seed": (0, 1, 0, 1, 0, 1),
        "right": (True, True, True, False, False, False),
        "said": ("1", "1", "2", "3", "", ""),
        "thinking": (10, 20, 30, 40, 50, 50),
        "answer": (2, 2, 2, 2, 0, 2),
        "truncated": (False, False, False, False, True, False),
        "loop": (False, False, False, False, True, False),
        "waits": (0, 1, 0, 0, 3, 0),
        "seconds": (0.5, 0.5, 1.0, 1.0, 2.0, 1.0),
    }
    return Answers(**{**given, **columns})  # type: ignore[arg-type]


def reasoning(found: Answers) -> Reasoning:
    return Reasoning(
        tasks="mine",
        tasks_sha256="0",
        kinds=("sum", "sum", "product"),
        seeds=2,
        temperature=0.6,
        top_p=0.95,
        max_tokens=50,
        sequences=2,
        answers=found,
    )


def test_shares_and_costs_by_hand() -> None:
    found = reasoning(answers()).outcome()
    assert (found.problems, found.answers, found.accuracy.value) == (3, 6, 0.5)
    assert found.thinking.value == pytest.approx(200 / 6)
    assert found.thinking_p90 == 50
    assert (found.truncated, found.unanswered, found.loops) == (1 / 6, 2 / 6, 1 / 6)
    assert found.waits == pytest.approx(1000 * 4 / 200)
    assert found.seconds_per_right == pytest.approx(6 / 3)
    assert found.tokens_per_right == pytest.approx(210 / 3)
    assert found.kinds == {"product": (0, 2), "sum": (3, 4)}
    assert found.against is None


def test_nothing_right_has_no_price() -> None:
    found = reasoning(answers(right=(False,) * 6)).outcome()
    assert (found.seconds_per_right, found.tokens_per_right, found.accuracy.value) == (None, None, 0)
    assert found.accuracy.high > 0.5  # three problems tell little
    assert found.detectable > 0.5


def test_flips_against_the_float_model_by_hand() -> None:
    other = answers(right=(True, True, True, True, True, False), thinking=(10, 10, 20, 20, 20, 20))
    found = reasoning(answers()).compared("Float-BF16", other)
    assert found.reference == "Float-BF16"
    against = found.outcome().against
    assert against is not None
    assert (against.pairs, against.lost, against.won, against.p) == (6, 2, 0, 0.5)
    assert against.difference.value == pytest.approx(-2 / 6)
    assert against.inflation is not None
    assert against.inflation.value == pytest.approx(200 / 100)
    assert against.inflation.low <= 2 <= against.inflation.high
    # −2 of 6 answers lost: by problem 0, −1, −1 of 2 each, which scatter by √(3/2 · (4/9 + 1/9 + 1/9)) / 6.
    assert against.detectable == pytest.approx(min(1.0, max(2.8016 * math.sqrt(1.5 * (4 + 1 + 1) / 9) / 6, 1.0)))


def test_only_answers_that_both_gave_are_compared() -> None:
    other = answers()
    part = Answers(**{name: getattr(other, name)[2:] for name in Answers.__slots__})
    found = reasoning(answers()).compared("x", part)
    assert found.answers.problem == (1, 1, 2, 2)
    against = found.outcome().against
    assert against is not None
    assert (against.lost, against.won, against.p) == (0, 0, 1.0)
    nothing = Answers(**{name: () for name in Answers.__slots__})
    assert reasoning(answers()).compared("x", nothing).reference is None


def test_records_in_any_order_make_the_same_columns() -> None:
    columns = answers()
    records = [{name: getattr(columns, name)[i] for name in Answers.__slots__} for i in (3, 0, 5, 1, 4, 2)]
    assert Answers.of(records) == columns


def test_the_table_at_two_widths() -> None:
    rows = [
        row_of("m [red]x", "bf16", reasoning(answers())),
        row_of("m", "q2_k", reasoning(answers()).compared("m", answers())),
    ]
    for width, tables in ((200, 1), (80, 2)):
        console = Console(width=width, record=True, file=io.StringIO())
        console.print(reasoning_report(rows, width))
        text = console.export_text()
        assert text.count("grid") == tables
        assert "50.0 [" in text
        assert "−0 +0" in text
        assert "×1.00" in text
        assert "[red]" in text
        assert "6 answers: 3 problems of mine × 2 seeds" in " ".join(text.split())


TALKER = """
import os
from r1q.runtimes.echo import Echo, EchoSession

class Session(EchoSession):
    calls = 0
    def prefill(self, sequence, tokens):
        self.calls += 1
        if self.fatal and self.calls > 3:
            os.kill(os.getpid(), 9)
        row = super().prefill(sequence, tokens)
        row[501] = 1000.0  # ends at once
        return row

class Talker(Echo):
    name = "talker"
    def open(self, path, options):
        if options.sequences > 1:
            from r1q.core.errors import UsageError
            raise UsageError("one sequence only")
        session = Session(512, options.context, options.sequences, load_seconds=0.1)
        session.fatal = "fatal" in path.name
        return session
"""


@pytest.fixture
def talker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Install a runtime as a third party would: it knows one sequence, ends every answer at once, and may die at the fourth."""
    plugin = tmp_path / "plugin"
    info = plugin / "talker_runtime-1.0.dist-info"
    info.mkdir(parents=True)
    (plugin / "talker_runtime.py").write_text(TALKER)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: talker-runtime\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[r1q.runtimes]\ntalker = talker_runtime:Talker\n")
    monkeypatch.syspath_prepend(plugin)
    monkeypatch.setenv("PYTHONPATH", str(plugin))
    RUNTIMES.__dict__.pop("entries", None)
    yield "talker"
    RUNTIMES.__dict__.pop("entries", None)


def entrant(folder: Path, name: str, grid: str, runtime: str, weights: int = 1) -> Entrant:
    path = folder / f"{name}.echo"
    path.write_text('{"vocab": 512, "context": 512}')
    return Entrant(path=path, name=name, grid=grid, weights=weights, runtime=runtime, options={}, context=512)


def ask(reasoner: Reasoner, one: Entrant) -> tuple[Found, list[str]]:
    steps, said = reasoner.ask(one), []
    while True:
        try:
            said.append(next(steps)[0])
        except StopIteration as end:
            return end.value, said


def test_the_float_model_is_asked_first_and_once_and_a_death_keeps_what_was_said(tmp_path: Path, talker: str) -> None:
    four, fatal, base = (
        entrant(tmp_path, "four", "q4_0", talker),
        entrant(tmp_path, "fatal", "q2_k", talker),
        entrant(tmp_path, "base", "BF16", talker),
    )
    plan = ReasoningPlan(count=3, tasks="tiny", seeds=2, tokenizer=EMBEDDED)
    reasoner = Reasoner(plan, [four, fatal, base])
    found, said = ask(reasoner, four)
    assert list(dict.fromkeys(said)) == ["base", "four"]
    assert found.reasoning is not None
    assert (found.reasoning.reference, found.reasoning.sequences, found.error) == ("base", 1, None)
    assert found.reasoning.outcome().unanswered == 1.0
    died, said = ask(reasoner, fatal)
    assert set(said) == {"fatal"}
    assert died.error is not None
    assert "SIGKILL" in str(died.error)
    assert died.reasoning is not None
    assert died.reasoning.answers.problem == (0, 0, 1)
    again, said = ask(reasoner, base)
    assert (said, again.error) == ([], None)
    assert again.reasoning is not None
    assert again.reasoning.reference is None


def test_without_a_float_model_of_its_own_it_says_so(tmp_path: Path, talker: str) -> None:
    four = entrant(tmp_path, "four", "q4_0", talker)
    other = entrant(tmp_path, "other", "bf16", talker, weights=2)
    plan = ReasoningPlan(count=2, tasks="tiny", seeds=1, tokenizer=EMBEDDED)
    found, said = ask(Reasoner(plan, [four, other]), four)
    assert "other" not in said
    assert "no float artifact of this model is in this bench" in found.notes[0]
    broken = entrant(tmp_path, "broken", "q4_0", "none")
    found, _ = ask(Reasoner(plan, [broken]), broken)
    assert found.reasoning is None
    assert isinstance(found.error, UsageError | MissingError)


def test_the_tokenizer_is_looked_for_where_it_can_be(tmp_path: Path) -> None:
    beside = tmp_path / "out" / "checkpoint" / "source"
    beside.mkdir(parents=True)
    (beside / "tokenizer.json").write_text("{}")
    assert find_tokenizer(tmp_path / "out" / "a.gguf") == beside
    (tmp_path / "out" / "gptq").mkdir()
    assert find_tokenizer(tmp_path / "out" / "gptq") == beside
    with pytest.raises(InputError, match=r"no tokenizer\.json lies with .*b\.gguf"):
        find_tokenizer(tmp_path / "b.gguf")
    with pytest.raises(InputError, match="--tokenizer"):
        find_tokenizer(tmp_path / "out" / "a.gguf", tmp_path)


@pytest.mark.parametrize("wish", [{"count": 0}, {"seeds": 0}, {"top_p": 0.0}, {"temperature": -1.0}, {"tasks": "tny"}])
def test_wishes_that_cannot_be_are_refused_first(wish: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        ReasoningPlan(**{"count": 5, **wish})  # type: ignore[arg-type]
