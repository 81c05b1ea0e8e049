"""r1q compare: what changed between two files of results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from r1q.benchmarks.gate import Limit
    from r1q.benchmarks.result import BenchResult


@click.command()
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
@click.option("--fail-on", metavar="LIMITS", help="Such as decode=-5%,kld=+20%; ends with 6 where one is passed.")
def compare(before: Path, after: Path, fail_on: str | None) -> None:
    """Compare two files of `r1q bench --format json` or jsonl, row by row, each number with its 95 % interval.

    Rows belong together by model, grid, runtime and target. A limit is passed only where the change is beyond it and its interval
    excludes no change. Metrics: decode, prefill, ttft, memory, bytes, kld, nll, top1.

    \b
    Examples:
      r1q compare old.jsonl new.jsonl
      r1q compare old.jsonl new.jsonl --fail-on decode=-5%,kld=+20%
    """
    from r1q.benchmarks.formats import read_results
    from r1q.benchmarks.gate import parse_limits

    limits = parse_limits(fail_on) if fail_on else []
    show_verdict(read_results(before), read_results(after), limits, to_stderr=False)


def show_verdict(
    before: Sequence[BenchResult], after: Sequence[BenchResult], limits: Sequence[Limit], *, to_stderr: bool
) -> None:
    """Show the changes; raise CheckError where a limit is broken."""
    from rich.console import Console

    from r1q.benchmarks.changes import judge, show_changes
    from r1q.core.errors import CheckError

    verdict = judge(before, after, limits)
    Console(stderr=to_stderr).print(show_changes(verdict))
    if verdict.broken:
        raise CheckError("; ".join(verdict.broken))
