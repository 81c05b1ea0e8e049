"""Bench results as a table: one where the terminal is wide enough for it, else one for speed and one for fidelity."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from r1q.benchmarks.result import BenchResult, Quality, Speed
from r1q.core.metrics import Estimate

ABSENT = "–"
Cell = Callable[[BenchResult], str]


@dataclass(frozen=True, slots=True)
class Column:
    """One column: its heading over two lines (what, unit) and how a result fills it."""

    heading: str
    cell: Cell


def report(results: Sequence[BenchResult], console: Console) -> RenderableType:
    """Return the table or tables of `results`, and below them the legend, notes and failures, for the console's width."""
    label = _labels(results)
    model = [] if len(set(label.values())) == 1 else [Column("model", lambda result: label[id(result)])]
    title = None if model else next(iter(label.values()))
    wide = _table([*model, *WHAT, *SPEED, *FIDELITY], results, title)
    if Measurement.get(console, console.options, wide).maximum <= console.width and _fits(wide, console):
        tables: list[RenderableType] = [wide]
    else:
        tables = [
            _table([*model, *WHAT[:1], *SPEED], results, title),
            _table([*model, *WHAT, *FIDELITY], results, None),
        ]
    spaced = [part for table in tables for part in (table, Text())]
    return Group(*spaced, *_legend(results), *_remarks(results))


def _fits(table: Table, console: Console) -> bool:
    # Measurement never exceeds the console: measure without it.
    free = console.options.update(width=10_000, max_width=10_000)
    return Measurement.get(console, free, table).maximum <= console.width


def _table(columns: Sequence[Column], results: Sequence[BenchResult], title: str | None) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for column in columns:
        left = column.heading in ("model", "grid")
        # Names fold rather than lose their end: what tells two of them apart is often there.
        table.add_column(
            column.heading, justify="left" if left else "right", no_wrap=column.heading != "model", overflow="fold"
        )
    for result in results:
        table.add_row(*(column.cell(result) for column in columns))
    return table


def _labels(results: Sequence[BenchResult]) -> dict[int, str]:
    """Return a name for every result: the model's, and where two rows would look alike, the folder's too."""
    plain = {id(result): _model(result) for result in results}
    seen = Counter((plain[id(result)], result.grid) for result in results)
    return {
        id(result): plain[id(result)]
        if seen[plain[id(result)], result.grid] == 1
        else f"{PurePath(result.artifact).parent.name}/{result.name}"
        for result in results
    }


def _model(result: BenchResult) -> str:
    """Return the file's name without the grid at its end, which has a column of its own."""
    stem, _, ending = result.name.rpartition("-")
    return stem if stem and ending.lower() == result.grid.lower() else result.name


def _legend(results: Sequence[BenchResult]) -> Iterator[RenderableType]:
    first = results[0]
    computers = {(r.runtime, r.threads, r.machine.cpu) for r in results}
    if len(computers) == 1:
        threads = f"{first.threads} thread{'s' if first.threads > 1 else ''}"
        yield _line(f"{first.runtime} on {first.machine.cpu}, {threads} of {first.machine.cores} cores")
    speeds = [result.speed for result in results if result.speed is not None]
    for line in dict.fromkeys(_lengths(speed) for speed in speeds if speed.prefill.seconds):
        yield _line(line)
    if speeds:
        bare = max(speed.base_memory for speed in speeds)
        yield _line(f"peak RSS is that of the process that measured, {_size(bare)} of it before the file was opened")
    for line in dict.fromkeys(_scored(r.quality) for r in results if r.quality is not None):
        yield _line(line)


def _lengths(speed: Speed) -> str:
    count = len(speed.prefill.seconds)
    return (
        f"tokens: first after {speed.first_token.tokens}, prefill {speed.prefill.tokens}, decode {speed.decode.tokens}; "
        f"mean ± sample deviation of {count} run{'s' if count > 1 else ''}"
    )


def _scored(quality: Quality) -> str:
    text = f"{len(quality.nll)} tokens scored in {quality.windows} windows of {quality.length} of {quality.text}, ± standard error"
    base = quality.reference_perplexity()
    if base is None:
        return text
    return (
        f"{text}; KLD (nats) and top-1 against {quality.reference} in float32, whose perplexity is {_estimate(base, 4)}"
    )


def _remarks(results: Sequence[BenchResult]) -> Iterator[RenderableType]:
    """Yield every note and failure once, with the rows it holds for where those are not all."""
    said: dict[tuple[str, str], list[str]] = {}
    for result in results:
        row = f"{_model(result)} {result.grid}"
        for note in result.notes:
            said.setdefault(("note", note), []).append(row)
        for failure in result.failures:
            said.setdefault((f"{failure.stage} failed", failure.message), []).append(row)
    for (kind, message), rows in said.items():
        where = "" if len(rows) == len(results) else f" ({', '.join(rows)})"
        yield _line(f"{kind}{where}: {message}", "yellow" if kind == "note" else "red")


def _line(text: str, style: str = "dim") -> Text:
    return Text(text, style=style)


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _seconds(value: float) -> str:
    if value >= 1:
        return f"{value:.2f} s"
    places = max(0, 2 - len(str(int(1000 * value))))
    return f"{1000 * value:.{places}f} ms"


def _estimate(estimate: Estimate | None, digits: int = 3) -> str:
    """Return `value ± error` with `digits` significant digits of the value, the error to the same place."""
    if estimate is None:
        return ABSENT
    places = max(0, digits - len(str(int(abs(estimate.value))))) if abs(estimate.value) >= 1 else digits
    error = "" if estimate.error is None else f" ± {estimate.error:.{places}f}"
    return f"{estimate.value:.{places}f}{error}"


def _rate(name: str) -> Cell:
    def cell(result: BenchResult) -> str:
        return ABSENT if result.speed is None else _estimate(getattr(result.speed, name).rate)

    return cell


def _first_token(result: BenchResult) -> str:
    duration = None if result.speed is None else result.speed.first_token.duration
    return ABSENT if duration is None else _seconds(duration.value)


def _perplexity(result: BenchResult) -> str:
    return ABSENT if result.quality is None else _estimate(result.quality.fidelity().perplexity, 4)


def _kld(result: BenchResult) -> str:
    kld = None if result.quality is None else result.quality.fidelity().kld
    if kld is None:
        return ABSENT
    # Fine grids diverge by millionths, where four decimals would say nothing.
    value, error = (".1e", ".0e") if kld.value < 1e-3 else (".4f", ".4f")
    return f"{kld.value:{value}}" + ("" if kld.error is None else f" ± {kld.error:{error}}")


def _top1(result: BenchResult) -> str:
    top1 = None if result.quality is None else result.quality.fidelity().top1
    if top1 is None:
        return ABSENT
    return f"{100 * top1.value:.1f}" + ("" if top1.error is None else f" ± {100 * top1.error:.1f}")


WHAT = (
    Column("grid", lambda result: result.grid),
    Column("size", lambda result: _size(result.bytes)),
    Column("bits/\nweight", lambda result: f"{result.bits_per_weight:.2f}"),
)
SPEED = (
    Column("prefill\ntokens/s", _rate("prefill")),
    Column("decode\ntokens/s", _rate("decode")),
    Column("first\ntoken", _first_token),
    Column("load", lambda result: ABSENT if result.speed is None else _seconds(result.speed.load_seconds)),
    Column("peak\nRSS", lambda result: ABSENT if result.speed is None else _size(result.speed.peak_memory)),
)
FIDELITY = (
    Column("perplexity", _perplexity),
    Column("KLD", _kld),
    Column("top-1\n%", _top1),
)
