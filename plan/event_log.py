"""`--log-json`: every event of a run as one JSON line, flushed at once, for whoever watches a run from outside."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from r1q.core.files import writing
from r1q.plan.walk import Exported
from r1q.quantize.run import Event


def logged(events: Iterator[Event | Exported], path: Path | None) -> Iterator[Event | Exported]:
    """Yield `events` as they are, adding a line to `path` for each: seconds since 1970, event, name, error, resident bytes.

    A file that is there is continued. Raises the errors of `core.files` where it cannot be written.
    """
    if path is None:
        yield from events
        return
    process = psutil.Process()
    with writing(path), open(path, "a", encoding="utf-8") as file:
        for event in events:
            line = {"time": round(time.time(), 3), **_told(event), "rss": process.memory_info().rss}
            file.write(json.dumps(line) + "\n")
            file.flush()
            yield event


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
