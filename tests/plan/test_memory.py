"""Sizes as people write them, memory from shapes, and what a run gives up to stay within a limit."""

import pytest

from r1q.core.errors import ResourceError, UsageError
from r1q.core.recipe import PlannedTensor, Recipe, resolve
from r1q.models.config import ModelConfig
from r1q.models.embedded import EMBEDDED
from r1q.models.source import ModelSource
from r1q.plan.memory import PROGRAM, fit_engine, memory_parts, parse_size
from r1q.plan.plan import model_shape
from r1q.quantize.engine import Engine

MIB = 1 << 20


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


def planned() -> tuple[ModelConfig, tuple[PlannedTensor, ...]]:
    source = ModelSource.open(EMBEDDED)
    return source.config, resolve(Recipe.named("q4_0"), source.tensors, model_shape(source.config, calibrated=True))


def engine(**changes: object) -> Engine:
    given: dict[str, object] = {
        "effort": "default",
        "threads": 2,
        "isa": "x",
        "compute": "float32",
        "passes": 2,
        **changes,
    }
    return Engine(**given)  # type: ignore[arg-type]


def test_streams_grow_with_the_text_alone_and_are_counted_by_hand() -> None:
    config, tensors = planned()
    few, many = (memory_parts(config, tensors, engine(tile=512), tokens) for tokens in (1024, 4096))
    name = "hidden states and kept inputs"
    per_token = 4 * 2 * config.hidden_size + 4 * config.intermediate_size
    assert many[name] - few[name] == 3072 * per_token
    assert {k: v for k, v in few.items() if k != name} == {k: v for k, v in many.items() if k != name}
    assert few["program"] == PROGRAM
    widest = config.intermediate_size
    assert few["statistics of the widest layer"] == 4 * (2 * widest**2 + config.hidden_size * widest)


def test_one_stream_and_no_refinement_need_less() -> None:
    config, tensors = planned()
    fast = memory_parts(config, tensors, engine(effort="fast", passes=0), 4096)
    default = memory_parts(config, tensors, engine(), 4096)
    assert all(fast[name] <= size for name, size in default.items())
    assert fast["statistics of the widest layer"] == 4 * config.intermediate_size**2


def test_a_limit_costs_first_the_room_of_hidden_states_then_tiles_and_slabs() -> None:
    config, tensors = planned()
    tokens = 1 << 17
    free = engine()
    whole = sum(memory_parts(config, tensors, free, tokens).values())
    assert fit_engine(config, tensors, free, tokens, whole) == free
    spilled = fit_engine(config, tensors, free, tokens, whole - 1)
    assert spilled.spill
    assert (spilled.tile, spilled.slab) == (free.tile, free.slab)
    least = sum(memory_parts(config, tensors, engine(spill=True, tile=512, slab=1 << 20), tokens).values())
    tight = fit_engine(config, tensors, free, tokens, least)
    assert (tight.spill, tight.tile) == (True, 512)
    with pytest.raises(ResourceError, match=f"about {least / MIB:.0f} MiB at the least"):
        fit_engine(config, tensors, free, tokens, least - 1)
    assert fit_engine(config, tensors, free, tokens, None) == free
