"""The disks of a run are measured where it reads and writes, leave nothing behind, and cost nothing where they cannot be."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from r1q.core.recipe import Recipe
from r1q.models.source import ModelSource
from r1q.plan.disks import Disks, probe_disks
from r1q.plan.plan import make_plan


def test_weights_are_read_once_and_written_twice(make_model: Callable[..., Path]) -> None:
    source = ModelSource.open(make_model("llama", num_layers=2))
    tensors = [
        t for t in make_plan(source, Recipe.named("bf16"), (), calibrated=True).tensors if t.spec.layer is not None
    ]
    weights = sum(t.spec.size for t in tensors)
    written = 2 * weights + 2 * sum(t.spec.size for t in tensors if not t.spec.is_matrix)  # norms stay in float32
    assert Disks(read=2.0).reading(tensors) == weights  # stored in bfloat16
    assert Disks(written=2.0).writing(tensors, 0) == written
    assert Disks(written=2.0).writing(tensors, 10) == written + 5
    assert Disks().reading(tensors) == Disks().writing(tensors, 10) == 0


def test_they_are_measured_and_nothing_is_left(make_model: Callable[..., Path], tmp_path: Path) -> None:
    model, there = make_model("llama", vocab_size=8192, hidden_size=128), tmp_path / "there"
    there.mkdir()
    found = probe_disks(model, there / "not" / "yet")
    assert 0 < found.written < math.inf
    assert found.read > 0
    assert list(there.iterdir()) == []


def test_what_cannot_be_measured_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    assert probe_disks(tmp_path, tmp_path) == Disks()
