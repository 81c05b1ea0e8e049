"""Benches of these tests keep what they measure in a folder of their own, where a bandwidth lies already: probing takes seconds."""

from pathlib import Path

import pytest

from r1q.benchmarks.bandwidth import Bandwidth, keep, machine_key
from r1q.benchmarks.machine import machine

BANDWIDTH = Bandwidth(read=20e9, triad=19e9, threads=2)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Point the user's folders elsewhere, and keep a bandwidth there."""
    folder = tmp_path_factory.mktemp("user")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
    here = machine()
    keep(machine_key(here.cpu, here.cores), BANDWIDTH)
    return folder
