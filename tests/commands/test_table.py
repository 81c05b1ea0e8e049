"""The table of commands in cli.py says of each what its own file says, and loads a file only when its command is named."""

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from r1q.cli import COMMANDS, main

ROOT = Path(__file__).resolve().parents[2]
ALL = 10_000  # columns: nothing is cut
PRINT_LOADED = (
    "import sys, json, contextlib, io\n"
    "from r1q.cli import main\n"
    "loaded = []\n"
    "for arguments in json.loads(sys.argv[1]):\n"
    "    with contextlib.redirect_stdout(io.StringIO()): main(arguments, standalone_mode=False)\n"
    "    loaded.append(list(sys.modules))\n"
    "print(json.dumps(loaded))\n"
)


def loaded_after(*commands: list[str]) -> list[set[str]]:
    """Return the names of all modules that are loaded after each of `commands`, run one after another in a process of their own."""
    call = [sys.executable, "-c", PRINT_LOADED, json.dumps(commands)]
    done = subprocess.run(call, capture_output=True, text=True, cwd=ROOT, check=True)
    return [set(names) for names in json.loads(done.stdout)]


def command_of(name: str) -> click.Command:
    command = main.get_command(click.Context(main), name)
    assert command is not None
    return command


@pytest.mark.parametrize("name", COMMANDS)
def test_the_table_says_what_the_command_says_of_itself(name: str) -> None:
    command = command_of(name)
    assert command.name == name
    assert not command.hidden
    assert COMMANDS[name].help == command.get_short_help_str(ALL)


def test_every_command_in_the_room_is_in_the_table() -> None:
    files = (ROOT / "commands").glob("*.py")
    with_command = {path.stem for path in files if "@click.command(" in path.read_text()}
    assert with_command == {entry.module.removeprefix("r1q.commands.") for entry in COMMANDS.values()}


@pytest.mark.parametrize("columns", [50, 80, 100])
def test_help_lists_the_commands_as_click_itself_would(columns: int) -> None:
    plain = click.Group(commands={name: command_of(name) for name in COMMANDS})
    formatter = click.HelpFormatter(width=columns)
    plain.format_commands(click.Context(plain), formatter)
    expected = formatter.getvalue()
    shown = CliRunner().invoke(main, ["--help"], terminal_width=columns).output
    assert expected.strip()
    assert shown.endswith(expected)


def test_a_command_is_loaded_when_it_is_named_and_its_help_needs_nothing_heavy() -> None:
    named = sorted(COMMANDS)
    before, *after = loaded_after(["--help"], *([name, "--help"] for name in named))
    assert not [name for name in before if name.startswith("r1q.commands")]
    for count, modules in enumerate(after, start=1):
        rooms = {name for name in modules if name.startswith("r1q.commands.")}
        assert rooms >= {COMMANDS[name].module for name in named[:count]}
        assert rooms.isdisjoint(COMMANDS[name].module for name in named[count:])
    assert not {"torch", "numba", "numpy", "gguf", "tokenizers", "llama_cpp", "rich"} & after[-1]


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("quantise", "No such command 'quantise'. Did you mean 'quantize'?"),
        ("exprot", "No such command 'exprot'. Did you mean 'export'?"),
        ("abacus", "No such command 'abacus'."),
        ("Bench", "No such command 'Bench'. Did you mean 'bench'?"),
    ],
)
def test_an_unknown_command_names_its_neighbours(typed: str, message: str) -> None:
    result = CliRunner().invoke(main, [typed, "--bits", "4"])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1] == f"Error: {message}"
