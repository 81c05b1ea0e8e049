"""A block's file grows in model order as far as what comes next is ready, and what comes next is read ahead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from r1q.core.checkpoint import QuantizedCheckpoint
from r1q.core.files import sha256_file
from r1q.core.qtensor import Floats
from r1q.core.recipe import PlannedTensor, Recipe
from r1q.core.safetensors_file import SafetensorsFile
from r1q.models.source import ModelSource
from r1q.plan.plan import make_plan
from r1q.quantize.block_file import writing_block
from r1q.quantize.engine import Engine
from r1q.quantize.run import Calibration, Request, quantize_checkpoint, stored_slabs

pytestmark = pytest.mark.usefixtures("one_core")


@pytest.fixture
def block(make_model: Callable[..., Path]) -> tuple[ModelSource, list[PlannedTensor]]:
    source = ModelSource.open(make_model("llama", num_layers=1))
    plan = make_plan(source, Recipe.named("q8_0"), ())
    return source, [tensor for tensor in plan.tensors if tensor.spec.layer == 0]


def test_it_grows_up_to_what_is_not_ready(block: tuple[ModelSource, list[PlannedTensor]], tmp_path: Path) -> None:
    source, tensors = block
    names = [tensor.spec.name for tensor in tensors]
    store, ready = stored_slabs(source, {}), {*names[:3], names[5]}
    with writing_block(tmp_path / "block", tensors) as file:
        told = [event.name for event in file.grow(store, lambda planned: planned.spec.name in ready)]
        assert told == names[:3]
        ready |= {names[3], names[4]}
        told += [event.name for event in file.grow(store, lambda planned: planned.spec.name in ready)]
        assert told == names[:6]
        told += [event.name for event in file.grow(store)]
        assert not (tmp_path / "block").exists()
    assert told == names == [record.spec.name for record in file.records]
    assert file.sha256 == sha256_file(tmp_path / "block")
    with writing_block(tmp_path / "at once", tensors) as other:
        list(other.grow(store))
    assert (tmp_path / "at once").read_bytes() == (tmp_path / "block").read_bytes()
    assert list(SafetensorsFile.open(tmp_path / "block").tensors) == names


def test_one_that_is_not_whole_is_no_file(block: tuple[ModelSource, list[PlannedTensor]], tmp_path: Path) -> None:
    source, tensors = block
    path = tmp_path / "out" / "block"
    with pytest.raises(ValueError, match="fewer than"), writing_block(path, tensors) as file:
        list(file.grow(stored_slabs(source, {}), lambda planned: planned is not tensors[-1]))
    assert list(path.parent.iterdir()) == []


class Watched(ModelSource):
    """A source that notes what is expected of it, and what is read."""

    def watch(self) -> list[tuple[str, str]]:
        self.seen: list[tuple[str, str]] = []
        return self.seen

    def expect(self, name: str) -> None:
        self.seen.append(("expect", name))
        super().expect(name)

    def read_rows(self, name: str, start: int, stop: int) -> Floats:
        self.seen.append(("read", name))
        return super().read_rows(name, start, stop)


@pytest.mark.parametrize("few", [0, 1000], ids=["by second moments", "by the mean of all"])
def test_what_is_coded_next_is_read_meanwhile(moe_models: SimpleNamespace, tmp_path: Path, few: int) -> None:
    """Every routed expert but the first is expected before the one before it is read; and so is every matrix but a block's first."""
    folder = moe_models.write_moe_model(tmp_path / "Tiny", "qwen3_moe", num_hidden_layers=2, moe_intermediate_size=64)
    opened = Watched.open(folder)
    assert isinstance(opened, Watched)
    seen, plan = opened.watch(), make_plan(opened, Recipe.named("q4_0"), (), calibrated=True)
    engine = Engine(effort="fast", threads=1, isa="here", compute="float32", tile=32, few=few)
    tokens = np.random.default_rng(7).integers(0, 300, (6, 16))
    request = Request(
        model="m",
        recipe=plan.recipe,
        planned=plan.tensors,
        method="gptq",
        versions={"r1q": "test"},
        calibrated=Calibration(tokens=tokens, record={"text": 1}, engine=engine),
    )
    events = list(quantize_checkpoint(opened, request, tmp_path / "out"))
    matrices = [
        t.spec for t in plan.tensors if t.spec.layer == 1 and t.spec.is_matrix and t.spec.kind != "ffn_gate_inp"
    ]
    experts = [spec for spec in matrices if spec.expert is not None]
    for spec in experts:
        before = [other.name for other in experts if other.expert == (spec.expert or 0) - 1]
        for other in before:
            assert seen.index(("expect", spec.name)) < seen.index(("read", other)), spec.name
    assert all(("expect", spec.name) in seen for spec in matrices if spec.expert is None)
    # A block's file has an expert before the next one is coded; the manifest has all in model order all the same.
    told = [event.name for event in events]
    for spec in experts:
        assert spec.expert == 7 or told.index(spec.name) < told.index(f"blk.1.ffn_up_exps.{(spec.expert or 0) + 1}")
    checkpoint = QuantizedCheckpoint.open(tmp_path / "out")
    assert [spec.name for spec in checkpoint.tensors] == [t.spec.name for t in plan.tensors]
    assert checkpoint.damaged_files() == []
