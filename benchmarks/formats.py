"""Results as text for machines and documents: JSON, JSON lines, CSV and Markdown; and results read back from a file."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from r1q.benchmarks.llama_bench import decode_record, records
from r1q.benchmarks.render import columns
from r1q.benchmarks.result import BenchResult
from r1q.core.errors import InputError

MAX_FILE = 1 << 30
MAX_RESULTS = 10_000
Writer = Callable[[Sequence[BenchResult]], str]


def to_line(result: BenchResult) -> str:
    """Return a result as one line of JSON: its own keys, llama-bench's of decoding, and under `tests` llama-bench's of every test."""
    value = {**decode_record(result), **result.to_dict(), "tests": records(result)}
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def to_jsonl(results: Sequence[BenchResult]) -> str:
    """Return a line for each result."""
    return "".join(to_line(result) + "\n" for result in results)


def to_json(results: Sequence[BenchResult]) -> str:
    """Return one JSON array with an object for each result."""
    return "[\n" + ",\n".join(to_line(result) for result in results) + "\n]\n"


def to_csv(results: Sequence[BenchResult]) -> str:
    """Return a header and a line for each result: what it is, and every number of its summary under a dotted name."""
    rows = [_flat(result) for result in results]
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def to_markdown(results: Sequence[BenchResult]) -> str:
    """Return a table with the columns of the terminal's, then notes and failures."""
    found = columns(results)
    # A bar in a cell would end it.
    cells = [[column.cell(result).replace("|", "\\|") for column in found] for result in results]
    heads = [column.heading.replace("-\n", "-").replace("\n", " ") for column in found]
    lines = [heads, ["--" if column.left else "--:" for column in found], *cells]
    remarks = dict.fromkeys(
        line
        for result in results
        for line in (*result.notes, *(f"{failure.stage} failed: {failure.message}" for failure in result.failures))
    )
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return table + ("\n" + "".join(f"- {line}\n" for line in remarks) if remarks else "")


WRITERS: Mapping[str, Writer] = MappingProxyType({"json": to_json, "jsonl": to_jsonl, "csv": to_csv, "md": to_markdown})


def read_results(path: Path) -> list[BenchResult]:
    """Return the results in a file of JSON lines or of one JSON array. Raises InputError for another, or one without results."""
    try:
        if path.stat().st_size > MAX_FILE:
            raise InputError(f"{path} has more than {MAX_FILE >> 20} MiB: that is no file of r1q bench")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a file of r1q bench --format json or jsonl: {error.reason}") from error
    found = [BenchResult.from_json(line) for line in _lines(path, text)]
    if not found:
        raise InputError(f"{path} holds no results: make some with r1q bench --json > {path.name}")
    return found


def _lines(path: Path, text: str) -> list[str]:
    if not text.lstrip().startswith("["):
        return [line for line in text.splitlines() if line.strip()][:MAX_RESULTS]
    try:
        return [json.dumps(value) for value in json.loads(text)][:MAX_RESULTS]
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error


def _flat(result: BenchResult) -> dict[str, Any]:
    what = {
        key: getattr(result, key)
        for key in ("artifact", "name", "format", "grid", "runtime", "target", "device", "emulated", "threads")
    }
    size = {key: getattr(result, key) for key in ("bytes", "weights", "bits_per_weight")}
    failures = "; ".join(f"{failure.stage}: {failure.message}" for failure in result.failures)
    return {
        **what,
        **size,
        **_dotted(result.summary()),
        "cpu": result.machine.cpu,
        "time": result.time,
        "failures": failures,
    }


def _dotted(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        dot = f"{name}." if name else ""
        return {inner: item for key, part in value.items() for inner, item in _dotted(part, f"{dot}{key}").items()}
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        # Decoding is a list: each entry goes by its depth.
        parts = [_dotted({k: v for k, v in part.items() if k != "depth"}, f"{name}@{part['depth']}") for part in value]
        return {key: item for part in parts for key, item in part.items()}
    return {name: " ".join(map(str, value)) if isinstance(value, list) else value}
