"""Traces: what a model is asked, what becomes of what it says, and that chance belongs to the problem alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from r1q.calibration.conversations import render_conversation
from r1q.calibration.problems import Problem, draw_problem
from r1q.calibration.traces import generate_traces, prompt_ids
from r1q.core.errors import UsageError
from r1q.models.embedded import EMBEDDED
from r1q.models.tiny_r1_tasks import sample
from r1q.models.tokenizer import Tokenizer
from r1q.runtimes.base import Options
from r1q.runtimes.table import load_runtime

MakeModel = Callable[..., Path]
PROBLEMS = [(index, draw_problem(5, index)) for index in range(6)]


@pytest.fixture(scope="module")
def r1() -> Tokenizer:
    return Tokenizer.open(EMBEDDED)


def echo(tmp_path: Path, tokenizer: Tokenizer, sequences: int, *, context: int = 700, extra: int = 0) -> Any:
    path = tmp_path / f"{sequences}-{context}.echo"
    path.write_text(f'{{"vocab": {tokenizer.vocab_size + extra}, "context": {context}}}')
    return load_runtime("echo").open(path, Options(sequences=sequences, context=context))


class Script:
    """A model that says given ids, whatever it is asked; what it was asked is kept."""

    sequences, context = 1, 4096

    def __init__(self, vocab: int, said: Sequence[int]) -> None:
        self._vocab, self._said = vocab, list(said)
        self.asked: list[list[int]] = []
        self._at = 0

    def _next(self) -> NDArray[np.float32]:
        row = np.zeros(self._vocab, np.float32)
        row[self._said[self._at]] = 100
        self._at += 1
        return row

    def prefill(self, sequence: int, tokens: Sequence[int]) -> NDArray[np.float32]:
        self.asked.append(list(tokens))
        self._at = 0
        return self._next()

    def step(self, pairs: Sequence[tuple[int, int]]) -> NDArray[np.float32]:
        return np.stack([self._next() for _ in pairs])

    def drop(self, sequence: int, start: int = 0) -> None:
        pass


def spoken(tokenizer: Tokenizer, text: str, problem: Problem, **options: Any) -> Any:
    ids = [*tokenizer.encode(text, add_special=False), tokenizer.eos_id or 0]
    model = Script(tokenizer.vocab_size, ids)
    settings: dict[str, Any] = {"seed": 0, "max_tokens": 1000, **options}
    (trace,) = generate_traces(model, tokenizer, [(4, problem)], **settings)
    return trace


def test_the_question_is_the_templates_with_thinking_forced(r1: Tokenizer, make_model: MakeModel) -> None:
    assert r1.decode(prompt_ids(r1, "1 + 1?")) == "<｜begin▁of▁sentence｜><｜User｜>1 + 1?<｜Assistant｜><think>\n"
    folder = make_model("qwen3")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
        "{{ '<think>' if thinking is defined and messages[0].content == 'V3' }}"
    )
    forced = Tokenizer.open(folder)
    assert forced.decode(prompt_ids(forced, "1 + 1?")) == "[user]1 + 1?[assistant]<think>\n"
    assert forced.decode(prompt_ids(forced, "V3")) == "[user]V3[assistant]<think>"
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").unlink()
    bare = Tokenizer.open(folder)
    assert bare.decode(prompt_ids(bare, "1 + 1?")) == "1 + 1?\n\n<think>\n"


def test_a_trace_holds_thoughts_and_answer_apart(r1: Tokenizer) -> None:
    problem = Problem(kind="sum", question="1 + 1?", thoughts="", answer="", result="2")
    trace = spoken(r1, "One, two.\n</think>\n\nIt is \\boxed{2}.", problem)
    assert trace == {
        "messages": [
            {"role": "user", "content": "1 + 1?"},
            {"role": "assistant", "content": "It is \\boxed{2}.", "reasoning_content": "One, two."},
        ],
        "index": 4,
        "kind": "sum",
        "result": "2",
        "seed": 0,
        "tokens": len(r1.encode("One, two.\n</think>\n\nIt is \\boxed{2}.", add_special=False)),
        "finished": True,
        "right": True,
    }
    assert spoken(r1, "One.\n</think>\n\nIt is 3.", problem)["right"] is False
    assert spoken(r1, "Without an end of thinking, 2.", problem)["right"] is True


def test_a_trace_that_was_cut_says_so_and_stays_open(r1: Tokenizer) -> None:
    problem = Problem(kind="sum", question="1 + 1?", thoughts="", answer="", result="2")
    trace = spoken(r1, "想一想 2", problem, max_tokens=4)
    assert (trace["finished"], trace["right"], trace["tokens"]) == (False, False, 4)
    assert trace["messages"][1] == {"role": "assistant", "content": "<think>\n想"}
    assert render_conversation(r1, trace["messages"]).endswith("<｜Assistant｜><think>\n想<｜end▁of▁sentence｜>")


def test_other_ends_of_a_turn_stop_it_too(r1: Tokenizer) -> None:
    stop = r1.encode("!", add_special=False)
    trace = spoken(r1, "a</think>b!c", PROBLEMS[0][1], stops=stop)
    assert trace["finished"] is True
    assert trace["messages"][1]["content"] == "b"


def test_chance_belongs_to_the_problem_and_not_to_its_company(r1: Tokenizer, tmp_path: Path) -> None:
    """The echo runtime's logits depend on the sequence's own history alone, so traces must be equal however they are run."""

    def traces(problems: Sequence[tuple[int, Problem]], sequences: int, seed: int = 1) -> dict[int, Any]:
        with echo(tmp_path, r1, sequences) as session:
            made = generate_traces(session, r1, problems, seed=seed, max_tokens=12, temperature=3.0)
            return {int(str(trace["index"])): trace for trace in made}

    alone = traces(PROBLEMS, 1)
    assert sorted(alone) == list(range(6))
    assert traces(PROBLEMS, 4) == alone
    assert traces(PROBLEMS[::-1], 3) == alone
    assert traces(PROBLEMS[2:4], 2) == {2: alone[2], 3: alone[3]}
    other = traces(PROBLEMS, 4, seed=2)
    assert all(other[index]["messages"][1] != alone[index]["messages"][1] for index in alone)


def test_sequences_are_given_back_and_used_again(r1: Tokenizer, tmp_path: Path) -> None:
    with echo(tmp_path, r1, 2) as session:
        made = list(generate_traces(session, r1, PROBLEMS, seed=1, max_tokens=5, temperature=3.0))
        assert len(made) == 6
        # A sequence that was not emptied would have no room for this.
        session.prefill(0, [1] * 700)
        session.prefill(1, [1] * 700)


def test_the_end_of_the_context_ends_a_trace(r1: Tokenizer, tmp_path: Path) -> None:
    problem = PROBLEMS[0][1]
    room = len(prompt_ids(r1, problem.question)) + 7
    with echo(tmp_path, r1, 1, context=room) as session:
        (trace,) = generate_traces(session, r1, [(0, problem)], seed=1, max_tokens=500, temperature=0)
    assert trace["finished"] is False
    assert trace["tokens"] == 7


def test_padding_rows_of_the_logits_are_never_said(r1: Tokenizer, tmp_path: Path) -> None:
    with echo(tmp_path, r1, 2, extra=100_000) as session:
        made = generate_traces(session, r1, PROBLEMS[:2], seed=1, max_tokens=20, temperature=1e6, top_p=1.0)
        for trace in made:
            assert trace["tokens"] == 20 or trace["finished"]


@pytest.mark.parametrize("options", [{"max_tokens": 0}, {"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}])
def test_settings_out_of_range_are_refused(r1: Tokenizer, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="max_tokens"):
        spoken(r1, "a", PROBLEMS[0][1], **options)


@pytest.fixture(scope="module")
def embedded_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("llama_cpp")
    from r1q.plan.job import Job, open_job, plan_job, run_job
    from r1q.plan.walk import Exported

    folder = tmp_path_factory.mktemp("embedded")
    opened = open_job(Job(scheme="bf16", output=folder / "out"))
    (exported,) = (event for event in run_job(opened, plan_job(opened)) if isinstance(event, Exported))
    return exported.path


@pytest.mark.runtime
def test_the_embedded_model_answers_what_it_was_trained_on(r1: Tokenizer, embedded_gguf: Path) -> None:
    """Arithmetic it never saw, at R1's own settings, three at a time: most is right, and is rendered as it was said."""
    asked = [
        (index, Problem(kind=task.level, question=task.question, thoughts="", answer="", result=task.answer))
        for index, task in enumerate(sample("traces", 12, held_out=True))
    ]
    with load_runtime("llama-cpp").open(embedded_gguf, Options(sequences=3, context=512, threads=1)) as session:
        traces: list[Any] = list(generate_traces(session, r1, asked, seed=0, max_tokens=350))
    assert sorted(trace["index"] for trace in traces) == list(range(12))
    assert sum(trace["finished"] for trace in traces) >= 11
    assert sum(trace["right"] for trace in traces) >= 8
    for trace in traces:
        if trace["finished"]:
            rendered = r1.encode(render_conversation(r1, trace["messages"]), add_special=False)
            question = prompt_ids(r1, trace["messages"][0]["content"])
            assert rendered[: len(question)] == question
            assert len(rendered) == len(question) + trace["tokens"] + 1
