"""Bandwidth, energy, cold files and GPUs: against arithmetic, counters written by hand, the kernel's own word, and a real program."""

import mmap
import os
import stat
from pathlib import Path

import numpy as np
import pytest

from r1q.benchmarks import bandwidth, cold, gpu
from r1q.benchmarks.bandwidth import Bandwidth, keep, kept, machine_key, measure
from r1q.benchmarks.energy import find_counters


def test_the_probe_measures_something_a_memory_could_do() -> None:
    found = measure(1, 8 << 20, runs=2)
    # Faster than any disk, slower than any cache; and no copy of numpy's is ten times as fast.
    assert 5e8 < found.read < 5e12
    assert 5e8 < found.triad < 5e12
    assert found.threads == 1
    assert found.best == max(found.read, found.triad)


def test_the_probes_kernels_compute_what_they_say() -> None:
    read, triad = bandwidth._kernels()
    words = np.arange(1003, dtype=np.uint64)
    # Parts of 1003 words: the sum of each part's exclusive or, by Python's integers.
    expected = 0
    for part in range(4):
        mixed = 0
        for word in range(part * 1003 // 4, (part + 1) * 1003 // 4):
            mixed ^= word
        expected += mixed
    assert int(read(words, 4)) == expected
    out, left, right = np.zeros(5), np.arange(5.0), np.ones(5)
    triad(out, left, right, 3.0)
    assert out.tolist() == [3, 4, 5, 6, 7]


def test_a_measurement_is_kept_for_its_machine_alone(tmp_path: Path) -> None:
    one, two = Bandwidth(read=1e9, triad=2e9, threads=2), Bandwidth(read=3e9, triad=2e9, threads=8)
    keep(machine_key("A", 2), one, tmp_path / "deep")
    keep(machine_key("B", 8), two, tmp_path / "deep")
    assert kept(machine_key("A", 2), tmp_path / "deep") == one
    assert kept(machine_key("B", 8), tmp_path / "deep") == two
    assert kept(machine_key("A", 4), tmp_path / "deep") is None


@pytest.mark.parametrize(
    "text", ["", "[]", '{"k": 3}', '{"k": {"read": "x"}}', '{"k": {"read": -1, "triad": 0, "threads": 1}}']
)
def test_a_damaged_cache_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / bandwidth.CACHE).write_text(text)
    assert kept("k", tmp_path) is None
    keep("k", Bandwidth(read=1.0, triad=1.0, threads=1), tmp_path)
    assert kept("k", tmp_path) is not None


def test_a_folder_that_cannot_be_written_costs_nothing() -> None:
    keep("k", Bandwidth(read=1.0, triad=1.0, threads=1), Path("/proc/none"))


def package(root: Path, name: str, microjoules: int, label: str = "package-0") -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "name").write_text(label + "\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text("1000000\n")
    return folder


def test_energy_adds_packages_and_sees_a_counter_wrap(tmp_path: Path) -> None:
    one, two = package(tmp_path, "intel-rapl:0", 100), package(tmp_path, "intel-rapl:1", 900_000, "package-1")
    package(tmp_path, "intel-rapl:0:0", 5, "core")
    package(tmp_path, "intel-rapl:2", 5, "psys")
    counters = find_counters(tmp_path)
    assert counters.folders == (one, two)
    before = counters.read()
    (one / "energy_uj").write_text("300100")
    (two / "energy_uj").write_text("200000")
    # 0.3 J, and from 0.9 over the end at 1 to 0.2: 0.3 J.
    assert counters.joules(before, counters.read()) == pytest.approx(0.6)


def test_without_counters_there_is_no_energy(tmp_path: Path) -> None:
    assert find_counters(tmp_path / "none").folders == ()
    package(tmp_path, "intel-rapl:0", 0).joinpath("energy_uj").unlink()
    assert find_counters(tmp_path).folders == ()


def test_a_forgotten_file_is_not_in_memory_and_a_locked_one_is_said(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(os.urandom(64 * mmap.PAGESIZE + 5))
    with path.open("rb") as file:
        file.read()
        size = path.stat().st_size
        if cold.resident_pages(file.fileno(), size) != 65:
            pytest.skip("this disk keeps no pages")
        said = cold.forget([path])
        left = cold.resident_pages(file.fileno(), size)
    assert left is not None
    # Either the pages are gone, or we are told that they are not: a disk in memory has nowhere else to put them.
    assert (left <= 65 * cold.WARM) == (said == "")
    if left:
        assert "stayed in memory" in said


def test_a_disk_in_memory_is_never_cold() -> None:
    shm = Path("/dev/shm")
    if not os.access(shm, os.W_OK):
        pytest.skip("no /dev/shm")
    path = shm / f"r1q-cold-{os.getpid()}"
    try:
        path.write_bytes(bytes(8 * mmap.PAGESIZE))
        assert "100% of it stayed in memory" in cold.forget([path])
    finally:
        path.unlink()


SMI = """#!/bin/sh
printf 'NVIDIA Imaginary 90, 24, 81559\\nAnother, with a comma, 1000, 2000\\n[N/A], x, y\\n'
"""


def nvidia_smi(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = folder / "nvidia-smi"
    tool.write_text(text)
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_gpus_are_what_nvidia_smi_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(tmp_path, SMI, monkeypatch)
    assert gpu.query() == [
        ("NVIDIA Imaginary 90", 24 << 20, 81559 << 20),
        ("Another, with a comma", 1000 << 20, 2000 << 20),
    ]
    assert gpu.find_gpus(tmp_path)[0] == ("NVIDIA Imaginary 90", "Another, with a comma")


def test_memory_of_gpus_is_the_most_above_what_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counting = '#!/bin/sh\necho x >> "$0.calls"\nn=$(wc -l < "$0.calls")\necho "G, $((100 + 50 * (n > 1))), 1000"\n'
    nvidia_smi(tmp_path, counting, monkeypatch)
    monkeypatch.setattr(gpu, "LOOK", 0.01)
    watch = gpu.MemoryWatch()
    with watch.watching():
        while watch.peak is None:
            os.sched_yield()
    assert watch.peak == 50 << 20


def test_without_a_gpu_it_says_what_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    names, looked = gpu.find_gpus(tmp_path)
    assert names == ()
    assert "nvidia-smi is not installed" in looked
    nvidia_smi(tmp_path, "#!/bin/sh\nexit 9\n", monkeypatch)
    assert "nvidia-smi names none" in gpu.find_gpus(tmp_path)[1]
    (tmp_path / "dri").mkdir()
    (tmp_path / "dri" / "renderD128").touch()
    assert gpu.find_gpus(tmp_path)[0] == (f"GPU ({tmp_path}/dri/renderD128)",)
