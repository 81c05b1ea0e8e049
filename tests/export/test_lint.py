"""Lint: our own exports are clean, and each thing that is put into a file to slow it down is named with what it costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file, save_file

from r1q.core.artifact import OutputFolder
from r1q.core.errors import CheckError, InputError
from r1q.export.lint import Finding, lint_path, refuse_found

Made = Callable[..., OutputFolder]
AVX2 = ("avx2", "fma")


def found(path: Path, features: tuple[str, ...] = AVX2) -> list[Finding]:
    (result,) = lint_path(path, features)
    return list(result.findings)


def whats(path: Path, features: tuple[str, ...] = AVX2) -> list[str]:
    return [finding.what for finding in found(path, features)]


def test_our_own_exports_are_clean(made: Made) -> None:
    output = made("llama", to="gguf,gptq,onnx", bits=4)
    results = list(lint_path(output.path, AVX2))
    assert [result.format for result in results] == ["gguf", "gptq", "onnx"]
    # The tiny model's keys and values at its whole context are larger than itself, and lint says so of any model.
    assert [f.what for result in results for f in result.findings if "keys and values" not in f.what] == []


Edit = Callable[[Any], None]


def change(output: OutputFolder, edit: Edit) -> Path:
    path = output.path / "onnx" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    edit(model.graph)
    onnx.save(model, path)
    return path


def _matrices(graph: Any) -> list[Any]:
    return [node for node in graph.node if node.op_type == "MatMulNBits"]


def _give(index: int, dtype: Any) -> Edit:
    """Give every MatMulNBits of the blocks an input `index`, as much as its zero points or indices would be."""

    def edit(graph: Any) -> None:
        for node in _matrices(graph)[:-1]:
            facts = {attribute.name: attribute.i for attribute in node.attribute}
            size = facts["K"] if index == 4 else facts["N"] * facts["K"] // facts["block_size"]
            node.input.extend([""] * (index + 1 - len(node.input)))
            node.input[index] = f"extra/{node.name}"
            graph.initializer.append(numpy_helper.from_array(np.zeros(size, dtype), node.input[index]))

    return edit


def _attribute(key: str, value: int | None, which: Callable[[Any], bool] = lambda node: True) -> Edit:
    def edit(graph: Any) -> None:
        for node in filter(which, _matrices(graph)):
            kept = [attribute for attribute in node.attribute if attribute.name != key]
            del node.attribute[:]
            node.attribute.extend(kept if value is None else [*kept, helper.make_attribute(key, value)])

    return edit


def _is_head(node: Any) -> bool:
    return "logits" in node.output


def _cast_embedding(graph: Any) -> None:
    """Look ids up in a float table that is turned first, as genai's builder does with a tied head."""
    node = next(node for node in graph.node if "input_ids" in node.input)
    node.CopyFrom(helper.make_node("Gather", ["turned", "input_ids"], list(node.output), node.name))
    graph.node.insert(0, helper.make_node("Transpose", ["table"], ["turned"], "/turn", perm=[1, 0]))
    graph.initializer.append(numpy_helper.from_array(np.zeros((256, 320), np.float32), "table"))


def _float_head(graph: Any) -> None:
    node = _matrices(graph)[-1]
    node.CopyFrom(helper.make_node("MatMul", [node.input[0], "head"], list(node.output), node.name))
    graph.initializer.append(numpy_helper.from_array(np.zeros((256, 320), np.float32), "head"))


def _no_cut(graph: Any) -> None:
    for node in graph.node:
        if node.op_type == "Gather" and any(a.name == "axis" and a.i == 1 for a in node.attribute):
            node.CopyFrom(helper.make_node("Identity", [node.input[0]], list(node.output), node.name))


def _half_caches(graph: Any) -> None:
    for value in [*graph.input, *graph.output]:
        if value.type.tensor_type.elem_type == TensorProto.FLOAT and value.name != "logits":
            value.type.tensor_type.elem_type = TensorProto.FLOAT16


SLOWED: dict[str, tuple[Edit, str, int, str]] = {
    "g_idx": (_give(4, np.int32), "MatMulNBits with a g_idx", 8, "MB are unpacked to float32 for every token"),
    "zeros": (_give(3, np.float32), "MatMulNBits with float zero points", 8, "onnxruntime #28552"),
    "level": (_attribute("accuracy_level", None, lambda n: not _is_head(n)), "MatMulNBits without accuracy_level 4", 8, "2.3 ×"),
    "level 1": (_attribute("accuracy_level", 1, _is_head), "8-bit MatMulNBits without accuracy_level 4", 1, "8-bit kernels"),
    "block": (_attribute("block_size", 512), "MatMulNBits with blocks of 512", 9, "refuses the file"),
    "table": (_cast_embedding, "embedding in float32", 1, "0.3 MB, in 8 bits 0.1 MB"),
    "head": (_float_head, "head in float32", 1, "0.3 MB are read for every token"),
    "logits": (_no_cut, "logits of every position", 1, "1.3 MB and the head's work 1024 times"),
    "cache": (_half_caches, "keys and values in float16", 4, "x86 has no kernels"),
}  # fmt: skip


@pytest.mark.parametrize("name", SLOWED)
def test_what_slows_an_onnx_graph_is_named(made: Made, name: str) -> None:
    edit, what, count, cost = SLOWED[name]
    output = made("llama", to="onnx", bits=4)
    path = change(output, edit)
    (finding,) = [finding for finding in found(path) if finding.what == what]
    assert finding.count == count
    assert cost in finding.cost
    assert {f.what for f in found(path)} - {what, "keys and values in float32"} == set()


def test_what_the_configuration_makes_heavy_is_named(made: Made) -> None:
    output = made("llama", to="onnx", bits=4, model={"config": {"max_position_embeddings": 65536}})
    path = output.path / "onnx" / "genai_config.json"
    config = json.loads(path.read_text())
    assert config["search"]["max_length"] == 4096
    config["search"] |= {"max_length": 65536, "past_present_share_buffer": False}
    config["model"]["context_length"] = 65536
    path.write_text(json.dumps(config))
    findings = {finding.what: finding.cost for finding in found(path.parent)}
    # 2 blocks of 2 heads of 64, keys and values, 4 bytes each: 2 KiB a position.
    assert findings["max_length = context_length = 65536"].startswith("134.2 MB are reserved")
    assert findings["past_present_share_buffer is false"].startswith(
        "keys and values are copied for every token, up to 8.4"
    )


def test_a_rotary_table_beyond_what_is_used_is_named(made: Made) -> None:
    output = made("llama", to="onnx", bits=4)

    def widen(graph: Any) -> None:
        for tensor in graph.initializer:
            if tensor.name.startswith("model.rotary"):
                tensor.CopyFrom(numpy_helper.from_array(np.zeros((40960, 32), np.float32), tensor.name))

    (finding,) = [finding for finding in found(change(output, widen)) if finding.what == "rotary table"]
    assert (finding.count, finding.cost) == (2, "10.5 MB for 40960 positions, 2.1 MB of it beyond 32768")


def test_a_folder_of_genais_own_builder(make_model: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    model = make_model("llama", hidden_size=64, num_layers=2, config={"max_position_embeddings": 8192})
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "onnxruntime_genai.models.builder",
        "-i",
        model,
        "-o",
        tmp_path / "genai",
    ]
    options: list[str | Path] = [
        "-p",
        "int4",
        "-e",
        "cpu",
        "-c",
        tmp_path / "cache",
        "--extra_options",
        "hf_token=false",
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "ORT_DISABLE_TELEMETRY": "1"}
    done = subprocess.run([*command, *options], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert whats(tmp_path / "genai") == [
        "embedding in float32",
        "logits of every position",
        "max_length = context_length = 8192",
    ]


def test_what_a_gguf_file_loses_is_named(made: Made) -> None:
    output = made("llama", scheme="q4_k_m", model={"hidden_size": 288, "num_heads": 4})
    (path,) = output.path.glob("*.gguf")
    assert whats(path) == [
        "rows of 288, which blocks of 256 do not divide, as q5_0",
        "rows of 288, which blocks of 256 do not divide, as q8_0",
        "matrix as q6_k",
    ]
    (five,) = [finding for finding in found(path) if finding.what.endswith("q5_0")]
    assert " as q4_k they would be" in five.cost
    (six,) = [finding for finding in found(path) if finding.what.endswith("q6_k")]
    assert "kernels for AVX2" in six.cost
    assert "matrix as q6_k" not in whats(path, ("amx_int8", "avx512f", "avx2"))
    assert "matrix as q6_k" not in whats(path, ())  # nothing is known of this processor


def test_float_ends_and_float_files_are_named(made: Made) -> None:
    (path,) = made("qwen2", scheme="bf16").path.glob("*.gguf")
    assert whats(path) == ["embedding in bf16", "head in bf16", "float matrix"]
    assert [finding.count for finding in found(path)] == [1, 1, 14]
    (tied,) = made("qwen2", scheme="f16", model={"tied": True}).path.glob("*.gguf")
    assert whats(tied)[0] == "embedding and head (tied) in f16"


def test_act_order_and_version_2_of_a_gptq_folder_are_named(made: Made) -> None:
    folder = made("llama", to="gptq", bits=4).path / "gptq"
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    order = tensors["model.layers.1.mlp.up_proj.g_idx"]
    order[[0, -1]] = order[[-1, 0]]
    save_file(tensors, weights, metadata={"format": "pt"})
    for name in ("config.json", "quantize_config.json"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace('"checkpoint_format": "gptq"', '"checkpoint_format": "gptq_v2"'))
    findings = found(folder)
    assert [(f.what, f.count) for f in findings] == [
        ("layer with a g_idx (act-order)", 1),
        ("checkpoint_format gptq_v2", 1),
    ]


def test_strict_ends_with_a_failed_check(made: Made) -> None:
    (path,) = made("qwen2", scheme="bf16").path.glob("*.gguf")
    results = list(lint_path(path, AVX2))
    with pytest.raises(CheckError, match=r"lint: embedding in bf16: .* \(3 findings in all\)"):
        refuse_found(results)
    assert "3 findings" in results[0].text()
    assert len(json.loads(results[0].json())["findings"]) == 3
    refuse_found([])


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        list(lint_path(tmp_path / "none", ()))
    with pytest.raises(InputError, match=r"neither a \.gguf file"):
        list(lint_path(tmp_path, ()))
