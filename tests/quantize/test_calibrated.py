"""Calibrated runs end to end: formats and verify, what calibration is worth, refusals by name, events in the manifest."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from r1q.core.artifact import OutputFolder
from r1q.core.checkpoint import QuantizedCheckpoint
from r1q.core.errors import InputError, MissingError
from r1q.core.metrics import merge, score
from r1q.core.recipe import Recipe
from r1q.export.verify import verify_path
from r1q.models.block import rms_norm, run_block
from r1q.models.embedded import EMBEDDED, OpenedModel
from r1q.models.forward import Configured, RowReader, embed, load_block, logits
from r1q.models.rope import rotation
from r1q.models.source import ModelSource
from r1q.models.tokenizer import Tokenizer
from r1q.plan.choose import Wish, choose_recipe
from r1q.plan.plan import make_plan
from r1q.plan.walk import Exported, quantize_model
from r1q.quantize import matrix
from r1q.quantize.computing import computing
from r1q.quantize.engine import Engine
from r1q.quantize.rtn import rtn
from r1q.quantize.run import Calibration, Event, Request, quantize_checkpoint

MakeModel = Callable[..., Path]
FAST = Engine(effort="fast", threads=1, isa="here", compute="float32")
DEFAULT = dataclasses.replace(FAST, effort="default")
HIGH = dataclasses.replace(DEFAULT, effort="high", passes=1)
WIDE: Mapping[str, int] = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 320}


def calibration(engine: Engine, tokens: NDArray[np.int64] | None = None) -> Calibration:
    if tokens is None:
        tokens = np.random.default_rng(0).integers(0, 320, (6, 32))
    return Calibration(tokens=tokens, record={"name": "test"}, engine=engine)


def request(source: ModelSource, recipe: Recipe, text: Calibration | None) -> Request:
    plan = make_plan(source, recipe, (), calibrated=text is not None)
    method = "rtn" if text is None else "gptq"
    return Request(
        model=plan.model, recipe=plan.recipe, planned=plan.tensors, method=method, versions={}, calibrated=text
    )


def run(model: Path, folder: Path, *, scheme: str = "q4_0", engine: Engine = DEFAULT) -> list[Event]:
    source = ModelSource.open(model)
    return list(quantize_checkpoint(source, request(source, Recipe.named(scheme), calibration(engine)), folder))


@pytest.mark.parametrize(
    ("family", "wish", "engine"),
    [
        ("llama", Wish(scheme="q4_0"), DEFAULT),
        ("qwen2", Wish(scheme="q4_k_m"), FAST),
        ("qwen3", Wish(scheme="q3_k_m"), DEFAULT),
        ("llama", Wish(scheme="iq4_xs"), FAST),
        ("qwen2", Wish(bits=4, group_size=64, symmetric=False, formats=()), HIGH),
        ("llama", Wish(bits=8, group_size=-1, formats=("gptq",)), FAST),
        ("qwen3", Wish(bits=4, formats=("gguf", "gptq")), dataclasses.replace(FAST, compute="bfloat16")),
    ],
    ids=lambda value: str(getattr(value, "scheme", None) or getattr(value, "bits", None) or value)[:12],
)
def test_a_calibrated_checkpoint_is_exported_and_verified(
    make_model: MakeModel, tmp_path: Path, family: str, wish: Wish, engine: Engine
) -> None:
    source = ModelSource.open(make_model(family, **WIDE))
    plan = make_plan(source, choose_recipe(wish, source.tensors).recipe, wish.formats, calibrated=True)
    events = list(quantize_model(OpenedModel(source), plan, OutputFolder(tmp_path / "out"), calibration(engine)))
    assert [event.artifact.format for event in events if isinstance(event, Exported)] == list(wish.formats)
    results = list(verify_path(tmp_path / "out"))
    assert [result.format for result in results] == ["checkpoint", *wish.formats]
    assert all(result.defects == () for result in results)
    checkpoint = QuantizedCheckpoint.open(tmp_path / "out" / "checkpoint")
    assert checkpoint.damaged_files() == []
    for spec in source.tensors:
        want, have = source.read_rows(spec.name, 0, spec.rows), checkpoint.read_rows(spec.name, 0, spec.rows)
        error = float(np.linalg.norm(have.astype(np.float64) - want) / np.linalg.norm(want))
        assert checkpoint.records[spec.name].error == pytest.approx(error, rel=1e-4, abs=1e-12)
        assert error < 0.3


def held_out(checkpoint: QuantizedCheckpoint, source: ModelSource, tokens: NDArray[np.int64]) -> float:
    """Return the mean KL divergence from the float model."""
    pairs = zip(logits(Configured(source.config, checkpoint), tokens), logits(source, tokens), strict=True)
    scores = merge([score(own[:-1], ids[1:], truth[:-1]) for (own, truth), ids in zip(pairs, tokens, strict=True)])
    assert scores.kld is not None
    return float(scores.kld.mean())


def test_more_effort_is_nearer_to_the_embedded_model_on_text_it_has_not_seen(tmp_path: Path) -> None:
    """At 3 bits; calibration and evaluation share no text. Both steps are far above what other windows would change."""
    source = ModelSource.open(EMBEDDED, "tiny-r1")
    text = (EMBEDDED / "evaluation.txt").read_text()
    ids = np.array(Tokenizer.open(EMBEDDED).encode(text, add_special=False), dtype=np.int64)
    seen, unseen = ids[: 10 * 96].reshape(10, 96), ids[-3 * 96 :].reshape(3, 96)
    assert len(ids) > 2 * (seen.size + unseen.size)
    found = {}
    for name, engine in (("rtn", None), ("fast", FAST), ("default", DEFAULT)):
        asked = request(source, Recipe.named("q3_k"), None if engine is None else calibration(engine, seen))
        list(quantize_checkpoint(source, asked, tmp_path / name))
        found[name] = held_out(QuantizedCheckpoint.open(tmp_path / name), source, unseen)
    assert found["fast"] < 0.6 * found["rtn"], found
    assert found["default"] < 0.9 * found["fast"], found


def streams_behind(source: ModelSource, weights: RowReader, tokens: NDArray[np.int64]) -> torch.Tensor:
    """Return the hidden states behind the last block, by the forward pass that `models.forward` runs."""
    hidden, turn = embed(weights, tokens).clone(), rotation(source.config, tokens.shape[1])
    for layer in range(source.config.num_layers):
        block = load_block(weights, layer)
        hidden = torch.stack([run_block(block, source.config, window, turn) for window in hidden])
    return hidden


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_hidden_states_are_those_of_the_model_as_stored_and_of_the_float_model(
    make_model: MakeModel, tmp_path: Path, family: str
) -> None:
    """Embedding and blocks, all coded: what a killed run finds on disk, and what the head is weighed by."""
    source = ModelSource.open(make_model(family, **WIDE))
    asked = calibration(DEFAULT)
    running = quantize_checkpoint(source, request(source, Recipe.named("q4_0"), asked), tmp_path / "out")
    next(event for event in running if event.what == "file" and event.name == "block-00001.safetensors")
    running.close()  # type: ignore[attr-defined]
    (path,) = (tmp_path / "out").glob("hidden-*.safetensors")
    stored = load_file(path)
    list(quantize_checkpoint(source, request(source, Recipe.named("q4_0"), asked), tmp_path / "out"))
    checkpoint = QuantizedCheckpoint.open(tmp_path / "out")
    coded = streams_behind(source, checkpoint, asked.tokens)
    np.testing.assert_allclose(stored["coded"], coded.numpy(), atol=1e-4)
    np.testing.assert_allclose(stored["exact"], streams_behind(source, source, asked.tokens).numpy(), atol=1e-4)
    assert np.abs(stored["coded"] - stored["exact"]).max() > 0.01
    norm = torch.from_numpy(source.read_rows("model.norm.weight", 0, 1).reshape(-1))
    importance = rms_norm(coded, norm, source.config.rms_norm_eps).square().mean((0, 1)).numpy()
    weights, head = source.read_rows("lm_head.weight", 0, 320), checkpoint.read("lm_head.weight", 0, 320)
    assert (rtn(weights, head.scheme, importance).codes == head.codes).mean() > 0.999
    assert (rtn(weights, head.scheme).codes == head.codes).mean() < 0.99


def set_weight(model: Path, name: str, value: float) -> None:
    """Change the first number of a tensor of an F32 checkpoint, with safetensors' own library."""
    path = model / "model.safetensors"
    tensors = {key: np.array(array) for key, array in load_file(path).items()}
    tensors[name].reshape(-1)[0] = value
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("engine", [FAST, DEFAULT, HIGH], ids=lambda engine: engine.effort)
@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("model.embed_tokens.weight", 1e9, "model.embed_tokens.weight: a value does not fit q4_0"),
        ("model.layers.1.self_attn.q_proj.weight", np.nan, "model.layers.1.self_attn.q_proj.weight.*NaN or infinite"),
        ("model.layers.1.self_attn.q_proj.weight", 1e9, "model.layers.1.self_attn.q_proj.weight: a value does not fit"),
        (
            "model.layers.1.mlp.down_proj.weight",
            -1e30,
            "model.layers.1.mlp.down_proj.weight: a value does not fit q4_0",
        ),
        ("model.layers.1.input_layernorm.weight", 1e30, "blk.1.attn_q/attn_k/attn_v: its inputs are not finite"),
        ("model.layers.0.post_attention_layernorm.weight", 1e30, "blk.0.ffn_gate/ffn_up: its inputs are not finite"),
        ("model.norm.weight", 1e30, "model.norm.weight: what it makes of the calibration text is not finite"),
    ],
)
def test_numbers_that_are_not_finite_stop_the_run_with_the_name_of_the_place(
    make_model: MakeModel, tmp_path: Path, engine: Engine, name: str, value: float, says: str
) -> None:
    model = make_model("llama", dtype="F32")
    set_weight(model, name, value)
    with pytest.raises(InputError, match=says):
        run(model, tmp_path / "out", engine=engine)
    assert not (tmp_path / "out" / "manifest.json").exists()


def spoil(factor: float) -> Callable[[torch.Tensor, int], float]:
    """Stand in for `shrink`, and couple two columns of one stage with each other alone, more than any inputs do."""

    def change(moment: torch.Tensor, tokens: int) -> float:
        if len(moment) == 96:  # what ffn_down reads
            moment[2:, :2] = 0
            moment[1, 1] = moment[0, 0]
            moment[1, 0] = factor * (moment[0, 0] + 0.3 * moment.diagonal().mean())
        return 0.0

    return change


@pytest.mark.parametrize(
    ("factor", "line"),
    [
        (1.0, "blk.{}.ffn_down: damping raised from 0.05 to 0.4"),
        (100.0, "blk.{}.ffn_down: second moments are not positive definite, rounded by importance instead"),
    ],
)
def test_what_was_done_otherwise_than_asked_is_said_once_and_kept(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float, line: str
) -> None:
    model, wanted = make_model("llama"), [line.format(layer) for layer in range(2)]
    monkeypatch.setattr(matrix, "shrink", spoil(factor))
    events = run(model, tmp_path / "out")
    assert [event.name for event in events if event.what == "note"] == wanted
    manifest = (tmp_path / "out" / "manifest.json").read_bytes()
    assert [event for event in json.loads(manifest)["events"] if event.startswith("blk.")] == wanted
    # A run that is cut between the blocks says the same, and writes the same.
    source = ModelSource.open(model)
    asked = request(source, Recipe.named("q4_0"), calibration(DEFAULT))
    running = quantize_checkpoint(source, asked, tmp_path / "cut")
    next(event for event in running if event.what == "file" and event.name == "block-00000.safetensors")
    running.close()  # type: ignore[attr-defined]
    again = list(quantize_checkpoint(source, asked, tmp_path / "cut"))
    assert [event.name for event in again if event.what == "note"] == wanted
    assert (tmp_path / "cut" / "manifest.json").read_bytes() == manifest


def test_a_sound_run_has_nothing_to_say(make_model: MakeModel, tmp_path: Path) -> None:
    assert not [event for event in run(make_model("llama", **WIDE), tmp_path / "out") if event.what == "note"]
    assert QuantizedCheckpoint.open(tmp_path / "out").manifest["events"] == []


def test_threads_and_gradients_are_as_before_when_a_run_ends_or_is_dropped(
    make_model: MakeModel, tmp_path: Path
) -> None:
    before = torch.get_num_threads()
    source = ModelSource.open(make_model("llama"))
    engine = dataclasses.replace(FAST, threads=before + 1)
    asked = request(source, Recipe.named("q4_0"), calibration(engine))
    running = quantize_checkpoint(source, asked, tmp_path / "out")
    next(event for event in running if event.what == "stage")
    assert torch.get_num_threads() == before + 1
    running.close()  # type: ignore[attr-defined]
    assert torch.get_num_threads() == before
    assert torch.is_grad_enabled()
    list(quantize_checkpoint(source, asked, tmp_path / "out"))
    assert torch.get_num_threads() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is the device that is to be missing")
def test_a_device_that_is_not_there_is_said_before_anything_is_done() -> None:
    says = r"--device cuda: torch cannot use it here .*; take cpu"
    with pytest.raises(MissingError, match=says), computing(dataclasses.replace(FAST, device="cuda")):
        pass


def test_an_engine_survives_job_json_and_nothing_else_passes_for_one() -> None:
    engine = dataclasses.replace(HIGH, damp=0.01, threads=3, spill=True)
    stored = json.loads(json.dumps(engine.to_dict()))
    assert Engine.from_dict(stored) == dataclasses.replace(
        engine, spill=False
    )  # where hidden states lie decides no byte
    for damage in ({"threads": "3"}, {"damp": None}, {"more": 1}, {"isa": 7}):
        with pytest.raises((TypeError, ValueError)):
            Engine.from_dict({**stored, **damage})
    with pytest.raises((TypeError, ValueError)):
        Engine.from_dict({key: value for key, value in stored.items() if key != "tile"})
