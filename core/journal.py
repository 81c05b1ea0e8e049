"""The journal of a run: which block files are finished, one flushed line each, so that a killed run goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from r1q.core.checkpoint import JOB, JOURNAL, TensorRecord
from r1q.core.errors import UsageError
from r1q.core.files import explain_os_error, is_bare_name, json_bytes, sha256_file, write_json

_NAMED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedFile:
    """One finished block file: its name, sha256, what it holds, and the events on the way.

    `state` is the sha256 of the hidden states that a calibrated run goes on from, empty in others; `coverage` how many calibration
    tokens each expert of the block was sent, empty without experts.
    """

    file: str
    sha256: str
    records: tuple[TensorRecord, ...]
    events: tuple[str, ...] = ()
    state: str = ""
    coverage: tuple[int, ...] = ()


def open_job(folder: Path, job: Mapping[str, object]) -> None:
    """Write job.json, or check that the one there asks for the same.

    Raises `UsageError` naming what differs: an unfinished or finished run is never mixed with another one.
    """
    path = folder / JOB
    if not path.is_file():
        write_json(path, job)
        return
    stored = path.read_bytes()
    if stored == json_bytes(job):
        return
    try:
        differs = _differing(json.loads(stored), json.loads(json_bytes(job)))
    except (ValueError, AttributeError, TypeError, RecursionError):
        differs = ["job.json is damaged"]
    raise UsageError(
        f"{folder} holds another job (different: {', '.join(differs)}); choose another folder with -o or delete it"
    )


def _differing(before: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """Return the names of entries that differ, as `engine.damp` where they lie one deeper and are not many."""
    names: list[str] = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        inner = _differing(old, new) if isinstance(old, dict) and isinstance(new, dict) and old != new else []
        if old != new:
            names += [f"{key}.{name}" for name in inner] if 0 < len(inner) <= _NAMED else [key]
    return names


def finished_files(folder: Path) -> dict[str, FinishedFile]:
    """Return the block files that the journal calls finished and whose bytes still are what it says."""
    path = folder / JOURNAL
    if not path.is_file():
        return {}
    found: dict[str, FinishedFile] = {}
    for line in path.read_bytes().split(b"\n"):
        entry = _parse(line)
        if entry is not None and (folder / entry.file).is_file() and sha256_file(folder / entry.file) == entry.sha256:
            found[entry.file] = entry
    return found


def append(folder: Path, entry: FinishedFile) -> None:
    """Add a line for a finished block file and flush it to the disk."""
    value = {
        "file": entry.file,
        "sha256": entry.sha256,
        "tensors": [record.to_dict() for record in entry.records],
        "events": list(entry.events),
        "state": entry.state,
        **({"coverage": list(entry.coverage)} if entry.coverage else {}),
    }
    path = folder / JOURNAL
    try:
        with open(path, "ab") as file:
            # A kill may have left half a line; a newline first keeps it apart from this one.
            file.write(b"\n" + json.dumps(value, sort_keys=True).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise explain_os_error(error, path) from error


def _parse(line: bytes) -> FinishedFile | None:
    # A torn line is one whose write was cut by a kill: its block is simply done again.
    try:
        value = json.loads(line)
        records = tuple(TensorRecord.from_dict(record) for record in value["tensors"])
        entry = FinishedFile(
            file=str(value["file"]),
            sha256=str(value["sha256"]),
            records=records,
            events=tuple(map(str, value.get("events", ()))),
            state=str(value.get("state", "")),
            coverage=tuple(map(int, value.get("coverage", ()))),
        )
        return entry if is_bare_name(entry.file) else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
