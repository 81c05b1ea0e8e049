"""A calibrated run that is killed, anywhere, and run again: the same bytes, no finished block twice, nothing left behind."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from r1q.core.checkpoint import JOURNAL, MANIFEST, QuantizedCheckpoint
from r1q.core.errors import UsageError
from r1q.core.recipe import Recipe
from r1q.models.source import ModelSource
from r1q.plan.plan import make_plan
from r1q.quantize import run as loop
from r1q.quantize.engine import Engine
from r1q.quantize.run import Calibration, Event, Request, quantize_checkpoint

MakeModel = Callable[..., Path]
ENGINE = Engine(effort="default", threads=1, isa="here", compute="float32", tile=32)
FILES = ["embedding", "block-00000", "block-00001", "block-00002", "head"]


pytestmark = pytest.mark.usefixtures("one_core")


@pytest.fixture
def model(make_model: MakeModel) -> Path:
    return make_model("qwen2", num_layers=3)


def request(model: Path, *, engine: Engine = ENGINE, scheme: str = "q4_0", seed: int = 0, samples: int = 5) -> Request:
    plan = make_plan(ModelSource.open(model), Recipe.named(scheme), (), calibrated=True)
    tokens = np.random.default_rng(seed).integers(0, 320, (samples, 16))
    return Request(
        model=plan.model,
        recipe=plan.recipe,
        planned=plan.tensors,
        method="gptq",
        versions={"r1q": "test"},
        calibrated=Calibration(tokens=tokens, record={"text": seed, "samples": samples}, engine=engine),
    )


def start(model: Path, folder: Path, **options: object) -> Iterator[Event]:
    return quantize_checkpoint(ModelSource.open(model), request(model, **options), folder)  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != JOURNAL)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def journaled(folder: Path) -> set[str]:
    path = folder / JOURNAL
    lines = path.read_bytes().splitlines() if path.exists() else []
    return {json.loads(line)["file"] for line in lines if line}


def names(events: list[Event], what: str) -> list[str]:
    return [event.name.partition(".")[0] for event in events if event.what == what]


def test_a_kill_between_any_two_events_changes_no_byte(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("llama", num_layers=2)
    events = list(start(model, tmp_path / "whole"))
    files = names(events, "file")
    assert files == [FILES[0], *FILES[1:3], FILES[-1]]
    whole = contents(tmp_path / "whole")
    assert not [name for name in whole if "hidden" in name or "tmp" in name]
    for stop in range(1, len(events)):
        cut = tmp_path / f"cut-{stop}"
        running = start(model, cut)
        for _ in range(stop):
            next(running)
        running.close()  # type: ignore[attr-defined]
        done = journaled(cut)
        again = list(start(model, cut))
        if stop < len(events) - 1:
            assert {f"{name}.safetensors" for name in names(again, "kept")} == done
            assert not {f"{name}.safetensors" for name in names(again, "file")} & done
            assert sorted(names(again, "kept") + names(again, "file")) == sorted(files)
        assert contents(cut) == whole


def test_a_run_killed_in_every_block_ends_in_the_same_bytes(model: Path, tmp_path: Path) -> None:
    """One folder, killed after every stage that is new, as often as there are stages."""
    list(start(model, tmp_path / "whole"))
    kills = 0
    for stop in (1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4, 99):
        running, stages = start(model, tmp_path / "cut"), 0
        for event in running:
            stages += event.what == "stage"
            if stages == stop and event.what == ("file" if stop == 4 else "stage"):
                kills += 1
                break
        running.close()  # type: ignore[attr-defined]
    assert kills == 12
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


# One process that imports everything, and forks a child for each run: importing takes longer than running.
SCRIPT = """
import os, random, runpy, signal, sys, time
import torch
from pathlib import Path
test = runpy.run_path(sys.argv[1])
model, folder, kills = Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])

def child(path):
    process = os.fork()
    if process == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            for _ in test["start"](model, path):
                pass
            code = 0
        finally:
            os._exit(code)
    return process

def ended(process, options=0):
    found, status = os.waitpid(process, options)
    assert not found or os.WIFSIGNALED(status) or status == 0, status
    return found and os.WIFSIGNALED(status)

assert not ended(child(folder / "whole"))
chance, killed = random.Random(5), 0
for number in range(kills):
    process = child(folder / "cut")
    while len(test["journaled"](folder / "cut")) <= number // 2 and os.waitid(
        os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT
    ) is None:
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.05))
    os.kill(process, signal.SIGKILL)
    killed += ended(process)
assert not ended(child(folder / "cut"))
print(killed)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
def test_sigkill_at_any_moment_changes_no_byte(make_model: MakeModel, tmp_path: Path) -> None:
    """Two kills on the way from each file to the next but one, while blocks are coded, written, or their hidden states are."""
    command = [sys.executable, "-c", SCRIPT, __file__, str(make_model(num_layers=5)), str(tmp_path), "8"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 4, "the kills came too late to be any"
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_kill_just_before_the_manifest_leaves_nothing_behind(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(start(model, tmp_path / "whole"))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_write_manifest", killed)
        with pytest.raises(KeyboardInterrupt):
            list(start(model, tmp_path / "cut"))
    # Behind the manifest nobody would look again: hidden states are gone before it.
    assert not list((tmp_path / "cut").glob("hidden-*"))
    again = list(start(model, tmp_path / "cut"))
    assert names(again, "kept") == FILES
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def stop_after(model: Path, folder: Path, file: str) -> None:
    running = start(model, folder)
    for event in running:
        if event.what == "file" and event.name.startswith(file):
            break
    running.close()  # type: ignore[attr-defined]


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("change", [Path.unlink, damage], ids=["missing", "damaged"])
@pytest.mark.parametrize("last", ["block-00000", "block-00001", "block-00002"])
def test_without_its_hidden_states_a_run_begins_its_blocks_again(
    model: Path, tmp_path: Path, last: str, change: Callable[[Path], None]
) -> None:
    list(start(model, tmp_path / "whole"))
    stop_after(model, tmp_path / "cut", last)
    (state,) = (tmp_path / "cut").glob("hidden-*.safetensors")
    change(state)
    again = list(start(model, tmp_path / "cut"))
    assert names(again, "kept") == ["embedding"]
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("change", [Path.unlink, damage], ids=["missing", "damaged"])
def test_a_file_of_a_finished_run_that_is_gone_or_damaged_comes_back(
    model: Path, tmp_path: Path, file: str, change: Callable[[Path], None]
) -> None:
    list(start(model, tmp_path / "out"))
    whole = contents(tmp_path / "out")
    change(tmp_path / "out" / f"{file}.safetensors")
    assert file in names(list(start(model, tmp_path / "out")), "file")
    assert contents(tmp_path / "out") == whole
    assert QuantizedCheckpoint.open(tmp_path / "out").damaged_files() == []


@pytest.mark.parametrize("file", FILES[:3])
def test_a_file_of_an_unfinished_run_that_is_damaged_comes_back(model: Path, tmp_path: Path, file: str) -> None:
    list(start(model, tmp_path / "whole"))
    stop_after(model, tmp_path / "cut", "block-00001")
    damage(tmp_path / "cut" / f"{file}.safetensors")
    assert file in names(list(start(model, tmp_path / "cut")), "file")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_the_same_run_again_changes_nothing(model: Path, tmp_path: Path) -> None:
    list(start(model, tmp_path / "out"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert [event.what for event in start(model, tmp_path / "out")] == ["already done"]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


OTHERS: list[tuple[dict[str, object], str]] = [
    ({"seed": 1}, "calibration.text"),
    ({"samples": 4}, "calibration.samples"),
    ({"scheme": "q5_0"}, "recipe"),
    ({"engine": dataclasses.replace(ENGINE, effort="fast")}, "engine.effort"),
    ({"engine": dataclasses.replace(ENGINE, damp=0.1)}, "engine.damp"),
    ({"engine": dataclasses.replace(ENGINE, threads=2)}, "engine.threads"),
    ({"engine": dataclasses.replace(ENGINE, passes=3)}, "engine.passes"),
    ({"engine": dataclasses.replace(ENGINE, isa="elsewhere")}, "engine.isa"),
]


@pytest.mark.parametrize("finished", [True, False])
def test_another_text_or_engine_in_the_same_folder_is_refused_by_name(
    model: Path, tmp_path: Path, finished: bool
) -> None:
    stop_after(model, tmp_path / "out", "nothing" if finished else "block-00000")
    before = contents(tmp_path / "out")
    assert (MANIFEST in before) == finished
    for options, named in OTHERS:
        with pytest.raises(UsageError, match=rf"holds another job \(different: .*{named}"):
            list(start(model, tmp_path / "out", **options))
        assert contents(tmp_path / "out") == before


def test_hidden_states_in_files_give_the_same_bytes_and_leave_none(model: Path, tmp_path: Path) -> None:
    """And a run begun in memory may go on in files."""
    spilling = dataclasses.replace(ENGINE, spill=True)
    list(start(model, tmp_path / "memory"))
    list(start(model, tmp_path / "files", engine=spilling))
    stop_after(model, tmp_path / "both", "block-00000")
    list(start(model, tmp_path / "both", engine=spilling))
    assert contents(tmp_path / "memory") == contents(tmp_path / "files") == contents(tmp_path / "both")
    assert not [name for name in contents(tmp_path / "files") if "tmp" in name or "hidden" in name]
