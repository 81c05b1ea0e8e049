"""What `r1q bench` shows: a progress bar on stderr; then a table, or a JSON line a result, on stdout."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from rich.console import Console
from rich.progress import Progress

from r1q.benchmarks.render import report
from r1q.benchmarks.result import BenchResult
from r1q.benchmarks.run import Event


def show_bench(events: Iterator[Event | BenchResult], *, as_json: bool, quiet: bool) -> int:
    """Consume a bench, show its results, and return the exit code: that of the worst failure among them."""
    results: list[BenchResult] = []
    screen = Console(stderr=True)
    with Progress(console=screen, transient=True, disable=quiet or not screen.is_terminal) as progress:
        task = progress.add_task("bench", total=None)
        for event in events:
            if isinstance(event, Event):
                what = f"{event.artifact}: {event.stage}"
                progress.update(task, description=what, completed=event.done, total=event.total)
                continue
            results.append(event)
            if as_json:
                # As each is measured: an interruption loses only what had not been.
                sys.stdout.write(event.to_json() + "\n")
                sys.stdout.flush()
    if results and not as_json:
        console = Console()
        console.print(report(results, console))
    return max((result.exit_code for result in results), default=0)
