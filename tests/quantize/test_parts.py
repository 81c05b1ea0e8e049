"""Parts of a block in work: kept through kills, coded once, made again when damaged, gone when the block is; memory without codes."""

from __future__ import annotations

import dataclasses
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from r1q.core import files
from r1q.core.checkpoint import JOURNAL
from r1q.core.recipe import Recipe
from r1q.models.source import ModelSource
from r1q.plan.plan import make_plan
from r1q.quantize.engine import Engine
from r1q.quantize.run import Calibration, Event, Request, quantize_checkpoint

ENGINE = Engine(effort="default", threads=1, isa="here", compute="float32", tile=32, few=16)


pytestmark = pytest.mark.usefixtures("one_core")


@pytest.fixture(scope="module")
def model(moe_models: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One dense block and one with eight experts."""
    settings = {"num_hidden_layers": 2, "moe_intermediate_size": 64}
    latent = {"q_lora_rank": 32, "qk_nope_head_dim": 32, "v_head_dim": 32}
    folder: Path = moe_models.write_moe_model(
        tmp_path_factory.mktemp("parts") / "Tiny", "deepseek_v3", **settings, **latent
    )
    return folder


def start(model: Path, folder: Path, engine: Engine = ENGINE, scheme: str = "q4_0") -> Iterator[Event]:
    source = ModelSource.open(model)
    plan = make_plan(source, Recipe.named(scheme), (), calibrated=True)
    tokens = np.random.default_rng(7).integers(0, 300, (6, 16))
    request = Request(
        model=plan.model,
        recipe=plan.recipe,
        planned=plan.tensors,
        method="gptq",
        versions={"r1q": "test"},
        calibrated=Calibration(tokens=tokens, record={}, engine=engine),
    )
    return quantize_checkpoint(source, request, folder)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != JOURNAL)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def parts(folder: Path) -> dict[str, tuple[int, int]]:
    """Return inode and time of every part that is there."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("parts-*/*")}


def stop_at(model: Path, folder: Path, stage: str) -> dict[str, tuple[int, int]]:
    """Run until the event of a stage, and return the parts that are there then."""
    running = start(model, folder)
    next(event for event in running if event.name == stage)
    running.close()  # type: ignore[attr-defined]
    return parts(folder)


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    list(start(model, folder))
    found = contents(folder)
    assert not [name for name in found if "parts" in name]
    assert not list(folder.glob("parts-*"))
    return found


@pytest.mark.parametrize(
    ("stage", "count"), [("blk.0.attn_output", 6), ("blk.1.attn_kv_a_mqa", 2), ("blk.1.ffn_up_exps.2", 12)]
)
def test_what_has_a_part_is_not_coded_again(
    model: Path, whole: dict[str, bytes], tmp_path: Path, stage: str, count: int
) -> None:
    before = stop_at(model, tmp_path, stage)
    last = "blk.1.ffn_down_exps.5" if stage.startswith("blk.1") else "blk.0.ffn_down"
    assert len(before) >= count
    running = start(model, tmp_path)
    next(event for event in running if event.name == last)
    after = parts(tmp_path)
    assert {name: after[name] for name in before} == before
    assert len(after) > len(before)
    running.close()  # type: ignore[attr-defined]
    list(start(model, tmp_path))
    assert contents(tmp_path) == whole


def spoil(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def swap(path: Path) -> None:
    """Put another tensor's part in its place."""
    other = next(p for p in sorted(path.parent.iterdir()) if p != path and "ffn_up_exps" in p.name)
    path.write_bytes(other.read_bytes())


@pytest.mark.parametrize("change", [Path.unlink, spoil, shorten, swap])
def test_a_part_that_is_damaged_is_made_again(
    model: Path, whole: dict[str, bytes], tmp_path: Path, change: Callable[[Path], None]
) -> None:
    before = stop_at(model, tmp_path, "blk.1.ffn_down_exps.4")
    for name in ("ffn_gate_exps.1.weight.00000000.safetensors", "attn_output.weight.00000000.safetensors"):
        assert name in before
        change(tmp_path / "parts-00001" / name)
    running = start(model, tmp_path)
    next(event for event in running if event.name == "blk.1.ffn_down_exps.4")
    after = parts(tmp_path)
    assert {name for name in before if after[name] != before[name]} >= {name}
    assert after["ffn_down_exps.0.weight.00000000.safetensors"] == before["ffn_down_exps.0.weight.00000000.safetensors"]
    running.close()  # type: ignore[attr-defined]
    list(start(model, tmp_path))
    assert contents(tmp_path) == whole


def test_slabs_are_parts_of_their_own(model: Path, tmp_path: Path) -> None:
    """A matrix of 64 columns in slabs of 20 rows; half of them lost."""
    engine = dataclasses.replace(ENGINE, slab=20 * 64)
    list(start(model, tmp_path / "whole", engine))
    running = start(model, tmp_path / "cut", engine)
    next(event for event in running if event.name == "blk.0.ffn_up")
    running.close()  # type: ignore[attr-defined]
    mine = sorted((tmp_path / "cut").glob("parts-00000/ffn_up.weight.*"))
    assert [path.name.split(".")[2] for path in mine] == [f"{start:08d}" for start in range(0, 96, 20)]
    for path in mine[::2]:
        path.unlink()
    list(start(model, tmp_path / "cut", engine))
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_codes_of_more_experts_take_no_more_memory(
    moe_models: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What numpy and Python hold at most: 48 more experts have 3.9 MB of codes, which were held until the block's file was written."""
    monkeypatch.setattr(files, "_HASH_CHUNK", 1 << 16)  # a file of less than a chunk would seem to need less

    def peak(experts: int) -> int:
        sizes = {"hidden_size": 256, "moe_intermediate_size": 128, "num_hidden_layers": 1, "num_experts": experts}
        model = moe_models.write_moe_model(tmp_path / f"model-{experts}", "qwen3_moe", **sizes)
        tracemalloc.start()
        list(start(model, tmp_path / f"out-{experts}", scheme="q6_k"))
        _, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return highest

    codes = 48 * 3 * 256 * 128 * 210 // 256
    few, many = peak(8), peak(56)
    assert codes > 3.8e6
    assert many - few < 0.25 * codes, (few, many)
