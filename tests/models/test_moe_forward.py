"""Blocks with experts and latent attention against transformers in float32; what a wrong reading of the config would do.

Tolerance: logits reach 28 here, and both sides sum up to 96 products a few times over in another order: some 1e-5. A wrong group,
scale, pair or norm moves logits by more than 1e-2, as the last tests show.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from r1q.models import mla, moe
from r1q.models.config import ModelConfig
from r1q.models.config_moe import Experts
from r1q.models.forward import Configured, load_block, logits
from r1q.models.source import ModelSource

TOLERANCE = 1e-4
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3 moe": ("qwen3_moe", {}),
    "qwen3 moe, a dense block, weights as they are": ("qwen3_moe", {"mlp_only_layers": [1], "norm_topk_prob": False}),
    "qwen3 moe, every second block, tied": ("qwen3_moe", {"decoder_sparse_step": 2, "tie_word_embeddings": True}),
    "v2": ("deepseek_v2", {}),
    "v2, groups by their best, plain queries": (
        "deepseek_v2",
        {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "q_lora_rank": None},
    ),
    "v3": ("deepseek_v3", {}),
    "v3, one group, plain queries, no yarn": (
        "deepseek_v3",
        {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "rope_parameters": PLAIN},
    ),
    "v3, weights not normalized, two dense blocks": (
        "deepseek_v3",
        {"norm_topk_prob": False, "first_k_dense_replace": 2},
    ),
}


def some_tokens() -> NDArray[np.int64]:
    return np.random.default_rng(7).integers(0, 320, (2, 72))


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(moe_models: SimpleNamespace, tmp_path: Path, case: str) -> None:
    family, settings = CASES[case]
    folder = moe_models.write_moe_model(tmp_path / "m", family, **settings)
    tokens = some_tokens()
    ours = np.stack(list(logits(ModelSource.open(folder), tokens)))
    theirs = moe_models.reference_logits(folder, tokens)
    assert np.abs(theirs).max() > 10
    assert np.abs(ours - theirs).max() < TOLERANCE


@pytest.mark.parametrize("scales", [{"mscale": 0.7, "mscale_all_dim": 1.2}, {}], ids=["two scales", "none"])
def test_yarn_scales_what_turns_and_what_attends(
    moe_models: SimpleNamespace, tmp_path: Path, scales: dict[str, float]
) -> None:
    rope = {key: value for key, value in moe_models.YARN.items() if "mscale" not in key} | scales
    folder = moe_models.write_moe_model(tmp_path / "m", "deepseek_v3", rope_parameters=rope, num_hidden_layers=2)
    tokens = some_tokens()
    ours = np.stack(list(logits(ModelSource.open(folder), tokens)))
    assert np.abs(ours - moe_models.reference_logits(folder, tokens)).max() < TOLERANCE


def test_a_config_as_deepseek_writes_it_means_the_same(moe_models: SimpleNamespace, tmp_path: Path) -> None:
    """`rope_scaling` of type yarn beside `rope_theta`, and the names of the methods that transformers leaves out."""
    folder = moe_models.write_moe_model(tmp_path / "m", "deepseek_v3")
    new = ModelConfig.read(folder, name="m")
    yarn = {k: v for k, v in moe_models.YARN.items() if k not in ("rope_theta", "rope_type")} | {"type": "yarn"}
    old = {
        "rope_parameters": None,
        "rope_scaling": yarn,
        "rope_theta": 10000,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "moe_layer_freq": 1,
        "head_dim": None,
        "aux_loss_alpha": 0.001,
    }
    moe_models.change_config(folder, old)
    facts = [field.name for field in dataclasses.fields(ModelConfig) if field.name != "raw"]
    assert [getattr(ModelConfig.read(folder, name="m"), fact) for fact in facts] == [
        getattr(new, fact) for fact in facts
    ]


WRONG: dict[str, dict[str, Any]] = {
    "groups": {"groups": 1, "groups_used": 1},
    "best of a group": {"group_best": 1},
    "gating": {"gating": "softmax"},
    "correction": {"corrected": False},
    "weights": {"normalized": False},
    "scale": {"scale": 1.0},
}


@pytest.mark.parametrize("fact", WRONG)
def test_every_fact_of_the_router_matters(moe_models: SimpleNamespace, tmp_path: Path, fact: str) -> None:
    source = ModelSource.open(moe_models.write_moe_model(tmp_path / "m", "deepseek_v3"))
    experts = source.config.experts
    assert isinstance(experts, Experts)
    wrong = dataclasses.replace(source.config, experts=dataclasses.replace(experts, **WRONG[fact]))
    right, found = (
        np.stack(list(logits(Configured(config, source), some_tokens()))) for config in (source.config, wrong)
    )
    assert np.abs(right - found).max() > 1e-2


def test_routes_by_hand() -> None:
    """Four experts in two groups, scores given: the group whose best two score most together, then its best with bias aside."""
    experts = Experts(
        count=4, used=2, inner=1, groups=2, groups_used=1, gating="sigmoid", corrected=True, scale=3.0, normalized=True
    )
    wanted = torch.tensor([0.9, 0.1, 0.6, 0.5])
    weights = {moe.ROUTER: torch.logit(wanted)[:, None], moe.CORRECTION: torch.tensor([0.0, 0.0, 0.0, 0.2])}
    routes = moe.route(weights, experts, torch.ones(1, 1))
    assert routes.experts.tolist() == [[3, 2]]  # 0.5 + 0.2 before 0.6; group 0 has 1.0, group 1 has 1.3
    np.testing.assert_allclose(routes.weights.numpy(), [[3 * 0.5 / 1.1, 3 * 0.6 / 1.1]], rtol=1e-6)
    assert [part.tolist() for part in routes.of(0)] == [[], []]
    assert routes.of(2)[0].tolist() == [0]


def test_experts_are_read_one_at_a_time_and_once(moe_models: SimpleNamespace, tmp_path: Path) -> None:
    """Whatever the windows: routed experts nobody holds, each matrix is read once for a block."""
    source = ModelSource.open(moe_models.write_moe_model(tmp_path / "m", "qwen3_moe", num_hidden_layers=1))
    reads: list[str] = []

    class Counting:
        config, tensors = source.config, source.tensors

        def read_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
            reads.append(name)
            return source.read_rows(name, start, stop)

    list(logits(Counting(), some_tokens()))
    experts = [name for name in reads if ".experts." in name]
    assert len(experts) == len(set(experts)) == 24
    reads.clear()
    block = load_block(Counting(), 0)
    assert not [name for name in reads if ".experts." in name]
    assert "ffn_up_exps.3.weight" in block
    assert block.get("ffn_up_exps.9.weight") is None


def test_keys_are_made_from_every_heads_transposed_matrix() -> None:
    from r1q.models.config_moe import Latent

    latent = Latent(query_rank=None, rank=2, key_dim=3, rope_dim=2, value_dim=1)
    heads = torch.arange(12.0).reshape(2, 3, 2)  # [heads, key_dim, rank], as kv_b_proj has them
    weights = {"attn_k_b.weight": heads.transpose(1, 2).reshape(4, 3)}
    compressed = torch.tensor([[1.0, 10.0]])
    keys = mla.keys_of(weights, latent, compressed, 2)
    assert keys.tolist() == [[(heads[head] @ compressed[0]).tolist()] for head in range(2)]
