"""The report: one self-contained page of HTML about results. No script, nothing fetched, and everything from results is escaped."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from r1q.benchmarks.reasoning_table import legend as reasoning_legend
from r1q.benchmarks.reasoning_table import row_of
from r1q.benchmarks.render import columns
from r1q.benchmarks.report_content import error_maps, is_float, length_plots, trade_plots, verdicts
from r1q.benchmarks.report_plots import COLOURS, MARKS
from r1q.benchmarks.result import BenchResult
from r1q.core.errors import UsageError
from r1q.core.untrusted import printable

TEMPLATE = Path(__file__).resolve().parent / "report.html"


def page(results: Sequence[BenchResult]) -> str:
    """Return the page about `results`. Raises UsageError without one."""
    if not results:
        raise UsageError("there are no results to report on: make some with r1q bench --json > runs.jsonl")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    labels = short_names(results)
    found = columns(results)
    maps, darkness = error_maps(results, labels)
    rows = [row_of(label, r.grid, r.reasoning) for label, r in zip(labels, results, strict=True) if r.reasoning]
    return template.render(
        colours=COLOURS,
        marks=MARKS,
        title=printable(_title(results)),
        subtitle=printable(_subtitle(results)),
        reference=", ".join(_unique(label for label, r in zip(labels, results, strict=True) if is_float(r))),
        verdicts=list(verdicts(results, labels)),
        plots=list(trade_plots(results, labels)),
        columns=[{"heading": " ".join(c.heading.replace("-\n", "-").split()), "left": c.left} for c in found],
        rows=[[printable(column.cell(result)) for column in found] for result in results],
        legend=[printable(line) for line in dict.fromkeys(reasoning_legend(rows))],
        failures=_unique(f"{r.name}: {f.stage} failed: {f.message}" for r in results for f in r.failures),
        notes=_unique(note for result in results for note in result.notes),
        lengths=list(length_plots(results, labels)),
        maps=maps,
        darkness=darkness,
        machines=_machines(results),
        commands=_unique(shlex.join(result.command) for result in results),
    )


def short_names(results: Sequence[BenchResult]) -> list[str]:
    """Return a short name for each result: its grid, and what else is needed to tell two apart."""
    parts = (
        lambda r: r.grid,
        lambda r: _model(r),
        lambda r: r.runtime,
        lambda r: r.target,
        lambda r: Path(r.artifact).parent.name,
    )
    used = [0]
    for index in range(1, len(parts)):
        names = [" ".join(parts[i](r) for i in used) for r in results]
        if len(set(names)) == len(names):
            break
        if len({parts[index](r) for r in results}) > 1:
            used.append(index)
    return [printable(" ".join(parts[i](result) for i in used)) for result in results]


def _model(result: BenchResult) -> str:
    stem, _, ending = result.name.rpartition("-")
    return stem if stem and ending.lower() == result.grid.lower() else result.name


def _title(results: Sequence[BenchResult]) -> str:
    models = _unique(_model(result) for result in results)
    return ", ".join(models[:3]) + (f" and {len(models) - 3} more" if len(models) > 3 else "")


def _subtitle(results: Sequence[BenchResult]) -> str:
    days = sorted({result.time[:10] for result in results})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    where = ", ".join(_unique(result.emulated or result.machine.cpu for result in results))
    runtimes = ", ".join(_unique(result.runtime for result in results))
    return f"{len(results)} rows · {runtimes} · {where} · {when}"


def _machines(results: Sequence[BenchResult]) -> list[list[tuple[str, str]]]:
    """Return each machine with the versions that ran on it, as names and values."""
    found: list[list[tuple[str, str]]] = []
    for result in results:
        one = result.machine
        facts = [
            ("processor", one.cpu),
            ("cores", f"{one.cores} physical here, {one.logical} logical"),
            ("memory", f"{one.memory / 2**30:.1f} GiB"),
            ("system", one.system),
            ("features", " ".join(one.features)),
            ("threads", str(result.threads)),
            *((name, version) for name, version in result.versions.items()),
        ]
        plain = [(printable(name), printable(value)) for name, value in facts]
        if plain not in found:
            found.append(plain)
    return found


def _unique(texts: Iterator[str]) -> list[str]:
    return list(dict.fromkeys(printable(text) for text in texts))
