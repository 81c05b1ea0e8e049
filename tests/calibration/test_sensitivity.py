"""Sensitivities: the divergence that they predict for small random errors, against that which the errors cause."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from r1q.calibration.sensitivity import Sensitivity, sensitivities
from r1q.models.config import ModelConfig
from r1q.models.forward import logits
from r1q.models.source import ModelSource

MakeModel = Callable[..., Path]
TOKENS = np.random.default_rng(3).integers(0, 320, (8, 48))
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_layers": 2}


@dataclass(frozen=True)
class Changed:
    """A model with other matrices in some places."""

    source: ModelSource
    matrices: Mapping[str, np.ndarray]

    @property
    def config(self) -> ModelConfig:
        return self.source.config

    @property
    def tensors(self) -> object:
        return self.source.tensors

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        found = self.matrices.get(name)
        return self.source.read_rows(name, start, stop) if found is None else found[start:stop]


def divergence(source: ModelSource, matrices: Mapping[str, np.ndarray]) -> float:
    """Return the mean KL divergence, in nats a token, that the matrices cause; in float64 from float32 logits."""
    kl = []
    for exact, other in zip(logits(source, TOKENS), logits(Changed(source, matrices), TOKENS), strict=True):  # type: ignore[arg-type]
        p, q = (
            x.astype(np.float64) - np.log(np.exp(x.astype(np.float64)).sum(-1, keepdims=True)) for x in (exact, other)
        )
        kl.append((np.exp(p) * (p - q)).sum(-1).mean())
    return float(np.mean(kl))


def collect(source: ModelSource) -> Mapping[str, list[Sensitivity]]:
    found: dict[str, list[Sensitivity]] = {}
    for entries in sensitivities(source, TOKENS):
        for name, value in entries.items():
            found.setdefault(name, []).append(value)
    return found


@pytest.mark.parametrize(
    ("family", "tied"), [("llama", False), ("qwen2", True), ("qwen3", False)], ids=["llama", "qwen2 tied", "qwen3"]
)
def test_small_errors_cost_what_was_predicted(make_model: MakeModel, family: str, tied: bool) -> None:
    """The median within a third; single ones within a factor of three: errors of values add up over the tokens that attend to them."""
    source = ModelSource.open(make_model(family, tied=tied, **SIZES))
    found, rng, ratios = collect(source), np.random.default_rng(11), {}
    for spec in source.tensors:
        if not spec.is_matrix:
            continue
        exact = source.read_rows(spec.name, 0, spec.rows)
        size = 0.05 * float(np.sqrt(np.mean(exact**2)))
        error = size * rng.standard_normal(exact.shape).astype(np.float32)
        predicted = sum(
            0.5 * float(each.rows @ (error.astype(np.float64) ** 2 @ each.columns)) for each in found[spec.gguf_name]
        )
        ratios[spec.gguf_name] = divergence(source, {spec.name: exact + error}) / predicted
    assert 3 / 4 < np.median(list(ratios.values())) < 4 / 3, ratios
    assert {name: ratio for name, ratio in ratios.items() if not 1 / 3 < ratio < 3} == {}


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_experts_cost_what_was_predicted(moe_models: SimpleNamespace, tmp_path: Path, family: str) -> None:
    """All experts of a kind in a block changed at once, as they have one grid; a changed score may send a token elsewhere."""
    source = ModelSource.open(moe_models.write_moe_model(tmp_path / "m", family, num_hidden_layers=2, head_gain=2.0))
    found, rng, ratios = collect(source), np.random.default_rng(11), {}
    for kind in ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"):
        specs = [spec for spec in source.tensors if (spec.kind, spec.layer) == (kind, 1)]
        assert len(specs) == 8
        changed, predicted = {}, 0.0
        for spec in specs:
            exact = source.read_rows(spec.name, 0, spec.rows)
            error = 0.05 * float(np.sqrt(np.mean(exact**2))) * rng.standard_normal(exact.shape).astype(np.float32)
            changed[spec.name] = exact + error
            (felt,) = found[spec.own_name]
            predicted += 0.5 * float(felt.rows @ (error.astype(np.float64) ** 2 @ felt.columns))
        ratios[kind] = divergence(source, changed) / predicted
    assert {kind: ratio for kind, ratio in ratios.items() if not 1 / 2 < ratio < 2} == {}


def test_every_matrix_is_felt_and_a_tied_table_twice(make_model: MakeModel) -> None:
    source = ModelSource.open(make_model("llama", tied=True, **SIZES))
    found = collect(source)
    assert set(found) == {spec.gguf_name for spec in source.tensors if spec.is_matrix}
    assert {name: len(each) for name, each in found.items() if len(each) != 1} == {"token_embd.weight": 2}
    for spec in source.tensors:
        for each in found.get(spec.gguf_name, []):
            assert (each.rows.shape, each.columns.shape) == ((spec.rows,), (spec.columns,))
