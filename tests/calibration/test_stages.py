"""A block walked stage by stage against transformers' own model of the same weights, with hooks on what its linear layers read.

Tolerance: both sides compute in float32, in another order; what a layer reads is off by some 10⁻⁶ of its size behind two blocks. Sums
over tokens are compared to 10⁻⁴ of √(H_ii·H_jj). A stage that reads the float model's numbers instead of the coded one's is off by a
hundred times that, as the last test shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from r1q.calibration.stages import BlockWalk, Stage, Streams
from r1q.models.forward import embed, load_block
from r1q.models.rope import rotation
from r1q.models.source import ModelSource

MakeModel = Callable[..., Path]
Doubles = NDArray[np.float64]
Seen = dict[str, Doubles]
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"config": {"attention_bias": True, "mlp_bias": True}}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
}
STAGES = {
    ("attn_q", "attn_k", "attn_v"): "self_attn.q_proj",
    ("attn_output",): "self_attn.o_proj",
    ("ffn_gate", "ffn_up"): "mlp.gate_proj",
    ("ffn_down",): "mlp.down_proj",
}
# Where the residual stream is before the layers that add to it, and behind them.
BEFORE = {"self_attn.o_proj": "input_layernorm", "mlp.down_proj": "post_attention_layernorm"}
BEHIND = {"self_attn.o_proj": "post_attention_layernorm", "mlp.down_proj": "after"}
TOLERANCE = 1e-4


pytestmark = pytest.mark.usefixtures("one_core")


def some_tokens() -> NDArray[np.int64]:
    return np.random.default_rng(7).integers(0, 320, (5, 24))


def coarse(weight: Tensor) -> Tensor:
    """Stand in for a quantizer: the weight in steps of an eighth, some 0.1 of its size away."""
    return (weight * 8).round() / 8


def seen_by_transformers(folder: Path, replace: Callable[[Tensor], Tensor] | None = None) -> Seen:
    """Return what every module of every block read, [tokens, features], and `after` each block; matrices `replace`d before."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    seen: Seen = {}

    def keep(name: str, values: Tensor) -> None:
        seen[name] = values.flatten(0, 1).double().numpy()

    for layer, block in enumerate(model.model.layers):
        for name, module in block.named_modules():
            if replace is not None and isinstance(module, torch.nn.Linear):
                module.weight.data = replace(module.weight.data)
            if name in STAGES.values() or name in BEFORE.values():
                module.register_forward_pre_hook(lambda _, args, n=f"{layer}.{name}": keep(n, args[0]))
        block.register_forward_hook(
            lambda _, __, out, n=f"{layer}.after": keep(n, out[0] if isinstance(out, tuple) else out)
        )
    with torch.no_grad():
        model(torch.from_numpy(some_tokens()))
    return seen


def walk_blocks(
    folder: Path,
    replace: Callable[[Tensor], Tensor],
    *,
    windows: int = 2,
    exact: bool = True,
    dtype: Any = torch.float32,
) -> Iterator[tuple[int, Stage | Streams]]:
    """Walk all blocks, replacing matrices as the stages arrive; yield every stage, and the streams behind every block."""
    source = ModelSource.open(folder)
    config, hidden = source.config, embed(source, some_tokens()).clone()
    streams = Streams(coded=hidden, exact=hidden.clone() if exact else None)
    turn = rotation(config, hidden.shape[1])
    for layer in range(config.num_layers):
        weights = load_block(source, layer)
        matrices = {key: value.to(dtype) for key, value in weights.items() if value.ndim == 2}
        coded = {key: value for key, value in weights.items() if value.ndim == 1}
        walk = BlockWalk(
            config=config,
            rotation=turn,
            exact={**coded, **matrices} if exact else dict(coded),
            coded=coded,
            dtype=dtype,
            windows=windows,
            allocate=lambda shape, kind: torch.full(shape, float("nan"), dtype=kind),
        )
        for stage in walk.stages(streams):
            yield layer, stage
            for kind in stage.kinds:
                assert f"{kind}.weight" not in walk.coded
                walk.coded[f"{kind}.weight"] = replace(weights[f"{kind}.weight"]).to(dtype)
        yield layer, streams


def shares(seen: Seen, layer: int, kinds: tuple[str, ...], where: Mapping[str, str] = BEHIND) -> Doubles:
    """Return what each token counts, [tokens, 1]: 1/rms of the stream behind layers that add to it (or `where` else), else 1."""
    place = where.get(STAGES[kinds])
    if place is None:
        return np.ones((len(seen[f"{layer}.after"]), 1))
    share: Doubles = 1 / np.sqrt(np.square(seen[f"{layer}.{place}"]).mean(axis=1, keepdims=True))
    return share


def assert_moment(moment: Tensor, wanted: Doubles) -> None:
    """Compare a moment (columns reversed, lower triangle) with xᵀx."""
    have = moment.numpy()[::-1, ::-1]
    size = np.sqrt(np.outer(wanted.diagonal(), wanted.diagonal()))
    upper = np.triu_indices(len(wanted))
    assert (np.abs(have - wanted) / size)[upper].max() < TOLERANCE


def assert_product(have: Tensor, left: Doubles, right: Doubles) -> None:
    wanted = left.T @ right
    size = np.outer(np.linalg.norm(left, axis=0), np.linalg.norm(right, axis=0)).max()
    assert np.abs(have.numpy() - wanted).max() <= TOLERANCE * size


@pytest.mark.parametrize("case", FAMILIES)
def test_stages_and_hidden_states_are_those_of_transformers(make_model: MakeModel, case: str) -> None:
    """With the float model's own weights both streams go its way, every stage sums what its layers read, and nothing drifts."""
    family, options = FAMILIES[case]
    folder = make_model(family, **options)
    seen, order = seen_by_transformers(folder), []
    for layer, found in walk_blocks(folder, lambda weight: weight):
        if isinstance(found, Streams):
            after = seen[f"{layer}.after"]
            assert found.exact is not None
            for stream in (found.coded, found.exact):
                np.testing.assert_allclose(stream.flatten(0, 1).numpy(), after, atol=2e-5)
        else:
            order.append((layer, found.kinds))
            read = seen[f"{layer}.{STAGES[found.kinds]}"] * shares(seen, layer, found.kinds)
            assert found.tokens == len(read) == 120
            assert_moment(found.moment, read.T @ read)
            assert found.drift is not None
            assert np.abs(found.drift.numpy()).max() < TOLERANCE * np.abs(read).max() * len(read)
    assert order == [(layer, kinds) for layer in range(2) for kinds in STAGES]


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("case", FAMILIES)
def test_a_stage_reads_what_everything_before_it_coded_has_made(make_model: MakeModel, case: str, exact: bool) -> None:
    """Moments are those of the model whose matrices are all replaced: what comes later does not reach a stage."""
    family, options = FAMILIES[case]
    folder = make_model(family, **options)
    float_model, seen = seen_by_transformers(folder), seen_by_transformers(folder, coarse)
    for layer, found in walk_blocks(folder, coarse, exact=exact):
        if isinstance(found, Streams):
            np.testing.assert_allclose(found.coded.flatten(0, 1).numpy(), seen[f"{layer}.after"], atol=5e-5)
        else:
            weigh = shares(float_model, layer, found.kinds) if exact else shares(seen, layer, found.kinds, BEFORE)
            read = seen[f"{layer}.{STAGES[found.kinds]}"] * weigh
            assert_moment(found.moment, read.T @ read)
            assert (found.drift is not None) == exact


@pytest.mark.parametrize("case", FAMILIES)
def test_drift_is_how_far_inputs_and_residual_stream_are_from_the_float_models(
    make_model: MakeModel, case: str
) -> None:
    """From two models of transformers in float64: (x_exact − x)ᵀx; for layers that add, (all that is missing behind)ᵀx, weighed."""
    family, options = FAMILIES[case]
    folder = make_model(family, **options)
    float_model, coded_model = seen_by_transformers(folder), seen_by_transformers(folder, coarse)
    source = ModelSource.open(folder)
    for layer, found in walk_blocks(folder, coarse):
        if isinstance(found, Streams):
            assert found.exact is not None
            np.testing.assert_allclose(found.exact.flatten(0, 1).numpy(), float_model[f"{layer}.after"], atol=2e-5)
            continue
        name = f"{layer}.{STAGES[found.kinds]}"
        read, away = coded_model[name], float_model[name] - coded_model[name]
        assert found.drift is not None
        assert found.residual == (STAGES[found.kinds] in BEFORE)
        if found.residual:
            before = f"{layer}.{BEFORE[STAGES[found.kinds]]}"
            weight = load_block(source, layer)[f"{found.kinds[0]}.weight"].double().numpy()
            away = float_model[before] - coded_model[before] + away @ weight.T
        share = shares(float_model, layer, found.kinds)
        assert_product(found.drift, away * share, read * share)
        if layer:
            assert np.abs(found.drift.numpy()).max() > 100 * TOLERANCE  # there is something to compare


def test_the_number_of_windows_at_once_changes_last_bits_only(make_model: MakeModel) -> None:
    folder = make_model("qwen2")
    one, five = (list(walk_blocks(folder, coarse, windows=windows)) for windows in (1, 5))
    for (_, left), (_, right) in zip(one, five, strict=True):
        if isinstance(left, Stage) and isinstance(right, Stage):
            lower = torch.ones_like(left.moment).tril().bool()
            torch.testing.assert_close(left.moment[lower], right.moment[lower], rtol=1e-4, atol=1e-3)


def test_bfloat16_products_stay_near_and_the_streams_in_float32(make_model: MakeModel) -> None:
    """Eight bits of mantissa: a product is off by 2⁻⁸ of its size at most, a sum of many by less; two blocks add up to some 2 %."""
    folder = make_model("llama")
    float_model, seen = seen_by_transformers(folder), seen_by_transformers(folder, coarse)
    for layer, found in walk_blocks(folder, coarse, dtype=torch.bfloat16):
        if isinstance(found, Streams):
            assert found.coded.dtype == torch.float32
            off = np.linalg.norm(found.coded.flatten(0, 1).numpy() - seen[f"{layer}.after"])
            assert 1e-4 < off / np.linalg.norm(seen[f"{layer}.after"]) < 0.02
        else:
            read = seen[f"{layer}.{STAGES[found.kinds]}"]
            diagonal = np.square(read * shares(float_model, layer, found.kinds)).sum(axis=0)
            np.testing.assert_allclose(found.moment.diagonal().numpy()[::-1], diagonal, rtol=0.1)


def test_the_float_models_inputs_would_not_pass_for_the_coded_ones(make_model: MakeModel) -> None:
    folder = make_model("llama")
    exact, coded = seen_by_transformers(folder), seen_by_transformers(folder, coarse)
    for layer in range(2):
        for name in STAGES.values():
            left, right = exact[f"{layer}.{name}"], coded[f"{layer}.{name}"]
            if (layer, name) == (0, "self_attn.q_proj"):
                np.testing.assert_array_equal(left, right)
                continue
            diagonal = np.square(right).sum(axis=0)
            assert (np.abs(np.square(left).sum(axis=0) - diagonal) / diagonal).max() > 100 * TOLERANCE
