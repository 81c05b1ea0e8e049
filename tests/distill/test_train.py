"""Distillation: its loss is the divergence of core/metrics.py, it falls, a killed run ends as an unbroken one does, and it stops."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from r1q.cli import main
from r1q.core.errors import InputError
from r1q.core.metrics import score
from r1q.distill import divergence as divergence_module
from r1q.distill.divergence import divergence, divergence_loss
from r1q.distill.network import Network, load_network
from r1q.distill.text import ProblemText, WindowText, open_text
from r1q.distill.train import BEST, STATE, Plan, distill, load_best
from r1q.models.embedded import open_model
from r1q.models.forward import logits
from r1q.models.source import ModelSource
from r1q.models.tokenizer import Tokenizer

MakeModel = Callable[..., Path]
TOKENS = np.random.default_rng(1).integers(0, 200, (2, 12))


@pytest.fixture
def pair(make_model: MakeModel) -> tuple[ModelSource, ModelSource]:
    """Return a teacher and a smaller student that knows nothing of it."""
    student = make_model("llama", num_layers=1, intermediate_size=64, seed=2)
    return ModelSource.open(make_model("llama", seed=1)), ModelSource.open(student)


def _text(seed: int = 0) -> WindowText:
    return WindowText(np.random.default_rng(3).integers(0, 60, (32, 16)), seed, {"seed": seed})


def test_the_loss_is_the_divergence_that_fidelity_is_measured_by(pair: tuple[ModelSource, ModelSource]) -> None:
    teacher, student = pair
    weights = np.random.default_rng(2).random((2, 12)).astype(np.float32)
    learning, teaching = load_network(student), load_network(teacher)
    ours = divergence(learning, teaching, torch.from_numpy(TOKENS), torch.from_numpy(weights))
    truth, given = (np.concatenate(list(logits(source, TOKENS))) for source in (teacher, student))
    kld = score(given, TOKENS.reshape(-1), truth).kld
    assert kld is not None
    assert float(ours) == pytest.approx(float(np.average(kld, weights=weights.reshape(-1))), rel=1e-4)


def test_logits_in_pieces_give_the_same_gradient(
    pair: tuple[ModelSource, ModelSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = load_network(pair[0])
    gradients = []
    for limit in (1 << 24, 1024):  # 1024 logits are three positions of this vocabulary
        monkeypatch.setattr(divergence_module, "_LOGITS", limit)
        student = load_network(pair[1])
        for tensor in student.tensors.values():
            tensor.requires_grad_()
        divergence(student, teacher, torch.from_numpy(TOKENS), torch.ones(2, 12)).backward()  # type: ignore[no-untyped-call]
        gradients.append(
            torch.cat([tensor.grad.flatten() for tensor in student.tensors.values() if tensor.grad is not None])
        )
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-7)


class _Killed(WindowText):
    """Text of a run that is killed in the middle of an interval between two states."""

    def batch(self, step: int, rows: int) -> tuple[Tensor, Tensor]:
        if step == 5:
            raise KeyboardInterrupt
        return super().batch(step, rows)


def _run(teacher: Network, student: ModelSource, text: WindowText, plan: Plan, folder: Path) -> list[float]:
    folder.mkdir(exist_ok=True)
    network = load_network(student)
    return [now.held_out for now in distill(divergence_loss(network, teacher), network.tensors, text, plan, folder)]


def test_a_killed_run_ends_with_the_same_bytes(pair: tuple[ModelSource, ModelSource], tmp_path: Path) -> None:
    teacher, plan, text = load_network(pair[0]), Plan(steps=8, rows=4, lr=3e-3, every=2), _text()
    whole = _run(teacher, pair[1], text, plan, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        _run(teacher, pair[1], _Killed(text.windows, 0, text.record), plan, tmp_path / "killed")
    rest = _run(teacher, pair[1], text, plan, tmp_path / "killed")
    assert rest == whole[2:]  # it went on at step 4, not at 0
    assert whole[-1] < 0.9 * whole[0]
    assert (tmp_path / "whole" / BEST).read_bytes() == (tmp_path / "killed" / BEST).read_bytes()
    (tmp_path / "killed" / STATE).write_bytes((tmp_path / "whole" / BEST).read_bytes())
    with pytest.raises(InputError, match="damaged"):
        _run(teacher, pair[1], text, plan, tmp_path / "killed")


def test_a_run_that_does_not_improve_stops_and_keeps_its_best(
    pair: tuple[ModelSource, ModelSource], tmp_path: Path
) -> None:
    teacher, student = load_network(pair[0]), load_network(pair[1])
    plan = Plan(steps=1000, rows=2, lr=30.0, every=1, patience=3)
    steps = list(distill(divergence_loss(student, teacher), student.tensors, _text(), plan, tmp_path))
    assert (steps[-1].step, steps[-1].best_step, steps[-1].best) == (3, 0, steps[0].held_out)
    load_best(tmp_path, student.tensors)
    for spec in pair[1].tensors:
        np.testing.assert_array_equal(
            student.tensors[spec.name].detach().numpy(), pair[1].read_rows(spec.name, 0, spec.rows).reshape(spec.shape)
        )


def test_the_rate_warms_up_and_falls_to_a_twentieth() -> None:
    plan = Plan(steps=100, rows=1, lr=2.0)
    assert [plan.lr_at(step) for step in (0, 4, 5)] == pytest.approx([0.4, 2.0, 2.0])
    assert plan.lr_at(100) == pytest.approx(0.1)
    rates = [plan.lr_at(step) for step in range(5, 101)]
    assert rates == sorted(rates, reverse=True)


def test_validation_is_never_learned_from_and_a_pass_sees_every_other_window_once() -> None:
    text = WindowText(np.arange(32)[:, None] * np.ones((1, 4), dtype=np.int64), 7, {})
    kept = {int(tokens[0, 0]) for tokens, _ in text.validation()}
    seen = [int(row[0]) for step in range(6) for row in text.batch(step, 5)[0]]
    assert kept == {0, 16}
    assert sorted(seen) == sorted(set(range(32)) - kept)


def test_problems_weigh_what_is_answered_and_never_what_follows_a_text() -> None:
    source = open_model(None).source
    tokenizer = Tokenizer.open(source.path)
    text = open_text("problems", tokenizer, samples=1, length=200, seed=3)
    assert isinstance(text, ProblemText)
    (tokens, weights), (again, _) = text.batch(4, 2), text.batch(4, 2)
    assert torch.equal(tokens, again)
    assert not torch.equal(tokens, text.batch(5, 2)[0])
    for row, counts in zip(tokens.tolist(), weights.tolist(), strict=True):
        asked = True
        for here, count in zip(row[1:], counts, strict=False):  # a weight is of the token behind it
            asked = asked or here == tokenizer.bos_id
            assert count == pytest.approx(0.0 if here == tokenizer.bos_id else 0.1 if asked else 1.0)
            asked = asked and tokenizer.decode([here]) != "\n"


def test_the_command_makes_a_folder_that_quantize_takes(make_model: MakeModel, tmp_path: Path) -> None:
    teacher, words, out = make_model("llama"), tmp_path / "words.txt", tmp_path / "student"
    words.write_text("What is the sum of one and two? It is three. " * 60)
    command = ["distill", str(teacher), "--ffn", "64", "-o", str(out), "--text", str(words), "--seq-len", "16"]
    command += ["--steps", "4", "--every", "2", "--rows", "2"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert "320 to 400 billion" in done.output
    assert "held out" in done.output
    assert ModelSource.open(out).config.intermediate_size == 64
    assert not (out / "distilling").exists()
    weights = (out / "model.safetensors").read_bytes()
    assert CliRunner().invoke(main, command).exit_code == 0  # it is done already
    assert (out / "model.safetensors").read_bytes() == weights
    other = CliRunner().invoke(main, [*command, "--seed", "9"])
    assert other.exit_code == 3
    assert "another run" in other.output
    quantized = ["quantize", str(out), "--scheme", "q4_0", "-o", str(tmp_path / "q"), "-q"]
    assert CliRunner().invoke(main, quantized).exit_code == 0
