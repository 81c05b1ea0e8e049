"""Counting cores on made-up machines: a /sys and a /proc written by the test."""

import os
from pathlib import Path

import pytest

from r1q.runtimes import cores


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the root of a machine of 4 cores with 2 hyper-threads each (cpu 0–3 and 4–7), no limits."""
    for cpu in range(8):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "core_cpus_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)), raising=False)
    return tmp_path


def count(machine: Path) -> int:
    return cores.physical_cores(machine / "sys", machine / "proc")


def test_two_hyper_threads_are_one_core(machine: Path) -> None:
    assert count(machine) == 4


@pytest.mark.parametrize(("allowed", "expected"), [({0, 4}, 1), ({0, 1}, 2), ({0, 4, 1}, 2), ({3}, 1)])
def test_affinity_limits(machine: Path, monkeypatch: pytest.MonkeyPatch, allowed: set[int], expected: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: allowed, raising=False)
    assert count(machine) == expected


@pytest.mark.parametrize(
    ("quota", "expected"),
    [
        ("300000 100000", 3),
        ("250000 100000", 2),
        ("50000 100000", 1),
        ("max 100000", 4),
        ("900000 100000", 4),
        ("junk", 4),
    ],
)
def test_quota_of_the_second_kind_is_rounded_down(machine: Path, quota: str, expected: int) -> None:
    (machine / "sys/fs/cgroup/cpu.max").write_text(quota + "\n")
    assert count(machine) == expected


def test_quota_of_a_group_above_counts(machine: Path) -> None:
    inner = machine / "sys/fs/cgroup/outer/inner"
    inner.mkdir(parents=True)
    (inner / "cpu.max").write_text("max 100000\n")
    (inner.parent / "cpu.max").write_text("200000 100000\n")
    (machine / "proc/self/cgroup").write_text("0::/outer/inner\n")
    assert count(machine) == 2


@pytest.mark.parametrize(("quota", "expected"), [("100000", 1), ("-1", 4)])
def test_quota_of_the_first_kind(machine: Path, quota: str, expected: int) -> None:
    folder = machine / "sys/fs/cgroup/cpu/box"
    folder.mkdir(parents=True)
    (folder / "cpu.cfs_quota_us").write_text(quota)
    (folder / "cpu.cfs_period_us").write_text("100000")
    (machine / "proc/self/cgroup").write_text("12:memory:/other\n4:cpu,cpuacct:/box\n")
    assert count(machine) == expected


def test_a_machine_that_says_nothing_has_at_least_one(tmp_path: Path) -> None:
    assert count(tmp_path) >= 1
