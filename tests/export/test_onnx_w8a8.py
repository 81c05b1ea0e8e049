"""8-bit weights and inputs in onnxruntime: the kernels it really runs, its numbers against integers multiplied here, the command."""

import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from r1q.core.activations import ACTIVATIONS, STAGES
from r1q.core.artifact import OutputFolder
from r1q.core.checkpoint import QuantizedCheckpoint
from r1q.core.errors import CheckError, UsageError
from r1q.core.onnx_file import OnnxFolder
from r1q.export.onnx import EVERY, GRAPH, write_onnx
from r1q.export.verify_onnx import verify_onnx
from r1q.models.block import attention_input, attention_mix, linear, mlp_input
from r1q.models.config import ModelConfig
from r1q.models.forward import Configured, _apply_head, embed, load_block
from r1q.models.rope import rotation
from r1q.plan.job import Job, open_job, plan_job, run_job
from r1q.plan.reexport import reexport

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
ort = pytest.importorskip("onnxruntime")

OPTIONS = {"scheme": "w8a8", "formats": ("onnx",), "activations": "entropy", "samples": 4, "seq_len": 64}


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> OutputFolder:
    """Return the embedded model in w8a8."""
    job = Job(output=tmp_path_factory.mktemp("w8a8") / "out", **OPTIONS)  # type: ignore[arg-type]
    opened = open_job(job)
    list(run_job(opened, plan_job(opened)))
    return OutputFolder(job.output)  # type: ignore[arg-type]


def test_onnxruntime_fuses_every_product_into_an_integer_kernel(output: OutputFolder, tmp_path: Path) -> None:
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(str(output.path / "onnx" / GRAPH), options, providers=["CPUExecutionProvider"])
    nodes = Counter(
        node.op_type for node in onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node
    )
    activations = QuantizedCheckpoint.open(output.checkpoint).activations
    assert activations is not None
    static = sum(found.static for found in activations.ranges.values())
    assert 0 < static <= 24
    assert nodes["MatMulIntegerToFloat"] == nodes["QuantizeLinear"] == static
    assert nodes["MatMulNBits"] == len(activations.ranges) - static + 1  # what stays weight-only, and the head
    assert not {"DequantizeLinear", "MatMul", "FusedMatMul"} & set(nodes)


def test_logits_are_those_of_integers_multiplied_here(output: OutputFolder, tmp_path: Path) -> None:
    checkpoint = QuantizedCheckpoint.open(output.checkpoint)
    tokens = np.random.default_rng(4).integers(0, 512, (1, 40))
    session = ort.InferenceSession(
        str(write_onnx(checkpoint, tmp_path, accuracy_level=1) / EVERY), providers=["CPUExecutionProvider"]
    )
    feed = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
    feed |= {v.name: np.zeros((1, v.shape[1], 0, v.shape[3]), np.float32) for v in session.get_inputs()[2:]}
    found = session.run(["logits"], feed)[0][0]
    rounded, plain = (integer_forward(checkpoint, tokens, inputs=inputs) for inputs in (True, False))
    cost = np.sqrt(np.mean((rounded - plain) ** 2))
    # Rounding inputs shows, and is done the same way; the last bit of a sum moves a code now and then.
    assert cost / np.sqrt(np.mean(plain**2)) > 1e-3
    assert (
        np.sqrt(np.mean((found - rounded) ** 2)) < 0.2 * cost
    )  # … and is done the same way; a sum's last bit moves a code now and then


def integer_forward(checkpoint: QuantizedCheckpoint, tokens: np.ndarray, *, inputs: bool) -> np.ndarray:
    """Return logits of a plain forward pass over the checkpoint's codes; with `inputs`, those of linear layers rounded to theirs."""
    config, activations = ModelConfig.read(checkpoint.sidecar), checkpoint.activations
    assert activations is not None
    source = Configured(config, checkpoint)
    hidden, turn = embed(source, tokens)[0], rotation(config, tokens.shape[1])
    for layer in range(config.num_layers):
        weights = load_block(source, layer)

        def spelled(x: torch.Tensor, kind: str, layer: int = layer) -> torch.Tensor:
            found = activations.static(layer, kind)
            if found is None or not inputs:
                return x
            return (torch.clamp(torch.round(x / found.scale) + found.zero, 0, 255) - found.zero) * found.scale

        normed = spelled(attention_input(weights, config, hidden), "attn_q")
        mixed = spelled(attention_mix(weights, config, normed, turn), "attn_output")
        hidden = hidden + linear(weights, "attn_output", mixed)
        middle = spelled(mlp_input(weights, config, hidden), "ffn_gate")
        inner = torch.nn.functional.silu(linear(weights, "ffn_gate", middle)) * linear(weights, "ffn_up", middle)
        hidden = hidden + linear(weights, "ffn_down", spelled(inner, "ffn_down"))
    return _apply_head(source, hidden[None])[0].numpy()


def test_what_stays_weight_only_is_in_the_manifest_and_strict_ends_there(output: OutputFolder, tmp_path: Path) -> None:
    checkpoint = QuantizedCheckpoint.open(output.checkpoint)
    activations = checkpoint.activations
    assert activations is not None
    lines = activations.weight_only()
    assert lines
    assert [event for event in checkpoint.manifest["events"] if "weight-only" in event] == lines  # type: ignore[attr-defined]
    opened = open_job(Job(output=tmp_path / "strict", strict=True, **OPTIONS))  # type: ignore[arg-type]
    with pytest.raises(CheckError, match=r"--strict: blk\.\d+\.\w+: weight-only, 8-bit inputs would err by"):
        list(run_job(opened, plan_job(opened)))
    # What was measured is not measured again, and a run without --strict goes on from it.
    again = open_job(Job(output=tmp_path / "strict", **OPTIONS))  # type: ignore[arg-type]
    events = [getattr(event, "name", "") for event in run_job(again, plan_job(again))]
    assert not any(name.endswith(".inputs") for name in events)
    assert (tmp_path / "strict" / "onnx" / GRAPH).read_bytes() == (output.path / "onnx" / GRAPH).read_bytes()


def test_exports_are_copies_and_other_formats_are_refused(output: OutputFolder, tmp_path: Path) -> None:
    list(reexport(output.path, ("onnx",), tmp_path / "elsewhere"))
    one, two = ({p.name: p.read_bytes() for p in (f / "onnx").iterdir()} for f in (output.path, tmp_path / "elsewhere"))
    assert one == two
    assert ACTIVATIONS not in one
    folder = OnnxFolder.open(output.path / "onnx")
    checkpoint = QuantizedCheckpoint.open(output.checkpoint)
    tensor = next(iter(folder.graphs.values())).initializers["model.layers.0.mlp.gate_up_proj.weight"]
    codes = [checkpoint.read(f"model.layers.0.mlp.{part}_proj.weight", 0, 768).codes for part in ("gate", "up")]
    np.testing.assert_array_equal(folder.read(tensor).T.astype(int) + 128, np.concatenate(codes))
    with pytest.raises(UsageError, match=r"w8a8 goes to ONNX alone: a gptq file has no place"):
        open_job(Job(scheme="w8a8", formats=("onnx", "gptq")))
    with pytest.raises(UsageError, match="a GPTQ folder has no place for the ranges"):
        list(reexport(output.path, ("gptq",)))
    with pytest.raises(UsageError, match="it goes with --scheme w8a8"):
        plan_job(open_job(Job(bits=8, formats=("onnx",), activations="entropy")))


@pytest.mark.parametrize(
    "name",
    ["mlp.gate_up_proj.input_scale", "mlp.gate_up_proj.input_zero", "attn.qkv_proj.weight", "attn.o_proj.scales"],
)
def test_verify_follows_integers_and_finds_a_changed_byte(output: OutputFolder, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "onnx"
    shutil.copytree(output.path / "onnx", folder)
    checkpoint = QuantizedCheckpoint.open(output.checkpoint)
    whole = verify_onnx(checkpoint, folder)
    assert not whole.defects
    tensor = next(iter(OnnxFolder.open(folder).graphs.values())).initializers[f"model.layers.0.{name}"]
    with open(folder / str(tensor.location), "r+b") as file:
        file.seek(tensor.offset)
        before = file.read(1)[0]
        file.seek(tensor.offset)
        file.write(bytes([before ^ 1]))
    defects = verify_onnx(checkpoint, folder).defects
    assert defects
    wanted = "inputs of" if "input" in name else "model.layers.0.self_attn"
    assert all(wanted in str(defect) for defect in defects)


def test_every_stage_names_layers_that_read_one_input() -> None:
    assert [kind for kinds in STAGES.values() for kind in kinds] == [
        "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down",
    ]  # fmt: skip
