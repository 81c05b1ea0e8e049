"""Which runtime opens what: our table against the adapters, and a plug-in that pip installed."""

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from r1q.benchmarks import choose
from r1q.benchmarks.formats import read_results
from r1q.cli import main
from r1q.core.errors import MissingError, UsageError
from r1q.runtimes.table import RUNTIMES, load_runtime

PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "r1q-dummy"
version = "1.2.3"
[project.entry-points."r1q.runtimes"]
dummy = "r1q_dummy:Dummy"
broken = "r1q_dummy_broken:Broken"
[tool.setuptools]
py-modules = ["r1q_dummy", "r1q_dummy_broken"]
"""
DUMMY = """
from r1q.runtimes.echo import Echo, EchoSession

class Dummy(Echo):
    name = "dummy"
    formats = ("dummy",)

    def versions(self):
        return {"r1q-dummy": "1.2.3"}

    def open(self, path, options):
        assert path.read_text() == "a model"
        return EchoSession(300, options.context, options.sequences, load_seconds=0.25)
"""
BROKEN = "import os\nos.kill(os.getpid(), 11)\n"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install a package with two runtimes, one of which kills whoever imports it, with pip and from no registry."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    (source / "pyproject.toml").write_text(PROJECT)
    (source / "r1q_dummy.py").write_text(DUMMY)
    (source / "r1q_dummy_broken.py").write_text(BROKEN)
    options = ["--no-index", "--no-deps", "--no-build-isolation", "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed")
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture
def plugged(installed: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(installed)
    monkeypatch.setenv("PYTHONPATH", str(installed))
    RUNTIMES.__dict__.pop("entries", None)
    yield
    RUNTIMES.__dict__.pop("entries", None)


@pytest.mark.parametrize("name", [name for name in RUNTIMES.names() if RUNTIMES.entry(name).package is None])
def test_the_table_says_what_our_adapters_open(name: str) -> None:
    needs = RUNTIMES.entry(name).needs
    if needs is not None and importlib.util.find_spec(needs) is None:
        pytest.skip(f"{needs} is not installed")
    assert choose.OWN[name] == tuple(load_runtime(name).formats)


@pytest.mark.usefixtures("plugged")
def test_a_package_that_pip_installed_is_benched_and_one_that_crashes_is_a_note(tmp_path: Path) -> None:
    (tmp_path / "small.dummy").write_text("a model")
    output = tmp_path / "results.jsonl"
    sizes = [
        "--prompt",
        "4",
        "--prefill",
        "8",
        "--generate",
        "3",
        "--depths",
        "0",
        "--repetitions",
        "2",
        "--windows",
        "1",
    ]
    command = ["bench", str(tmp_path / "small.dummy"), "--json", "-o", str(output), "-q", *sizes]
    done = CliRunner().invoke(main, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    (result,) = read_results(output)
    assert (result.runtime, result.format, result.versions["r1q-dummy"]) == ("dummy", "dummy", "1.2.3")
    assert result.speed is not None
    assert result.speed.load_seconds == 0.25
    assert len(result.speed.decode.seconds) == 2
    assert result.quality is not None
    assert any("broken: does not load" in note and "crashed" in note for note in result.notes)


def test_a_runtime_that_does_not_open_the_format_is_refused() -> None:
    found = choose.offers("torch")
    with pytest.raises(UsageError, match=r"torch opens hf, checkpoint, gptq, and x\.gguf is gguf: leave --runtime out"):
        choose.require_format(found, "torch", "gguf", "x.gguf")


def test_what_is_not_installed_says_what_installs_it(monkeypatch: pytest.MonkeyPatch, tiny_gguf: Path) -> None:
    from r1q.benchmarks.run import bench

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingError, match=r"no runtime here opens .*Tiny-F32\.gguf.*pip install 'r1q\[llama-cpp\]'"):
        next(bench([tiny_gguf]))
