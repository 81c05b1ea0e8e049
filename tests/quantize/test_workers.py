"""Crews: what --workers may say; processes that die in the middle, or at every try; the bytes are those of one process."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from safetensors.numpy import load_file, save_file

from r1q.core.checkpoint import JOURNAL
from r1q.core.errors import InputError, MissingError, ResourceError, UsageError
from r1q.core.recipe import Recipe
from r1q.models.source import ModelSource
from r1q.plan.plan import make_plan
from r1q.quantize import processes
from r1q.quantize.crews import Workers, parse_workers
from r1q.quantize.engine import Engine
from r1q.quantize.processes import Processes
from r1q.quantize.run import Calibration, Event, Request, quantize_checkpoint
from r1q.quantize.tasks import RowsTask, Site

MakeModel = Callable[..., Path]
ROOT = Path(__file__).resolve().parents[2]
ENGINE = Engine(effort="default", threads=1, isa="here", compute="float32", tile=32, few=40)


pytestmark = pytest.mark.usefixtures("one_core")


@pytest.fixture(scope="module")
def model(moe_models: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One dense block and one with eight experts, of which some see fewer than 40 tokens of 96."""
    settings = {"num_hidden_layers": 2, "moe_intermediate_size": 64}
    latent = {"q_lora_rank": 32, "qk_nope_head_dim": 32, "v_head_dim": 32}
    folder: Path = moe_models.write_moe_model(
        tmp_path_factory.mktemp("workers") / "Tiny", "deepseek_v3", **settings, **latent
    )
    return folder


def start(model: Path, folder: Path, workers: str = "1") -> Iterator[Event]:
    source = ModelSource.open(model)
    plan = make_plan(source, Recipe.named("q4_0"), (), calibrated=True)
    tokens = np.random.default_rng(7).integers(0, 300, (6, 16))
    request = Request(
        model=plan.model,
        recipe=plan.recipe,
        planned=plan.tensors,
        method="gptq",
        versions={"r1q": "test"},
        calibrated=Calibration(tokens=tokens, record={}, engine=ENGINE, workers=workers),
    )
    return quantize_checkpoint(source, request, folder)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != JOURNAL)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("1", Workers()),
        ("12", Workers(count=12)),
        ("ray", Workers(address="local")),
        ("ray:auto", Workers(address="auto")),
        ("ray://head:10001", Workers(address="ray://head:10001")),
    ],
)
def test_workers_are_a_number_or_ray(text: str, wanted: Workers) -> None:
    assert parse_workers(text) == wanted


@pytest.mark.parametrize("text", ["", "0", "-1", "2.5", "²", "9999", "Ray", "ray://", "rayon", "http://x", "auto"])
def test_anything_else_is_refused_with_what_may_be_said(text: str) -> None:
    with pytest.raises(UsageError, match="give a number of processes"):
        parse_workers(text)


def children() -> set[psutil.Process]:
    """Return the spawned workers of this process; multiprocessing's resource tracker is none."""
    return {one for one in psutil.Process().children() if "spawn_main" in " ".join(one.cmdline())}


def test_two_processes_and_one_that_replaces_a_killed_one_write_the_bytes_of_one(model: Path, tmp_path: Path) -> None:
    list(start(model, tmp_path / "one"))
    one = contents(tmp_path / "one")
    assert "rounded by importance" in str(one["manifest.json"])
    before, killed, seen = children(), 0, list[Event]()
    for event in start(model, tmp_path / "two", "2"):
        seen.append(event)
        if event.name.startswith("blk.1.ffn_up_exps") and not killed:
            (victim, *_) = children() - before
            for worker in children() - before:
                worker.send_signal(signal.SIGINT)  # a terminal's Ctrl-C reaches all: workers do not mind
            victim.send_signal(signal.SIGKILL)
            killed += 1
    assert killed == 1
    assert not children() - before
    assert contents(tmp_path / "two") == one
    assert [event.name for event in seen if event.what == "stage"][-1] == "blk.1.ffn_down_exps." + seen_last(one)


def seen_last(one: dict[str, bytes]) -> str:
    """Return the number of the expert that is coded last: the last one that leans on others."""
    (counts,) = json.loads(one["manifest.json"])["expert_tokens"].values()
    return str(max(expert for expert, tokens in enumerate(counts) if tokens < ENGINE.few))


class Once:
    """A task that ends the first worker which unpickles it, and is done by the second."""

    name = "once.weight"

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[object, ...]:
        done = (
            f"__import__('types').SimpleNamespace(do=lambda site, arrays: open({self.mark + '.done'!r}, 'x').close())"
        )
        first = f"(open({self.mark!r}, 'x').close(), __import__('os')._exit(9))"
        return eval, (f"{done} if __import__('os').path.exists({self.mark!r}) else {first}",)

    def do(self, site: object, arrays: object) -> None:
        raise AssertionError("it is never done here")


class Deadly:
    """A task that ends whoever unpickles it."""

    name = "deadly.weight"

    def __reduce__(self) -> tuple[object, ...]:
        return os._exit, (9,)

    def do(self, site: object, arrays: object) -> None:
        raise AssertionError("it is never done here")


def test_errors_of_workers_are_ours_and_name_the_tensor(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight that is not a number; a task at which one worker dies, and one at which all do."""
    folder = make_model("llama", dtype="F32")
    tensors = {key: np.array(array) for key, array in load_file(folder / "model.safetensors").items()}
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name][3, 3] = np.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    source = ModelSource.open(folder)
    planned = {one.spec.name: one for one in make_plan(source, Recipe.named("q4_0"), ()).tensors}
    sound = "model.layers.0.self_attn.k_proj.weight"
    site = Site.of(source, ENGINE, tmp_path)

    def task(which: str) -> RowsTask:
        rows = slice(0, planned[which].spec.rows)
        return RowsTask(layer=0, planned=planned[which], rows=rows, tokens=1, residual=False, damp=0.05, events=())

    crew = Processes(1, tmp_path)
    try:
        lent = crew.lend({"importance": torch.ones(planned[sound].spec.columns)})
        doing = crew.do(site, [(task(sound), lent), (task(name), lent)])
        assert next(doing).name == sound
        assert len(list(tmp_path.glob("parts-00000/attn_k.*"))) == 1
        with pytest.raises(InputError, match=f"{name} holds NaN or infinite weights"):
            next(doing)
        assert [one.name for one in crew.do(site, [(Once(tmp_path / "once"), lent)])] == ["once.weight"]
        assert (tmp_path / "once.done").exists()
        monkeypatch.setattr(processes, "TRIES", 1)  # every death costs a start
        with pytest.raises(ResourceError, match=r"deadly\.weight: 3 workers died at it.*fewer --workers"):
            list(crew.do(site, [(Deadly(), lent)]))
        for other, says in (
            (dataclasses.replace(site, numbers="an abacus"), "other last bits"),
            (dataclasses.replace(site, job="0"), "does not see the run's"),
        ):
            with pytest.raises(MissingError, match=says):
                list(crew.do(other, [(task(sound), lent)]))
        crew.take_back(lent)
        assert not list(tmp_path.glob(".r1q-tmp-*"))
    finally:
        crew.close()


SCRIPT = """
import runpy, sys, torch
from pathlib import Path
if __name__ == "__main__":
    test = runpy.run_path(sys.argv[1])
    torch.set_num_threads(1)
    for event in test["start"](Path(sys.argv[2]), Path(sys.argv[3]), "2"):
        print(event.name, flush=True)
"""


def lives(process: psutil.Process) -> bool:
    """Return whether a process runs; one that ended is a zombie where nobody takes it off."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_a_run_that_is_killed_leaves_no_worker_and_goes_on(model: Path, tmp_path: Path) -> None:
    list(start(model, tmp_path / "one"))
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), __file__, str(model), str(tmp_path / "cut")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as running:
        assert running.stdout is not None
        next(line for line in running.stdout if line.startswith("blk.1.ffn_up_exps"))
        workers = psutil.Process(running.pid).children()
        running.kill()
    assert len(workers) >= 2
    deadline = time.monotonic() + 60
    while any(map(lives, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(lives, workers))
    list(start(model, tmp_path / "cut"))
    assert contents(tmp_path / "cut") == contents(tmp_path / "one")


def test_a_source_opens_again_in_another_process(model: Path) -> None:
    source = ModelSource.open(model)
    again = pickle.loads(pickle.dumps(source))
    name = source.tensors[3].name
    assert again.config == source.config
    assert np.array_equal(again.read_rows(name, 0, 1), source.read_rows(name, 0, 1))
