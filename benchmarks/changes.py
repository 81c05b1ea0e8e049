"""What became of each row: changes with their intervals as a table, and the verdict on limits as sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from r1q.benchmarks.gate import METRICS, Change, Limit, compare, pairs, same_machine
from r1q.benchmarks.result import BenchResult
from r1q.core.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Rows compared: each one's name and changes; `broken` limits as sentences; `notes` on what was not compared."""

    rows: tuple[tuple[str, tuple[Change, ...]], ...]
    broken: tuple[str, ...]
    notes: tuple[str, ...]


def judge(before: Sequence[BenchResult], after: Sequence[BenchResult], limits: Sequence[Limit] = ()) -> Verdict:
    """Compare the rows that both have, and hold the changes against `limits`.

    Raises UsageError where no row is in both, a limit is on speed and the machines differ, or a limit's metric was measured nowhere.
    """
    found = pairs(before, after)
    if not found:
        raise UsageError(
            f"no row is in both: there {_names(before)}, here {_names(after)} (model, grid, runtime and target must be the same)"
        )
    for old, new in found:
        fast = [limit for limit in limits if METRICS[limit.metric].kind == "speed"]
        if fast and not same_machine(old, new):
            raise UsageError(
                f"{fast[0]} cannot be judged: the baseline was measured on {old.machine.cpu} with {old.threads} threads, "
                f"this on {new.machine.cpu} with {new.threads}"
            )
    rows = tuple((_row(new), tuple(compare(old, new))) for old, new in found)
    broken = [sentence for row, changes in rows for sentence in _broken(row, changes, limits)]
    measured = {change.metric for _, changes in rows for change in changes}
    if absent := [limit for limit in limits if limit.metric not in measured]:
        raise UsageError(f"{absent[0]} cannot be judged: {METRICS[absent[0].metric].about} is not in both files")
    return Verdict(rows=rows, broken=tuple(broken), notes=tuple(_notes(before, after, found)))


def show_changes(verdict: Verdict) -> RenderableType:
    """Return the table of changes, and below it what was broken and what was not compared."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for heading in ("row", "metric", "before", "after", "change", "95 % interval"):
        table.add_column(heading, justify="left" if heading in ("row", "metric") else "right", overflow="fold")
    for row, changes in verdict.rows:
        for number, change in enumerate(changes):
            style = "" if change.real else "dim"
            table.add_row(
                row if number == 0 else "",
                change.metric,
                _number(change.before),
                _number(change.after),
                _percent(change.relative),
                _interval(change),
                style=style,
            )
    lines = [Text(f"limit broken: {sentence}", "red") for sentence in verdict.broken]
    lines += [Text(f"note: {note}", "yellow") for note in verdict.notes]
    return Group(table, *lines)


def _broken(row: str, changes: Sequence[Change], limits: Sequence[Limit]) -> Iterator[str]:
    for limit in limits:
        for change in changes:
            if change.metric == limit.metric and change.passes(limit):
                yield (
                    f"{row}: {change.metric} went from {_number(change.before)} to {_number(change.after)}, "
                    f"{_percent(change.relative)} ({_interval(change)}), and {limit.percent:+g} % is the limit"
                )


def _notes(
    before: Sequence[BenchResult], after: Sequence[BenchResult], found: Sequence[tuple[BenchResult, BenchResult]]
) -> Iterator[str]:
    used = {id(result) for pair in found for result in pair}
    for where, results in (("before", before), ("after", after)):
        alone = [_row(result) for result in results if id(result) not in used]
        if alone:
            yield f"only in {where}: {', '.join(alone)}"
    if any(not same_machine(*pair) for pair in found):
        yield "the two were measured on different machines: compare no speeds"


def _names(results: Sequence[BenchResult]) -> str:
    return ", ".join(map(_row, results))


def _row(result: BenchResult) -> str:
    return f"{result.name} {result.grid} in {result.runtime}"


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1e5 else f"{value:.4g}"


def _percent(share: float) -> str:
    return "from 0" if math.isinf(share) else f"{100 * share:+.2f} %"


def _interval(change: Change) -> str:
    if change.low is None or change.high is None:
        return "too few samples"
    if math.isinf(change.low) or math.isinf(change.high):
        return "from 0"
    return "exact" if change.low == change.high else f"{100 * change.low:+.2f} … {100 * change.high:+.2f} %"
