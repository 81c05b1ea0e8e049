"""The child's side of `isolate.run`: read one job, run it, send messages, say how it ended."""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import IO, Any

from r1q.core.errors import R1qError, ResourceError


def main() -> int:
    """Serve one job from stdin; return the exit status."""
    messages = _claim_stdout()
    order = json.loads(sys.stdin.buffer.readline())
    _die_with_parent()
    try:
        _limit_memory(order["memory_limit"])
        for message in _load(order["target"])(order["job"]):
            _send(messages, message)
    except KeyboardInterrupt:
        return 130  # Ctrl-C reaches the whole process group; the parent says what there is to say
    except MemoryError as error:
        _send_error(messages, ResourceError(f"not enough memory: {error or 'an allocation failed'}"))
    except R1qError as error:
        _send_error(messages, error)
    except Exception as error:  # noqa: BLE001  a runtime may raise anything; the parent tells the user in one line
        text = "".join(traceback.format_exception_only(error)).strip()
        _send(messages, {"crash": {"message": " ".join(text.split()), "trace": traceback.format_exc()}})
    return 0


def _claim_stdout() -> IO[bytes]:
    """Return a stream to the parent that nobody else writes to: what native code prints to stdout goes to stderr."""
    private = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(private, "wb", buffering=0)


def _die_with_parent() -> None:
    def wait() -> None:
        # The parent never writes again; the end of the stream means that it is gone. Read the descriptor itself: a thread
        # blocked inside sys.stdin's own lock would keep the interpreter from finishing.
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _limit_memory(limit: int | None) -> None:
    if limit is None:
        return
    import resource  # not on every system, and only needed here

    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _load(target: str) -> Callable[[Mapping[str, Any]], Iterable[Mapping[str, Any]]]:
    module, _, name = target.partition(":")
    task: Callable[[Mapping[str, Any]], Iterable[Mapping[str, Any]]] = getattr(importlib.import_module(module), name)
    return task


def _send(messages: IO[bytes], message: Mapping[str, Any]) -> None:
    # Built before it is written, so that a message that JSON cannot spell is an error and not half a line.
    data = memoryview(json.dumps(message, allow_nan=False).encode() + b"\n")
    while data:
        data = data[messages.write(data) :]


def _send_error(messages: IO[bytes], error: R1qError) -> None:
    gc.collect()  # after a MemoryError there may be no room for the message itself
    _send(messages, {"error": {"kind": type(error).__name__, "message": str(error)}})


if __name__ == "__main__":
    sys.exit(main())
