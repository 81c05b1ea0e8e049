"""r1q distill as processes: killed and interrupted it ends in the same bytes, and two that torchrun starts do the work of one."""

import hashlib
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from signal import SIGINT, SIGKILL

import numpy as np
import pytest
import torch

import r1q
from r1q.core.safetensors_file import SafetensorsFile
from r1q.distill.network import product_dtype
from r1q.distill.train import STATE

MakeModel = Callable[..., Path]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture
def command(make_model: MakeModel, tmp_path: Path) -> list[str]:
    """Return the command that distils a small teacher, up to its -o."""
    words = tmp_path / "words.txt"
    words.write_text("What is the sum of one and two? It is three. " * 120)
    asked = ["distill", str(make_model("llama")), "--ffn", "64", "--text", str(words), "--seq-len", "16"]
    return ["-m", "r1q", *asked, "--samples", "24", "--rows", "4"]


def _weights(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_killed_and_interrupted_it_ends_in_the_same_weights(command: list[str], tmp_path: Path) -> None:
    # A shell's background jobs ignore SIGINT, and their children with them: this one shall not.
    heed = (
        "import signal, sys; signal.signal(2, signal.default_int_handler); from r1q.cli import main; main(sys.argv[3:])"
    )
    command = [sys.executable, "-c", heed, *command, "--steps", "72", "--every", "3", "--top", "8", "-o"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run([*command, str(whole)], check=True, capture_output=True)
    rng = np.random.default_rng()  # any moment will do
    for signal in (SIGKILL, SIGINT):
        state = cut / "distilling" / STATE
        before = state.stat().st_mtime_ns if state.exists() else 0
        child = subprocess.Popen([*command, str(cut)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while child.poll() is None and not (state.exists() and state.stat().st_mtime_ns > before):
            time.sleep(0.002)
        time.sleep(float(rng.uniform(0, 0.1)))
        child.send_signal(signal)
        out, err = child.communicate()
        assert child.returncode == (-SIGKILL if signal == SIGKILL else 130), out + err
    assert " of 72 steps are kept" in out
    assert "the same command goes on from there" in err
    rest = subprocess.run([*command, str(cut)], check=True, capture_output=True, text=True)
    assert "step 0 of 72" not in rest.stdout
    assert _weights(cut) == _weights(whole)
    assert not (cut / "distilling").exists()


def _gradients(state: Path) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """Return the first moments of all tensors: after one step a tenth of the clipped gradient."""
    with SafetensorsFile.open(state) as file:
        names = sorted(name for name in file.tensors if name.startswith("first/"))
        return np.concatenate([file.read(name).reshape(-1) for name in names])


WORKER = """
import sys
from pathlib import Path
import numpy as np, torch
from r1q.core.errors import CheckError
from r1q.distill.divergence import divergence_loss
from r1q.distill.group import joined
from r1q.distill.network import load_network, product_dtype
from r1q.distill.student import load_student
from r1q.distill.text import WindowText
from r1q.distill.train import Plan, distill
from r1q.models.source import ModelSource

teacher, student, folder = map(Path, sys.argv[1:])
with joined(6) as group:
    taught = load_student(student)
    text = WindowText(np.random.default_rng(3).integers(0, 60, (32, 16)), 0, {})
    loss = divergence_loss(taught, load_network(ModelSource.open(teacher), matrices=product_dtype()))
    *_, now = distill(loss, taught.tensors, text, Plan(steps=1, rows=6, lr=1e-3), folder, group=group)
    values = np.concatenate([tensor.detach().numpy().reshape(-1) for tensor in taught.tensors.values()])
    np.save(folder / f"rank{group.rank}.npy", np.append(values, [now.loss, now.held_out]))
    group.require_equal(taught.tensors)
    if group.size > 1:
        try:
            group.require_equal({"x": torch.tensor([float(group.rank)])})
        except CheckError:
            (folder / f"differs{group.rank}").touch()
"""


def test_two_processes_take_the_step_of_one(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, student = make_model("llama", seed=1), make_model("llama", num_layers=1, intermediate_size=64, seed=2)
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    asked = [str(script), str(teacher), str(student)]
    monkeypatch.setattr(sys, "argv", [*asked, str(tmp_path / "one")])
    runpy.run_path(str(script))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(r1q.__file__).parents[1])}
    done = subprocess.run(
        [*TORCHRUN, *asked, str(tmp_path / "two")], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (np.load(tmp_path / "two" / f"rank{rank}.npy") for rank in (0, 1))
    np.testing.assert_array_equal(first, second)
    assert (tmp_path / "two" / "differs0").exists()
    assert (tmp_path / "two" / "differs1").exists()
    alone = np.load(tmp_path / "one" / "rank0.npy")
    # Each half's gradient is rounded once more, in the dtype of products; a loss is a sum of those of its rows.
    eps = torch.finfo(product_dtype()).eps
    np.testing.assert_allclose(first[-2], alone[-2], rtol=max(eps, 1e-5))
    ours, theirs = (_gradients(tmp_path / name / STATE) for name in ("two", "one"))
    assert np.linalg.norm(ours - theirs) <= max(eps, 1e-5) * np.linalg.norm(theirs)
    assert np.linalg.norm(theirs) > 0


def test_torchrun_makes_a_student_that_the_first_process_alone_writes(command: list[str], tmp_path: Path) -> None:
    asked = [*command, "--steps", "2", "--every", "1"]
    run = subprocess.run(
        [*TORCHRUN, *asked, "-o", str(tmp_path / "two")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("step 2 of 2") == run.stdout.count("done: ") == 1
    assert (tmp_path / "two" / "model.safetensors").is_file()
    assert not (tmp_path / "two" / "distilling").exists()
