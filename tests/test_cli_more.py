"""The commands export, verify, inspect and doctor as a user runs them: what they print, exit codes, one line an error."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from r1q import cli
from r1q.cli import main
from r1q.core.artifact import OutputFolder

MakeModel = Callable[..., Path]
ROOT = Path(__file__).resolve().parents[1]
SIZES: dict[str, int] = {"hidden_size": 128, "intermediate_size": 256, "num_heads": 2, "vocab_size": 320}


def r1q(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(result: Result, code: int) -> str:
    """Return the one line on stderr of a command that must end with `code`."""
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("Error: ")
    return line


@pytest.fixture
def output(make_model: MakeModel, tmp_path: Path) -> Path:
    """A folder of `r1q quantize` with a checkpoint of 4-bit groups of 32, and a GGUF file."""
    model = make_model("llama", **SIZES)
    result = r1q("quantize", model, "--scheme", "q4_0", "-o", tmp_path / "out", "-q")
    assert result.exit_code == 0, result.output
    return tmp_path / "out"


def gguf_of(output: Path) -> Path:
    return output / OutputFolder(output).artifacts()["gguf"].name


@pytest.mark.parametrize("command", ["export", "verify", "inspect", "doctor"])
def test_every_command_has_help(command: str) -> None:
    result = r1q(command, "--help")
    assert result.exit_code == 0
    assert max(map(len, result.output.splitlines())) <= 100


def test_export_writes_what_quantize_would_have_written(output: Path, tmp_path: Path) -> None:
    result = r1q("export", output, "--to", "gguf,gptq")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0].startswith(f"already done: {gguf_of(output)} ")
    assert any(line.startswith(f"done: {output / 'gptq'} ") for line in lines)
    before = gguf_of(output).read_bytes()
    gguf_of(output).unlink()
    assert r1q("export", output / "checkpoint", "--to", "gguf").exit_code == 0
    assert gguf_of(output).read_bytes() == before
    assert r1q("verify", output).exit_code == 0


def test_export_elsewhere_is_verified_and_inspected_there(output: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    for state in ("done", "already done"):
        result = r1q("export", output, "--to", "gguf", "-o", elsewhere)
        assert result.exit_code == 0, result.output
        assert result.output.startswith(f"{state}: {gguf_of(elsewhere)} ")
    assert gguf_of(elsewhere).read_bytes() == gguf_of(output).read_bytes()
    result = r1q("verify", elsewhere)
    assert result.exit_code == 0, result.output
    assert f"ok: checkpoint {output / 'checkpoint'}: " in result.output
    assert "q4_0" in r1q("inspect", elsewhere).output
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert "holds something else" in refused(r1q("export", output, "--to", "gguf", "-o", tmp_path / "mine"), 2)
    assert "holds something else" in refused(
        r1q("export", output, "--to", "gptq", "-o", tmp_path / "mine/notes.txt"), 2
    )


def test_export_refuses_what_a_format_cannot_hold_before_it_writes(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("llama", **SIZES)
    folder, other = tmp_path / "mixed", tmp_path / "int3"
    assert r1q("quantize", model, "--scheme", "q6_k", "-o", folder, "--to", "checkpoint").exit_code == 0
    line = refused(r1q("export", folder, "--to", "gguf,gptq"), 2)
    assert "a GPTQ folder has no form for" in line
    assert "--bits 4 --group-size 32" in line
    assert f"run r1q quantize {model} -o FOLDER" in line
    assert {path.name for path in folder.iterdir()} == {"checkpoint", "where.json"}
    assert r1q("quantize", model, "--bits", "3", "--to", "gptq", "-o", other).exit_code == 0
    line = refused(r1q("export", other, "--to", "gguf", "-o", tmp_path / "new"), 2)
    assert "GGUF has no form for int3 g128" in line
    assert not (tmp_path / "new").exists()


def test_export_refuses_words_that_do_not_fill_before_it_writes(make_model: MakeModel, tmp_path: Path) -> None:
    # Three bits of 48 outputs are no whole 32-bit words; GGUF has no 3-bit integers, so only the checkpoint is made.
    model = make_model("qwen2", hidden_size=96, num_heads=8, num_kv_heads=4, head_dim=12, intermediate_size=96)
    made = r1q("quantize", model, "--bits", "3", "--group-size", "32", "--to", "checkpoint", "-o", tmp_path / "out")
    assert made.exit_code == 0, made.output
    assert "32-bit words of a GPTQ folder" in refused(r1q("export", tmp_path / "out", "--to", "gptq"), 3)
    assert not (tmp_path / "out" / "gptq").exists()


def test_export_of_what_is_no_checkpoint(output: Path, tmp_path: Path, make_model: MakeModel) -> None:
    assert "r1q quantize makes one" in refused(r1q("export", tmp_path / "gone", "--to", "gguf"), 3)
    assert "r1q quantize makes one" in refused(r1q("export", make_model("llama"), "--to", "gguf"), 3)
    assert "name a format" in refused(r1q("export", output, "--to", "checkpoint"), 2)
    assert "no format named 'ggml'" in refused(r1q("export", output, "--to", "ggml"), 2)
    moved = (output / "checkpoint").rename(tmp_path / "moved")
    assert "give -o" in refused(r1q("export", moved, "--to", "gguf"), 2)
    assert r1q("export", moved, "--to", "gguf", "-o", tmp_path / "fresh").exit_code == 0
    (moved / "manifest.json").unlink()
    assert "unfinished" in refused(r1q("export", moved, "--to", "gguf", "-o", tmp_path / "fresh"), 3)


def test_verify_says_what_it_proved(output: Path) -> None:
    result = r1q("verify", output)
    assert result.exit_code == 0
    checkpoint, gguf = result.output.splitlines()
    assert (
        checkpoint
        == f"ok: checkpoint {output / 'checkpoint'}: 8 files as hashed; stored bytes as the manifest says: 21 tensors"
    )
    assert gguf == f"ok: gguf {gguf_of(output)}: 1 file as hashed; same weights: 21 tensors"
    values = [json.loads(line) for line in r1q("verify", output, "--json").output.splitlines()]
    assert [(value["format"], value["ok"], value["tensors"]) for value in values] == [
        ("checkpoint", True, 21),
        ("gguf", True, 21),
    ]


def test_verify_ends_with_6_for_other_weights_and_3_for_no_file(output: Path) -> None:
    path = gguf_of(output)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    result = r1q("verify", output)
    line = refused(result, 6)
    assert line.startswith("Error: verify failed: output.weight: 1 code, 1 value differ, by up to ")
    assert line.endswith(f"; delete {path} and run r1q export on its checkpoint again")
    assert f"FAILED: gguf {path}: 0 files as hashed; 1 of 21 tensors differ" in result.stdout
    failed = r1q("verify", output, "--json")
    assert failed.exit_code == 6
    where = [defect["where"] for defect in json.loads(failed.stdout.splitlines()[1])["defects"]]
    assert where == [path.name, "output.weight"]
    # What the message says to do mends it.
    path.unlink()
    assert "is missing" in refused(r1q("verify", output), 3)
    assert r1q("export", output, "--to", "gguf").exit_code == 0
    assert r1q("verify", output).exit_code == 0
    path.write_bytes(b"GGUF")
    assert "too short" in refused(r1q("verify", path), 3)


def test_inspect_on_the_command_line(output: Path, tmp_path: Path) -> None:
    result = r1q("inspect", gguf_of(output))
    assert result.exit_code == 0
    assert "true bits/weight" in result.output
    value = json.loads(r1q("inspect", output, "--json").stdout)
    assert value["format"] == "r1q output"
    assert {row["grid"] for row in value["grids"]} == {"q4_0", "q8_0", "f32"}
    assert "no such file" in refused(r1q("inspect", tmp_path / "gone"), 3)


def test_hostile_names_in_an_error_are_harmless(tmp_path: Path) -> None:
    name = "evil\x1b[2J\x1b]0;owned\x07.gguf"
    (tmp_path / name).write_bytes(b"GGUF" + bytes(40))
    line = refused(r1q("inspect", tmp_path / name), 3)
    assert "\x1b" not in line
    assert "evil␛[2J␛]0;owned␇.gguf" in line


def run_doctor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([environment.pop("PYTHONPATH", ""), str(ROOT)]).strip(os.pathsep)
    return subprocess.run(
        [sys.executable, "-m", "r1q", "doctor", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment, "PYTHONPATH": paths, "COLUMNS": "80"},
        check=False,
    )


@pytest.mark.runtime
def test_doctor_tells_everything_and_ends_with_0(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    done = run_doctor(
        "--json", HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1", HF_ENDPOINT="https://me:secret@hub.example/x?y=z"
    )
    assert (done.returncode, done.stderr) == (0, "")
    value = json.loads(done.stdout)
    states = {runtime["name"]: runtime["state"] for runtime in value["runtimes"]}
    assert states["llama-cpp"] == states["echo"] == "ready"
    assert value["hub"] == {
        "cache": f"{tmp_path / 'hub'} (not there yet)",
        "offline": "yes (HF_HUB_OFFLINE)",
        "endpoint": "https://hub.example/x (HF_ENDPOINT)",
    }


def test_doctor_ends_with_4_when_nothing_here_can_open_a_file(tmp_path: Path) -> None:
    for module in ("llama_cpp", "torch", "onnxruntime", "onnxruntime_genai"):
        (tmp_path / f"{module}.py").write_text("raise RuntimeError('Failed to load shared library libllama.so')")
    done = run_doctor(PYTHONPATH=str(tmp_path))
    assert done.returncode == 4
    assert "llama-cpp: broken" in done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: no runtime here can open what r1q writes (gguf, gptq, onnx); llama-cpp is broken: ")
    assert "libllama.so" in line


@pytest.mark.parametrize(
    ("arguments", "restarts"), [(["quantize", "--help"], 1), (["plan"], 1), (["--help"], 0), (["bench"], 0), ([], 0)]
)
def test_what_calibrates_starts_on_huge_pages(
    arguments: list[str], restarts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    monkeypatch.setattr(cli, "restart_on_huge_pages", lambda: called.append("restarted"))
    monkeypatch.setattr(cli, "main", lambda: called.append("run"))
    monkeypatch.setattr("sys.argv", ["r1q", *arguments])
    cli.start()
    assert called == ["restarted"] * restarts + ["run"]
