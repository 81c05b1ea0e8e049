"""A file of traces that may be killed at any moment: every finished trace is kept, and the end is the same as without a kill.

While it grows it is `<name>.part`, one flushed line for each trace in the order they end; when all are there it becomes `<name>`, in
the order of the problems.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from r1q.calibration.traces import Trace
from r1q.core.errors import UsageError
from r1q.core.files import atomic_write, json_bytes, writing

MAX_BYTES = 1 << 30
Generate = Callable[[Sequence[int]], Iterable[Trace]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Where the file is: `done` of `count` traces are in it; `trace` is the one just added, None at the start."""

    done: int
    count: int
    trace: Trace | None = None


def write_traces(path: Path, count: int, generate: Generate, *, run: Mapping[str, object]) -> Iterator[Step]:
    """Fill `path` with traces 0 … count − 1, made by `generate(missing indices)`; yield where it is, then after each trace.

    `run` is all that decides a trace but its index; a file of another run, or of anything else, is refused with `UsageError`. Traces
    that are there are kept: the same call after a kill goes on, on a finished file does nothing, with a larger `count` adds to it.
    """
    if count < 1:
        raise UsageError(f"{count} traces are asked for; ask for at least one")
    mark = hashlib.sha256(json_bytes(run)).hexdigest()[:16]
    part = path.with_name(path.name + ".part")
    held = {**_read(path, mark), **_read(part, mark, torn=True)}
    missing = [index for index in range(count) if index not in held]
    yield Step(done=count - len(missing), count=count)
    if missing:
        _rewrite(part, held.values())  # without the half line that a kill may have left
        for trace in generate(missing):
            line = {**trace, "run": mark}
            _append(part, line)
            held[_index(line)] = line
            yield Step(done=sum(index in held for index in range(count)), count=count, trace=trace)
    if missing or not path.is_file():
        _rewrite(path, [held[index] for index in sorted(held)])
    with writing(part):
        part.unlink(missing_ok=True)


def _read(path: Path, mark: str, *, torn: bool = False) -> dict[int, Trace]:
    """Return the traces of a file by index; with `torn`, lines that are none are passed over: a kill leaves such."""
    if not path.is_file():
        return {}
    if path.stat().st_size > MAX_BYTES:
        raise UsageError(f"{path} has more than {MAX_BYTES} bytes, so it holds no traces; choose another file")
    found: dict[int, Trace] = {}
    for line in path.read_bytes().splitlines():
        try:
            trace = json.loads(line)
            index, theirs = _index(trace), trace["run"]
        except (ValueError, KeyError, TypeError, RecursionError):
            if torn:
                continue
            raise UsageError(f"{path} holds something else than traces; choose another file") from None
        if theirs != mark:
            raise UsageError(f"{path} holds traces of another run (other model, seed or settings); choose another file")
        found[index] = trace
    return found


def _index(trace: Trace) -> int:
    index = trace["index"]
    if not isinstance(index, int):
        raise TypeError("index is not a number")
    return index


def _line(trace: Trace) -> bytes:
    return json.dumps(trace, ensure_ascii=False).encode() + b"\n"


def _rewrite(path: Path, traces: Iterable[Trace]) -> None:
    with atomic_write(path) as file:
        file.writelines(_line(trace) for trace in traces)


def _append(path: Path, trace: Trace) -> None:
    with writing(path), open(path, "ab") as file:
        file.write(_line(trace))
        file.flush()
        os.fsync(file.fileno())
