"""What commands show: a plan in two lines, what it will take, progress bars, and where the result is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from r1q.calibration.trace_file import Step
from r1q.plan.calibrate import Done
from r1q.plan.outlook import Outlook
from r1q.plan.plan import Plan
from r1q.plan.walk import Exported


def make_console(quiet: bool) -> Console:
    """Return the console for people: it wraps nothing, so that paths and names stay whole; quiet, it prints nothing."""
    return Console(quiet=quiet, soft_wrap=True)


def show_plan(console: Console, plan: Plan) -> None:
    """Print the size of what will be made, its grids, and every fallback."""
    grids = ", ".join(f"{count} × {grid}" for grid, count in plan.grids().items())
    console.print(
        f"{plan.model}: {plan.weights / 1e6:.1f} M weights, {plan.bytes / 1e6:.1f} MB, "
        f"{plan.bits_per_weight:.3f} bits per weight ({grids})",
        highlight=False,
    )
    for line in (*plan.notes, *plan.fallback_lines()):
        console.print(f"  note: {line}", highlight=False)


def _columns() -> tuple[ProgressColumn, ...]:
    return (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )


def show_outlook(console: Console, found: Outlook) -> None:
    """Print what a run will take: bytes, memory, time."""
    sizes = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in found.bytes.items())
    console.print(f"writes: {sizes}; disk {found.disk / 1e6:.0f} MB", highlight=False)
    console.print(f"memory: about {found.memory / 1e6:.0f} MB ({found.memory_told})", highlight=False)
    if found.spilled:
        console.print("  hidden states go to files, to stay within the limit", highlight=False)
    if found.seconds is not None:
        console.print(f"time: about {duration(found.seconds)} on this machine", highlight=False)


def duration(seconds: float) -> str:
    """Return a time that is not known to the second, as people say it.

    >>> duration(100), duration(619.3), duration(19_800), duration(329_820)
    ('100 s', '10 min', '5.5 h', '92 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    hours = seconds / 3600
    return f"{hours:.1f} h" if hours < 10 else f"{hours:.0f} h"


def show_calibration(console: Console, steps: Iterator[Done]) -> Path:
    """Draw the progress of `r1q calibrate` and return the file it wrote."""
    last = None
    with Progress(*_columns(), console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("calibrate", total=None)
        for last in steps:
            progress.update(task, completed=last.blocks, total=last.all_blocks)
    if last is None or last.path is None:
        raise ValueError("the pass ended without a file")
    console.print(f"done: {last.path} ({last.entries} tensors, {last.windows} windows)", highlight=False)
    if last.unseen:
        told = f"  {last.unseen} of {last.experts} experts were sent no token, and weigh their columns alike: take more text"
        console.print(told, highlight=False)
    return last.path


def show_traces(console: Console, steps: Iterator[Step]) -> None:
    """Draw the progress of `r1q traces`."""
    with Progress(*_columns(), console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("traces", total=None)
        for step in steps:
            progress.update(task, completed=step.done, total=step.count)


def show_exported(console: Console, result: Exported) -> None:
    """Print where a finished artifact is, how large, and what there is to know about it."""
    state = "already done" if result.already else "done"
    console.print(f"{state}: {result.path} ({result.artifact.bytes / 1e6:.1f} MB)", highlight=False)
    for note in result.artifact.notes:
        console.print(f"  {note}", highlight=False)
