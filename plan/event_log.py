"""`--log-json`: every event of a run as one JSON line, flushed at once, for whoever watches a run from outside."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

from r1q.core.errors import R1qError
from r1q.core.files import writing
from r1q.plan.walk import Exported
from r1q.quantize.run import Event


def logged(events: Iterator[Event | Exported], path: Path | None) -> Iterator[Event | Exported]:
    """Yield `events` as they are, adding a line to `path` for each: seconds since 1970, event, name, error, resident bytes.

    A file that is there is continued; an error that ends the run is its last line. Raises the errors of `core.files` where the
    file cannot be written.
    """
    if path is None:
        yield from events
        return
    with writing(path):
        file = open(path, "a", encoding="utf-8")  # noqa: SIM115  # closed below: what the run raises is not the log's
    process = psutil.Process()

    def write(told: Mapping[str, object]) -> None:
        line = {"time": round(time.time(), 3), **told, "rss": process.memory_info().rss}
        with writing(path):
            file.write(json.dumps(line) + "\n")
            file.flush()

    try:
        for event in events:
            write(_told(event))
            yield event
    except R1qError as error:
        write({"event": "failed", "name": type(error).__name__, "message": str(error)})
        raise
    finally:
        file.close()


def _told(event: Event | Exported) -> dict[str, object]:
    if isinstance(event, Exported):
        return {
            "event": "exported",
            "name": event.artifact.name,
            "bytes": event.artifact.bytes,
            "already": event.already,
        }
    told: dict[str, object] = {"event": event.what, "name": event.name, "count": event.count}
    return told if event.record is None else told | {"grid": str(event.record.scheme), "error": event.record.error}
