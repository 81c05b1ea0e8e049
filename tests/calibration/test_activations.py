"""Inputs measured and balanced: ranges and errors by a plain loop, and a model that computes the same after it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from r1q.calibration.activations import Method, block_activations
from r1q.calibration.ranges import BINS, METHODS, Histogram, spell
from r1q.core.activations import ACTIVATIONS, STAGES, Activations
from r1q.core.errors import InputError
from r1q.models.block import attention_input, attention_mix, attention_output, mlp_inner, mlp_input, run_block
from r1q.models.forward import embed, load_block, logits
from r1q.models.linear import Weights
from r1q.models.rope import Rotation, rotation
from r1q.models.source import ModelSource
from r1q.quantize.balance import BalancedSource

MakeModel = Callable[..., Path]
TOKENS = np.random.default_rng(5).integers(0, 300, (3, 16))


def measured(source: ModelSource, folder: Path, **method: object) -> tuple[Activations, BalancedSource]:
    found = list(block_activations(source, TOKENS, Method(**method)))  # type: ignore[arg-type]
    activations = Activations(
        ranges={(layer, stage): ranges[stage] for layer, (ranges, _) in enumerate(found) for stage in STAGES},
        exponents={(layer, stage): powers[stage] for layer, (_, powers) in enumerate(found) for stage in STAGES},
        record={},
    )
    activations.write(folder / ACTIVATIONS)
    assert Activations.read(folder / ACTIVATIONS) == activations
    return activations, BalancedSource(source, activations, folder / ACTIVATIONS)


def made(activations: Activations, layer: int, kind: str) -> torch.Tensor:
    """Return by which powers the rows of a layer were divided for the sake of a later one."""
    if kind == "ffn_up":
        return torch.tensor(activations.exponents[layer, "ffn_down"])
    if kind == "attn_v":  # two heads of 16 read each head of values
        return torch.tensor(activations.exponents[layer, "attn_output"]).reshape(2, 2, 16)[:, 0].flatten()
    return torch.zeros(1, dtype=torch.int64)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_balanced_model_computes_the_same(make_model: MakeModel, tmp_path: Path, family: str) -> None:
    biased = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
    source = ModelSource.open(make_model(family, config=biased))
    activations, balanced = measured(source, tmp_path)
    assert any(any(powers) for powers in activations.exponents.values())
    before, after = (np.stack(list(logits(model, TOKENS))) for model in (source, balanced))
    # Powers of two round nothing; only sums of products may be taken in another order.
    np.testing.assert_allclose(after, before, atol=1e-6 * float(np.abs(before).max()))


def test_ranges_and_errors_are_those_of_a_plain_loop(make_model: MakeModel, tmp_path: Path) -> None:
    activations, source = measured(ModelSource.open(make_model("qwen2")), tmp_path, name="minmax", limit=0.02)
    config, turn = source.config, rotation(source.config, TOKENS.shape[1])
    hidden = embed(source, TOKENS)
    for layer in range(config.num_layers):
        weights = load_block(source, layer)
        normed = attention_input(weights, config, hidden)
        mixed = attention_mix(weights, config, normed, turn)
        middle = mlp_input(weights, config, hidden + attention_output(weights, mixed))
        inputs = {"attn_q": normed, "attn_output": mixed, "ffn_gate": middle, "ffn_down": mlp_inner(weights, middle)}
        for stage, values in inputs.items():
            found, x = activations.ranges[layer, stage], values.flatten(0, 1)
            span = float(x.max().clamp_min(0) - x.min().clamp_max(0))
            assert span / 255 <= found.scale <= span / 255 * (1 + 2**-6)
            codes = torch.clamp(torch.round(x / found.scale) + found.zero, 0, 255)
            errors = []
            for kind in STAGES[stage]:
                weight = torch.ldexp(weights[f"{kind}.weight"], made(activations, layer, kind)[:, None])
                right, wrong = x @ weight.T, ((codes - found.zero) * found.scale - x) @ weight.T
                errors.append(float(wrong.norm() / right.norm()))
                errors.append(float((wrong.norm(dim=1) / right.norm(dim=1)).square().mean().sqrt()))
            assert found.error == pytest.approx(max(errors), rel=0.02)
            assert found.static == (found.error <= 0.02)
        hidden = torch.stack([run_block(weights, config, window, turn) for window in hidden])


@pytest.mark.parametrize("name", ["percentile", "entropy"])
def test_methods_that_cut_off_see_every_input_once(make_model: MakeModel, tmp_path: Path, name: str) -> None:
    """A second walk counts what is balanced: the same hidden states come out, and ranges are those of a histogram made here."""
    source = ModelSource.open(make_model("qwen2"))
    activations, balanced = measured(source, tmp_path, name=name)
    turn, hidden = rotation(source.config, TOKENS.shape[1]), embed(balanced, TOKENS)
    for layer in range(source.config.num_layers):
        weights = load_block(balanced, layer)
        inner = mlp_inner(weights, mlp_input(weights, source.config, _after_attention(weights, source, hidden, turn)))
        counts, edges = np.histogram(inner.numpy(), BINS)
        low, high = METHODS[name](Histogram(low=float(edges[0]), high=float(edges[-1]), counts=counts.astype(float)))
        found = activations.ranges[layer, "ffn_down"]
        # Values within a float32's last bit of an edge may be counted in the bin beside it.
        assert found.scale == pytest.approx(spell(low, high)[0], rel=2 / 256)
        hidden = torch.stack([run_block(weights, source.config, window, turn) for window in hidden])


def _after_attention(weights: Weights, source: ModelSource, hidden: torch.Tensor, turn: Rotation) -> torch.Tensor:
    mixed = attention_mix(weights, source.config, attention_input(weights, source.config, hidden), turn)
    return hidden + attention_output(weights, mixed)


def test_broken_weights_are_named(make_model: MakeModel, tmp_path: Path) -> None:
    broken = _Loud(ModelSource.open(make_model("llama", hidden_size=128)), by=float("inf"))
    with pytest.raises(InputError, match="block 0 makes numbers that are not finite"):
        measured(broken, tmp_path)  # type: ignore[arg-type]


def test_balancing_evens_out_an_outlier_channel(make_model: MakeModel, tmp_path: Path) -> None:
    source = ModelSource.open(make_model("llama", hidden_size=128))
    loud = _Loud(source)
    activations, balanced = measured(loud, tmp_path)  # type: ignore[arg-type]
    powers = activations.exponents[0, "attn_q"]
    assert powers[3] == max(powers)
    assert powers[3] == pytest.approx(np.log2(64), abs=2)
    inputs, loudest = (
        attention_input(load_block(model, 0), source.config, embed(model, TOKENS)).abs().amax((0, 1))
        for model in (balanced, loud)
    )
    assert loudest[3] > 30 * loudest.median()
    assert inputs[3] < 4 * inputs.median()
    assert activations.ranges[0, "attn_q"].scale < float(loudest[3]) / 255 / 5


class _Loud:
    """A source whose third channel comes out of the first norm `by` times as large, and is read with a 64th of the weight."""

    def __init__(self, source: ModelSource, by: float = 64) -> None:
        self._source, self._by = source, by
        self.config, self.tensors = source.config, source.tensors
        self._specs = {spec.name: spec for spec in source.tensors}

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        values, spec = self._source.read_rows(name, start, stop).copy(), self._specs[name]
        if spec.layer == 0 and spec.kind == "attn_norm":
            values[3] *= self._by
        if spec.layer == 0 and spec.kind in STAGES["attn_q"] and spec.is_matrix:
            values[:, 3] /= 64
        return values

    def fingerprint(self) -> dict[str, str]:
        return {}

    def sidecars(self) -> list[Path]:
        return []


def test_a_damaged_file_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    measured(ModelSource.open(make_model("llama")), tmp_path)
    path = tmp_path / ACTIVATIONS
    whole = path.read_text()
    for damaged in (
        whole[:-9],
        whole.replace('"scale": ', '"scale": -', 1),
        whole.replace("attn_q", "attn_z", 1),
        "[]",
    ):
        assert damaged != whole
        path.write_text(damaged)
        with pytest.raises(InputError, match=r"activations\.json is damaged"):
            Activations.read(path)
