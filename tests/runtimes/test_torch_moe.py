"""The torch adapter with experts and latent attention: transformers' logits by every route, the contract, the formats.

Tolerance: tests/models/test_moe_forward.py's 1e-4, for logits that reach 28 and other orders of the same sums. Moving the matrices of
latent attention to the queries and the results is one more such order.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from r1q.core.artifact import OutputFolder
from r1q.core.checkpoint import QuantizedCheckpoint
from r1q.models import decoder_layer
from r1q.models.config import ModelConfig
from r1q.models.embedded import OpenedModel
from r1q.models.forward import Configured, TensorReader, logits
from r1q.models.gptq_source import GptqSource
from r1q.models.source import ModelSource
from r1q.plan.choose import Wish, choose_recipe
from r1q.plan.plan import make_plan
from r1q.plan.walk import quantize_model
from r1q.runtimes.base import Options
from r1q.runtimes.contract import CHECKS, Case, Check
from r1q.runtimes.torch import Torch, TorchSession

TOLERANCE = 1e-4
FLOAT32 = Options(compute="f32", threads=1)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3 moe, a dense block": ("qwen3_moe", {"mlp_only_layers": [1], "norm_topk_prob": False}),
    "v2, groups, plain queries": (
        "deepseek_v2",
        {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "q_lora_rank": None},
    ),
    "v3": ("deepseek_v3", {}),
}
WriteModel = Callable[..., Path]


@pytest.fixture
def write(moe_models: SimpleNamespace, tmp_path: Path) -> WriteModel:
    """Return `write(family, **settings) -> folder`."""
    return lambda family, **settings: moe_models.write_moe_model(tmp_path / family, family, **settings)


def open_torch(path: Path, options: Options = FLOAT32) -> TorchSession:
    return Torch().open(path, options)


def some_tokens(length: int = 72) -> list[int]:
    return [int(token) for token in np.random.default_rng(7).integers(0, 320, length)]


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers_by_every_route(
    moe_models: SimpleNamespace, write: WriteModel, case: str
) -> None:
    family, settings = CASES[case]
    folder, tokens = write(family, **settings), some_tokens()
    theirs = moe_models.reference_logits(folder, np.array([tokens]))[0]
    with open_torch(folder) as session:
        whole = session.logits(tokens)
        rows = [session.prefill(0, tokens[:40])]
        rows.append(session.prefill(0, tokens[40:66]))
        rows += [session.step([(0, token)])[0] for token in tokens[66:]]
    assert np.abs(theirs).max() > 10
    np.testing.assert_allclose(whole, theirs, atol=TOLERANCE)
    np.testing.assert_allclose(np.stack(rows), theirs[[39, *range(65, 72)]], atol=TOLERANCE)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_contract(write: WriteModel, family: str, check: Check) -> None:
    check.run(Case(runtime=Torch(), path=write(family), tolerance=TOLERANCE, options=FLOAT32))


@pytest.mark.parametrize("chosen", [(0, 1, 2), (2, 0)], ids=str)
def test_a_step_of_several_sequences_is_each_ones_own(write: WriteModel, chosen: tuple[int, ...]) -> None:
    texts = [np.random.default_rng(seed).integers(0, 320, length).tolist() for seed, length in enumerate((3, 9, 5))]
    options = Options(compute="f32", threads=1, sequences=3, context=16)
    with open_torch(write("deepseek_v3"), options) as session:
        for sequence, text in enumerate(texts):
            session.prefill(sequence, text[:-1])
        rows = session.step([(sequence, texts[sequence][-1]) for sequence in chosen])
        for row, sequence in zip(rows, chosen, strict=True):
            np.testing.assert_allclose(row, session.logits(texts[sequence])[-1], atol=TOLERANCE)


def test_latents_are_all_that_is_kept(write: WriteModel) -> None:
    """32 + 8 numbers for each token, where keys and values of 4 heads would be 4 · (16 + 8 + 12)."""
    with open_torch(write("deepseek_v3"), Options(compute="f32", threads=1, context=16)) as session:
        keys, values = session._cache.keys[0], session._cache.values[0]
    assert keys.shape == (1, 1, 16, 40)
    assert values.shape == (1, 1, 16, 32)
    assert values.data_ptr() == keys.data_ptr()


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_bfloat16_is_near_to_float32(write: WriteModel, family: str) -> None:
    """Near where no token changes its experts, which a rounded score may make it do: by the median, not the mean."""
    folder, tokens = write(family), some_tokens()
    with open_torch(folder) as exact, open_torch(folder, Options(threads=1)) as rounded:
        wanted, found = exact.logits(tokens), rounded.logits(tokens)
    assert 0 < np.median(np.abs(found - wanted)) < 0.05 * np.abs(wanted).std()


def test_packed_weights_and_plain_ones_compute_the_same(write: WriteModel, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, tokens = write("deepseek_v3"), some_tokens()
    with open_torch(folder) as session:
        packed = session.logits(tokens)
    monkeypatch.setattr(decoder_layer, "_packs", lambda dtype, device: False)
    with open_torch(folder) as session:
        np.testing.assert_allclose(session.logits(tokens), packed, atol=TOLERANCE)


def test_a_checkpoint_and_a_gptq_folder_are_the_weights_they_mean(write: WriteModel, tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 64, "kv_lora_rank": 64}
    heads = {"q_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32}
    source = ModelSource.open(write("deepseek_v3", dtype=torch.bfloat16, **sizes, **heads))
    recipe = choose_recipe(Wish(formats=("gptq",), bits=4, group_size=32), source.tensors).recipe
    list(quantize_model(OpenedModel(source), make_plan(source, recipe, ("gptq",)), OutputFolder(tmp_path / "out")))
    checkpoint = QuantizedCheckpoint.open(tmp_path / "out/checkpoint")
    readers: dict[Path, TensorReader] = {
        checkpoint.path: Configured(ModelConfig.read(checkpoint.sidecar), checkpoint),
        tmp_path / "out/gptq": GptqSource.open(tmp_path / "out/gptq"),
    }
    for path, meant in readers.items():
        with open_torch(path) as session:
            wanted = next(logits(meant, np.array([some_tokens()])))
            np.testing.assert_allclose(session.logits(some_tokens()), wanted, atol=TOLERANCE)
