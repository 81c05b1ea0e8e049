"""Exchanges after the knapsack: of those measured, what lowers the divergence is kept, and nothing else is."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from r1q.core.recipe import Recipe
from r1q.core.scheme import Scheme
from r1q.models.forward import Configured, logits
from r1q.models.source import ModelSource
from r1q.plan.fit import Fitted
from r1q.plan.fitting import to_toml
from r1q.plan.swaps import Option, Stack, swapped
from r1q.quantize.rtn import rtn

MakeModel = Callable[..., Path]
TOKENS = np.random.default_rng(6).integers(0, 320, (2, 32))
LOSSES = {"q4_0": 0.3, "q5_0": 0.1, "q8_0": 0.01}


def _stacks(source: ModelSource) -> dict[str, Stack]:
    """Return every matrix with options whose losses are drawn: the predictions of a knapsack that is often wrong."""
    rng, stacks = np.random.default_rng(1), {}
    for spec in source.tensors:
        if spec.is_matrix:
            options = [
                Option(
                    scheme=scheme,
                    bytes=spec.rows * scheme.row_bytes(spec.columns),
                    loss=loss * float(rng.uniform(0.5, 1)),
                )
                for scheme, loss in ((Scheme(grid=grid), loss) for grid, loss in LOSSES.items())
            ]
            importance = rng.uniform(0.5, 2, spec.columns).astype(np.float32)
            stacks[spec.gguf_name] = Stack(members={spec: importance}, options=tuple(options))
    return stacks


def _rounded(source: ModelSource, stacks: Mapping[str, Stack], state: Mapping[str, Option]) -> Configured:
    """Return the model under a choice, rounded from the beginning."""
    values = {spec.name: source.read_rows(spec.name, 0, spec.rows) for spec in source.tensors}
    for key, option in state.items():
        ((spec, importance),) = stacks[key].members.items()
        values[spec.name] = rtn(values[spec.name], option.scheme, importance).dequantize()

    def read_rows(name: str, start: int, stop: int) -> NDArray[np.float32]:
        return values[name][start:stop] if values[name].ndim > 1 else values[name]

    rows = SimpleNamespace(tensors=source.tensors, read_rows=read_rows)
    return Configured(source.config, rows)


def _divergence(source: ModelSource, other: Configured) -> float:
    p, q = (
        torch.from_numpy(np.stack(list(logits(model, TOKENS, first=16)))).log_softmax(-1) for model in (source, other)
    )
    return float(torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean())


def test_what_lowers_the_divergence_and_fits_is_kept_and_the_rest_undone(make_model: MakeModel) -> None:
    source = ModelSource.open(make_model("llama"))
    stacks = _stacks(source)
    state = {key: stack.options[1] for key, stack in stacks.items()}
    room = sum(option.bytes for option in state.values())
    first = _divergence(source, _rounded(source, stacks, state))
    swaps = list(
        swapped(source, TOKENS, stacks, state, 10, lambda choice: sum(o.bytes for o in choice.values()) <= room)
    )
    assert len(swaps) == 10
    assert swaps[0].before == pytest.approx(first, rel=1e-3)
    assert 0 < sum(swap.kept for swap in swaps) < 10
    for swap in swaps:
        assert swap.before == pytest.approx(_divergence(source, _rounded(source, stacks, state)), rel=1e-3)
        after = _divergence(source, _rounded(source, stacks, state | dict(swap.to)))
        assert swap.after == pytest.approx(after, rel=1e-3)
        assert dict(swap.was) == {key: state[key] for key in swap.to}
        assert sum(o.bytes for o in swap.to.values()) <= sum(o.bytes for o in swap.was.values())
        assert swap.kept == (swap.after < swap.before)
        if swap.kept:
            state |= swap.to
    tried = [frozenset((key, option.scheme) for key, option in swap.to.items()) for swap in swaps]
    assert len(set(tried)) == len(tried)
    state = {key: stack.options[1] for key, stack in stacks.items()}
    too_large = list(swapped(source, TOKENS, stacks, state, 10, lambda choice: False))
    assert any(swap.after < swap.before for swap in too_large)
    assert not any(swap.kept for swap in too_large)
    assert {swap.before for swap in too_large} == {swaps[0].before}


def test_a_recipe_says_what_was_exchanged() -> None:
    recipe = Recipe(name="fit", base=Scheme(grid="q8_0"))
    assert to_toml(recipe, ["exchanges measured: 2", "a q4_0 to q5_0"]).splitlines()[:2] == [
        "# exchanges measured: 2",
        "# a q4_0 to q5_0",
    ]
    assert Fitted(recipe=recipe, bytes=1, loss=0.0).swaps == ()
