"""A ready student: copied as it is, trained, and refused where it is no smaller than its teacher or has other words."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from click.testing import CliRunner

from r1q.cli import main
from r1q.distill.ready import copy_model
from r1q.models.source import ModelSource

MakeModel = Callable[..., Path]


def _distill(teacher: Path, student: Path, out: Path, *options: str) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["distill", str(teacher), "--student", str(student), "-o", str(out), *options])
    return done.exit_code, done.output


def test_a_ready_student_learns(make_model: MakeModel, tmp_path: Path) -> None:
    teacher, student = make_model("llama", seed=1), make_model("llama", num_layers=1, seed=2)
    words, out = tmp_path / "words.txt", tmp_path / "out"
    words.write_text("What is the sum of one and two? It is three. " * 120)
    options = [
        "--text",
        str(words),
        "--samples",
        "24",
        "--seq-len",
        "16",
        "--steps",
        "30",
        "--every",
        "10",
        "--lr",
        "3e-3",
    ]
    code, said = _distill(teacher, student, out, *options)
    assert code == 0, said
    held = [float(line.split("held out ")[1].split()[0]) for line in said.splitlines() if line.startswith("step ")]
    assert held[-1] < 0.9 * held[0]
    assert ModelSource.open(out).config.num_layers == 1


def test_a_copied_model_is_the_model(make_model: MakeModel, tmp_path: Path) -> None:
    for number, dtype in enumerate(("F16", "BF16", "F32")):
        source = ModelSource.open(make_model("qwen2", dtype=dtype, seed=number))
        copy_model(source, tmp_path / dtype)
        copy = ModelSource.open(tmp_path / dtype)
        assert copy.tensors == source.tensors
        for spec in source.tensors:
            np.testing.assert_array_equal(
                copy.raw_rows(spec.name, 0, spec.rows), source.raw_rows(spec.name, 0, spec.rows)
            )


def test_what_is_no_student_of_this_teacher_is_refused_with_the_reason(make_model: MakeModel, tmp_path: Path) -> None:
    teacher, out = make_model("llama"), tmp_path / "out"
    other = make_model("llama", num_layers=1)
    tokenizer = json.loads((other / "tokenizer.json").read_bytes())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[40:42]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    for student, says in (
        (make_model("llama", num_layers=3), "a student is smaller"),
        (make_model("llama", num_layers=1, vocab_size=400), "predicts 400 tokens"),
        (other, f"the tokenizers differ: token {vocabulary[second]} is"),
    ):
        code, said = _distill(teacher, student, out)
        assert (code, says in said) == (3, True), said
    assert not out.exists()


def test_what_it_would_need_is_said_before_anything_is_made(make_model: MakeModel, tmp_path: Path) -> None:
    code, said = _distill(make_model("llama"), make_model("llama", num_layers=1), tmp_path / "out", "--dry-run")
    assert code == 0, said
    assert "7B to 1.5B is 4 cuts of a third, each with 80 to 100 billion tokens" in said
    assert "320 to 400 billion" in said
    assert not (tmp_path / "out").exists()
