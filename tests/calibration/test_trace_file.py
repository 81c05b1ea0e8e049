"""The file of traces: whatever moment it is killed at, the end is the same and nothing finished is made again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from r1q.calibration.trace_file import write_traces
from r1q.calibration.traces import Trace
from r1q.core.errors import ResourceError, UsageError

RUN = {"model": "m", "seed": 3}
ROOT = Path(__file__).resolve().parents[2]


class Maker:
    """Makes traces out of order, and remembers which; dies before the one at `dies_at`."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.made: list[int] = []
        self.dies_at = dies_at

    def __call__(self, missing: Sequence[int]) -> Iterator[Trace]:
        for index in sorted(missing, key=lambda index: (index * 7) % 10):
            if len(self.made) == self.dies_at:
                raise KeyboardInterrupt
            self.made.append(index)
            yield {"index": index, "messages": [{"role": "user", "content": f"«{index}»\n想"}], "finished": True}


def fill(path: Path, count: int, maker: Maker) -> list[tuple[int, int]]:
    return [(step.done, step.count) for step in write_traces(path, count, maker, run=RUN)]


def test_traces_are_in_the_order_of_problems_and_each_step_is_told(tmp_path: Path) -> None:
    path, maker = tmp_path / "traces.jsonl", Maker()
    assert fill(path, 5, maker) == [(done, 5) for done in range(6)]
    assert maker.made != sorted(maker.made)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["index"] for line in lines] == list(range(5))
    assert lines[3]["messages"][0]["content"] == "«3»\n想"
    assert list(tmp_path.iterdir()) == [path]


def test_a_finished_file_is_left_as_it_is_and_a_larger_count_adds(tmp_path: Path) -> None:
    path, maker = tmp_path / "traces.jsonl", Maker()
    fill(path, 5, maker)
    before = path.stat()
    assert fill(path, 5, maker) == [(5, 5)]
    assert fill(path, 3, maker) == [(3, 3)]
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    fill(path, 8, maker)
    fill(tmp_path / "at-once.jsonl", 8, Maker())
    assert path.read_bytes() == (tmp_path / "at-once.jsonl").read_bytes()
    assert sorted(maker.made) == list(range(8))


def test_every_place_to_be_killed_at_leads_to_the_same_file(tmp_path: Path) -> None:
    fill(tmp_path / "whole.jsonl", 4, Maker())
    whole = (tmp_path / "whole.jsonl").read_bytes()
    path, part = tmp_path / "traces.jsonl", tmp_path / "traces.jsonl.part"
    with pytest.raises(KeyboardInterrupt):
        fill(path, 4, Maker(dies_at=3))
    assert not path.exists()
    held = part.read_bytes()
    ends = [at + 1 for at, byte in enumerate(held) if byte == ord("\n")]
    assert len(ends) == 3
    for cut in sorted({*range(0, len(held), 7), *(end + near for end in ends for near in (-2, -1, 0) if end)}):
        path.unlink(missing_ok=True)
        part.write_bytes(held[:cut])
        maker = Maker()
        fill(path, 4, maker)
        assert path.read_bytes() == whole
        # A line that lacks nothing but its end is whole.
        assert len(maker.made) == 4 - sum(end - 1 <= cut for end in ends)
        assert not part.exists()


def test_a_kill_between_the_rename_and_the_end_loses_nothing(tmp_path: Path) -> None:
    path, maker = tmp_path / "traces.jsonl", Maker()
    fill(path, 3, maker)
    (tmp_path / "traces.jsonl.part").write_bytes(path.read_bytes())
    assert fill(path, 3, maker) == [(3, 3)]
    assert list(tmp_path.iterdir()) == [path]
    (tmp_path / "traces.jsonl.part").write_bytes(path.read_bytes())
    whole = path.read_bytes()
    path.unlink()
    assert fill(path, 3, maker) == [(3, 3)]
    assert path.read_bytes() == whole
    assert len(maker.made) == 3


SLOW = """
import sys, time
from pathlib import Path
from r1q.calibration.trace_file import write_traces
def make(missing):
    for index in missing:
        time.sleep(0.02)
        with open(sys.argv[2], "a") as log:
            log.write(f"{index}\\n")
        yield {"index": index, "text": "x" * 5000}
for _ in write_traces(Path(sys.argv[1]), 30, make, run={"a": 1}):
    pass
"""


def test_killed_for_real_again_and_again(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SLOW]
    subprocess.run([*command, str(tmp_path / "whole.jsonl"), str(tmp_path / "whole.log")], cwd=ROOT, check=True)
    path, log = tmp_path / "traces.jsonl", tmp_path / "log"
    kills = 0
    while not path.exists():
        running = subprocess.Popen([*command, str(path), str(log)], cwd=ROOT)
        if kills < 4:
            before = log.read_text().count("\n") if log.exists() else 0
            while running.poll() is None and (not log.exists() or log.read_text().count("\n") < before + 3):
                time.sleep(0.005)
            running.send_signal(signal.SIGKILL)
            kills += 1
        running.wait()
    assert kills == 4
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    made = [int(line) for line in log.read_text().split()]
    assert set(made) == set(range(30))
    assert len(made) <= 30 + kills  # at most the one in work is made again


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("traces.jsonl", b'{"text": "mine"}\n', "something else than traces"),
        ("traces.jsonl", b"\xff\xfe", "something else than traces"),
        ("traces.jsonl", b'{"index": 0, "run": "0123456789abcdef"}\n', "another run"),
        ("traces.jsonl.part", b'{"index": 0, "run": "0123456789abcdef"}\n', "another run"),
    ],
)
def test_what_is_not_ours_is_refused_and_left(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=reason):
        fill(tmp_path / "traces.jsonl", 3, Maker())
    assert (tmp_path / name).read_bytes() == content
    assert len(list(tmp_path.iterdir())) == 1


def test_no_traces_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least one"):
        fill(tmp_path / "traces.jsonl", 0, Maker())


def test_a_full_disk_says_so_and_keeps_what_is_there(mount_disk: Callable[[str], Path]) -> None:
    disk = mount_disk("size=64k")

    def large(missing: Sequence[int]) -> Iterator[Trace]:
        for index in missing:
            yield {"index": index, "text": "x" * 12_000}

    with pytest.raises(ResourceError, match="disk is full"):
        list(write_traces(disk / "traces.jsonl", 20, large, run=RUN))
    lines = (disk / "traces.jsonl.part").read_bytes().splitlines()
    assert [json.loads(line)["index"] for line in lines[:3]] == [0, 1, 2]
