"""The table of runtimes: every row points at a class that exists, whether or not its library is installed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from r1q.core.errors import UsageError
from r1q.core.registry import Entry
from r1q.runtimes.table import DEFAULTS, RUNTIMES, load_runtime, runtime_name

ROOT = Path(__file__).resolve().parents[2]
OWN = [(name, offers[0]) for name, offers in RUNTIMES.entries.items() if offers[0].package is None]


@pytest.mark.parametrize(("name", "entry"), OWN, ids=[name for name, _ in OWN])
def test_target_names_a_class_in_a_file_and_needs_is_a_module_name(name: str, entry: Entry) -> None:
    module, _, attribute = entry.target.partition(":")
    tree = ast.parse((ROOT / f"{module.removeprefix('r1q.').replace('.', '/')}.py").read_text())
    assert attribute in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    assert entry.needs is None or entry.needs.isidentifier()


def test_defaults_name_rows_of_the_table() -> None:
    assert set(DEFAULTS.values()) <= set(RUNTIMES.names())


def test_format_chooses_the_runtime_unless_one_is_asked_for() -> None:
    assert runtime_name("gguf") == "llama-cpp"
    assert runtime_name("gguf", "echo") == "echo"
    with pytest.raises(UsageError, match="did you mean llama-cpp"):
        runtime_name("gguf", "llama_cpp")
    with pytest.raises(UsageError, match="no artifact format named 'gguff'; did you mean gguf"):
        runtime_name("gguff")


def test_the_table_is_read_without_any_runtime() -> None:
    code = (
        "import sys; from r1q.runtimes.table import RUNTIMES; RUNTIMES.names()\n"
        "print('llama_cpp' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_a_runtime_says_its_name() -> None:
    assert load_runtime("echo").name == "echo"
