"""llama.cpp's log: kept off the terminal, remembered for the message of a failure."""

from __future__ import annotations

import ctypes
from collections import deque

import llama_cpp

WARN = 3  # enum ggml_log_level: 0 none, 1 debug, 2 info, 3 warn, 4 error, 5 goes on from the line before
GOES_ON = 5
OUT_OF_MEMORY = ("failed to allocate", "unable to allocate", "bad_alloc", "cannot allocate memory", "out of memory")

_lines: deque[str] = deque(maxlen=40)
_level = 0


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator, unused-ignore]
def _remember(level: int, text: bytes, _user_data: ctypes.c_void_p) -> None:
    global _level
    goes_on, _level = level == GOES_ON, _level if level == GOES_ON else level
    line = text.decode("utf-8", "replace")
    if _level < WARN:
        return
    if goes_on and _lines:
        _lines[-1] += line
    else:
        _lines.append(line)


def capture() -> None:
    """Send llama.cpp's log here and forget what came before. The callback is the module's, so it outlives every model."""
    _lines.clear()
    llama_cpp.llama_log_set(_remember, ctypes.c_void_p(0))


def reason() -> str:
    """Return the last warnings and errors as one line, without llama.cpp's function names; "no reason given" if there are none."""
    parts = []
    for line in _lines:
        text = " ".join(line.split())
        head, colon, tail = text.partition(": ")
        text = tail if colon and " " not in head else text
        if text and text not in parts:
            parts.append(text)
    return "; ".join(parts[-3:]) or "no reason given"


def ran_out_of_memory() -> bool:
    """Return whether the log speaks of an allocation that failed."""
    return any(sign in line.lower() for line in _lines for sign in OUT_OF_MEMORY)
