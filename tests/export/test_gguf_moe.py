"""Files of models with experts: llama.cpp computes what transformers computes, and codes and grids are what llama-quantize makes.

The models are of R1's and Qwen3-MoE's shape (16 experts, rows of 256), with weights that speak up: the likeliest token has more
than a tenth of the probability.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from r1q.core.checkpoint import QuantizedCheckpoint
from r1q.core.errors import UsageError
from r1q.core.gguf_file import GgufFile
from r1q.core.mixtures import FILE_TYPES
from r1q.core.recipe import Recipe, Rule
from r1q.core.scheme import Scheme
from r1q.export.gguf import plan_gguf, write_gguf
from r1q.export.verify_gguf import verify_gguf
from r1q.models.config import ModelConfig
from r1q.models.forward import Configured, logits
from r1q.models.source import ModelSource
from r1q.plan.job import Job, open_job, plan_job, run_job
from r1q.plan.plan import make_plan

pytestmark = pytest.mark.runtime

Logits = Callable[[Path, NDArray[np.int64]], NDArray[np.float32]]
Model = Callable[[str], Path]
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 2,
}
R1 = SIZES | {
    "n_routed_experts": 16,
    "q_lora_rank": 256,
    "kv_lora_rank": 256,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "r1": ("deepseek_v3", R1),
    "plain queries, one group": ("deepseek_v3", R1 | {"q_lora_rank": None, "n_group": 1, "topk_group": 1}),
    "v2": ("deepseek_v2", R1),
    "qwen3": ("qwen3_moe", SIZES | {"num_experts": 16, "head_dim": 64}),
    "qwen3 of eight": ("qwen3_moe", SIZES | {"num_experts": 8, "head_dim": 64}),
}
TOKENS = np.random.default_rng(7).integers(0, 300, 80)


@pytest.fixture(scope="module")
def model(moe_models: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Return `model(case)`: the folder, made once."""
    made: dict[str, Path] = {}

    def folder(case: str) -> Path:
        if case not in made:
            family, settings = CASES[case]
            made[case] = moe_models.write_moe_model(tmp_path_factory.mktemp("moe") / "Tiny", family, **settings)
        return made[case]

    return folder


def divergence(reference: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    """Return the mean Kullback–Leibler divergence over the positions, in nats."""
    return float(np.mean(divergences(reference, found)))


def divergences(reference: NDArray[np.float32], found: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the Kullback–Leibler divergence at every position."""
    p, q = (x.astype(np.float64) - x.max(1, keepdims=True) for x in (reference, found))
    p, q = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (p, q))
    result: NDArray[np.float64] = (np.exp(p) * (p - q)).sum(1)
    return result


def surest(found: NDArray[np.float32]) -> float:
    """Return the mean probability of the likeliest token."""
    shares = np.exp(found - found.max(1, keepdims=True))
    return float((1 / shares.sum(1)).mean())


@pytest.mark.parametrize("case", list(CASES)[:4])
def test_a_float_file_computes_what_transformers_computes(
    case: str, model: Model, checkpoint_of: Callable[..., QuantizedCheckpoint], llama_logits: Logits,
    moe_models: SimpleNamespace, tmp_path: Path,
) -> None:  # fmt: skip
    checkpoint = checkpoint_of(model(case), "f32")
    path = write_gguf(checkpoint, tmp_path)
    reference = moe_models.reference_logits(model(case), TOKENS[None])[0]
    assert surest(reference) > 0.1
    assert divergence(reference, llama_logits(path, TOKENS)) < 1e-8  # rounding in another order; asked for are 1e-4
    assert verify_gguf(checkpoint, path).defects == ()


def _replace(path: Path, name: str, values: NDArray[np.float32]) -> None:
    tensor = GgufFile.open(path).tensors[name]
    with open(path, "r+b") as file:
        file.seek(tensor.offset)
        file.write(values.astype("<f4").tobytes())


def _heads(path: Path, name: str) -> NDArray[np.float32]:
    file = GgufFile.open(path)
    return np.array(file.read_bytes(name).view("<f4")).reshape(file.tensors[name].shape)


def _as_it_was(heads: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return k_b as if no head had been transposed."""
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(heads.shape)


SWAPPED: dict[str, tuple[str, Callable[[NDArray[np.float32]], NDArray[np.float32]]]] = {
    "k_b not transposed": ("blk.1.attn_k_b.weight", _as_it_was),
    "k_b of other heads": ("blk.1.attn_k_b.weight", lambda heads: heads[::-1]),
    "v_b of other heads": ("blk.1.attn_v_b.weight", lambda heads: heads[::-1]),
    "two experts": ("blk.1.ffn_up_exps.weight", lambda experts: experts[[1, 0, *range(2, 16)]]),
    "gate for up": ("blk.1.ffn_gate_exps.weight", lambda experts: experts[:, ::-1]),
}


@pytest.mark.parametrize("swap", SWAPPED)
def test_what_is_swapped_is_caught_by_logits_and_by_verify(
    swap: str, model: Model, checkpoint_of: Callable[..., QuantizedCheckpoint], llama_logits: Logits, tmp_path: Path
) -> None:
    checkpoint = checkpoint_of(model("r1"), "f32")
    path = write_gguf(checkpoint, tmp_path)
    right = llama_logits(path, TOKENS)
    name, change = SWAPPED[swap]
    _replace(path, name, change(_heads(path, name)))
    assert divergence(right, llama_logits(path, TOKENS)) > 1e-3
    assert any(defect.where.startswith(name) for defect in verify_gguf(checkpoint, path).defects)


LLAMA_QUANTIZE = """
import ctypes, sys, llama_cpp
options = llama_cpp.llama_model_quantize_default_params()
options.ftype, options.nthread = int(sys.argv[3]), 2
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(options)))
"""


@pytest.mark.parametrize(
    ("case", "presets"), [("r1", ["q4_0", "q4_k_m", "q2_k"]), ("qwen3 of eight", ["q4_k_m", "q3_k_m"])]
)
def test_grids_and_codes_are_those_of_llama_quantize(
    case: str, presets: list[str], model: Model, checkpoint_of: Callable[..., QuantizedCheckpoint], tmp_path: Path
) -> None:
    whole = write_gguf(checkpoint_of(model(case), "f32"), tmp_path)
    for preset in presets:
        ours = GgufFile.open(write_gguf(checkpoint_of(model(case), preset), tmp_path))
        target = tmp_path / f"theirs-{preset}.gguf"
        command = [sys.executable, "-c", LLAMA_QUANTIZE, str(whole), str(target), str(FILE_TYPES[preset])]
        subprocess.run(command, check=True, capture_output=True)
        theirs = GgufFile.open(target)
        assert set(ours.tensors) == set(theirs.tensors)
        for name, tensor in ours.tensors.items():
            assert (tensor.type, tensor.shape) == (theirs.tensors[name].type, theirs.tensors[name].shape), name
            np.testing.assert_array_equal(ours.read_bytes(name), theirs.read_bytes(name), err_msg=name)


@pytest.mark.parametrize(
    ("case", "effort", "scheme"),
    [
        ("r1", None, "q4_0"),
        ("r1", None, "q4_k_m"),
        ("r1", None, "experts_q4_k"),
        ("r1", "fast", "q4_0"),
        ("r1", "fast", "q4_k_m"),
        ("qwen3", None, "q4_k_m"),
        ("qwen3", "fast", "q4_0"),
        ("qwen3", "fast", "q4_k_m"),
    ],
)
def test_the_walk_ends_in_a_file_that_computes_what_its_checkpoint_computes(
    case: str, effort: str | None, scheme: str, model: Model, llama_logits: Logits, tmp_path: Path
) -> None:
    """Rounded to nearest and by GPTQ; llama.cpp's own logits of the file are those of our forward pass on the checkpoint."""
    (tmp_path / "text.txt").write_text("".join(f"{n} + {n * n} = {n + n * n}; wait, think.\n" for n in range(200)))
    options = {"calibration": str(tmp_path / "text.txt"), "samples": 4, "seq_len": 64} if effort else {}
    job = Job(model=str(model(case)), scheme=scheme, effort=effort, threads=1, output=tmp_path / "out", **options)  # type: ignore[arg-type]
    opened = open_job(job)
    list(run_job(opened, plan_job(opened)))
    checkpoint = QuantizedCheckpoint.open(tmp_path / "out" / "checkpoint")
    assert checkpoint.manifest["method"] == ("gptq" if effort else "rtn")
    path = next((tmp_path / "out").glob("*.gguf"))
    result = verify_gguf(checkpoint, path)
    assert (result.defects, result.tensors) == ((), len(checkpoint.tensors))
    (ours,) = logits(Configured(opened.model.source.config, checkpoint), TOKENS[None])
    # llama.cpp rounds the inputs of each product to 8 bits, which sends a token to another expert now and then: hence the median.
    apart = divergences(ours, llama_logits(path, TOKENS))
    assert np.median(apart) < 0.02
    assert np.median(apart) < np.median(divergences(ours, ours[:, ::-1])) / 100


def test_grids_by_rule(model: Model) -> None:
    source = ModelSource.open(model("r1"))
    grids = {t.spec.kind: t.scheme.grid for t in make_plan(source, Recipe.named("experts_q4_k"), ("gguf",)).tensors}
    assert {kind for kind, grid in grids.items() if grid == "q4_k"} == {"ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"}
    floats = {"attn_norm", "ffn_norm", "output_norm", "attn_q_a_norm", "attn_kv_a_norm", "ffn_gate_inp", "exp_probs_b"}
    assert {kind for kind, grid in grids.items() if grid == "f32"} == floats
    assert {grid for grid in grids.values()} == {"q4_k", "q8_0", "f32"}


def test_one_expert_cannot_have_a_grid_of_its_own_in_a_gguf(model: Model, tmp_path: Path) -> None:
    source = ModelSource.open(model("qwen3"))
    rule = Rule(tensors="model.layers.0.mlp.experts.3.up_proj.weight", scheme=Scheme(grid="q8_0"))
    recipe = Recipe(name="one", base="q4_0", rules=(rule,))
    with pytest.raises(UsageError, match=r"one grid for all experts of a block, not q4_0 and q8_0"):
        make_plan(source, recipe, ("gguf",))


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "groups by their best": (
        "deepseek_v2",
        {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
        "scores groups of experts by their two best",
    ),
    "weights as they are": ("qwen3_moe", {"norm_topk_prob": False}, "always divides the weights"),
    "a dense block": ("qwen3_moe", {"mlp_only_layers": [1]}, "has experts in every block"),
    "two scales": ("deepseek_v3", {"mscale": 0.5}, "mscale equal to mscale_all_dim alone"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    case: str, moe_models: SimpleNamespace, checkpoint_of: Callable[..., QuantizedCheckpoint], tmp_path: Path
) -> None:
    family, settings, message = REFUSED[case]
    if "mscale" in settings:
        settings = {"rope_parameters": moe_models.YARN | settings}
    folder = moe_models.write_moe_model(tmp_path / "m", family, num_hidden_layers=2, **settings)
    checkpoint = checkpoint_of(folder, "f32")
    with pytest.raises(UsageError, match=message):
        plan_gguf(checkpoint)


def test_keys_are_those_of_llama_cpps_converter(
    model: Model, checkpoint_of: Callable[..., QuantizedCheckpoint]
) -> None:
    keys = {entry.key: entry.value for entry in plan_gguf(checkpoint_of(model("r1"), "f32")).entries}
    told = {key.removeprefix("deepseek2."): value for key, value in keys.items() if key.startswith("deepseek2.")}
    yarn = {
        "type": "yarn",
        "factor": 8.0,
        "original_context_length": 32,
        "yarn_beta_fast": 32.0,
        "yarn_beta_slow": 1.0,
        "yarn_log_multiplier": 0.1,
    }
    assert told == {
        **{"block_count": 2, "context_length": 256, "embedding_length": 256, "feed_forward_length": 512},
        **{"attention.head_count": 4, "attention.head_count_kv": 1, "attention.layer_norm_rms_epsilon": 1e-6},
        **{"expert_count": 16, "expert_used_count": 4, "expert_feed_forward_length": 256, "expert_shared_count": 1},
        **{"expert_group_count": 4, "expert_group_used_count": 2, "expert_weights_scale": 2.5},
        **{"expert_weights_norm": True, "expert_gating_func": 2, "leading_dense_block_count": 1, "vocab_size": 320},
        **{"attention.q_lora_rank": 256, "attention.kv_lora_rank": 256, "attention.key_length": 288},
        **{"attention.value_length": 256, "attention.key_length_mla": 96, "attention.value_length_mla": 64},
        **{"rope.dimension_count": 32, "rope.freq_base": 10000.0},
        **{f"rope.scaling.{key}": value for key, value in yarn.items()},
    }
    assert ModelConfig.read(model("r1")).architecture == "deepseek2"
