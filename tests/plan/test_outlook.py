"""`r1q plan` and --dry-run say the same, read no weights, and their bytes are those of the files."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from r1q.cli import main
from r1q.core.checkpoint import QuantizedCheckpoint

FEW = ["--samples", "4", "--seq-len", "64"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def test_planned_bytes_are_the_bytes_of_the_file(tmp_path: Path) -> None:
    planned = json.loads(run("plan", "--scheme", "q4_k_m", "--json").output)
    assert run("quantize", "--scheme", "q4_k_m", "-o", str(tmp_path / "out"), "-q").exit_code == 0
    checkpoint = QuantizedCheckpoint.open(tmp_path / "out" / "checkpoint")
    stored = sum(r.spec.rows * r.scheme.row_bytes(r.spec.columns) for r in checkpoint.records.values())
    (file,) = (tmp_path / "out").glob("*.gguf")
    assert planned["bytes"] == {"checkpoint": stored, "gguf": file.stat().st_size}
    assert 0 < file.stat().st_size - stored < 1 << 19  # metadata and tokenizer
    assert planned["tensors"] == {name: str(record.scheme) for name, record in checkpoint.records.items()}
    assert planned["seconds"] is None


@pytest.mark.parametrize("kv", ["float", "int8"])
def test_planned_bytes_are_those_of_an_onnx_folder(tmp_path: Path, kv: str) -> None:
    """Scales are wider there than in a checkpoint, and two graphs and the tokenizer lie beside."""
    options = ["--bits", "4", "--to", "onnx", "--kv", kv]
    planned = json.loads(run("plan", *options, "--json").output)
    assert run("quantize", *options, "-o", str(tmp_path / "out"), "-q").exit_code == 0
    assert planned["bytes"]["onnx"] == sum(file.stat().st_size for file in (tmp_path / "out/onnx").iterdir())
    assert planned["disk"] == sum(planned["bytes"].values())


def test_a_calibrated_plan_has_a_time_and_dry_run_says_the_same_of_memory(tmp_path: Path) -> None:
    options = ["--scheme", "q4_0", "--effort", "default", *FEW]
    planned = json.loads(run("plan", *options, "--json").output)
    assert planned["seconds"] > 0
    assert planned["memory"] == sum(planned["parts"].values())
    dry = run("quantize", *options, "--dry-run", "-o", str(tmp_path / "out")).output
    assert f"memory: about {planned['memory'] / 1e6:.0f} MB" in dry
    assert "time: about" in dry
    assert not (tmp_path / "out").exists()


def test_too_little_memory_is_refused_with_what_it_needs() -> None:
    refused = run("plan", "--effort", "default", *FEW, "--max-ram", "10MB")
    assert refused.exit_code == 5
    assert "at the least" in refused.output
    assert run("plan", "--effort", "default", "--max-ram", "lots").exit_code == 2


def test_a_run_begun_with_more_memory_is_not_gone_on_with_in_less(tmp_path: Path) -> None:
    out = ["--scheme", "q4_0", "--effort", "fast", *FEW, "-o", str(tmp_path / "out"), "--to", "checkpoint", "-q"]
    assert run("quantize", *out).exit_code == 0
    job = tmp_path / "out" / "checkpoint" / "job.json"
    held = json.loads(job.read_text())["engine"]
    assert held["tile"] == 2048
    (tmp_path / "out" / "checkpoint" / "manifest.json").unlink()
    # Spilled hidden states change no byte: a limit that they alone can meet is met, and the run ends with the same engine.
    assert run("quantize", *out, "--max-ram", "2GiB").exit_code == 0
    assert json.loads(job.read_text())["engine"] == held
    refused = run("quantize", *out, "--max-ram", "100MB")
    assert refused.exit_code == 5


def test_contradictions_are_refused(tmp_path: Path) -> None:
    assert run("quantize", "--effort", "fast", "--imatrix", "x.gguf", "--dry-run").exit_code == 2
    assert run("quantize", "--effort", "fast", "--method", "rtn", "--dry-run").exit_code == 2
    missing = run("quantize", "--effort", "fast", "--device", "cuda:7", *FEW, "-o", str(tmp_path / "out"), "-q")
    assert missing.exit_code == 4
    assert "take cpu" in missing.output


def test_every_event_is_a_line_in_the_log_while_the_run_goes_on(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    options = ["--scheme", "q4_0", "--effort", "fast", *FEW, "-o", str(tmp_path / "out"), "--log-json", str(log), "-q"]
    assert run("quantize", *options).exit_code == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    events = [line["event"] for line in lines]
    assert events[-2:] == ["done", "exported"]
    assert events.count("stage") == 4 * sum(line["event"] == "file" and "block" in line["name"] for line in lines)
    assert all(line["rss"] > 1 << 20 and line["time"] > 1e9 for line in lines)
    assert all(0 < line["error"] < 0.2 for line in lines if line.get("grid") == "q4_0")
    assert run("quantize", *options).exit_code == 0
    assert [json.loads(line)["event"] for line in log.read_text().splitlines()][len(lines) :] == [
        "already done",
        "exported",
    ]
    folder = run("quantize", *options[:-3], "--log-json", str(tmp_path), "-q")
    assert folder.exit_code in (2, 3, 5)
