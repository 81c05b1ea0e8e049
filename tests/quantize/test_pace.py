"""The time of a run from counted work: by hand for one matrix, and what experts add as they see more or fewer tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from r1q.core.recipe import PlannedTensor, Recipe
from r1q.core.scheme import Scheme
from r1q.models.source import ModelSource
from r1q.plan.plan import make_plan
from r1q.quantize.engine import Engine
from r1q.quantize.pace import GridPace, Pace, main_schemes, probe, seconds

ENGINE = Engine(effort="fast", threads=1, isa="here", compute="float32")
GRID = GridPace(coded=1e30, rounded=1e30, refined=1e30, stored=1e30, restored=1e30)
NOTHING = Pace(
    products=1e30, exact_products=1e30, normalized=1e30, read=1e30, hashed=1e30, grids={Scheme(grid="q4_0"): GRID}
)


def only(rate: str) -> Pace:
    """Return a pace that takes a second for each piece of work of one sort, and no time for all others."""
    if rate in {field.name for field in fields(GridPace)}:
        return replace(NOTHING, grids={Scheme(grid="q4_0"): replace(GRID, **{rate: 1.0})})
    return replace(NOTHING, **{rate: 1.0})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def sparse(moe_models: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    folder = moe_models.write_moe_model(
        tmp_path_factory.mktemp("m") / "Tiny", "qwen3_moe", num_hidden_layers=2, moe_intermediate_size=64
    )
    return ModelSource.open(folder)


def planned(source: ModelSource, scheme: str) -> tuple[PlannedTensor, ...]:
    return make_plan(source, Recipe.named(scheme), (), calibrated=True).tensors


def test_one_matrix_by_hand(make_model: Callable[..., Path]) -> None:
    source = ModelSource.open(make_model("llama", num_layers=1))
    (down,) = (t for t in planned(source, "q4_0") if t.spec.kind == "ffn_down")
    size, columns = down.spec.size, down.spec.columns
    for name, wanted in {
        "coded": size,
        "rounded": 0,
        "refined": 0,
        "stored": size,
        "restored": size,
        "read": size,
        "hashed": 6 * size * 18 / 32,
        "normalized": 100 * 1.6 * (down.spec.rows + columns),
        "products": 100 * (size + 0.6 * columns**2),
        "exact_products": columns**3 / 3 + size * columns / 2,
    }.items():
        found = seconds(source.config, [down], ENGINE, 100, 10, only(name))
        assert found == pytest.approx(wanted), name


def test_what_is_outside_of_blocks_is_rounded(make_model: Callable[..., Path]) -> None:
    source = ModelSource.open(make_model("llama", num_layers=1))
    (embedding,) = (t for t in planned(source, "q4_0") if t.spec.kind == "token_embd")
    for name, wanted in {
        "rounded": embedding.spec.size,
        "stored": embedding.spec.size,
        "coded": 0,
        "products": 0,
    }.items():
        assert seconds(source.config, [embedding], ENGINE, 100, 10, only(name)) == pytest.approx(wanted), name


def test_attention_takes_longer_over_longer_windows(make_model: Callable[..., Path]) -> None:
    source = ModelSource.open(make_model("llama", num_layers=1))
    (output,) = (t for t in planned(source, "q4_0") if t.spec.kind == "attn_output")
    times = [seconds(source.config, [output], ENGINE, 100, length, only("products")) for length in (10, 30)]
    assert times[1] - times[0] == pytest.approx(100 * 20 * 6.5 * output.spec.columns)


def test_experts_that_see_little_are_rounded_and_others_coded(sparse: ModelSource) -> None:
    """8 experts, 3 a token: 340 tokens are 128 each on average, of which half see fewer."""
    experts = [tensor for tensor in planned(sparse, "q4_0") if tensor.spec.expert is not None]
    size = sum(tensor.spec.size for tensor in experts)

    def weights(tokens: float, rate: str, engine: Engine = ENGINE) -> float:
        return seconds(sparse.config, experts, engine, int(tokens), 10, only(rate)) / size

    assert weights(128 * 8 / 3, "coded") == pytest.approx(0.5, abs=0.01)
    assert weights(128 * 8 / 3, "rounded") == pytest.approx(0.5, abs=0.01)
    assert weights(100_000, "coded") == pytest.approx(1)
    assert weights(20, "rounded") == pytest.approx(1, abs=1e-6)
    for seen in ("all", "hybrid"):
        assert weights(200, "coded", replace(ENGINE, experts=seen)) == 1
    assert weights(20, "coded", replace(ENGINE, experts="hybrid")) < 0.01


def test_workers_share_what_is_coded_and_not_the_walk(sparse: ModelSource) -> None:
    tensors = planned(sparse, "q4_0")

    def times(rate: str, workers: int) -> float:
        return seconds(sparse.config, tensors, ENGINE, 4000, 10, only(rate), workers)

    outside = sum(t.spec.size for t in tensors if t.spec.is_matrix and t.spec.layer is None)
    for rate, alone in {"stored": outside, "coded": 0, "normalized": times("normalized", 1)}.items():
        assert times(rate, 4) - alone == pytest.approx((times(rate, 1) - alone) / 4), rate
    # Second moments of experts are their workers' work, those of attention are not.
    assert times("products", 1) / 4 < times("products", 4) < times("products", 1)


def test_the_float_model_beside_is_read_too(sparse: ModelSource) -> None:
    tensors = planned(sparse, "q4_0")
    matrices = [tensor.spec for tensor in tensors if tensor.spec.is_matrix]
    outside = sum(spec.size for spec in matrices if spec.layer is None)
    size = sum(spec.size for spec in matrices) - outside
    for engine, times in ((ENGINE, 1), (replace(ENGINE, effort="default"), 2)):
        assert seconds(sparse.config, tensors, engine, 100, 10, only("read")) == pytest.approx(times * size + outside)


def test_a_grid_is_coded_at_its_own_pace_and_one_not_measured_at_the_first(sparse: ModelSource) -> None:
    first, other = Scheme(grid="q8_0"), Scheme(grid="q4_0")
    pace = replace(NOTHING, grids={first: replace(GRID, stored=1.0), other: GRID})
    tensors = [tensor for tensor in planned(sparse, "q4_0") if tensor.spec.kind == "attn_q"]
    size = sum(tensor.spec.size for tensor in tensors)
    assert seconds(sparse.config, tensors, ENGINE, 100, 10, pace) < 1e-9
    assert seconds(sparse.config, tensors, ENGINE, 100, 10, replace(pace, grids={first: pace.grids[first]})) == size


def test_the_probe_is_of_the_grids_that_most_weights_have(sparse: ModelSource) -> None:
    tensors = planned(sparse, "q4_0")
    first, other = Scheme(grid="q4_0"), Scheme(grid="q8_0")
    assert main_schemes(tensors) == ([first, other], "F32")
    rare = [tensor for tensor in tensors if tensor.scheme == other]
    assert main_schemes([*rare, *100 * [tensor for tensor in tensors if tensor.scheme == first]]) == ([first], "F32")
    assert main_schemes(planned(sparse, "bf16")) is None


def test_a_probe_measures_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("r1q.quantize.pace._SECONDS", 0.01)
    monkeypatch.setattr("r1q.quantize.pace._ROWS", 256)
    schemes = [Scheme(grid="q4_0"), Scheme(grid="int4", group_size=64)]
    found = probe(ENGINE, schemes, "F8_E4M3")
    assert list(found.grids) == schemes
    rates = [found.products, found.exact_products, found.normalized, found.read, found.hashed]
    rates += [getattr(pace, field.name) for pace in found.grids.values() for field in fields(GridPace)]
    assert min(rates) > 0
