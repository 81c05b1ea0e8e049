"""An 8-bit cache in onnxruntime: the integers themselves, logits against a forward pass that rounds, and exports that repeat."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from r1q.calibration.cache import cache_ranges
from r1q.core.artifact import OutputFolder
from r1q.core.cache_scales import CACHE_SCALES, CacheScales
from r1q.core.checkpoint import QuantizedCheckpoint
from r1q.core.errors import InputError, UsageError
from r1q.export.onnx import EVERY, write_onnx
from r1q.models.block import attention_input, attention_output, linear, mlp_inner, mlp_input, mlp_output
from r1q.models.config import ModelConfig
from r1q.models.embedded import EMBEDDED, NAME
from r1q.models.forward import Configured, _apply_head, embed, load_block
from r1q.models.rope import rotation
from r1q.models.source import ModelSource
from r1q.plan.choose import Wish, choose_recipe
from r1q.plan.job import Job, open_job, plan_job, run_job
from r1q.plan.kv_cache import CacheText
from r1q.plan.plan import make_plan
from r1q.plan.reexport import reexport
from r1q.plan.walk import Exported, versions
from r1q.quantize.run import Request, quantize_checkpoint

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
ort = pytest.importorskip("onnxruntime")

MakeModel = Callable[..., Path]
Floats = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
ROOM = 96  # positions of the shared buffer
TOKENS = np.random.default_rng(2).integers(0, 512, 64)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[QuantizedCheckpoint, CacheScales, Path]:
    """Return the embedded model in int4, its cache's scales on other text, and a folder to write to."""
    folder = tmp_path_factory.mktemp("kv")
    source = ModelSource.open(EMBEDDED, NAME)
    plan = make_plan(source, choose_recipe(Wish(bits=4, formats=("onnx",)), source.tensors).recipe, ())
    request = Request(model=plan.model, recipe=plan.recipe, planned=plan.tensors, method="rtn", versions=versions())
    list(quantize_checkpoint(source, request, folder / "checkpoint"))
    checkpoint = QuantizedCheckpoint.open(folder / "checkpoint")
    config = ModelConfig.read(checkpoint.sidecar)
    text = np.random.default_rng(1).integers(0, config.vocab_size, (8, 64))
    found = list(cache_ranges(Configured(config, checkpoint), text, ROOM))
    keys, values = (np.stack([ranges[part] for ranges in found]) for part in (0, 1))
    return checkpoint, CacheScales.of_ranges(keys, values, {}), folder


def run(graph: Path) -> tuple[Floats, list[np.ndarray]]:
    """Return logits of TOKENS, given in three parts, and the shared buffers, which held 77 everywhere before."""
    session = ort.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    binding, buffers, rows = session.io_binding(), [], []
    for value in session.get_inputs()[2:]:
        kind = np.int8 if value.type == "tensor(int8)" else np.float32
        buffers.append(np.full((1, value.shape[1], ROOM, value.shape[3]), 77, kind))
        held = ort.OrtValue.ortvalue_from_numpy(buffers[-1])
        binding.bind_ortvalue_input(value.name, held)
        binding.bind_ortvalue_output(value.name.replace("past_key_values", "present"), held)
    for start, stop in ((0, 40), (40, 41), (41, 64)):
        binding.bind_cpu_input("input_ids", TOKENS[None, start:stop])
        binding.bind_cpu_input("attention_mask", np.ones((1, stop), np.int64))
        binding.bind_output("logits")
        session.run_with_iobinding(binding)
        rows.append(binding.get_outputs()[-1].numpy()[0].copy())
    return np.concatenate(rows), buffers


def rounded_forward(checkpoint: QuantizedCheckpoint, scales: CacheScales) -> Floats:
    """Return logits of TOKENS by a plain forward pass in which every key and value is rounded to its step."""
    config = ModelConfig.read(checkpoint.sidecar)
    source = Configured(config, checkpoint)
    hidden, turn = embed(source, TOKENS[None])[0], rotation(config, len(TOKENS))
    for layer in range(config.num_layers):
        weights = load_block(source, layer)
        normed = attention_input(weights, config, hidden)
        queries, keys, values = (
            linear(weights, f"attn_{part}", normed).reshape(len(TOKENS), -1, config.head_dim).transpose(0, 1)
            for part in "qkv"
        )
        keys, values = (
            (part / step[:, None]).round().clamp(-128, 127) * step[:, None]
            for part, step in (
                (turn.turn(keys), torch.from_numpy(scales.keys[layer])),
                (values, torch.from_numpy(scales.values[layer])),
            )
        )
        repeats = config.num_heads // config.num_kv_heads
        keys, values = keys.repeat_interleave(repeats, dim=0), values.repeat_interleave(repeats, dim=0)
        mixed = F.scaled_dot_product_attention(turn.turn(queries), keys, values, is_causal=True)
        hidden = hidden + attention_output(weights, mixed.transpose(0, 1).flatten(1))
        hidden = hidden + mlp_output(weights, mlp_inner(weights, mlp_input(weights, config, hidden)))
    return _apply_head(source, hidden[None])[0].numpy()


def test_the_cache_holds_what_rounding_says(tiny: tuple[QuantizedCheckpoint, CacheScales, Path]) -> None:
    checkpoint, scales, folder = tiny
    plain, floats = run(write_onnx(checkpoint, folder / "float", accuracy_level=1) / EVERY)
    found, integers = run(write_onnx(checkpoint, folder / "int8", accuracy_level=1, cache=scales) / EVERY)
    assert {buffer.dtype for buffer in integers} == {np.dtype(np.int8)}
    assert all(
        (buffer[:, :, len(TOKENS) :] == 77).all() for buffer in integers
    )  # written in place, and only where it should be
    for codes, exact, step in zip(integers[:2], floats[:2], (scales.keys[0], scales.values[0]), strict=True):
        # Nothing is rounded before the first block's keys and values: half a step is all that may be lost, plus float32's own noise.
        wanted = exact[0, :, : len(TOKENS)]
        inside = np.abs(wanted) < 127.5 * step[:, None]
        lost = np.abs(codes[0, :, : len(TOKENS)] * step[:, None] - wanted) / step[:, None]
        assert inside.mean() > 0.99
        assert lost[inside].max() < 0.501
        assert np.abs(codes[0, :, : len(TOKENS)]).max() > 100
    # Logits are those of the plain pass with rounded keys and values, but for the odd number between two steps …
    rounding = np.sqrt(np.mean((found - plain) ** 2))
    assert np.sqrt(np.mean((found - rounded_forward(checkpoint, scales)) ** 2)) < 0.1 * rounding
    # … and rounding to 255 steps over a channel's range (rms error range/440, values of rms about range/4) moves them that little.
    assert 1e-5 < rounding / np.sqrt(np.mean(plain**2)) < 0.01


def test_genai_reads_the_same_cache(tiny: tuple[QuantizedCheckpoint, CacheScales, Path]) -> None:
    pytest.importorskip("onnxruntime_genai")
    from r1q.runtimes.base import Options
    from r1q.runtimes.table import load_runtime

    checkpoint, scales, folder = tiny
    path = write_onnx(checkpoint, folder / "int8", accuracy_level=1, cache=scales)
    said: list[Floats] = []
    for name in ("onnxruntime", "onnxruntime-genai"):
        with load_runtime(name).open(path, Options(context=ROOM, threads=1)) as session:
            rows = [session.prefill(0, TOKENS[:40].tolist())]
            rows += [session.step([(0, token)])[0] for token in TOKENS[40:48].tolist()]
            said.append(np.stack(rows))
    np.testing.assert_allclose(said[0], said[1], atol=1e-3)


@pytest.fixture
def output(make_model: MakeModel, tmp_path: Path) -> OutputFolder:
    job = Job(model=str(make_model("qwen2", hidden_size=64, intermediate_size=64)), bits=4, formats=("onnx",), kv="int8",
              samples=2, seq_len=16, output=tmp_path / "out")  # fmt: skip
    opened = open_job(job)
    list(run_job(opened, plan_job(opened)))
    return OutputFolder(tmp_path / "out")


def exported(events: Iterator[object]) -> Exported:
    return [event for event in events if isinstance(event, Exported)][-1]


def test_scales_are_found_once_and_exports_repeat(output: OutputFolder) -> None:
    first = output.artifacts()["onnx"]
    assert first.settings["kv"] == "int8"
    kept = (output.path / CACHE_SCALES).read_bytes()
    text = CacheText(samples=2, length=16)
    assert exported(reexport(output.path, ("onnx",), cache=text)).already
    plain = exported(reexport(output.path, ("onnx",)))
    assert not plain.already
    assert not plain.artifact.settings
    assert plain.artifact.files != first.files
    events = list(reexport(output.path, ("onnx",), cache=text))
    assert [type(event) for event in events] == [Exported]  # no pass over the text
    assert (output.path / CACHE_SCALES).read_bytes() == kept
    assert output.artifacts()["onnx"] == first
    other = list(reexport(output.path, ("onnx",), cache=CacheText(samples=3, length=16)))
    assert len(other) == 3  # two blocks
    assert output.artifacts()["onnx"].settings["kv_scales"] != first.settings["kv_scales"]


def test_a_damaged_file_of_scales_is_refused(output: OutputFolder) -> None:
    path = output.path / CACHE_SCALES
    path.write_text(path.read_text().replace('"keys": [', '"keys": [[],', 1).replace('"keys":[', '"keys":[[],', 1))
    with pytest.raises(InputError, match=r"kv-int8\.json is damaged .*; delete it"):
        list(reexport(output.path, ("onnx",), cache=CacheText(samples=2, length=16)))


def test_a_cache_that_no_format_has_is_refused() -> None:
    job = Job(bits=4, formats=("gguf",), kv="int8")
    with pytest.raises(UsageError, match=r"--kv int8 is of ONNX folders: add --to onnx"):
        plan_job(open_job(job))


def test_a_channel_that_stayed_at_zero_has_a_step() -> None:
    ranges = np.zeros((2, 1, 4), np.float32)
    ranges[0, 0, 0] = 127
    steps = CacheScales.of_ranges(ranges, ranges, {}).keys
    assert steps[0, 0].tolist() == pytest.approx([1.0, 1e-6, 1e-6, 1e-6])
    assert (steps[1] > 0).all()
