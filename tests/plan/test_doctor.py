"""Doctor against real child processes, a library that crashes, tools that fail, and machines drawn as files."""

import io
import os
import stat
from collections.abc import Mapping
from pathlib import Path

import pytest
from rich.console import Console

from r1q import __version__
from r1q.core.errors import MissingError
from r1q.core.registry import Entry, Registry
from r1q.plan.doctor import Diagnosis, examine, refuse_unusable, unused_features
from r1q.plan.probe import probe_runtime
from r1q.plan.render_doctor import show_diagnosis
from r1q.plan.surroundings import find_gpus, look_around, memory_limit
from r1q.runtimes.base import RuntimeFactory


def registry(**entries: Entry) -> Registry[RuntimeFactory]:
    return Registry("runtime", {name.replace("_", "-"): entry for name, entry in entries.items()})


def shown(found: Diagnosis) -> str:
    console = Console(file=io.StringIO(), width=80, force_terminal=False, soft_wrap=True)
    show_diagnosis(console, found)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


LLAMA = Entry(target="r1q.runtimes.llama_cpp:LlamaCpp", about="llama.cpp", needs="llama_cpp", extra="llama-cpp")


@pytest.mark.runtime
def test_llama_cpp_is_ready_with_its_version_and_build(tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    found = examine(tmp_path, registry=registry(llama_cpp=LLAMA))
    (state,) = found.runtimes
    assert (state.state, state.formats, state.useful) == ("ready", ("gguf",), True)
    assert state.versions["llama-cpp-python"] == llama_cpp.__version__
    built = llama_cpp.llama_print_system_info().decode()
    assert state.versions["llama.cpp build"] == " ".join(built.split())
    refuse_unusable(found)
    assert f"llama-cpp-python {llama_cpp.__version__}" in shown(found)


def test_what_is_missing_is_told_with_what_installs_it(tmp_path: Path) -> None:
    entries = registry(gone=Entry(target="a:b", needs="no_such_module_here", extra="llama-cpp"))
    found = examine(tmp_path, registry=entries)
    assert (found.runtimes[0].state, found.runtimes[0].detail) == ("missing", "pip install 'r1q[llama-cpp]'")
    assert found.advice[0] == "gone is not installed: pip install 'r1q[llama-cpp]'"
    with pytest.raises(
        MissingError, match=r"no runtime here .*gone is missing: pip install 'r1q\[llama-cpp\]'"
    ) as caught:
        refuse_unusable(found)
    assert caught.value.exit_code == 4


def test_a_runtime_that_opens_nothing_of_ours_is_not_enough(tmp_path: Path) -> None:
    found = examine(tmp_path, registry=registry(echo=Entry(target="r1q.runtimes.echo:Echo")))
    assert (found.runtimes[0].state, found.runtimes[0].formats) == ("ready", ("echo",))
    with pytest.raises(MissingError, match="no runtime here can open what r1q writes"):
        refuse_unusable(found)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os; os.abort()", "crashed (SIGABRT)"),
        ("raise ImportError('libgomp.so.1 is not there')", "libgomp.so.1 is not there"),
        ("raise RuntimeError('Failed to load shared library')", "Failed to load shared library"),
        ("import sys; sys.exit(3)", "failed (exit code 3)"),
        ("raise KeyError('an unforeseen one')", "KeyError: 'an unforeseen one'"),
    ],
)
def test_a_library_that_does_not_load_takes_nothing_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, said: str
) -> None:
    (tmp_path / "llama_cpp.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    found = examine(tmp_path, registry=registry(llama_cpp=LLAMA))
    assert found.runtimes[0].state == "broken"
    assert said in found.runtimes[0].detail
    assert "llama-cpp: broken" in shown(found)
    with pytest.raises(MissingError, match="llama-cpp is broken"):
        refuse_unusable(found)


def test_native_code_that_prints_does_not_confuse_the_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text("import os; os.write(1, b'ggml: hello {')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert probe_runtime("echo") == {"formats": ["echo"], "versions": {}}
    assert "no runtime named" in str(probe_runtime("nobody")["error"])


def test_a_name_that_two_packages_offer_is_broken(tmp_path: Path) -> None:
    entries = registry(echo=Entry(target="r1q.runtimes.echo:Echo"))
    entries.__dict__["entries"] = {"echo": (Entry(target="a:b", package="one"), Entry(target="c:d", package="two"))}
    state = examine(tmp_path, registry=entries).runtimes[0]
    assert (state.state, state.detail) == ("broken", "runtime 'echo' is offered by one and two: uninstall one of them")


def test_versions_and_machine_are_told(tmp_path: Path) -> None:
    import numpy as np
    import psutil

    found = examine(tmp_path, registry=registry())
    assert found.r1q == __version__
    assert found.libraries["numpy"] == np.__version__
    assert found.machine.memory == psutil.virtual_memory().total
    assert 0 < found.machine.available <= found.machine.memory
    assert found.machine.disk_free > 0
    assert found.torch is None
    text = shown(found)
    assert max(map(len, text.splitlines())) <= 80
    for label in ("python", "r1q", "libraries", "system", "cpu", "memory", "disk", "gpu", "hugging face"):
        assert f"\n{label}  " in f"\n{text}"


def draw(root: Path, files: Mapping[str, str]) -> tuple[Path, Path]:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root / "sys", root / "proc"


X86 = (
    "processor\t: 0\nmodel name\t: A CPU\nflags\t\t: fpu sse2 f16c fma avx2 avx512f avx512_vnni amx_tile amx_int8 rdseed\n"
    "\nprocessor\t: 1\n"
)
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm bf16 sve crc32\n"


def test_features_that_matter_are_read_from_x86_and_arm(tmp_path: Path) -> None:
    sysfs, proc = draw(tmp_path / "x86", {"proc/cpuinfo": X86})
    found = look_around(tmp_path, sysfs=sysfs, proc=proc)
    assert found.cpu == "A CPU"
    assert found.features == ("f16c", "fma", "avx2", "avx512f", "avx512_vnni", "amx_tile", "amx_int8")
    sysfs, proc = draw(tmp_path / "arm", {"proc/cpuinfo": ARM})
    assert look_around(tmp_path, sysfs=sysfs, proc=proc).features == ("asimd", "asimddp", "i8mm", "bf16", "sve")
    assert look_around(tmp_path, sysfs=tmp_path, proc=tmp_path).features == ()


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/memory.max": "1000\n"}, 1000),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/memory.max": "1000",
                "sys/fs/cgroup/a/b/memory.max": "max",
            },
            1000,
        ),
        ({"proc/self/cgroup": "0::/elsewhere\n", "sys/fs/cgroup/memory.max": "77"}, 77),
        (
            {
                "proc/self/cgroup": "4:memory:/c\n1:cpu:/d\n",
                "sys/fs/cgroup/memory/c/memory.limit_in_bytes": "500",
                "sys/fs/cgroup/memory/d/memory.limit_in_bytes": "5",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
            },
            500,
        ),
    ],
)
def test_the_tightest_memory_limit_above_this_process_counts(
    tmp_path: Path, files: Mapping[str, str], limit: int | None
) -> None:
    sysfs, proc = draw(tmp_path, files)
    assert memory_limit(sysfs, proc) == limit


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("echo 'NVIDIA H100, 81559 MiB, 550.54'; echo 'NVIDIA A2, 15 MiB, 550.54'",
         ("NVIDIA H100, 81559 MiB, driver 550.54", "NVIDIA A2, 15 MiB, driver 550.54")),
        ("echo 'no driver is loaded' >&2; exit 9", ("nvidia-smi fails: no driver is loaded",)),
    ],
)  # fmt: skip
def test_gpus_are_what_nvidia_smi_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, told: tuple[str, ...]
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert find_gpus() == told


def test_a_build_that_leaves_features_unused_is_told_with_the_way_to_mend_it() -> None:
    build = "CPU : SSE3 = 1 | AVX2 = 1 | AVX512 = 1 | AVX512_VNNI = 0 | REPACK = 1 | "
    assert unused_features(("avx2", "avx512f", "avx512_vnni", "amx_int8"), build) == ["avx512_vnni", "amx_int8"]
    assert unused_features(("i8mm", "asimd"), "CPU : NEON = 1 | ARM_FMA = 1 | ") == ["i8mm"]
    assert unused_features(("avx2",), "") == []
