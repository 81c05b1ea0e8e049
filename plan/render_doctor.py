"""A diagnosis for people, in lines that fit 80 columns."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from r1q.core.untrusted import printable
from r1q.plan.doctor import BUILD, Diagnosis, RuntimeState

_STYLES = {"ready": "green", "missing": "yellow", "broken": "red"}
_LIBRARIES_A_LINE = 3


def show_diagnosis(console: Console, found: Diagnosis) -> None:
    """Print every finding under its heading, and the advice last."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, line in _lines(found):
        table.add_row(label, line if isinstance(line, Text) else Text(printable(line)))
    console.print(table, soft_wrap=False)


def _lines(found: Diagnosis) -> Iterator[tuple[str, str | Text]]:
    for runtime in found.runtimes:
        yield from _runtime(runtime)
    yield "python", found.python
    yield "r1q", found.r1q
    known = [f"{name} {version or 'MISSING'}" for name, version in found.libraries.items()]
    for start in range(0, len(known), _LIBRARIES_A_LINE):
        yield ("libraries" if not start else ""), ", ".join(known[start : start + _LIBRARIES_A_LINE])
    machine = found.machine
    yield "system", machine.system
    yield "cpu", machine.cpu
    yield "", f"{machine.cores} physical cores usable here, {machine.logical} logical in the system"
    yield "", " ".join(machine.features) or "features not told by this system"
    limit = "no control-group limit" if machine.memory_limit is None else f"limited to {_gib(machine.memory_limit)}"
    yield "memory", f"{_gib(machine.memory)}, {_gib(machine.available)} available, {limit}"
    yield "disk", f"{_gib(machine.disk_free)} free here"
    for number, line in enumerate(found.gpus or ("none found (nvidia-smi, libcuda)",)):
        yield ("gpu" if not number else ""), line
    if found.torch is not None:
        yield "torch", found.torch
    for number, (key, value) in enumerate(found.hub.items()):
        yield ("hugging face" if not number else ""), f"{key}: {value}"
    yield from (("advice", line) for line in found.advice)


def _runtime(runtime: RuntimeState) -> Iterator[tuple[str, str | Text]]:
    opens = f", opens {', '.join(runtime.formats)}" if runtime.formats else ""
    style = _STYLES.get(runtime.state, "")
    yield "runtime", Text.assemble(printable(runtime.name), ": ", (runtime.state, style), printable(opens))
    if runtime.about:
        yield "", runtime.about
    if runtime.detail:
        yield "", runtime.detail
    if versions := [f"{name} {value}" for name, value in runtime.versions.items() if name != BUILD]:
        yield "", ", ".join(versions)
    if BUILD in runtime.versions:
        yield "", f"build: {_features(runtime.versions[BUILD])}"


def _features(build: str) -> str:
    """Return llama.cpp's system info without the `= 1` after each word."""
    words = [
        part.split("=")[0].strip() for part in build.split("|") if part.strip() and not part.rstrip().endswith("= 0")
    ]
    return " ".join(words).replace(" : ", ": ")


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
