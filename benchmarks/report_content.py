"""What the report says of results, as words and plots: verdicts against the float model, trade-offs, thinking lengths, error maps."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from r1q.benchmarks.reasoner import FLOATS
from r1q.benchmarks.reasoning_table import row_of, span
from r1q.benchmarks.report_plots import Axis, Point, Span, heat, histogram, scatter
from r1q.benchmarks.result import BenchResult
from r1q.core.artifact import CHECKPOINT
from r1q.core.checkpoint import MANIFEST, QuantizedCheckpoint
from r1q.core.errors import InputError
from r1q.core.metrics import Estimate
from r1q.core.untrusted import printable

_Z = 1.96
_SHORT = {
    "attn_q": "q", "attn_k": "k", "attn_v": "v", "attn_qkv": "qkv", "attn_output": "o",
    "ffn_gate": "gate", "ffn_up": "up", "ffn_down": "down",
}  # fmt: skip
Number = Callable[[BenchResult], "tuple[float, Span | None] | None"]


@dataclass(frozen=True, slots=True)
class Plot:
    """A figure: its heading, its SVG (in which every text is escaped: the page takes it as it is), and what is said below it."""

    name: str
    svg: str
    caption: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One artifact in one sentence."""

    name: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """A number of a result with its 95 % interval, and the axis that it is drawn on."""

    number: Number
    axis: Axis
    short: str


def is_float(result: BenchResult) -> bool:
    """Return whether an artifact holds the model as floats."""
    return result.grid.lower() in FLOATS


def size(result: BenchResult) -> tuple[float, Span | None] | None:
    """Return the artifact's size in MiB."""
    return result.bytes / 2**20, None


def decode(result: BenchResult) -> tuple[float, Span | None] | None:
    """Return tokens/s of decoding, with the interval of the mean."""
    samples = None if result.speed is None else result.speed.decode
    rate = None if samples is None else samples.rate
    if samples is None or rate is None:
        return None
    half = _Z * (rate.error or 0) / len(samples.seconds) ** 0.5
    return rate.value, (rate.value - half, rate.value + half)


def kld(result: BenchResult) -> tuple[float, Span | None] | None:
    """Return the mean divergence in nats."""
    found = None if result.quality is None else result.quality.fidelity().kld
    return None if found is None else (found.value, _around(found))


def accuracy(result: BenchResult) -> tuple[float, Span | None] | None:
    """Return the percentage of right answers."""
    if result.reasoning is None:
        return None
    found = row_of(result.name, result.grid, result.reasoning).outcome.accuracy
    return 100 * found.value, (100 * found.low, 100 * found.high)


SIZE = Measure(number=size, axis=Axis(title="size, MiB (less is better)", up=False, zero=True), short="size")
SPEED = Measure(number=decode, axis=Axis(title="decode, tokens/s (more is better)", up=True, zero=True), short="speed")
KLD = Measure(number=kld, axis=Axis(title="mean KLD, nats (less is better)", up=False, log=True), short="divergence")
RIGHT = Measure(number=accuracy, axis=Axis(title="right answers, % (more is better)", up=True), short="right answers")
TRADES = ((SIZE, KLD), (SPEED, KLD), (SPEED, RIGHT), (SIZE, RIGHT))


def trade_plots(results: Sequence[BenchResult], labels: Sequence[str]) -> Iterator[Plot]:
    """Yield a scatter for every trade that at least two results have the numbers of."""
    for x, y in TRADES:
        points, missing = [], []
        for result, label in zip(results, labels, strict=True):
            across, down = x.number(result), y.number(result)
            if across is None or down is None:
                missing.append(label)
                continue
            points.append(
                Point(
                    label=label,
                    x=across[0],
                    y=down[0],
                    told=f"{label}: {across[0]:.4g} × {down[0]:.4g}",
                    x_span=across[1],
                    y_span=down[1],
                    is_float=is_float(result),
                )
            )
        shown = len(points) > 1 and (not y.axis.log or any(point.y > 0 for point in points))
        if shown:
            name = f"{x.short.capitalize()} and {y.short}"
            svg, hidden = scatter(name, points, x.axis, y.axis)
            said = [f"not measured: {', '.join(missing)}"] if missing else []
            said += [f"without a label for lack of room: {', '.join(hidden)}"] if hidden else []
            yield Plot(name, svg, printable("; ".join(said)))


def reference_of(results: Sequence[BenchResult], result: BenchResult) -> BenchResult | None:
    """Return the float artifact of the same size of model in the same runtime, else in any, None without one."""
    floats = [one for one in results if is_float(one) and one.weights == result.weights]
    return min(floats, key=lambda one: one.runtime != result.runtime, default=None)


def verdicts(results: Sequence[BenchResult], labels: Sequence[str]) -> Iterator[Verdict]:
    """Yield a sentence for every artifact that has a float one to be held against."""
    for result, label in zip(results, labels, strict=True):
        base = reference_of(results, result)
        if base is None or is_float(result):
            continue
        said = [f"{result.bytes / base.bytes:.0%} of its size"]
        own, other = decode(result), decode(base)
        if own is not None and other is not None and result.runtime == base.runtime:
            said.append(f"decodes ×{own[0] / other[0]:.2f} as fast")
        if (found := kld(result)) is not None:
            said.append(f"KLD {found[0]:.2g}")
        said += _thought(result)
        yield Verdict(label, ", ".join(said))


def _thought(result: BenchResult) -> Iterator[str]:
    if result.reasoning is None:
        return
    outcome = row_of(result.name, result.grid, result.reasoning).outcome
    yield f"{span(outcome.accuracy, 100)} % right"
    if (against := outcome.against) is not None:
        p = "p < 0.001" if against.p < 0.001 else f"p = {against.p:.3f}"
        yield f"{against.lost} right answers lost and {against.won} won ({p})"
        if against.inflation is not None:
            yield f"thoughts ×{span(against.inflation, places=2)} as long"


def length_plots(results: Sequence[BenchResult], labels: Sequence[str]) -> Iterator[Plot]:
    """Yield a histogram of thinking tokens for every artifact that was asked, the float model's own only where it is alone."""
    for result, label in zip(results, labels, strict=True):
        found = result.reasoning
        if found is None or (is_float(result) and any(one.reasoning and one.reasoning.reference for one in results)):
            continue
        outcome = row_of(result.name, result.grid, found).outcome
        said = [f"mean {outcome.thinking.value:.1f}, 90 % within {outcome.thinking_p90:.0f}"]
        if outcome.against is not None and outcome.against.inflation is not None:
            said.append(f"×{span(outcome.against.inflation, places=2)} of {found.reference}'s")
        if outcome.truncated:
            said.append(f"{100 * outcome.truncated:.1f} % were cut off")
        svg = histogram(label, found.answers.thinking, found.reference_thinking, "thinking tokens")
        yield Plot(label, svg, printable(", ".join(said)))


@dataclass(frozen=True, slots=True)
class Errors:
    """One checkpoint's errors: by (layer, kind) with what a pointer is told, those outside the layers, and the largest as words."""

    cells: dict[tuple[int, str], tuple[float, str]]
    kinds: dict[str, str]
    caption: str


def error_maps(results: Sequence[BenchResult], labels: Sequence[str]) -> tuple[list[Plot], str]:
    """Return a map for every quantized artifact whose checkpoint is still beside it, and what the colours mean."""
    found: dict[bytes, tuple[str, Errors]] = {}
    for result, label in zip(results, labels, strict=True):
        if (manifest := find_manifest(Path(result.artifact))) is None or is_float(result):
            continue
        try:
            errors = read_errors(QuantizedCheckpoint.open(manifest.parent))
        except InputError:
            continue  # what is shown is extra: a checkpoint that was changed since is no reason to show nothing
        if errors is not None:
            # One checkpoint in several formats or runtimes has one map.
            found.setdefault(json.dumps(sorted(map(str, errors.cells.items()))).encode(), (label, errors))
    every = [error for _, errors in found.values() for error, _ in errors.cells.values() if error > 0]
    if not every:
        return [], ""
    low, high = min(every), max(every)
    plots = [Plot(label, heat(label, one.cells, one.kinds, low, high), one.caption) for label, one in found.values()]
    return plots, f"from {low:.2g} (light) to {high:.2g} (dark), by decades"


def find_manifest(artifact: Path) -> Path | None:
    """Return the manifest of the checkpoint that an artifact was written from, where it lies beside it."""
    folders = (artifact, artifact / CHECKPOINT, artifact.parent / CHECKPOINT)
    return next((folder / MANIFEST for folder in folders if (folder / MANIFEST).is_file()), None)


def read_errors(checkpoint: QuantizedCheckpoint) -> Errors | None:
    """Return the errors of a checkpoint's matrices in layers, the largest of a kind where experts have several; None without one."""
    cells: dict[tuple[int, str], tuple[float, str]] = {}
    rest, worst = [], (0.0, "")
    for record in checkpoint.records.values():
        spec = record.spec
        if record.scheme.facts.family == "float":
            continue
        told = f"{spec.name}: {record.error:.3g} ({record.scheme.grid})"
        worst = max(worst, (record.error, told))
        if spec.layer is None:
            rest.append(f"{spec.kind} {record.error:.2g} ({record.scheme.grid})")
        else:
            key = (spec.layer, spec.kind)
            cells[key] = max(cells.get(key, (0.0, "")), (record.error, told))
    if not cells:
        return None
    kinds = {kind: _SHORT.get(kind, kind) for kind in sorted({kind for _, kind in cells}, key=_order)}
    said = [f"largest: {worst[1]}", *([f"outside the layers: {', '.join(rest)}"] if rest else [])]
    return Errors(cells, kinds, printable("; ".join(said)))


def _order(kind: str) -> tuple[int, str]:
    known = list(_SHORT)
    return (known.index(kind) if kind in known else len(known), kind)


def _around(estimate: Estimate) -> Span | None:
    if estimate.error is None:
        return None
    # By decades an interval cannot go below nothing: it ends a decade below the value.
    return max(estimate.value / 10, estimate.value - _Z * estimate.error), estimate.value + _Z * estimate.error
