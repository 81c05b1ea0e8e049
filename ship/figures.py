"""The pictures of a model card: what its artifacts cost and give, how long they think, and where their error is, as SVG files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from r1q.benchmarks.report import short_names
from r1q.benchmarks.report_content import Plot, length_plots, read_errors, trade_plots
from r1q.benchmarks.report_plots import heat, standalone
from r1q.benchmarks.result import BenchResult
from r1q.core.checkpoint import QuantizedCheckpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One picture: the file's name and text, its heading, and what is said below it."""

    file: str
    svg: str
    heading: str
    caption: str


def figures(results: Sequence[BenchResult], checkpoint: QuantizedCheckpoint) -> list[Figure]:
    """Return what can be drawn of the results that go into a card, and the map of the checkpoint's errors where it has any."""
    labels = short_names(results)
    measured = [*trade_plots(results, labels)]
    thought = [_named(f"Thinking of {plot.name}", plot) for plot in length_plots(results, labels)]
    made = [_figure(plot) for plot in (*measured, *thought, *_error_map(checkpoint))]
    # Two results can only have one name where they are the same thing measured twice: the later one is told.
    return list({figure.file: figure for figure in made}.values())


def _error_map(checkpoint: QuantizedCheckpoint) -> Iterator[Plot]:
    errors = read_errors(checkpoint)
    found = [] if errors is None else [error for error, _ in errors.cells.values() if error > 0]
    if errors is None or not found:
        return
    low, high = min(found), max(found)
    svg = heat("Where the error is", errors.cells, errors.kinds, low, high)
    colours = (
        f"relative error of each matrix, by layer and kind, from {low:.2g} (faint) to {high:.2g} (strong), by decades"
    )
    yield Plot("Where the error is", svg, f"{colours}; {errors.caption}")


def _named(name: str, plot: Plot) -> Plot:
    return Plot(name, plot.svg, plot.caption)


def _figure(plot: Plot) -> Figure:
    word = re.sub(r"[^a-z0-9]+", "-", plot.name.lower()).strip("-")[:60] or "plot"
    return Figure(file=f"plot-{word}.svg", svg=standalone(plot.svg), heading=plot.name, caption=plot.caption)
