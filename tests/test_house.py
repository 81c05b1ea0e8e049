"""The house guards itself: links, floors, sizes, names, and what `r1q --help` may import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = (
    "core",
    "models",
    "calibration",
    "quantize",
    "distill",
    "export",
    "runtimes",
    "plan",
    "benchmarks",
    "serve",
    "ship",
    "commands",
)
TORCH_ALLOWED = ("models/", "calibration/", "quantize/", "distill/", "runtimes/torch.py")
FOUND = (path for room in (*ROOMS, "tests") for path in sorted((ROOT / room).rglob("*.py")))
SOURCES = [ROOT / "cli.py", *(path for path in FOUND if not {"peers", "studies", "__pycache__"} & set(path.parts))]


def test_every_room_is_linked_into_the_import_name() -> None:
    for room in ROOMS:
        link = ROOT / "r1q" / room
        assert link.is_symlink(), f"r1q/{room} is not a link: clone with symlinks enabled"
        assert link.resolve() == ROOT / room
        assert (link / "__init__.py").is_file(), "a wheel leaves out a room without it"
    assert (ROOT / "r1q" / "cli.py").resolve() == ROOT / "cli.py"
    real = {path.name for path in (ROOT / "r1q").iterdir() if not path.is_symlink() and path.name != "__pycache__"}
    assert real == {"__init__.py", "__main__.py", "py.typed"}


def test_the_floor_plan_names_every_room() -> None:
    plan = (ROOT / "README.md").read_text().partition("## Floor plan")[2]
    named = [line.partition(" ")[0] for line in plan.splitlines()]
    assert [f"{room}/" for room in ROOMS if f"{room}/" not in named] == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    assert text.count("\n") <= (300 if path.name == "cli.py" else 400)
    assert ast.get_docstring(tree), "a file says in its first line which idea it is"
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = [
        f"{f.name}: {f.end_lineno - f.lineno + 1}" for f in functions if f.end_lineno and f.end_lineno - f.lineno >= 60
    ]
    assert not long


def test_no_file_has_a_name_that_says_nothing() -> None:
    assert not [path for path in SOURCES if path.stem in ("utils", "helpers", "common", "misc")]


def _imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_torch_stays_in_its_rooms_and_transformers_out_of_the_product() -> None:
    product = [path for path in SOURCES if "tests" not in path.relative_to(ROOT).parts]
    torch = [str(path.relative_to(ROOT)) for path in product if "torch" in _imports(path)]
    assert not [name for name in torch if not name.startswith(TORCH_ALLOWED)]
    assert not [path for path in product if "transformers" in _imports(path)]


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, contextlib, io\n"
        "from r1q.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()): main(['--help'], standalone_mode=False)\n"
        "heavy = {'torch', 'numba', 'onnx', 'numpy', 'gguf', 'tokenizers', 'llama_cpp', 'rich'} & set(sys.modules)\n"
        "sys.exit(f'imported {sorted(heavy)}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_quantizing_without_statistics_needs_no_torch() -> None:
    code = "import sys, r1q.plan.walk, r1q.export.gguf, r1q.quantize.grids; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_everything_imported_is_declared() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    modules = {name.split(">")[0].split("[")[0].strip().replace("-", "_").lower() for name in wanted}
    modules = {{"llama_cpp_python": "llama_cpp", "pyyaml": "yaml"}.get(name, name) for name in modules}
    imported = set().union(*(_imports(path) for path in SOURCES))
    assert imported - set(sys.stdlib_module_names) - modules - {"r1q"} == set()
