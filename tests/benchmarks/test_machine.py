"""What a machine says of itself, on a made-up /proc and on this one."""

import json
import platform
from dataclasses import asdict
from pathlib import Path

import numpy as np
import psutil

from r1q.benchmarks.machine import busy, machine, resident, versions

CPUINFO = """processor\t: 0
model name\t: Imaginary 9000
flags\t\t: fpu avx2 fma avx512_vnni weird

processor\t: 1
model name\t: Another
flags\t\t: avx
"""


def test_the_first_processor_speaks_and_known_features_are_kept(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(CPUINFO)
    found = machine(tmp_path)
    assert (found.cpu, found.features) == ("Imaginary 9000", ("avx2", "fma", "avx512_vnni"))


def test_a_machine_without_proc_has_a_processor_all_the_same(tmp_path: Path) -> None:
    assert machine(tmp_path / "absent").cpu == (platform.processor() or platform.machine())


def test_this_machine_tells_no_host_name() -> None:
    found = machine()
    assert 1 <= found.cores <= found.logical
    assert found.memory == psutil.virtual_memory().total
    node = platform.node()
    assert not node or node not in json.dumps(asdict(found)).split('"')


def test_versions_keep_what_the_runtime_says() -> None:
    found = versions({"engine": "1.2"})
    assert found["numpy"] == np.__version__
    assert found["engine"] == "1.2"
    assert "r1q" in found


def test_busy_is_a_fraction() -> None:
    assert 0 <= busy(0.01) <= 1


def test_the_peak_stays_when_memory_is_given_back() -> None:
    before, _ = resident()
    block = np.ones(64 << 20, dtype=np.uint8)
    during, _ = resident()
    assert during - before > 48 << 20  # pages that were written are resident
    del block
    after, peak = resident()
    assert peak >= during - (1 << 20)
    assert after <= peak
