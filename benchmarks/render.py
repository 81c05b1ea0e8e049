"""Bench results as a table: one where the terminal is wide enough for it, else as few as hold every column whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from r1q.benchmarks.reasoning_table import NUMBERS, Row, reasoning_report, row_of
from r1q.benchmarks.result import BenchResult, Quality, Samples, Speed
from r1q.core.metrics import Estimate, Fidelity

ABSENT = "–"
NOISY = " !"
Cell = Callable[[BenchResult], str]


@dataclass(frozen=True, slots=True)
class Column:
    """One column: its heading over two lines (what, unit) and how a result fills it; names stand to the left."""

    heading: str
    cell: Cell
    left: bool = False


def report(results: Sequence[BenchResult], console: Console) -> RenderableType:
    """Return the table or tables of `results`, and below them the legend, notes and failures, for the console's width."""
    label = _labels(results)
    names, title = _names(results, label)
    keys, sizes, speed, fidelity = names, WHAT, _speed(results), _fidelity(results)
    wide = _table([*keys, *sizes, *speed, *fidelity], results, title)
    if _fits(wide, console):
        tables = [wide]
    else:
        groups = [[*sizes, *speed], fidelity]
        parts = [part for group in groups for part in _split(keys, group, results, console)]
        tables = [_table([*keys, *part], results, None if number else title) for number, part in enumerate(parts)]
    spaced = [part for table in tables for part in (table, Text())]
    thought = [row_of(label[id(r)], r.grid, r.reasoning) for r in results if r.reasoning is not None]
    reasoning = [Text(), reasoning_report(thought, console.width)] if thought else []
    return Group(*spaced, *_legend(results), *reasoning, *_remarks(results))


def columns(results: Sequence[BenchResult]) -> list[Column]:
    """Return every column that these results fill, the names first: what one wide table has."""
    label = _labels(results)
    model = Column("model", lambda result: label[id(result)], left=True)
    return [model, GRID, RUNTIME, *WHAT, *_speed(results), *_fidelity(results), *_reasoning(results)]


def _reasoning(results: Sequence[BenchResult]) -> list[Column]:
    def column(heading: str, number: Callable[[Row], str]) -> Column:
        return Column(heading, lambda r: ABSENT if r.reasoning is None else number(row_of(r.name, r.grid, r.reasoning)))

    return [column(*number) for number in NUMBERS] if any(r.reasoning is not None for r in results) else []


def _names(results: Sequence[BenchResult], label: Mapping[int, str]) -> tuple[list[Column], str | None]:
    """Return the columns that tell rows apart, and the title: the one model's name where there is only one."""
    found = [GRID]
    if len({result.runtime for result in results}) > 1 or any(result.emulated for result in results):
        found.append(RUNTIME)
    if len(set(label.values())) == 1:
        return found, next(iter(label.values()))
    return [Column("model", lambda result: label[id(result)], left=True), *found], None


def _split(
    keys: Sequence[Column], group: Sequence[Column], results: Sequence[BenchResult], console: Console
) -> list[list[Column]]:
    """Return the columns of `group` in as few tables as the width allows, each with the key columns before it."""
    parts: list[list[Column]] = []
    for column in group:
        if parts and _fits(_table([*keys, *parts[-1], column], results, None), console):
            parts[-1].append(column)
        else:
            parts.append([column])
    return parts


def _fits(table: Table, console: Console) -> bool:
    # Measurement never exceeds the console: measure without it.
    free = console.options.update(width=10_000, max_width=10_000)
    return Measurement.get(console, free, table).maximum <= console.width


def _table(columns: Sequence[Column], results: Sequence[BenchResult], title: str | None) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for column in columns:
        # Names fold rather than lose their end: what tells two of them apart is often there.
        fold = column.heading in ("model", "grid", "runtime")
        table.add_column(column.heading, justify="left" if column.left else "right", no_wrap=not fold, overflow="fold")
    for result in results:
        table.add_row(*(column.cell(result) for column in columns))
    return table


def _labels(results: Sequence[BenchResult]) -> dict[int, str]:
    """Return a name for every result: the model's, and where two rows would look alike, the folder's too."""
    plain = {id(result): _model(result) for result in results}
    seen = Counter((plain[id(result)], result.grid, result.runtime) for result in results)
    return {
        id(result): plain[id(result)]
        if seen[plain[id(result)], result.grid, result.runtime] == 1
        else f"{PurePath(result.artifact).parent.name}/{result.name}"
        for result in results
    }


def _model(result: BenchResult) -> str:
    """Return the file's name without the grid at its end, which has a column of its own."""
    stem, _, ending = result.name.rpartition("-")
    return stem if stem and ending.lower() == result.grid.lower() else result.name


def _legend(results: Sequence[BenchResult]) -> Iterator[RenderableType]:
    first = results[0]
    computers = {(r.threads, r.device, r.machine.cpu) for r in results}
    if len(computers) == 1:
        threads = f"{first.threads} thread{'s' if first.threads > 1 else ''}"
        runtimes = ", ".join(dict.fromkeys(result.runtime for result in results))
        where = first.emulated or f"on {first.machine.cpu if first.device == 'cpu' else first.device}"
        yield _line(f"{runtimes} {where}, {threads} of {first.machine.cores} cores")
    speeds = [result.speed for result in results if result.speed is not None]
    for line in dict.fromkeys(_lengths(speed) for speed in speeds if speed.prefill.seconds):
        yield _line(line)
    if speeds:
        bare = max(speed.base_memory for speed in speeds)
        yield _line(f"peak RSS is that of the process that measured, {_size(bare)} of it before the file was opened")
        yield from _speed_legend(results, speeds)
    for line in dict.fromkeys(_scored(r.quality) for r in results if r.quality is not None):
        yield _line(line)


def _speed_legend(results: Sequence[BenchResult], speeds: Sequence[Speed]) -> Iterator[RenderableType]:
    if any(speed.noisy for speed in speeds):
        yield _line("! varies by more than 5 % of its mean from run to run: measure again on a quiet machine")
    if bandwidth := next((result.bandwidth for result in results if result.bandwidth is not None), None):
        best = bandwidth.best / 1e9
        threads = f"{bandwidth.threads} thread{'s' if bandwidth.threads > 1 else ''}"
        yield _line(
            f"MBU: bytes a token touches × tokens/s, of the {best:.1f} GB/s that memory was measured to give to {threads}"
        )
        if any((result.bandwidth_use() or 0) > 1 for result in results):
            yield _line(
                "MBU above 100 %: the weights stay in the processor's caches, and memory is not what bounds them"
            )
    if not any(speed.decode.joules for speed in speeds):
        yield _line("energy: not measured, the processor's counters (RAPL) cannot be read here")
    if any(result.predictions for result in results):
        yield _line(
            "estimates: share of nominal memory bandwidth / bytes a token touches; not measured (r1q bench --list-targets)"
        )


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
    against = f"against {quality.reference} in float32, whose perplexity is {_estimate(base, 4)}"
    return f"{text}; KLD (nats) and top-1 {against}{_floor(quality)}"


def _floor(quality: Quality) -> str:
    if quality.floor is None:
        return ""
    floor = quality.floor
    return f"; noise floor, itself rounded to bfloat16 after every block: KLD {_divergence(floor.kld)}, top-1 {_percent(floor.top1)} %"


def _remarks(results: Sequence[BenchResult]) -> Iterator[RenderableType]:
    """Yield every note and failure once, with the rows it holds for where those are not all."""
    said: dict[tuple[str, str], list[str]] = {}
    runtimes = len({result.runtime for result in results})
    for result in results:
        row = f"{_model(result)} {result.grid}" + (f" in {result.runtime}" if runtimes > 1 else "")
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


def _rate(samples: Samples | None) -> str:
    if samples is None:
        return ABSENT
    return _estimate(samples.rate) + (NOISY if samples.noisy else "")


def _depth(result: BenchResult, depth: int) -> Samples | None:
    decodes = () if result.speed is None else result.speed.decodes
    return next((samples for samples in decodes if samples.depth == depth), None)


def _first_token(result: BenchResult) -> str:
    duration = None if result.speed is None else result.speed.first_token.duration
    return ABSENT if duration is None else _seconds(duration.value)


def _latencies(result: BenchResult) -> str:
    found = [None if result.speed is None else result.speed.decode.latency(share) for share in (0.5, 0.9, 0.99)]
    return ABSENT if None in found else " ".join(f"{1000 * value:.3g}" for value in found if value is not None)


def _loads(result: BenchResult) -> str:
    if result.speed is None:
        return ABSENT
    cold, warm = result.speed.load_seconds, result.speed.warm_load_seconds
    return _seconds(cold) + ("" if warm is None else f" {_seconds(warm)}")


def _use(result: BenchResult) -> str:
    use = result.bandwidth_use()
    return ABSENT if use is None else f"{100 * use:.0f}"


def _joules(result: BenchResult) -> str:
    return ABSENT if result.speed is None else _estimate(result.speed.decode.joules_per_token)


def _fidelity_of(result: BenchResult) -> Fidelity | None:
    return None if result.quality is None else result.quality.fidelity()


def _perplexity(result: BenchResult) -> str:
    found = _fidelity_of(result)
    return ABSENT if found is None else _estimate(found.perplexity, 4)


def _ratio(result: BenchResult) -> str:
    found = _fidelity_of(result)
    ratio = None if found is None else found.perplexity_ratio
    if ratio is None:
        return ABSENT
    return f"{ratio.value:.4f}" + ("" if ratio.error is None else f" ± {ratio.error:.4f}")


def _divergence(kld: Estimate | None) -> str:
    if kld is None:
        return ABSENT
    # Fine grids diverge by millionths, where four decimals would say nothing.
    value, error = (".1e", ".0e") if kld.value < 1e-3 else (".4f", ".4f")
    return f"{kld.value:{value}}" + ("" if kld.error is None else f" ± {kld.error:{error}}")


def _kld(result: BenchResult) -> str:
    found = _fidelity_of(result)
    return ABSENT if found is None else _divergence(found.kld)


def _tail(result: BenchResult) -> str:
    found = _fidelity_of(result)
    if found is None or found.kld_median is None or found.kld_p90 is None or found.kld_p99 is None:
        return ABSENT
    return " ".join(f"{value:.2g}" for value in (found.kld_median, found.kld_p90.value, found.kld_p99.value))


def _percent(estimate: Estimate | None) -> str:
    if estimate is None:
        return ABSENT
    return f"{100 * estimate.value:.1f}" + ("" if estimate.error is None else f" ± {100 * estimate.error:.1f}")


def _top1(result: BenchResult) -> str:
    found = _fidelity_of(result)
    return ABSENT if found is None else _percent(found.top1)


def _delta(result: BenchResult) -> str:
    found = _fidelity_of(result)
    return ABSENT if found is None or found.kld is None else _percent(found.rms_delta)


def _prediction(profile: str) -> Column:
    def cell(result: BenchResult) -> str:
        found = next((one for one in result.predictions if one.profile == profile), None)
        if found is None:
            return ABSENT
        return f"~{found.tokens_per_second:.3g}" if found.fits else "too large"

    return Column(f"{profile}\nestimate", cell)


def _runtime(result: BenchResult) -> str:
    return f"{result.runtime}, {result.emulated}" if result.emulated else result.runtime


def _speed(results: Sequence[BenchResult]) -> list[Column]:
    """Return the columns of speed: one for each depth that was decoded at, and those that somebody fills."""
    speeds = [result.speed for result in results if result.speed is not None]
    depths = sorted({samples.depth for speed in speeds for samples in speed.decodes} or {0})
    found = [Column("prefill\ntokens/s", lambda result: _rate(None if result.speed is None else result.speed.prefill))]
    for depth in depths:
        heading = "decode\ntokens/s" if depth == 0 else f"decode at\n{depth} deep"
        found.append(Column(heading, lambda result, depth=depth: _rate(_depth(result, depth))))  # type: ignore[misc]
    found.append(Column("first\ntoken", _first_token))
    optional = (
        (any(speed.decode.latencies for speed in speeds), Column("token ms\np50 p90 p99", _latencies)),
        (any(result.bandwidth is not None for result in results), Column("MBU\n%", _use)),
        (any(speed.decode.joules for speed in speeds), Column("J/\ntoken", _joules)),
    )
    found += [column for there, column in optional if there]
    warm = any(speed.warm_load_seconds is not None for speed in speeds)
    found.append(Column("load\ncold warm" if warm else "load", _loads))
    found.append(
        Column("peak\nRSS", lambda result: ABSENT if result.speed is None else _size(result.speed.peak_memory))
    )
    if any(speed.gpu_memory is not None for speed in speeds):
        found.append(Column("GPU\nmemory", _gpu_memory))
    profiles = dict.fromkeys(one.profile for result in results for one in result.predictions)
    return [*found, *map(_prediction, profiles)]


def _gpu_memory(result: BenchResult) -> str:
    memory = None if result.speed is None else result.speed.gpu_memory
    return ABSENT if memory is None else _size(memory)


def _fidelity(results: Sequence[BenchResult]) -> list[Column]:
    """Return the columns of fidelity; those that need a reference are left out where no row has one."""
    compared = any(result.quality is not None and result.quality.kld is not None for result in results)
    more = [Column("ratio", _ratio), Column("KLD median\np90 p99", _tail), Column("RMS\nΔp %", _delta)]
    found = [Column("perplexity", _perplexity), Column("KLD", _kld), Column("top-1\n%", _top1)]
    return [found[0], more[0], found[1], more[1], found[2], more[2]] if compared else found


GRID = Column("grid", lambda result: result.grid, left=True)
RUNTIME = Column("runtime", _runtime, left=True)
WHAT = (
    Column("size", lambda result: _size(result.bytes)),
    Column("bits/\nweight", lambda result: f"{result.bits_per_weight:.2f}"),
)
