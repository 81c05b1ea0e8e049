"""The run loop: what lands in a checkpoint, resume after a kill byte for byte, and refusals."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from r1q.core.checkpoint import QuantizedCheckpoint
from r1q.core.errors import InputError, ResourceError, UsageError
from r1q.core.recipe import Recipe
from r1q.models.source import ModelSource
from r1q.plan.plan import make_plan
from r1q.plan.walk import versions
from r1q.quantize.run import Event, Request, quantize_checkpoint

MakeModel = Callable[..., Path]
SIZES: dict[str, int] = {"hidden_size": 256, "intermediate_size": 512, "num_layers": 3, "vocab_size": 320}


def request(source: ModelSource, scheme: str) -> Request:
    plan = make_plan(source, Recipe.named(scheme), ())
    return Request(model=plan.model, recipe=plan.recipe, planned=plan.tensors, method="rtn", versions=versions())


def run(model: Path, scheme: str, folder: Path) -> list[Event]:
    source = ModelSource.open(model)
    return list(quantize_checkpoint(source, request(source, scheme), folder))


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "journal.jsonl")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_checkpoint_holds_the_codes_and_the_model_beside_them(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("qwen2", **SIZES)
    run(model, "q8_0", tmp_path / "out")
    checkpoint = QuantizedCheckpoint.open(tmp_path / "out")
    source = ModelSource.open(model)
    assert [spec.name for spec in checkpoint.tensors] == [spec.name for spec in source.tensors]
    for spec in source.tensors:
        want, have = source.read_rows(spec.name, 0, spec.rows), checkpoint.read_rows(spec.name, 0, spec.rows)
        assert have.shape == want.shape
        # Half a step of 1/127 of the block's largest weight, and float16's rounding of the scale.
        np.testing.assert_allclose(have, want, atol=float(np.abs(want).max()) * (0.5 / 127 + 2**-10) + 1e-7)
        record = checkpoint.records[spec.name]
        assert 0 < record.error < 0.01 if spec.is_matrix else record.error == 0
    assert (checkpoint.sidecar / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert checkpoint.damaged_files() == []
    # The block files are plain safetensors for anyone.
    assert load_file(tmp_path / "out" / "block-00000.safetensors")


def test_the_same_command_again_changes_nothing(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("llama", **SIZES)
    run(model, "q4_k_m", tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert [event.what for event in run(model, "q4_k_m", tmp_path / "out")] == ["already done"]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_equal_runs_give_equal_bytes_wherever_they_are(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("llama", **SIZES)
    run(model, "q4_k_m", tmp_path / "a")
    run(model, "q4_k_m", tmp_path / "elsewhere" / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "elsewhere" / "b")


def test_another_recipe_or_source_in_the_same_folder_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    run(make_model("llama", **SIZES), "q4_0", tmp_path / "out")
    with pytest.raises(UsageError, match=r"another job \(different: .*recipe"):
        run(make_model("llama", **SIZES), "q8_0", tmp_path / "out")
    with pytest.raises(UsageError, match=r"different: .*source"):
        run(make_model("llama", seed=1, **SIZES), "q4_0", tmp_path / "out")


@pytest.mark.parametrize("stop_after", [1, 2, 4])
def test_an_interrupted_run_goes_on_and_ends_in_the_same_bytes(
    make_model: MakeModel, tmp_path: Path, stop_after: int
) -> None:
    model = make_model("qwen2", **SIZES)
    run(model, "q6_k", tmp_path / "whole")
    source = ModelSource.open(model)
    events = quantize_checkpoint(source, request(source, "q6_k"), tmp_path / "cut")
    for event in events:
        stop_after -= event.what == "file"
        if not stop_after:
            break
    events.close()  # type: ignore[attr-defined]
    # A line torn by the kill, and a temporary file left behind.
    with open(tmp_path / "cut" / "journal.jsonl", "ab") as journal:
        journal.write(b'{"file": "block-0000')
    (tmp_path / "cut" / ".r1q-tmp-left").write_bytes(b"x")
    kept = [event.name for event in run(model, "q6_k", tmp_path / "cut") if event.what == "kept"]
    assert kept
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_block_file_that_changed_is_done_again(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("llama", **SIZES)
    run(model, "q4_0", tmp_path / "out")
    whole = contents(tmp_path / "out")
    damaged = tmp_path / "out" / "block-00001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\0")
    assert QuantizedCheckpoint.open(tmp_path / "out").damaged_files() == ["block-00001.safetensors"]
    what = [event.what for event in run(model, "q4_0", tmp_path / "out")]
    assert what.count("kept") == 4
    assert contents(tmp_path / "out") == whole


def test_sigkill_at_any_moment_ends_in_the_same_bytes(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("llama", **{**SIZES, "num_layers": 8, "intermediate_size": 1024})
    command = [
        sys.executable,
        "-m",
        "r1q",
        "quantize",
        str(model),
        "--scheme",
        "q4_k_m",
        "--to",
        "checkpoint",
        "-q",
        "-o",
    ]
    subprocess.run([*command, str(tmp_path / "whole")], check=True)
    rng = np.random.default_rng(7)
    for _ in range(4):
        child = subprocess.Popen([*command, str(tmp_path / "cut")], stderr=subprocess.DEVNULL)
        while child.poll() is None and not list((tmp_path / "cut").rglob("*.safetensors")):
            time.sleep(0.002)
        time.sleep(float(rng.uniform(0, 0.05)))
        child.send_signal(signal.SIGKILL)
        child.wait()
    subprocess.run([*command, str(tmp_path / "cut")], check=True)
    assert contents(tmp_path / "cut" / "checkpoint") == contents(tmp_path / "whole" / "checkpoint")


@pytest.mark.parametrize(
    ("value", "scheme", "says"),
    [
        ("nan", "q4_0", "NaN or infinite weights"),
        ("inf", "q8_0", "NaN"),
        ("1e6", "f16", "does not fit f16"),
        ("1e9", "q8_0", "does not fit q8_0"),
        ("-1e9", "q4_k_m", "does not fit q4_k"),
    ],
)
def test_a_weight_that_cannot_be_stored_stops_the_run_with_its_name(
    make_model: MakeModel, tmp_path: Path, value: str, scheme: str, says: str
) -> None:
    model = make_model("llama", dtype="F32", **SIZES)
    path = model / "model.safetensors"
    source = ModelSource.open(model)
    spec = source.tensors[4]
    raw = path.read_bytes()
    at = raw.index(source.read_rows(spec.name, 0, 1).tobytes())
    path.write_bytes(raw[:at] + np.float32(value).tobytes() + raw[at + 4 :])
    with pytest.raises(InputError, match=f"{spec.name}.*{says}"):
        run(model, scheme, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_manifest_that_is_damaged_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    run(make_model("llama", **SIZES), "q4_0", tmp_path / "out")
    manifest = tmp_path / "out" / "manifest.json"
    value = json.loads(manifest.read_bytes())
    for damage in ({"format": 99}, {"tensors": 3}, {"tensors": [{**value["tensors"][0], "file": "../../etc/passwd"}]}):
        manifest.write_text(json.dumps({**value, **damage}))
        with pytest.raises(InputError):
            QuantizedCheckpoint.open(tmp_path / "out")
    manifest.unlink()
    with pytest.raises(InputError, match="unfinished: run the same r1q quantize again"):
        QuantizedCheckpoint.open(tmp_path / "out")


def test_a_full_disk_is_said_and_what_was_finished_stays(
    make_model: MakeModel, tmp_path: Path, mount_disk: Callable[[str], Path]
) -> None:
    model, disk = make_model("llama", **SIZES), mount_disk("size=1m")
    with pytest.raises(ResourceError, match="the disk is full while writing"):
        run(model, "f32", disk / "out")
    assert not (disk / "out" / "manifest.json").exists()
    assert not list((disk / "out").glob(".r1q-tmp-*"))
