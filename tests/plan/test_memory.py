"""Sizes as people write them, memory from shapes, and what a run gives up to stay within a limit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from r1q.core.errors import ResourceError, UsageError
from r1q.core.files import sha256_file
from r1q.core.recipe import Recipe, resolve
from r1q.models.embedded import EMBEDDED
from r1q.models.source import ModelSource
from r1q.plan.job import Job, open_job, plan_job, planned_engine, run_job, workload
from r1q.plan.memory import PROGRAM, Workload, ceiling, fit_engine, memory_parts, parse_size
from r1q.plan.plan import model_shape
from r1q.quantize.engine import Engine

MakeModel = Callable[..., Path]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("6GiB", 6 << 30),
        ("800MB", 800_000_000),
        ("1.5 GiB", 3 << 29),
        ("512", 512),
        ("2k", 2048),
        ("3g", 3 << 30),
        ("7B", 7),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1GB", "0", "6 GiBs", "1e9", "GiB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="write it like 6GiB"):
        parse_size(text)


def work(windows: int, length: int = 256) -> Workload:
    source = ModelSource.open(EMBEDDED)
    shape = model_shape(source.config, calibrated=True)
    tensors = resolve(Recipe.named("q4_0"), source.tensors, shape)
    return Workload(config=source.config, tensors=tensors, windows=windows, length=length)


def engine(**changes: object) -> Engine:
    given: dict[str, object] = {
        "effort": "high",
        "threads": 2,
        "isa": "x",
        "compute": "float32",
        "passes": 8,
        **changes,
    }
    return Engine(**given)  # type: ignore[arg-type]


def test_streams_grow_with_the_text_alone_and_are_counted_by_hand() -> None:
    few, many = (memory_parts(work(windows), engine(tile=256)) for windows in (64, 128))
    config, name = work(1).config, "hidden states and inputs"
    assert many[name] - few[name] == 64 * 256 * (4 * 2 * config.hidden_size + 4 * config.intermediate_size)
    assert {k: v for k, v in few.items() if k != name} == {k: v for k, v in many.items() if k != name}
    assert few["program"] == PROGRAM
    # Text by far outweighs the rest here, so that ffn_down with its kept inputs is the fullest moment.
    widest = config.intermediate_size
    twice = many["statistics"] == 4 * (2 * widest**2 + config.hidden_size * widest)
    assert twice or many["statistics"] == 4 * (widest**2 + config.hidden_size * widest)


def test_one_stream_and_no_refinement_need_less() -> None:
    fast = memory_parts(work(64), engine(effort="fast", passes=0))
    default = memory_parts(work(64), engine(effort="default", passes=0))
    high = memory_parts(work(64), engine())
    assert sum(fast.values()) < sum(default.values()) <= sum(high.values())
    assert fast["statistics"] == 4 * work(1).config.intermediate_size ** 2


def test_the_number_of_layers_does_not_matter() -> None:
    whole = work(8)
    half = Workload(
        config=whole.config,
        tensors=[t for t in whole.tensors if t.spec.layer in (None, 0)],
        windows=whole.windows,
        length=whole.length,
    )
    assert memory_parts(half, engine()) == memory_parts(whole, engine())


def test_a_limit_costs_first_the_room_of_hidden_states_then_tiles_then_slabs() -> None:
    asked, free = work(512), engine(effort="fast", passes=0)
    whole = sum(memory_parts(asked, free).values())
    assert fit_engine(asked, free, whole) == free
    spilled = fit_engine(asked, free, whole - 1)
    assert spilled == replace(free, spill=True)
    at_the_least = sum(memory_parts(asked, replace(spilled, tile=256, slab=1 << 20)).values())
    limits = range(at_the_least, sum(memory_parts(asked, spilled).values()), 1 << 16)
    order = [(found.tile, found.slab) for found in (fit_engine(asked, free, limit) for limit in limits)]
    assert order == sorted(order)
    assert order[0][0] == 256
    with pytest.raises(ResourceError, match=f"{at_the_least} bytes"):
        fit_engine(asked, free, at_the_least - 1)


def test_a_tile_is_never_less_than_a_window() -> None:
    asked = work(16, length=4096)
    limit = sum(memory_parts(asked, engine(spill=True)).values())
    assert fit_engine(asked, engine(), limit).tile == 2048
    with pytest.raises(ResourceError, match="at the least"):
        fit_engine(asked, engine(), limit // 4)


def test_without_a_limit_there_is_what_the_machine_has() -> None:
    assert ceiling("6GiB") == 6 << 30
    assert 0 < ceiling(None) <= psutil.virtual_memory().total


def test_spilled_hidden_states_change_no_byte(make_model: MakeModel, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a thinker thinks: wait, let me think again. 12 + 30 = 42\n" * 200)
    model = str(make_model("llama"))

    def run(name: str, max_ram: str | None) -> tuple[Engine, dict[str, str]]:
        opened = open_job(
            Job(
                model=model,
                scheme="q4_0",
                effort="default",
                calibration=str(text),
                samples=64,
                seq_len=32,
                formats=(),
                max_ram=max_ram,
                output=tmp_path / name,
            )
        )
        plan = plan_job(opened)
        engine = planned_engine(opened, plan)
        for _ in run_job(opened, plan):
            pass
        folder = tmp_path / name / "checkpoint"
        return engine, {path.name: sha256_file(path) for path in folder.iterdir() if path.is_file()}

    held, files = run("held", None)
    opened = open_job(Job(model=model, scheme="q4_0", effort="default", samples=64, seq_len=32))
    enough = sum(memory_parts(workload(opened, plan_job(opened)), held).values())
    spilled, same = run("spilled", str(enough - 1))
    assert (held.spill, spilled.spill) == (False, True)
    assert files == same
    assert "manifest.json" in files
