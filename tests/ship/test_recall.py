"""The command on a card makes the same codes again: it is run, and the checkpoints are compared by their sums."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from r1q.cli import main
from r1q.core.checkpoint import QuantizedCheckpoint
from r1q.plan.job import Job, open_job, plan_job, run_job
from r1q.ship.recall import RECIPE, Recalled, recall


def run(job: Job) -> QuantizedCheckpoint:
    opened = open_job(job)
    list(run_job(opened, plan_job(opened)))
    assert job.output is not None
    return QuantizedCheckpoint.open(job.output / "checkpoint")


def again(recalled: Recalled, folder: Path, monkeypatch: pytest.MonkeyPatch) -> QuantizedCheckpoint:
    """Run the command in `folder`, where recipe.toml lies if it has one."""
    monkeypatch.chdir(folder)
    if recalled.recipe is not None:
        (folder / RECIPE).write_text(recalled.recipe)
    program, *words = shlex.split(recalled.command)
    assert program == "r1q"
    done = CliRunner().invoke(main, [*words, "-o", "again"])
    assert done.exit_code == 0, done.output
    return QuantizedCheckpoint.open(folder / "again" / "checkpoint")


def test_a_preset_needs_no_more_than_its_name(output: Path) -> None:
    made = recall(QuantizedCheckpoint.open(output / "checkpoint"), ["gguf"])
    assert made == Recalled(command="r1q quantize --scheme q4_k_m --to gguf")


def test_a_calibrated_mix_comes_out_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my text.txt").write_text("What is 17 + 25? It is 42, and nobody said that it was not. " * 400)
    monkeypatch.chdir(tmp_path)
    asked = Job(
        bits=4, group_size=64, formats=("gptq",), effort="fast", calibration="my text.txt:0.25,builtin:0.75", samples=8,
        seq_len=48, damp=0.1, threads=1, output=tmp_path / "first",
    )  # fmt: skip
    first = run(asked)
    made = recall(first, ["gptq"])
    assert made.recipe is not None
    assert "rules" in made.recipe
    ((name, digest),) = made.inputs
    assert (name, len(digest)) == ("my text.txt", 64)
    second = again(made, tmp_path, monkeypatch)
    for key in ("files", "calibration", "engine", "recipe"):
        assert first.manifest[key] == second.manifest[key], key


@pytest.mark.parametrize("engine", [{"effort": "fast", "heal": 3}, {"effort": "high"}])
def test_healing_is_recalled(output: Path, engine: dict[str, object]) -> None:
    checkpoint = QuantizedCheckpoint.open(output / "checkpoint")
    calibrated = replace(checkpoint, manifest={**checkpoint.manifest, "engine": engine})
    said = " ".join(f"--{name} {value}" for name, value in engine.items())
    assert recall(calibrated, ["gguf"]).command == f"r1q quantize --scheme q4_k_m --to gguf {said}"


def test_ranges_of_inputs_are_recalled(tmp_path: Path) -> None:
    first = run(
        Job(scheme="w8a8", formats=("onnx",), samples=4, seq_len=32, activations="percentile", output=tmp_path / "w")
    )
    made = recall(first, ["onnx"])
    expected = "--scheme w8a8 --to onnx --activations percentile --samples 4 --seq-len 32"
    assert made == Recalled(command=f"r1q quantize {expected}")
