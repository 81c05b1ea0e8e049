"""The command line as a new user meets it: the first lines, the exit codes, one line for every mistake."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from r1q.cli import main
from r1q.core.checkpoint import QuantizedCheckpoint

MakeModel = Callable[..., Path]
SIZES: dict[str, int] = {"hidden_size": 256, "intermediate_size": 512, "num_layers": 2, "vocab_size": 320}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(result: Result, code: int, *says: str) -> None:
    assert result.exit_code == code, result.output
    lines = result.stderr.strip().splitlines()
    assert lines[-1].startswith("Error: ")
    assert "Traceback" not in result.output
    for text in says:
        assert text in lines[-1]


@pytest.mark.parametrize("command", [[], ["quantize"], ["bench"]])
def test_help_teaches(command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "r1q quantize --bits 4" in result.output or "r1q bench" in result.output


def test_the_first_line_says_what_was_chosen_and_why(make_model: MakeModel, tmp_path: Path) -> None:
    result = run("quantize", make_model("llama", **SIZES), "--bits", 4, "--dry-run", "-o", tmp_path / "out")
    assert result.exit_code == 0
    assert result.output.splitlines()[0].startswith(
        "q4_k_m: --bits 4 in a GGUF file means llama.cpp's usual 4-bit preset"
    )
    assert "bits per weight" in result.output
    assert not (tmp_path / "out").exists()


def test_a_walk_ends_with_the_files_and_the_second_time_says_so(make_model: MakeModel, tmp_path: Path) -> None:
    command = ("quantize", make_model("qwen2", **SIZES), "--bits", 4, "--to", "gguf,gptq", "-o", tmp_path / "out")
    first = run(*command)
    assert first.exit_code == 0, first.output
    assert (tmp_path / "out" / "gptq" / "model.safetensors").is_file()
    files = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    second = run(*command)
    assert second.exit_code == 0
    assert second.output.count("already done") == 2
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == files
    checkpoint = QuantizedCheckpoint.open(tmp_path / "out" / "checkpoint")
    assert checkpoint.manifest["events"] == []
    # Where the source is comes back too, as after a kill between the manifest and that note.
    (tmp_path / "out" / "where.json").unlink()
    assert run(*command).exit_code == 0
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == files


def test_quiet_prints_the_path_alone(make_model: MakeModel, tmp_path: Path) -> None:
    result = run("quantize", make_model("llama", **SIZES), "--scheme", "q8_0", "-q", "-o", tmp_path / "out")
    assert result.exit_code == 0
    assert [Path(line).suffix for line in result.output.splitlines()] == [".gguf"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--scheme", "q4_km"], "did you mean q4_k_m"),
        (["--scheme", "q4_0", "--bits", "4"], "not both"),
        (["--bits", "7"], "--bits takes 2, 3, 4, 5, 6, 8"),
        (["--to", "onnx", "--scheme", "q4_k"], "no kernel for q4_k"),
        (["--to", "onnx", "--bits", "3"], "--bits 4 (2, 8) --to onnx"),
        (["--head-bits", "5"], "none of 4, 8"),
        (["--head-bits", "4", "--scheme", "q4_0"], "go with --bits"),
        (["--to", "gguf", "--bits", "4", "--group-size", "64"], "--to gptq"),
        (["--bits", "4", "--group-size", "48", "--to", "gptq"], "group sizes that do: 128, 64, 32"),
        (["--scheme", "none.toml"], "presets are"),
        (["--strict", "--scheme", "q4_k"], "--strict"),
    ],
)
def test_options_that_cannot_be(make_model: MakeModel, tmp_path: Path, options: list[str], says: str) -> None:
    model = make_model("llama", **{**SIZES, "intermediate_size": 384})
    refused(run("quantize", model, "-o", tmp_path / "out", *options), 2, says)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_somebody_else_is_left_alone(make_model: MakeModel, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    refused(run("quantize", make_model("llama", **SIZES), "-o", tmp_path / "mine"), 2, "was not made by r1q")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def damage_truncated(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def damage_header(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes((1 << 40).to_bytes(8, "little") + path.read_bytes()[8:])


def damage_missing(model: Path) -> None:
    (model / "model.safetensors").unlink()


def damage_pickle(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def damage_architecture(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps({**config, "architectures": ["MambaForCausalLM"], "model_type": "mamba"})
    )


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (damage_truncated, "model.safetensors"),
        (damage_header, "header"),
        (damage_missing, "safetensors"),
        (damage_pickle, "pickle"),
        (damage_architecture, "LlamaForCausalLM"),
    ],
)
def test_a_checkpoint_that_cannot_be_read(
    make_model: MakeModel, tmp_path: Path, damage: Callable[[Path], None], says: str
) -> None:
    model = make_model("llama", **SIZES)
    damage(model)
    refused(run("quantize", model, "-o", tmp_path / "out"), 3, says)


def test_a_missing_shard_is_named(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("qwen2", shards=2, **SIZES)
    shard = sorted(model.glob("model-*.safetensors"))[1]
    shard.unlink()
    refused(run("quantize", model, "-o", tmp_path / "out"), 3, shard.name)


def test_a_model_that_is_neither_folder_nor_id(tmp_path: Path) -> None:
    refused(run("quantize", tmp_path / "none" / "at" / "all"), 3, "neither a folder nor a hub id")


def test_a_read_only_folder(make_model: MakeModel, mount_disk: Callable[[str], Path]) -> None:
    disk = mount_disk("size=64m,ro")
    refused(run("quantize", make_model("llama", **SIZES), "-o", disk / "out"), 2, "Read-only", "choose another folder")


def test_a_disk_that_is_too_small_is_said_before_the_work(
    make_model: MakeModel, mount_disk: Callable[[str], Path]
) -> None:
    disk = mount_disk("size=1m")
    refused(run("quantize", make_model("llama", **SIZES), "-o", disk / "out"), 5, "MB free")
    assert not (disk / "out").exists()


def test_a_disk_that_fills_up_leaves_the_artifact_before_it(
    make_model: MakeModel, mount_disk: Callable[[str], Path]
) -> None:
    disk = mount_disk("size=24m")
    model = make_model("llama", **SIZES)
    assert run("quantize", model, "--scheme", "q8_0", "-o", disk / "out").exit_code == 0
    artifact = next((disk / "out").glob("*.gguf"))
    before = artifact.read_bytes()
    (disk / "out" / "artifacts.json").unlink()  # so that the file is written again
    filler = disk / "filler"
    with open(filler, "wb") as file:
        file.write(b"\0" * (os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - 65536))
    refused(run("quantize", model, "--scheme", "q8_0", "-o", disk / "out"), 5, "the disk is full while writing")
    assert artifact.read_bytes() == before


def test_ctrl_c_says_how_to_go_on(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("llama", **{**SIZES, "num_layers": 16, "intermediate_size": 1024})
    command = [sys.executable, "-m", "r1q", "quantize", str(model), "--scheme", "q4_k_m", "-o", str(tmp_path / "out")]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while child.poll() is None and not list(tmp_path.glob("out/checkpoint/block-*")):
        time.sleep(0.005)
    child.send_signal(signal.SIGINT)
    _, error = child.communicate(timeout=60)
    assert child.returncode == 130, error
    assert error.strip() == "Error: interrupted; what is finished is kept, and the same command goes on from there"


def test_bench_refuses_a_damaged_file_before_a_runtime_sees_it(make_model: MakeModel, tmp_path: Path) -> None:
    assert (
        run("quantize", make_model("llama", **SIZES), "--scheme", "q8_0", "-q", "-o", tmp_path / "out").exit_code == 0
    )
    whole = next((tmp_path / "out").glob("*.gguf")).read_bytes()
    for place, value in [(0, b"GGML"), (4, b"\x63\0\0\0"), (8, b"\xff" * 8), (16, b"\xff" * 8), (24, b"\xff" * 8)]:
        damaged = tmp_path / f"damaged-{place}.gguf"
        damaged.write_bytes(whole[:place] + value + whole[place + len(value) :])
        refused(run("bench", damaged), 3, damaged.name)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[:-1000])
    refused(run("bench", cut), 3, cut.name)


def test_bench_of_nothing_is_refused(tmp_path: Path) -> None:
    refused(run("bench", tmp_path), 3, "holds no artifact")
    refused(run("bench", tmp_path, "--target", "abacus"), 2, "abacus")


def test_a_message_that_repeats_a_file_is_cut(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("llama", **SIZES)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": "x" * 100_000}))
    result = run("quantize", model, "-o", tmp_path / "out")
    refused(result, 3, "vocab_size")
    assert len(result.stderr) < 1100
