"""An inspection for people: facts in lines, a table of grids, metadata; everything that came out of a file made printable."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from r1q.core.untrusted import printable
from r1q.plan.inspection import Inspection, Shown

ABSENT = "–"
_TEMPLATE_LINES = 4
_LINE = 60
_KEY = 44
_WIDEST = 400  # of a metadata value: no terminal shows more of a line


def show_inspection(console: Console, found: Inspection, *, tensors: bool = False, template: bool = False) -> None:
    """Print the report; with `tensors` every tensor in it, with `template` the whole chat template after it, unwrapped."""
    parts: list[RenderableType] = [
        Text(printable(found.path.resolve().name or str(found.path)), style="bold"),
        _facts(found, template),
    ]
    if found.tensors:
        parts += [Text(), _grids(found)]
    if tensors:
        parts += [Text(), _tensors(found)]
    if found.metadata:
        parts += [Text(), Text("metadata", style="bold"), *_metadata(found)]
    console.print(Group(*parts), soft_wrap=False)
    if template and found.model.chat_template is not None:
        console.print(Text("\nchat template", style="bold"))
        console.print(Text(printable(found.model.chat_template, lines=True)), soft_wrap=True)


def _plain_table() -> Table:
    return Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)


def _facts(found: Inspection, template: bool) -> RenderableType:
    table = _plain_table()
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for label, line in _fact_lines(found, template):
        table.add_row(label, Text(printable(line)))
    return table


def _fact_lines(found: Inspection, template: bool) -> Iterator[tuple[str, str]]:
    model = found.model
    yield "format", found.format
    yield "architecture", model.architecture
    if model.sizes:
        counted = ("blocks", "heads", "kv heads", "experts")
        yield (
            "",
            ", ".join(
                f"{n:,} {w if n > 1 else w.removesuffix('s')}" if w in counted else f"{w} {n:,}"
                for w, n in model.sizes.items()
            ),
        )
    yield "parameters", f"{_count(found.weights)} in {len(found.tensors):,} tensors{_tied(model.tied)}"
    bits = found.bits_per_weight
    true_bits = f"{bits:.3f} true bits/weight" if bits is not None else "bits/weight unknown"
    yield "size", f"{_size(found.file_bytes)} on disk, tensors {_size(found.data_bytes)}: {true_bits}"
    yield "context", f"{_count(model.context)} tokens" if model.context else "not stated"
    yield "vocabulary", f"{_count(model.vocabulary)} tokens" if model.vocabulary else "not stated"
    for number, line in enumerate(found.made_by or ("not stated",)):
        yield ("made by" if not number else ""), line
    yield from _template_lines(model.chat_template, template)
    yield "fallbacks", found.fallbacks[0] if found.fallbacks else "none recorded"
    yield from (("", line) for line in found.fallbacks[1:])
    yield from (("artifact", line) for line in found.beside)
    yield from (("note", line) for line in found.notes)


def _template_lines(template: str | None, whole: bool) -> Iterator[tuple[str, str]]:
    if template is None:
        yield "chat template", "none"
        return
    lines = printable(template, lines=True).split("\n")
    size = f"{len(template):,} characters, {len(lines):,} line{'s' if len(lines) > 1 else ''}"
    yield "chat template", f"{size}{'; below' if whole else '; --template shows it whole'}"
    if not whole:
        pieces = [line[at : at + _LINE] for line in lines for at in range(0, max(len(line), 1), _LINE)]
        yield from (("", piece) for piece in pieces[:_TEMPLATE_LINES])
        if len(pieces) > _TEMPLATE_LINES:
            yield "", "…"


def _grids(found: Inspection) -> RenderableType:
    table = _plain_table()
    table.show_header = True
    table.add_column("grid", no_wrap=True)
    for heading in ("tensors", "weights", "bytes", "share", "bits/weight"):
        table.add_column(heading, justify="right", no_wrap=True)
    total = max(found.data_bytes, 1)
    for row in found.grids():
        bits = ABSENT if row.bits_per_weight is None else f"{row.bits_per_weight:.3f}"
        cells = (f"{row.tensors:,}", _count(row.weights), _size(row.bytes), f"{100 * row.bytes / total:.1f} %", bits)
        table.add_row(Text(printable(row.grid)), *cells)
    return table


def _tensors(found: Inspection) -> RenderableType:
    table = _plain_table()
    table.show_header = True
    table.add_column("tensor", overflow="fold")
    table.add_column("grid", no_wrap=True)
    for heading in ("shape", "size"):
        table.add_column(heading, justify="right", no_wrap=True)
    errors = any(row.error is not None for row in found.tensors)
    if errors:
        table.add_column("error %", justify="right", no_wrap=True)
    for row in found.tensors:
        error = [] if not errors else [ABSENT if not row.error else f"{100 * row.error:.2f}"]
        shape = "×".join(map(str, row.shape)) or "scalar"
        table.add_row(Text(printable(row.name)), Text(printable(row.grid)), shape, _size(row.bytes), *error)
    return table


def _metadata(found: Inspection) -> Iterator[RenderableType]:
    """Yield a line for each key, cut at the console's edge: `--json` has them whole."""
    keys = {key: printable(key) for key in found.metadata}
    width = min(max(map(len, keys.values())), _KEY)
    for key, value in found.metadata.items():
        line = Text.assemble("  ", (f"{keys[key]:<{width}}", "dim"), "  ", printable(_spelled(value)[:_WIDEST]))
        line.no_wrap, line.overflow = True, "ellipsis"
        yield line


def _spelled(value: Shown) -> str:
    if isinstance(value, Mapping) and "count" in value:
        first = value["first"]
        items = ", ".join(_spelled(item) for item in first) if isinstance(first, list) else ""
        return f"[{value['count']:,} values] {items}, …"
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return "[" + ", ".join(_spelled(item) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False, default=str)


def _tied(tied: bool | None) -> str:
    return {True: ", the head is the embedding (tied)", False: ", a head of its own (not tied)", None: ""}[tied]


def _count(count: int | None) -> str:
    return "unknown" if count is None else f"{count:,}"


def _size(count: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} B"
