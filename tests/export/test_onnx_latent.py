"""ONNX folders with latent attention and DeepSeek's routers: logits against our forward pass of the same codes, and verify's formulas.

Tolerance: 1e-4, as in tests/models/test_moe_forward.py, for logits that reach 24 and other orders of the same sums; experts in 4 bits,
which ONNX Runtime computes in float32.
"""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from r1q.core.artifact import OutputFolder
from r1q.core.checkpoint import QuantizedCheckpoint
from r1q.core.errors import UsageError
from r1q.export.onnx import write_onnx
from r1q.export.verify import verify_path
from r1q.models.config import ModelConfig
from r1q.models.embedded import OpenedModel
from r1q.models.forward import Configured, logits
from r1q.models.source import ModelSource
from r1q.plan.choose import Wish, choose_recipe
from r1q.plan.job import Job, open_job, plan_job
from r1q.plan.plan import make_plan
from r1q.plan.walk import quantize_model
from r1q.runtimes.base import Options
from r1q.runtimes.table import load_runtime

pytest.importorskip("onnxruntime")

Edit = Callable[[Any], None]
Made = Callable[..., OutputFolder]
TOLERANCE = 1e-4
SIZES = {"moe_intermediate_size": 64, "q_lora_rank": 64, "qk_rope_head_dim": 16, "v_head_dim": 16}
GROUPS = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
harm = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("onnx_damage.py"))))
BLOCK, TENSOR = "/model/layers.2/", "model.layers.2."


@pytest.fixture
def make(moe_models: SimpleNamespace, tmp_path: Path) -> Made:
    """Return `make(family, settings of the model, **wish) -> OutputFolder` with a checkpoint and an ONNX folder."""

    def run(family: str = "deepseek_v3", settings: dict[str, Any] | None = None, **wish: Any) -> OutputFolder:
        source = ModelSource.open(moe_models.write_moe_model(tmp_path / "m", family, **SIZES | (settings or {})))
        recipe = choose_recipe(Wish(**{"formats": ("onnx",), "bits": 4, **wish}), source.tensors).recipe
        list(quantize_model(OpenedModel(source), make_plan(source, recipe, ("onnx",)), OutputFolder(tmp_path / "out")))
        return OutputFolder(tmp_path / "out")

    return run


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "v3": ("deepseek_v3", {}, {}),
    "v3, one group, plain queries, no yarn, each product alone": (
        "deepseek_v3",
        {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "rope_parameters": {"rope_type": "default"}},
        {"group_size": 32, "symmetric": False},
    ),
    "v3, weights as they are, two dense blocks, scale 1": (
        "deepseek_v3",
        {"norm_topk_prob": False, "first_k_dense_replace": 2, "routed_scaling_factor": 1.0},
        {},
    ),
    "v2, groups by their best, plain queries": ("deepseek_v2", {**GROUPS, "q_lora_rank": None}, {}),
    "v2": ("deepseek_v2", {}, {"group_size": 16}),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_and_weights_are_those_of_the_checkpoint(make: Made, tmp_path: Path, case: str) -> None:
    family, settings, wish = CASES[case]
    output = make(family, settings, **wish)
    results = {result.format: result for result in verify_path(output.path)}
    assert not results["onnx"].defects
    checkpoint = QuantizedCheckpoint.open(output.path / "checkpoint")
    exact = write_onnx(checkpoint, tmp_path / "exact", accuracy_level=1)
    tokens = [int(token) for token in np.random.default_rng(7).integers(0, 320, 48)]
    wanted = next(logits(Configured(ModelConfig.read(checkpoint.sidecar), checkpoint), np.array([tokens])))
    assert np.abs(wanted).max() > 10
    for runtime in ("onnxruntime", "onnxruntime-genai"):
        with load_runtime(runtime).open(exact, Options(threads=2)) as session:
            whole = session.logits(tokens)
            rows = [session.prefill(0, tokens[:32]), *(session.step([(0, token)])[0] for token in tokens[32:])]
        np.testing.assert_allclose(whole, wanted, atol=TOLERANCE)
        np.testing.assert_allclose(np.stack(rows), wanted[31:], atol=TOLERANCE)


def test_latents_are_all_that_the_cache_holds(make: Made) -> None:
    """32 numbers and 16 that turn, as one head of keys and of values."""
    graph = onnx.load(make().path / "onnx" / "model.onnx", load_external_data=False).graph
    shapes = {tuple(side.dim_value for side in value.type.tensor_type.shape.dim) for value in graph.input[2:]}
    assert shapes == {(0, 1, 0, 48)}


def defects(output: OutputFolder) -> list[str]:
    return [str(defect) for result in verify_path(output.path) if result.format == "onnx" for defect in result.defects]


@pytest.mark.parametrize(
    ("name", "place", "where"),
    [
        ("attn.k_b.heads", (3, 31, 15), "self_attn.k_b_proj.weight"),
        ("attn.v_b.heads", (0, 0, 0), "self_attn.v_b_proj.weight"),
        ("attn.q_a_proj_kv_a.weight", (0, 0, 0), "self_attn.q_a_proj.weight"),
        ("attn.q_a_proj_kv_a.weight", (-1, 0, 0), "self_attn.kv_a_proj_with_mqa.weight"),
        ("attn.q_b_proj.weight", (5, 0, 0), "self_attn.q_b_proj.weight"),
        ("self_attn.q_a_layernorm.weight", (1,), "self_attn.q_a_layernorm.weight"),
        ("self_attn.kv_a_layernorm.weight", (1,), "self_attn.kv_a_layernorm.weight"),
        ("mlp.router.correction", (4,), "mlp.gate.e_score_correction_bias"),
        ("mlp.router.weight", (4, 2), "mlp.gate.weight"),
        ("mlp.shared_experts.gate_up_proj.weight", (0, 0, 0), "mlp.shared_experts.gate_proj.weight"),
        ("mlp.shared_experts.down_proj.weight", (0, 0, 0), "mlp.shared_experts.down_proj.weight"),
    ],
)
def test_one_flipped_bit_is_found(make: Made, name: str, place: tuple[int, ...], where: str) -> None:
    output = make()
    harm.change_bytes(output, TENSOR + name, harm.flip(place))
    (defect,) = defects(output)
    assert f"{TENSOR}{where}" in defect


def test_heads_that_changed_places_are_found(make: Made) -> None:
    def swap(values: Any) -> None:
        values[[0, 2]] = values[[2, 0]]

    output = make()
    harm.change_bytes(output, f"{TENSOR}attn.k_b.heads", swap)
    (defect,) = defects(output)
    assert f"{TENSOR}self_attn.k_b_proj.weight" in defect


def _set(name: str, key: str, value: Any) -> Edit:
    edit: Edit = harm.set_attribute(BLOCK + name, key, value)
    return edit


def _input(name: str, at: int, of: str) -> Edit:
    """Let a node take what another one of its block makes, or a tensor of the model."""

    def edit(graph: Any) -> None:
        outputs = {output for one in graph.node for output in one.output}
        harm.node(graph, BLOCK + name).input[at] = BLOCK + of if BLOCK + of in outputs else of

    return edit


def _swap(name: str) -> Edit:
    def edit(graph: Any) -> None:
        outputs = harm.node(graph, BLOCK + name).output
        outputs[0], outputs[1] = outputs[1], outputs[0]

    return edit


ATTENTION = "attn/GroupQueryAttention"
LIES: dict[str, tuple[Edit, str]] = {
    "scale": (_set(ATTENTION, "scale", 0.5), "scale is 0.5, the model needs"),
    "halves": (_set(ATTENTION, "rotary_interleaved", 0), "rotary_interleaved is 0, the model needs 1"),
    "heads": (_set(ATTENTION, "num_heads", 2), "num_heads is 2, the model needs 4"),
    "values": (_input(ATTENTION, 2, "attn/q/Reshape_2/output_0"), "mixes other values than its keys"),
    "latent before what turns": (
        _input("attn/kv/Concat", 0, "attn/kv_a_norm/LayerNorm/output_0"),
        "has keys that are not",
    ),
    "which part of queries turns": (_swap("attn/q/Split"), "has queries of another formula"),
    "order of axes": (_set("attn/k_b/Transpose_2", "perm", [0, 2, 3, 1]), "has queries of another formula"),
    "matrices not transposed": (_set("attn/k_b/MatMul", "transB", 0), "transB is 0, the model needs 1"),
    "what is left out": (_swap("attn/mixed/Split"), "Gather of [-1] from"),
    "another head's matrices": (_input("attn/v_b/MatMul", 1, "model.layers.1.attn.v_b.heads"), "v_b_proj.weight"),
    "choice without correction": (_input("mlp/router/groups/Reshape", 0, "mlp/router/Sigmoid/output_0"), "correction"),
    "weights with correction": (_input("mlp/QMoE", 14, "mlp/router/Add/output_0"), "which is not what belongs there"),
    "all groups": (_input("mlp/QMoE", 1, "mlp/router/Add/output_0"), "does not close experts of other groups"),
    "best of a group": (
        _input("mlp/router/experts/TopK", 1, "/model/constants/vector/-1"),
        "does not choose by the model's",
    ),
    "groups by one": (
        _input("mlp/router/groups/Less", 0, "mlp/router/groups/ReduceMin/output_0"),
        "does not choose by",
    ),
    "no shared expert": (_input("post", 0, "mlp/scale/Mul/output_0"), "does not add a block's branch"),
    "not scaled": (_input("mlp/Add", 0, "mlp/QMoE/output_0"), "does not add the shared expert to"),
    "scaled twice": (_input("mlp/scale/Mul", 1, "two"), "multiplies experts by 2, the model needs 2.5"),
}


def _edit(lie: str) -> Edit:
    if lie == "no shared expert":

        def past(graph: Any) -> None:
            last = next(one for one in graph.node if one.name == "/model/norm/SkipLayerNorm")
            last.input[1] = f"{BLOCK}mlp/scale/Mul/output_0"

        return past
    edit, _ = LIES[lie]

    def with_two(graph: Any) -> None:
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(2.0, np.float32), "two"))
        edit(graph)

    return with_two if lie == "scaled twice" else edit


@pytest.mark.parametrize("lie", LIES)
def test_a_graph_that_computes_something_else_is_found(make: Made, lie: str) -> None:
    output = make()
    harm.damage(output, _edit(lie))
    found = defects(output)
    assert any(LIES[lie][1] in defect for defect in found), found


def test_sizes_that_the_attention_does_not_take_are_refused(moe_models: SimpleNamespace, tmp_path: Path) -> None:
    source = ModelSource.open(
        moe_models.write_moe_model(tmp_path / "m", "deepseek_v3", **SIZES | {"qk_rope_head_dim": 8})
    )
    recipe = choose_recipe(Wish(formats=("onnx",), bits=4), source.tensors).recipe
    with pytest.raises(UsageError, match=r"keys have 40 numbers, of which 8 turn; .* multiples of 16; --to gguf"):
        make_plan(source, recipe, ("onnx",))


def test_8_bits_of_latents_or_of_inputs_are_refused_before_anything_is_read(
    moe_models: SimpleNamespace, tmp_path: Path
) -> None:
    folder = moe_models.write_moe_model(tmp_path / "m", "deepseek_v3", **SIZES)
    with pytest.raises(UsageError, match="the cache holds latents, which stay float"):
        plan_job(open_job(Job(model=str(folder), bits=4, formats=("onnx",), kv="int8")))
    with pytest.raises(UsageError, match="w8a8 is for dense models"):
        plan_job(open_job(Job(model=str(folder), scheme="w8a8", formats=("onnx",))))
