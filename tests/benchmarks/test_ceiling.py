"""A child's ceiling: by a control group where this process may make one, and by watching; real children that ask for too much."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from r1q.benchmarks import ceiling, isolate
from r1q.benchmarks.ceiling import Fence
from r1q.core.errors import ResourceError

MIB = 1 << 20
TAKE = """
held = []
for step in range(job['steps']):
    held.append(bytearray(b'x' * (16 << 20)))
    yield {'mib': 16 * (step + 1)}
    import time; time.sleep(0.03)
"""


@pytest.fixture
def take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the target of a task that takes 16 MiB a step."""
    (tmp_path / "taking.py").write_text("def task(job):\n" + textwrap.indent(TAKE, "    "))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "taking:task"


@pytest.fixture(params=["group", "watched"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    if request.param == "watched":
        monkeypatch.setattr(ceiling, "_enclose", lambda *_: None)
        return "watched 50 times a second"
    probe = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    fence = Fence(probe.pid, 64 * MIB)
    probe.communicate(b"\n")
    fence.close()
    if "control group" not in fence.how:
        pytest.skip("this process may make no control group")
    return "held by its control group"


def test_a_child_below_its_ceiling_ends_well_and_says_how_it_was_held(take: str, way: str) -> None:
    first, *rest = isolate.run(take, {"steps": 2}, what="taking", ceiling=512 * MIB)
    assert first == {"ceiling": way}
    assert [message["mib"] for message in rest] == [16, 32]


def test_a_child_over_its_ceiling_is_ended_and_what_it_said_is_kept(take: str, way: str) -> None:
    arrived: list[isolate.Message] = []
    with pytest.raises(ResourceError, match="taking went over its ceiling of 160 MiB of memory and was ended"):
        arrived.extend(isolate.run(take, {"steps": 40}, what="taking", ceiling=160 * MIB))
    assert {"ceiling": way} in arrived
    assert {"mib": 16} in arrived
    assert {"mib": 640} not in arrived


def test_a_group_is_taken_away_again(take: str, way: str) -> None:
    def groups() -> set[Path]:
        return set(ceiling.CGROUPS.rglob(f"r1q-{os.getpid()}-*"))

    before = groups()
    list(isolate.run(take, {"steps": 1}, what="taking", ceiling=512 * MIB))
    assert groups() == before


def fake(root: Path, proc: Path, lines: str, folders: dict[str, tuple[str, ...]]) -> None:
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text(lines)
    for folder in folders:
        (root / folder).mkdir(parents=True)


def test_both_versions_of_control_groups_are_looked_for(tmp_path: Path) -> None:
    root, proc = tmp_path / "cgroup", tmp_path / "proc"
    fake(root, proc, "4:memory:/mine\n0::/box\n", {"memory/mine": (), "box": (), "unified/box": ()})
    found = ceiling._parents(root, proc)
    assert (root / "memory/mine", ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")) in found
    assert (root / "box", ("memory.max", "memory.swap.max")) in found
    # A folder where no such control appears is no ceiling: nothing is left behind, and the child is watched.
    assert ceiling._enclose(os.getpid(), MIB, root, proc) is None
    assert not list(root.rglob("r1q-*"))


@pytest.mark.parametrize(("file", "text", "killed"), [
    ("memory.events", "low 0\noom 1\noom_kill 1\n", True),
    ("memory.events", "oom_kill 0\n", False),
    ("memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n", True),
])  # fmt: skip
def test_a_group_says_whether_the_kernel_ended_one(tmp_path: Path, file: str, text: str, killed: bool) -> None:
    (tmp_path / file).write_text(text)
    assert ceiling._killed(tmp_path) == killed
