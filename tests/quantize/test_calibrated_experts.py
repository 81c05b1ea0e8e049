"""Calibrated runs of models with experts: what each expert is fitted to, experts that saw little, kills, and what is written down."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from r1q.calibration.expert_stages import Coverage
from r1q.calibration.lesson import first_stage, second_stage
from r1q.calibration.stages import BlockWalk, Stage, Streams
from r1q.core.checkpoint import JOURNAL, QuantizedCheckpoint
from r1q.core.recipe import Recipe
from r1q.models import moe
from r1q.models.block import mlp_input, run_attention, run_block
from r1q.models.config_moe import Experts
from r1q.models.forward import Configured, embed, load_block, logits
from r1q.models.rope import rotation
from r1q.models.source import ModelSource
from r1q.plan.plan import make_plan
from r1q.quantize.engine import Engine
from r1q.quantize.run import Calibration, Event, Request, quantize_checkpoint

ENGINE = Engine(effort="default", threads=1, isa="here", compute="float32", tile=32, few=16)
FAMILIES = ("deepseek_v3", "qwen3_moe")


pytestmark = pytest.mark.usefixtures("one_core")


@pytest.fixture(scope="module")
def models(moe_models: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    latent = {"q_lora_rank": 32, "qk_nope_head_dim": 32, "v_head_dim": 32}  # whole blocks of 32, as q4_0 has them
    made = {}
    for family in FAMILIES:
        settings = {"num_hidden_layers": 2, "moe_intermediate_size": 64} | (latent if family == "deepseek_v3" else {})
        made[family] = moe_models.write_moe_model(tmp_path_factory.mktemp(family) / "Tiny", family, **settings)
    return made


def some_tokens(windows: int = 6) -> NDArray[np.int64]:
    return np.random.default_rng(7).integers(0, 300, (windows, 16))


def walked(source: ModelSource, layer: int, streams: Streams, coverage: Coverage) -> Iterator[Stage]:
    """Walk a block with the float model's own weights in the place of coded ones."""
    weights = load_block(source, layer)
    kept = {key: weights[key] for key in weights if weights[key].ndim == 1 or key == moe.ROUTER}
    walk = BlockWalk(
        config=source.config,
        rotation=rotation(source.config, 16),
        exact=weights,
        coded=dict(kept),
        dtype=torch.float32,
        windows=2,
        allocate=lambda shape, dtype: torch.full(shape, float("nan"), dtype=dtype),
        coverage=coverage,
    )
    for stage in walk.stages(streams):
        yield stage
        walk.coded.update({f"{kind}.weight": weights[f"{kind}.weight"] for kind in stage.kinds})
    if walk.routed is None:
        return
    for expert in walk.routed.order:
        lesson = walk.routed.lesson(expert)
        yield first_stage(lesson, torch.float32)
        walk.coded.update({f"{kind}.weight": weights[f"{kind}.weight"] for kind in moe.kinds(expert)})
        stage, squares = second_stage(lesson, walk.coded, weights, torch.float32)
        walk.routed.learn(squares, lesson.count)
        yield stage
        walk.routed.add_results(expert, streams)
    assert not [key for key in walk.coded if "exps" in key]


def block_input(source: ModelSource, layer: int) -> Tensor:
    hidden = embed(source, some_tokens()).clone()
    for before in range(layer):
        hidden = run_block(load_block(source, before), source.config, hidden, rotation(source.config, 16))
    return hidden


def natural(moment: Tensor) -> NDArray[np.float64]:
    """Return a moment (columns reversed, lower triangle) as xᵀx."""
    lower = moment.double().numpy()
    whole: NDArray[np.float64] = (np.tril(lower) + np.tril(lower, -1).T)[::-1, ::-1]
    return whole


@pytest.mark.parametrize("family", FAMILIES)
def test_each_expert_is_fitted_to_the_tokens_that_are_sent_to_it(family: str, models: dict[str, Path]) -> None:
    """Against a slow loop over tokens; and behind the block both streams are where the float model is."""
    source = ModelSource.open(models[family])
    config, experts = source.config, source.config.experts
    assert isinstance(experts, Experts)
    hidden, weights = block_input(source, 1), load_block(source, 1)
    normed = mlp_input(weights, config, run_attention(weights, config, hidden, rotation(config, 16))).flatten(0, 1)
    routes = moe.route(weights, experts, normed)
    streams, coverage = Streams(coded=hidden.clone(), exact=hidden.clone()), Coverage()
    stages = {stage.kinds[-1]: stage for stage in _copied(walked(source, 1, streams, coverage))}
    for expert in range(experts.count):
        mine = [token for token in range(len(normed)) if expert in routes.experts[token].tolist()]
        read = normed[mine].double().numpy()
        first, second = stages[f"ffn_up_exps.{expert}"], stages[f"ffn_down_exps.{expert}"]
        assert first.tokens == second.tokens == coverage.tokens[expert] == len(mine)
        np.testing.assert_allclose(natural(first.moment), read.T @ read, atol=1e-3)
        inner = moe.expert_inner(weights, expert, normed[mine]).double().numpy()
        np.testing.assert_allclose(natural(second.moment), inner.T @ inner, atol=1e-3)
        assert first.drift is not None
        assert float(first.drift.abs().max()) < 1e-3
    after = run_block(weights, config, hidden, rotation(config, 16))
    for stream in (streams.coded, streams.exact):
        assert stream is not None
        assert float((stream - after).abs().max()) < 1e-4
    assert sum(coverage.tokens) == normed.shape[0] * experts.used


def _copied(stages: Iterator[Stage]) -> Iterator[Stage]:
    for stage in stages:
        yield dataclasses.replace(stage, moment=stage.moment.clone())


def test_latent_attention_is_walked_from_its_own_inputs(models: dict[str, Path]) -> None:
    from r1q.models import mla
    from r1q.models.block import attention_input

    source = ModelSource.open(models["deepseek_v3"])
    config, latent = source.config, source.config.latent
    assert latent is not None
    hidden, weights = block_input(source, 0), load_block(source, 0)
    stages = {s.kinds: s for s in _copied(walked(source, 0, Streams(coded=hidden.clone()), Coverage()))}
    normed = attention_input(weights, config, hidden)
    shared = torch.nn.functional.linear(normed, weights["attn_kv_a_mqa.weight"])
    for kinds, read in (
        (("attn_q_a", "attn_kv_a_mqa"), normed),
        (("attn_q_b",), mla.query_latent(weights, config, normed)),
        (("attn_v_b",), mla.latent_of(weights, config, latent, shared)),
    ):
        rows = read.flatten(0, 1).double().numpy()
        np.testing.assert_allclose(natural(stages[kinds].moment), rows.T @ rows, atol=1e-3)
    assert stages[("attn_k_b",)].plain


def request(model: Path, *, scheme: str = "q4_0", samples: int = 6, **engine: Any) -> Request:
    plan = make_plan(ModelSource.open(model), Recipe.named(scheme), (), calibrated=True)
    return Request(
        model=plan.model,
        recipe=plan.recipe,
        planned=plan.tensors,
        method="gptq",
        versions={"r1q": "test"},
        calibrated=Calibration(
            tokens=some_tokens(samples), record={"text": 1}, engine=dataclasses.replace(ENGINE, **engine)
        ),
    )


def run(model: Path, folder: Path, **options: Any) -> tuple[list[Event], QuantizedCheckpoint]:
    events = list(quantize_checkpoint(ModelSource.open(model), request(model, **options), folder))
    return events, QuantizedCheckpoint.open(folder)


def divergence(reference: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    p, q = (torch.from_numpy(x).double().log_softmax(-1) for x in (reference, found))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_calibrated_model_is_nearer_than_a_rounded_one(family: str, models: dict[str, Path], tmp_path: Path) -> None:
    source = ModelSource.open(models[family])
    tokens = some_tokens(24)
    exact = np.stack(list(logits(source, tokens)))
    _, checkpoint = run(models[family], tmp_path / "gptq", samples=24)
    rounded = make_plan(source, Recipe.named("q4_0"), ())
    plain = Request(model="m", recipe=rounded.recipe, planned=rounded.tensors, method="rtn", versions={"r1q": "test"})
    list(quantize_checkpoint(source, plain, tmp_path / "rtn"))
    apart = [
        divergence(exact, np.stack(list(logits(Configured(source.config, found), tokens))))
        for found in (checkpoint, QuantizedCheckpoint.open(tmp_path / "rtn"))
    ]
    assert apart[0] < 0.8 * apart[1]


def test_experts_that_saw_little_are_counted_noted_and_sound(models: dict[str, Path], tmp_path: Path) -> None:
    """One window of 16 tokens for 8 experts: some see few, and a router that shuns one sends it none."""
    events, checkpoint = run(models["qwen3_moe"], tmp_path / "out", samples=1, few=6)
    tokens = checkpoint.manifest["expert_tokens"]
    assert isinstance(tokens, dict)
    assert list(tokens) == ["block-00000.safetensors", "block-00001.safetensors"]
    assert [sum(counts) for counts in tokens.values()] == [16 * 3] * 2
    few = [(layer, e, n) for layer, counts in enumerate(tokens.values()) for e, n in enumerate(counts) if n < 6]
    assert few
    wanted = {
        f"blk.{layer}.expert {e}: {n} tokens, fewer than 6: importance shrunk toward the layer's mean, rounded by importance"
        for layer, e, n in few
    }
    told = checkpoint.manifest["events"]
    assert isinstance(told, list)
    assert {line for line in told if "expert " in line} == wanted
    assert {event.name for event in events if event.what == "note" and "expert " in event.name} == wanted
    for spec in checkpoint.tensors:
        assert np.isfinite(checkpoint.read_rows(spec.name, 0, spec.rows)).all()


def test_an_expert_without_any_token_is_rounded_by_the_layers_mean(models: dict[str, Path], tmp_path: Path) -> None:
    shunned = shutil.copytree(models["deepseek_v3"], tmp_path / "shunned")
    tensors = load_file(shunned / "model.safetensors")
    tensors["model.layers.1.mlp.gate.e_score_correction_bias"][3] = -100
    save_file(tensors, shunned / "model.safetensors", metadata={"format": "pt"})
    _, checkpoint = run(shunned, tmp_path / "out", samples=1, few=40)
    tokens = checkpoint.manifest["expert_tokens"]
    assert isinstance(tokens, dict)
    (counts,) = tokens.values()
    assert counts[3] == 0
    assert checkpoint.records["model.layers.1.mlp.experts.3.up_proj.weight"].error < 0.15
    told = str(checkpoint.manifest["events"])
    assert all(f"blk.1.expert {e}: {n} tokens, fewer than 40" in told for e, n in enumerate(counts))
    assert "attn_k_b: has another input for every head" in told


def test_importance_is_shrunk_by_hand(models: dict[str, Path]) -> None:
    """(Σx² of its own + few · the mean over all tokens) / (own tokens + few), for an expert that saw less than the others."""
    source = ModelSource.open(models["qwen3_moe"])
    hidden, weights, config = block_input(source, 0), load_block(source, 0), source.config
    normed = mlp_input(weights, config, run_attention(weights, config, hidden, rotation(config, 16))).flatten(0, 1)
    coverage = Coverage(few=1000)
    stages = {s.kinds[-1]: s for s in walked(source, 0, Streams(coded=hidden.clone()), coverage)}
    assert isinstance(config.experts, Experts)
    tokens, _ = moe.route(weights, config.experts, normed).of(5)
    stage = stages["ffn_up_exps.5"]
    wanted = (normed[tokens].square().sum(0) + 1000 * normed.square().mean(0)) / (len(tokens) + 1000)
    assert stage.plain
    assert stage.importance is not None
    np.testing.assert_allclose(stage.importance.numpy(), wanted.numpy(), rtol=1e-4)


@pytest.mark.parametrize("seen", ["all", "hybrid"])
def test_experts_can_be_shown_more_than_they_are_sent(seen: Any, models: dict[str, Path]) -> None:
    source = ModelSource.open(models["deepseek_v3"])
    coverage = Coverage(seen=seen, few=40)
    stages = [s for s in walked(source, 1, Streams(coded=block_input(source, 1)), coverage) if "exps" in s.kinds[0]]
    shown = {s.kinds[0].rpartition(".")[2]: s.tokens for s in stages}
    if seen == "all":
        assert set(shown.values()) == {96}
    else:
        assert shown == {str(e): max(n, 40) for e, n in enumerate(coverage.tokens)}
        assert sum("filled up to 40" in s.note for s in stages) == sum(n < 40 for n in coverage.tokens) > 0
    assert not any(s.plain for s in stages)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != JOURNAL)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_kill_between_events_changes_no_byte(models: dict[str, Path], tmp_path: Path) -> None:
    model = models["deepseek_v3"]
    events, _ = run(model, tmp_path / "whole", few=30)
    whole = contents(tmp_path / "whole")
    assert not [name for name in whole if "hidden" in name or "tmp" in name]
    stages = [number for number, event in enumerate(events) if event.what in ("stage", "file")]
    for stop in (stages[2], stages[8], stages[9], stages[17], stages[-2], stages[-1]):
        cut = tmp_path / f"cut-{stop}"
        running = quantize_checkpoint(ModelSource.open(model), request(model, few=30), cut)
        for _ in range(stop + 1):
            next(running)
        running.close()  # type: ignore[attr-defined]
        run(model, cut, few=30)
        assert contents(cut) == whole


def test_inspect_says_what_experts_were_sent(models: dict[str, Path], tmp_path: Path) -> None:
    from r1q.plan.inspect import inspect_path

    _, checkpoint = run(models["deepseek_v3"], tmp_path / "out", samples=2)
    (counts,) = checkpoint.manifest["expert_tokens"].values()  # type: ignore[attr-defined]
    told = [note for note in inspect_path(tmp_path / "out").notes if "experts" in note]
    assert told == [
        f"block-00001: its 8 experts were sent {min(counts)} to {max(counts)} calibration tokens, "
        f"half of them {sorted(counts)[4]} or more"
    ]
