"""The time of a run from counted work: by hand for one matrix, and what experts add as they see more or fewer tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from r1q.core.recipe import PlannedTensor, Recipe
from r1q.core.scheme import Scheme
from r1q.models.source import ModelSource
from r1q.plan.plan import make_plan
from r1q.quantize.engine import Engine
from r1q.quantize.pace import Pace, main_scheme, probe, seconds

ENGINE = Engine(effort="fast", threads=1, isa="here", compute="float32")
NOTHING = Pace(products=1e30, exact_products=1e30, coded=1e30, rounded=1e30, refined=1e30, read=1e30)


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
        "read": 6 * size,
        "products": 100 * (size + 0.6 * columns**2),
        "exact_products": columns**3 / 3 + size * columns / 2,
    }.items():
        found = seconds(source.config, [down], ENGINE, 100, replace(NOTHING, **{name: 1.0}))
        assert found == pytest.approx(wanted), name


def test_experts_that_see_little_are_rounded_and_others_coded(sparse: ModelSource) -> None:
    """8 experts, 3 a token: 340 tokens are 128 each on average, of which half see fewer."""
    experts = [tensor for tensor in planned(sparse, "q4_0") if tensor.spec.expert is not None]
    size = sum(tensor.spec.size for tensor in experts)

    def weights(tokens: float, rate: str, engine: Engine = ENGINE) -> float:
        return seconds(sparse.config, experts, engine, int(tokens), replace(NOTHING, **{rate: 1.0})) / size

    assert weights(128 * 8 / 3, "coded") == pytest.approx(0.5, abs=0.01)
    assert weights(128 * 8 / 3, "rounded") == pytest.approx(0.5, abs=0.01)
    assert weights(100_000, "coded") == pytest.approx(1)
    assert weights(20, "rounded") == pytest.approx(1, abs=1e-6)
    for seen in ("all", "hybrid"):
        assert weights(200, "coded", replace(ENGINE, experts=seen)) == 1
    assert weights(20, "coded", replace(ENGINE, experts="hybrid")) < 0.01


def test_the_probe_is_of_the_grid_that_most_weights_have(sparse: ModelSource) -> None:
    main = main_scheme(planned(sparse, "q4_0"))
    assert main == (Scheme(grid="q4_0"), "F32")
    assert main_scheme(planned(sparse, "bf16")) is None
    found = probe(ENGINE, Scheme(grid="q4_0"), "F8_E4M3")
    assert min(found.products, found.exact_products, found.coded, found.rounded, found.refined, found.read) > 0
