"""Progress is counted from the events of real runs: it ends at everything, and a resumed run begins where it was."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from r1q.core.errors import CheckError, UsageError
from r1q.plan import progress
from r1q.plan.event_log import logged
from r1q.plan.job import Job, OpenedJob, open_job, plan_job, run_job
from r1q.plan.plan import Plan
from r1q.plan.progress import Work, show_run
from r1q.plan.walk import Exported

MakeModel = Callable[..., Path]


@pytest.fixture
def opened(make_model: MakeModel, tmp_path: Path) -> tuple[OpenedJob, Plan]:
    text = tmp_path / "text.txt"
    text.write_text("a thinker thinks: wait, let me think again. 12 + 30 = 42\n" * 40)
    model = make_model("llama", num_layers=3)
    job = Job(
        model=str(model),
        scheme="q4_0",
        effort="fast",
        calibration=str(text),
        samples=2,
        seq_len=32,
        output=tmp_path / "out",
    )
    found = open_job(job)
    return found, plan_job(found)


def test_work_grows_from_nothing_to_everything(opened: tuple[OpenedJob, Plan]) -> None:
    work = Work(opened[1], calibrated=True)
    assert (work.share, work.seconds_left, work.blocks) == (0, None, 3)
    shares, blocks = [0.0], [0]
    for event in run_job(*opened):
        if not isinstance(event, Exported):
            work.take(event)
            shares.append(work.share)
            blocks.append(work.block)
    assert shares == sorted(shares)
    assert work.share == pytest.approx(1)
    assert blocks == sorted(blocks)
    assert (work.block, work.where) == (3, "writing files")
    # Embedding and head are rounded, which takes next to no time beside three calibrated blocks.
    assert shares[1] < 0.05


def test_a_resumed_run_begins_where_it_was(opened: tuple[OpenedJob, Plan], tmp_path: Path) -> None:
    for event in run_job(*opened):
        if not isinstance(event, Exported) and event.what == "file" and event.name == "block-00001.safetensors":
            break
    work = Work(opened[1], calibrated=True)
    events = run_job(*opened)
    for event in events:
        if isinstance(event, Exported) or event.what != "kept":
            break
        work.take(event)
        assert work.seconds_left is None
    assert (work.kept, work.block) == (3, 2)
    assert 0.6 < work.share < 0.7
    lines = io.StringIO()
    show_run(Console(file=lines, width=200), events, opened[1], calibrated=True)
    assert "done: " in lines.getvalue()


def test_in_a_pipe_there_are_lines_only_for_long_runs(
    opened: tuple[OpenedJob, Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    said = io.StringIO()
    (path,) = show_run(Console(file=said, width=200), run_job(*opened), opened[1], calibrated=True)
    lines = said.getvalue().splitlines()
    told = [line for line in lines if " MB of memory" in line]
    assert [line.split(",")[0].strip() for line in told] == [f"block {n} of 3" for n in (0, 1, 2, 3, 3)]
    assert all(", about " in line for line in told[1:-1])
    monkeypatch.undo()
    again = io.StringIO()
    show_run(Console(file=again, width=200), run_job(*opened), opened[1], calibrated=True)
    assert again.getvalue().splitlines()[0].startswith(f"already done: {path}")


def test_a_terminal_gets_a_bar_with_block_time_and_memory(opened: tuple[OpenedJob, Plan]) -> None:
    screen = io.StringIO()
    show_run(Console(file=screen, width=200, force_terminal=True), run_job(*opened), opened[1], calibrated=True)
    assert "blk.2.ffn_down" in screen.getvalue()
    assert "block 3 of 3, 100 %" in screen.getvalue()
    assert " MB of memory" in screen.getvalue()


def test_every_event_is_a_line_of_the_log_and_the_error_that_ends_a_run_is_the_last(
    opened: tuple[OpenedJob, Plan], tmp_path: Path
) -> None:
    log = tmp_path / "log.jsonl"
    events = list(logged(run_job(*opened), log))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(lines) == len(events)
    assert [line["event"] for line in lines[-2:]] == ["done", "exported"]
    assert all(line["rss"] > 1 << 20 and line["time"] > 1.7e9 for line in lines)
    stages = [line["name"] for line in lines if line["event"] == "stage"]
    assert stages[:4] == ["blk.0.attn_v", "blk.0.attn_output", "blk.0.ffn_up", "blk.0.ffn_down"]
    coded = [line for line in lines if line["event"] == "tensor" and line["grid"] == "q4_0"]
    assert len(coded) == 1 + 3 * 7  # the embedding, and seven matrices a block
    assert all(0 < line["error"] < 0.2 for line in coded)
    assert [line["event"] for line in lines].count("file") == 5

    def fails() -> object:
        yield events[0]
        raise CheckError("--strict: blk.0: damping raised")

    with pytest.raises(CheckError):
        list(logged(fails(), log))  # type: ignore[arg-type]
    last = json.loads(log.read_text().splitlines()[-1])
    assert (last["event"], last["name"], last["message"]) == ("failed", "CheckError", "--strict: blk.0: damping raised")
    assert len(log.read_text().splitlines()) == len(lines) + 2
    with pytest.raises(UsageError, match="cannot write"):
        list(logged(iter(events), tmp_path))
