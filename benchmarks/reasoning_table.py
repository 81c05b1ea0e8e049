"""Reasoning as a table: what is right, what flipped, how long the thoughts are, how answers fail, and what a right one costs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from r1q.benchmarks.chance import Interval
from r1q.benchmarks.reasoning import Outcome, Reasoning

ABSENT = "–"
Column = tuple[str, "Callable[[Row], str]"]


@dataclass(frozen=True, slots=True)
class Row:
    """One artifact: its label and grid, its answers and what they say."""

    label: str
    grid: str
    reasoning: Reasoning
    outcome: Outcome


@functools.lru_cache(maxsize=256)
def row_of(label: str, grid: str, reasoning: Reasoning) -> Row:
    """Return the row of an artifact's answers; its intervals are computed once."""
    return Row(label, grid, reasoning, reasoning.outcome())


def reasoning_report(rows: Sequence[Row], width: int) -> RenderableType:
    """Return the table of `rows`, or two where `width` is too narrow, and below what was asked, of whom, and what would have shown."""
    table = _table(COLUMNS, rows)
    free = Console(width=10_000)
    if Measurement.get(free, free.options, table).maximum <= width:
        tables = [table]
    else:
        tables = [_table(COLUMNS[:7], rows), _table((*COLUMNS[:2], *COLUMNS[7:]), rows)]
    spaced = [part for table in tables for part in (table, Text())]
    return Group(*spaced, *(Text(line, style="dim") for line in dict.fromkeys(legend(rows))))


def _table(columns: Sequence[Column], rows: Sequence[Row]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for heading, _ in columns:
        left = heading in ("model", "grid")
        table.add_column(heading, justify="left" if left else "right", no_wrap=heading != "model", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell(row)) for _, cell in columns))  # as text: brackets in a name are no markup
    return table


def legend(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the sentences below a table: what was asked, how it was compared, what could have been seen."""
    for row in rows:
        one, found = row.reasoning, row.outcome
        yield (
            f"{found.answers} answers: {found.problems} problems of {one.tasks} × {one.seeds} seeds, at temperature "
            f"{one.temperature:g}, top-p {one.top_p:g}, at most {one.max_tokens} tokens, {one.sequences} side by side; "
            "95 % intervals by problem"
        )
    for row in rows:
        if row.outcome.against is not None:
            yield (
                f"flips: right answers lost and won against {row.reasoning.reference} on the same problems and seeds, with the "
                "same luck; p by McNemar's exact test; inflation: thinking tokens over its"
            )
    smallest = [row.outcome.against.detectable for row in rows if row.outcome.against is not None]
    if smallest:
        yield (
            f"the smallest change of accuracy that this many answers would show (5 %, four times in five): {_points(smallest)} points"
        )
    if alone := [row.outcome.detectable for row in rows if row.outcome.against is None]:
        yield f"against another run of this size, with other luck, it would be {_points(alone)} points"


def _points(shares: Sequence[float]) -> str:
    low, high = (f"{100 * share:.1f}" for share in (min(shares), max(shares)))
    return low if low == high else f"{low} to {high}"


def percent(share: float) -> str:
    """Return a share as a percentage; what is not nothing does not look like it."""
    return f"{100 * share:.1f}" if share == 0 or share >= 0.0005 else "<0.1"


def span(interval: Interval, scale: float = 1.0, places: int = 1) -> str:
    """Return `value [low, high]`."""
    value, low, high = (f"{scale * number:.{places}f}" for number in (interval.value, interval.low, interval.high))
    return f"{value} [{low}, {high}]"


def _flips(row: Row) -> str:
    found = row.outcome.against
    return ABSENT if found is None else f"−{found.lost} +{found.won}"


def _p(row: Row) -> str:
    found = row.outcome.against
    return ABSENT if found is None else "<0.001" if found.p < 0.001 else f"{found.p:.3f}"


def _inflation(row: Row) -> str:
    found = row.outcome.against
    return ABSENT if found is None or found.inflation is None else "×" + span(found.inflation, places=2)


def _seconds(row: Row) -> str:
    value = row.outcome.seconds_per_right
    return ABSENT if value is None else f"{value:.1f} s" if value >= 10 else f"{value:.3g} s"


def _tokens(row: Row) -> str:
    value = row.outcome.tokens_per_right
    return ABSENT if value is None else f"{value:.0f}" if value >= 100 else f"{value:.1f}"


NUMBERS: tuple[Column, ...] = (
    ("right\n% [95 %]", lambda row: span(row.outcome.accuracy, 100)),
    ("flips\nlost, won", _flips),
    ("p", _p),
    ("thinking\nmean, p90", lambda row: f"{row.outcome.thinking.value:.1f}, {row.outcome.thinking_p90:.0f}"),
    ("inflation", _inflation),
    ("cut off\n%", lambda row: percent(row.outcome.truncated)),
    ("no answer\n%", lambda row: percent(row.outcome.unanswered)),
    ("loops\n%", lambda row: percent(row.outcome.loops)),
    ("waits /\n1000", lambda row: f"{row.outcome.waits:.1f}"),
    ("time per\nright one", _seconds),
    ("tokens per\nright one", _tokens),
)
COLUMNS: tuple[Column, ...] = (("model", lambda row: row.label), ("grid", lambda row: row.grid), *NUMBERS)
