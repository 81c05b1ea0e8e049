"""What `r1q bench` shows: a progress bar on stderr; then the results on stdout or in a file, as a table or in another format.

Results come one by one and are kept as they come: JSON lines are written at once, and where a bench is interrupted, every other format
is written with what there is.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from r1q.benchmarks.course import Event
from r1q.benchmarks.formats import WRITERS, to_line
from r1q.benchmarks.render import report
from r1q.benchmarks.result import BenchResult
from r1q.core.files import atomic_path

FORMATS = ("table", *WRITERS, "html")


def show_bench(
    events: Iterator[Event | BenchResult],
    *,
    format_name: str = "table",
    output: Path | None = None,
    quiet: bool = False,
) -> list[BenchResult]:
    """Consume a bench, write its results to `output` or stdout, and return them, also those before an interruption."""
    results: list[BenchResult] = []
    screen = Console(stderr=True)
    with contextlib.ExitStack() as stack:
        # On the way out, whichever way that is: what was measured is not lost.
        stack.callback(lambda: _write(results, format_name, output) if results else None)
        lines = None
        if format_name == "jsonl":
            lines = sys.stdout if output is None else stack.enter_context(output.open("w", encoding="utf-8"))
        bar = Progress(console=screen, transient=True, disable=quiet or not screen.is_terminal)
        progress = stack.enter_context(bar)
        task = progress.add_task("bench", total=None)
        for event in events:
            if isinstance(event, Event):
                what = f"{event.artifact}: {event.stage}"
                progress.update(task, description=what, completed=event.done, total=event.total)
                continue
            results.append(event)
            if lines is not None:
                lines.write(to_line(event) + "\n")
                lines.flush()
    return results


def exit_code(results: Sequence[BenchResult]) -> int:
    """Return that of the worst failure among the results, 0 without one."""
    return max((result.exit_code for result in results), default=0)


def _write(results: Sequence[BenchResult], format_name: str, output: Path | None) -> None:
    if format_name == "jsonl":
        return  # written line by line
    if format_name == "table":
        if output is None:
            console = Console()
            console.print(report(results, console))
            return
        with output.open("w", encoding="utf-8") as file:
            console = Console(file=file, width=160)
            console.print(report(results, console))
        return
    text = _html(results) if format_name == "html" else WRITERS[format_name](results)
    if output is None:
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    with atomic_path(output) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _html(results: Sequence[BenchResult]) -> str:
    from r1q.benchmarks.report import page

    return page(results)
