"""r1q verify as a user runs it on ONNX folders: proof, refusal before any runtime, lint and its exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from r1q.cli import main


def r1q(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def output(make_model: Callable[..., Path], tmp_path: Path) -> Path:
    model = make_model("llama", hidden_size=128, intermediate_size=256, num_heads=2, vocab_size=320)
    result = r1q("quantize", model, "--bits", 4, "--method", "rtn", "--to", "gguf,onnx", "-o", tmp_path / "out", "-q")
    assert result.exit_code == 0, result.output
    return tmp_path / "out"


def test_several_paths_are_verified_in_one_go(output: Path) -> None:
    result = r1q("verify", output / "onnx", next(output.glob("*.gguf")))
    assert result.exit_code == 0, result.output
    kinds = [line.split()[1] for line in result.output.splitlines() if line.startswith("ok: ")]
    assert kinds == ["checkpoint", "onnx", "checkpoint", "gguf"]
    assert result.output.count("same weights") == 2


def test_an_escaping_tensor_ends_verify_and_lint_with_3(output: Path) -> None:
    graph = output / "onnx" / "model.onnx"
    data = graph.read_bytes()
    assert b"model.onnx.data" in data
    graph.write_bytes(data.replace(b"model.onnx.data", b"../../etc/passw"))
    for arguments in (("verify", output / "onnx"), ("verify", "--lint", output / "onnx")):
        result = r1q(*arguments)
        assert result.exit_code == 3
        (line,) = result.stderr.strip().splitlines()
        assert "lies in '../../etc/passw', not a file of the folder" in line


def test_lint_prints_findings_and_strict_fails_on_them(output: Path) -> None:
    path = output / "onnx" / "genai_config.json"
    config = json.loads(path.read_text())
    config["search"]["past_present_share_buffer"] = False
    path.write_text(json.dumps(config))
    result = r1q("verify", "--lint", output)
    assert result.exit_code == 0, result.output
    gguf, onnx = [line for line in result.output.splitlines() if not line.startswith(" ")]
    assert gguf.endswith("nothing that makes it slow or heavy")
    assert "finding" in onnx
    assert "past_present_share_buffer is false: keys and values are copied" in result.output
    strict = r1q("verify", "--lint", "--strict", output / "onnx")
    assert strict.exit_code == 6
    assert strict.stderr.startswith("Error: lint: ")
    values = [json.loads(line) for line in r1q("verify", "--lint", "--json", output).output.splitlines()]
    assert [value["format"] for value in values] == ["gguf", "onnx"]
    assert r1q("verify", "--strict", output).exit_code == 2
