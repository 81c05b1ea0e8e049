"""Memory bandwidth as this machine really has it: McCalpin's STREAM in numba, all threads, the best of some runs, kept per machine.

Decoding one token reads every weight once, so bytes read per second bound tokens per second. Two kernels: one that only reads,
as decoding does, and STREAM's triad a = b + s·c, which also writes. The arrays are much larger than any cache.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from r1q import __version__
from r1q.core.files import write_json

CACHE = "bandwidth.json"
ARRAY_BYTES = 256 << 20
SHARE = 16  # of the memory that is available, one array takes at most a sixteenth
RUNS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Bandwidth:
    """Bytes a second: `read` of one array, `triad` of two arrays read and one written, with `threads` threads."""

    read: float
    triad: float
    threads: int

    @property
    def best(self) -> float:
        """The more of the two: what memory can do."""
        return max(self.read, self.triad)


def cache_folder() -> Path:
    """Return the folder for what can be measured again: $XDG_CACHE_HOME/r1q, or ~/.cache/r1q."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "r1q"


def machine_key(cpu: str, cores: int) -> str:
    """Return what a kept measurement belongs to: the processor, how many of its cores, and this version's way of measuring."""
    return f"{cpu} | {cores} cores | r1q {__version__}"


def kept(key: str, folder: Path | None = None) -> Bandwidth | None:
    """Return the bandwidth measured before for `key`, None without one; a damaged file counts as none."""
    try:
        found = _all(folder)[key]
        value = Bandwidth(read=float(found["read"]), triad=float(found["triad"]), threads=int(found["threads"]))
    except (KeyError, TypeError, ValueError):
        return None
    return value if 0 < value.best < 1e15 else None


def keep(key: str, value: Bandwidth, folder: Path | None = None) -> None:
    """Keep a measurement; where the folder cannot be written, it is measured again the next time."""
    folder = folder or cache_folder()
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / CACHE, {**_all(folder), key: asdict(value)})


def probe(job: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Measure, in a child; the job: threads, and array_bytes or None. Yields one message, `bandwidth`."""
    size = job.get("array_bytes") or min(ARRAY_BYTES, psutil.virtual_memory().available // SHARE)
    yield {"bandwidth": asdict(measure(int(job["threads"]), int(size)))}


def measure(threads: int, array_bytes: int, runs: int = RUNS) -> Bandwidth:
    """Return the best of `runs` runs of both kernels over arrays of `array_bytes`."""
    import numba
    import numpy as np

    read, triad = _kernels()
    threads = min(threads, numba.config.NUMBA_NUM_THREADS)
    before = numba.get_num_threads()
    numba.set_num_threads(threads)
    try:
        count = max(threads, array_bytes // 8)
        out, left, right = (np.full(count, value, dtype=np.float64) for value in (0.0, 1.0, 2.0))
        words = left.view(np.uint64)
        rates = [
            max(_rate(lambda: read(words, 4 * threads), 8 * count) for _ in range(runs + 1)),
            max(_rate(lambda: triad(out, left, right, 3.0), 24 * count) for _ in range(runs + 1)),
        ]
    finally:
        numba.set_num_threads(before)
    return Bandwidth(read=rates[0], triad=rates[1], threads=threads)


def _rate(action: Callable[[], object], size: int) -> float:
    started = time.perf_counter()
    action()
    return size / (time.perf_counter() - started)


def _kernels() -> tuple[Callable[..., Any], Callable[..., None]]:
    import numpy as np
    from numba import njit, prange

    @njit  # type: ignore[untyped-decorator]
    def mix(words: Any) -> Any:
        # Exclusive or has no order, so the compiler takes many words at once; a sum of floats would be bound by the adder.
        found = np.uint64(0)
        for index in range(len(words)):
            found ^= words[index]
        return found

    @njit(parallel=True)  # type: ignore[untyped-decorator]
    def read(words: Any, parts: int) -> Any:
        found = np.zeros(parts, dtype=np.uint64)
        for part in prange(parts):
            found[part] = mix(words[part * len(words) // parts : (part + 1) * len(words) // parts])
        return found.sum()

    @njit(parallel=True, fastmath=True)  # type: ignore[untyped-decorator]
    def triad(out: Any, left: Any, right: Any, factor: float) -> None:
        for index in prange(len(out)):
            out[index] = left[index] + factor * right[index]

    return read, triad


def _all(folder: Path | None) -> dict[str, Any]:
    try:
        value = json.loads(((folder or cache_folder()) / CACHE).read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
