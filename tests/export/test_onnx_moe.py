"""ONNX folders of models with experts: QMoE's logits against our forward pass of the same codes, and verify on its rows in turn.

QMoE computes 4 bits, and 2 in blocks of 16, in float32: there logits, which reach 28, differ by other orders of the same sums, as in
tests/models/test_moe_forward.py. 8 bits it multiplies with inputs rounded to int8, which now and then sends a token to another expert.
"""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from r1q.benchmarks.subject_folders import folder_subject
from r1q.cli import main as cli
from r1q.core.artifact import OutputFolder
from r1q.core.checkpoint import QuantizedCheckpoint
from r1q.core.errors import InputError, UsageError
from r1q.core.recipe import Recipe, Rule
from r1q.core.scheme import Scheme
from r1q.export.lint import lint_path
from r1q.export.onnx import write_onnx
from r1q.export.verified import Verified
from r1q.export.verify import verify_path
from r1q.models.config import ModelConfig
from r1q.models.embedded import OpenedModel
from r1q.models.forward import Configured, logits
from r1q.models.source import ModelSource
from r1q.plan.choose import Wish, choose_recipe
from r1q.plan.plan import make_plan
from r1q.plan.walk import quantize_model
from r1q.runtimes.base import Options
from r1q.runtimes.table import load_runtime

pytest.importorskip("onnxruntime")

Make = Callable[..., OutputFolder]
Edit = Callable[[Any], None]
TOLERANCE = 1e-4
SIZES = {"hidden_size": 128, "intermediate_size": 96, "moe_intermediate_size": 64}
harm = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("onnx_damage.py"))))
BLOCK = "/model/layers.2/mlp/"
EXPERT = "model.layers.2.mlp.experts."


@pytest.fixture
def make(moe_models: SimpleNamespace, tmp_path: Path) -> Make:
    """Return `make(settings of the model, **wish) -> OutputFolder` with a checkpoint and an ONNX folder."""

    def run(settings: dict[str, Any] | None = None, **wish: Any) -> OutputFolder:
        folder = moe_models.write_moe_model(tmp_path / "m", "qwen3_moe", **SIZES | (settings or {}))
        source = ModelSource.open(folder)
        recipe = choose_recipe(Wish(formats=("onnx",), **wish), source.tensors).recipe
        list(quantize_model(OpenedModel(source), make_plan(source, recipe, ("onnx",)), OutputFolder(tmp_path / "out")))
        return OutputFolder(tmp_path / "out")

    return run


def some_tokens(length: int = 48) -> list[int]:
    return [int(token) for token in np.random.default_rng(7).integers(0, 320, length)]


def expected(checkpoint: QuantizedCheckpoint) -> Any:
    source = Configured(ModelConfig.read(checkpoint.sidecar), checkpoint)
    return next(logits(source, np.array([some_tokens()])))


def by_every_route(folder: Path, runtime: str) -> tuple[Any, Any]:
    """Return logits of all positions at once, and from position 31 on by one prefill and single steps."""
    tokens = some_tokens()
    with load_runtime(runtime).open(folder, Options(threads=2)) as session:
        whole = session.logits(tokens)
        rows = [session.prefill(0, tokens[:32]), *(session.step([(0, token)])[0] for token in tokens[32:])]
    return whole, np.stack(rows)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "4 bits": ({}, {"bits": 4}),
    "4 bits, zero points, weights as they are, a dense block": (
        {"norm_topk_prob": False, "mlp_only_layers": [1]},
        {"bits": 4, "group_size": 32, "symmetric": False},
    ),
    "4 bits, a scale a row, every second block, tied": (
        {"decoder_sparse_step": 2, "tie_word_embeddings": True},
        {"bits": 4, "group_size": -1},
    ),
    "2 bits": ({}, {"bits": 2, "group_size": 16}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_logits_are_those_of_the_same_codes(make: Make, tmp_path: Path, case: str) -> None:
    settings, wish = CASES[case]
    checkpoint = QuantizedCheckpoint.open(make(settings, **wish).path / "checkpoint")
    exact = write_onnx(checkpoint, tmp_path / "exact", accuracy_level=1)
    wanted = expected(checkpoint)
    assert np.abs(wanted).max() > 10
    for runtime in ("onnxruntime", "onnxruntime-genai"):
        whole, rows = by_every_route(exact, runtime)
        np.testing.assert_allclose(whole, wanted, atol=TOLERANCE)
        np.testing.assert_allclose(rows, wanted[31:], atol=TOLERANCE)


def test_8_bits_are_as_near_as_rounded_inputs_allow(make: Make) -> None:
    checkpoint = QuantizedCheckpoint.open((output := make(bits=8)).path / "checkpoint")
    wanted = expected(checkpoint)
    whole, _ = by_every_route(output.path / "onnx", "onnxruntime")
    assert 0 < np.median(np.abs(whole - wanted)) < 0.1 * wanted.std()


@pytest.mark.parametrize("case", CASES)
def test_a_folder_as_written_has_the_same_weights_and_nothing_slow(make: Make, case: str) -> None:
    settings, wish = CASES[case]
    output = make(settings, **wish)
    checkpoint, result = verify_path(output.path)
    assert result.defects == ()
    assert result.tensors == checkpoint.tensors + 2  # and two rotary tables
    (linted,) = lint_path(output.path / "onnx", frozenset())
    assert not linted.findings


def test_three_formats_of_one_calibrated_run_hold_the_same_integers(
    moe_models: SimpleNamespace, tmp_path: Path
) -> None:
    sizes = SIZES | {"intermediate_size": 128}
    folder, out = moe_models.write_moe_model(tmp_path / "m", "qwen3_moe", **sizes), tmp_path / "out"
    asked = ["--bits", "4", "--to", "gguf,gptq,onnx", "--effort", "fast", "--samples", "2", "--seq-len", "64"]
    result = CliRunner().invoke(cli, ["quantize", str(folder), *asked, "-o", str(out), "-q"])
    assert result.exit_code == 0, result.output
    results = {result.format: result for result in verify_path(out)}
    assert list(results) == ["checkpoint", "gguf", "gptq", "onnx"]
    assert all(not result.defects for result in results.values())
    assert all("same weights" in results[name].text() for name in ("gguf", "gptq", "onnx"))


def test_experts_alone_have_few_bits_where_onnx_is_all_that_is_asked_for(make: Make) -> None:
    checkpoint = QuantizedCheckpoint.open(make(bits=4).path / "checkpoint")
    grids = {s.kind: str(checkpoint.scheme(s.name)) for s in checkpoint.tensors if s.layer == 0 and s.is_matrix}
    assert {grids[f"ffn_{part}_exps"] for part in ("gate", "up", "down")} == {"int4 g64"}
    assert {grids[f"attn_{part}"] for part in ("q", "k", "v", "output")} == {"int8 g64"}
    assert grids["ffn_gate_inp"] == "f32"


def result_of(output: OutputFolder) -> Verified:
    return next(result for result in verify_path(output.path) if result.format == "onnx")


@pytest.mark.parametrize(
    ("name", "place", "where", "said"),
    [
        ("gate_up_proj.weight", (0, 0, 0), "0.gate_proj", "1 code differs"),
        ("gate_up_proj.weight", (7, 127, 63), "7.up_proj", "1 code differs"),
        ("gate_up_proj.scales", (3, 2, 1), "3.gate_proj", "1 scale differs"),
        ("down_proj.weight", (5, 9, 0), "5.down_proj", "1 code differs"),
        ("down_proj.scales", (6, 127, 0), "6.down_proj", "1 scale differs"),
    ],
)
def test_one_flipped_bit_is_found(make: Make, name: str, place: tuple[int, ...], where: str, said: str) -> None:
    output = make(bits=4)
    harm.change_bytes(output, EXPERT + name, harm.flip(place))
    (defect,) = result_of(output).defects
    assert (defect.where, said in defect.what) == (f"{EXPERT}{where}.weight", True)


def test_what_changed_places_is_found(make: Make) -> None:
    def two_experts(values: Any) -> None:
        values[[1, 4]] = values[[4, 1]]

    def gate_and_up(values: Any) -> None:
        values[2, [6, 7]] = values[2, [7, 6]]

    output = make(bits=4)
    harm.change_bytes(output, f"{EXPERT}down_proj.weight", two_experts)
    harm.change_bytes(output, f"{EXPERT}gate_up_proj.weight", gate_and_up)
    wrong = {f"{EXPERT}{name}.weight" for name in ("1.down_proj", "4.down_proj", "2.gate_proj", "2.up_proj")}
    assert {defect.where for defect in result_of(output).defects} == wrong


def test_a_router_of_another_block_is_found(make: Make) -> None:
    def edit(graph: Any) -> None:
        other = harm.node(graph, "/model/layers.1/mlp/router/MatMul")
        harm.node(graph, f"{BLOCK}router/MatMul").input[1] = other.input[1]

    output = make(bits=4)
    harm.damage(output, edit)
    assert "model.layers.2.mlp.gate.weight" in {defect.where for defect in result_of(output).defects}


def _set(key: str, value: Any) -> Edit:
    edit: Edit = harm.set_attribute(f"{BLOCK}QMoE", key, value)
    return edit


def _input(at: int, of: Callable[[Any], str]) -> Edit:
    def edit(graph: Any) -> None:
        harm.node(graph, f"{BLOCK}QMoE").input[at] = of(graph)

    return edit


LIES: dict[str, tuple[Edit, str]] = {
    "fewer experts": (_set("k", 2), "k is 2, the model needs 3"),
    "weights": (_set("normalize_routing_weights", 0), "normalize_routing_weights is 0, the model needs 1"),
    "one beside up": (_set("activation_beta", 1.0), "activation_beta is 1, the model needs 0"),
    "clamped": (_set("swiglu_limit", 7.0), "has the attribute swiglu_limit 7"),
    "halves": (_set("swiglu_fusion", 2), "swiglu_fusion is 2, the model needs 1"),
    "another activation": (_set("activation_type", "silu"), "activation_type is"),
    "scores as shares": (
        _input(14, lambda graph: harm.node(graph, f"{BLOCK}router/MatMul").output[0]),
        "does not weigh by the softmax of 8 scores of what it mixes",
    ),
    "shares of another block": (
        _input(14, lambda _: "/model/layers.1/mlp/router/Softmax/output_0"),
        "does not weigh by",
    ),
    "blocks": (_set("block_size", 32), "takes 'model.layers.2.mlp.experts.gate_up_proj.scales'"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_graph_that_mixes_otherwise_is_found(make: Make, lie: str) -> None:
    edit, said = LIES[lie]
    output = make(bits=4)
    harm.damage(output, edit)
    defects = [str(defect) for defect in result_of(output).defects]
    assert any(said in defect for defect in defects), defects
    assert len(defects) <= 2  # and not a line for everything that follows from it


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        (
            (Rule(tensors="blk.*.ffn_down_exps.weight", scheme=Scheme(grid="q8_0")),),
            "one grid for all experts of a block",
        ),
        ((Rule(tensors="blk.*.ffn_*_exps.weight", scheme=Scheme(grid="bf16")),), "computes experts in integers"),
    ],
)
def test_what_qmoe_cannot_hold_is_refused(
    moe_models: SimpleNamespace, tmp_path: Path, rules: tuple[Rule, ...], says: str
) -> None:
    source = ModelSource.open(moe_models.write_moe_model(tmp_path / "m", "qwen3_moe", **SIZES))
    with pytest.raises(UsageError, match=says):
        make_plan(source, Recipe(name="r", base=Scheme(grid="q4_0"), rules=rules), ("onnx",))


@pytest.mark.parametrize("key", ["k", "expert_weight_bits", "block_size"])
def test_sizes_that_are_none_are_refused(make: Make, key: str) -> None:
    output = make(bits=4)
    harm.damage(output, harm.set_attribute(f"{BLOCK}QMoE", key, 0))
    with pytest.raises(InputError, match=f"QMoE: {key} is 0"):
        folder_subject(output.path / "onnx", "onnx")
    assert result_of(output).defects


def test_a_token_touches_the_experts_it_is_sent_to(make: Make) -> None:
    subject = folder_subject(make(bits=4).path / "onnx", "onnx")
    expert = 3 * SIZES["hidden_size"] * SIZES["moe_intermediate_size"]
    assert subject.traffic is not None
    assert subject.grid == "onnx int4 g64"
    # 8 experts in 3 blocks, of which a token is sent to 3; the embedding is looked up.
    looked_up = 320 * SIZES["hidden_size"]
    assert subject.weights - subject.traffic.touched_weights == 3 * 5 * expert + looked_up
