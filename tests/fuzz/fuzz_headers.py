"""The long fuzzing run: `python tests/fuzz/fuzz_headers.py TARGET --runs 1000000 --work FOLDER` (needs atheris; see README.md).

Coverage-guided, with mutations that keep the format. A finding does not stop the run: the smallest input of each kind is kept in
FOLDER/findings, and FOLDER/TARGET.json has the figures. Limits: 2 seconds and 64 MiB an input, and an address space that is capped.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import resource
import runpy
import sys
import time
import traceback
import tracemalloc
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SLOW_SECONDS = 2.0
LARGE_BYTES = 64 << 20
_ADDRESS_SPACE = 1 << 30  # beyond what the process has when the run begins
_TRACED_EVERY = 32  # inputs; every input is held to the growth of the resident memory, these to each byte allocated


def _peak_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Run:
    """Feeds inputs to one target and keeps the figures and the findings."""

    def __init__(self, name: str, feed: Any, target: Any, work: Path, runs: int) -> None:
        self.name, self.feed, self.target, self.work, self.runs = name, feed, target, work, runs
        self.folder = work / f"{name}-scratch"
        self.folder.mkdir(parents=True)
        target.prepare(self.folder)
        self.counts: Counter[str] = Counter()
        self.findings: dict[str, int] = {}
        self.slowest, self.largest, self.slowest_size = 0.0, 0, 0
        self.began, self.rss_at_start, self.rss = time.monotonic(), _peak_rss(), _peak_rss()

    def one(self, data: bytes) -> None:
        """Feed one input; a finding is kept, never raised."""
        traced = self.counts["inputs"] % _TRACED_EVERY == 0
        if traced:
            tracemalloc.start()
        began = time.perf_counter()
        try:
            self.counts["accepted" if self.feed(self.target, self.folder, data) else "refused"] += 1
        except Exception as error:  # noqa: BLE001  # that is what a fuzzer looks for
            self.keep(_kind(error), data)
        seconds = time.perf_counter() - began
        if traced:
            self.largest = max(self.largest, peak := tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            if peak > LARGE_BYTES:
                self.keep("memory", data)
        elif seconds > self.slowest:
            self.slowest, self.slowest_size = seconds, len(data)
        if seconds > SLOW_SECONDS:
            self.keep("slow", data)
        if (rss := _peak_rss()) > self.rss:
            if rss - self.rss > LARGE_BYTES:
                self.keep("memory", data)
            self.rss = rss
        self.counts["inputs"] += 1
        if self.counts["inputs"] % 50_000 == 0 or self.counts["inputs"] == self.runs:
            self.report()

    def keep(self, kind: str, data: bytes) -> None:
        """Keep the smallest input of each kind of finding."""
        self.counts["findings"] += 1
        if len(data) < self.findings.get(kind, sys.maxsize):
            self.findings[kind] = len(data)
            place = self.work / "findings" / self.name
            place.mkdir(parents=True, exist_ok=True)
            (place / "".join(c if c.isalnum() else "_" for c in kind)).write_bytes(data)

    def report(self) -> None:
        """Write the figures as they stand."""
        figures = {
            "target": self.name, **self.counts, "seconds": round(time.monotonic() - self.began, 1),
            "slowest_ms": round(1000 * self.slowest, 1), "slowest_bytes": self.slowest_size,
            "largest_traced_bytes": self.largest, "peak_rss_start": self.rss_at_start, "peak_rss": _peak_rss(),
            "kinds": self.findings,
        }  # fmt: skip
        (self.work / f"{self.name}.json").write_text(json.dumps(figures, indent=1) + "\n")


def _kind(error: BaseException) -> str:
    """Return the name of an exception and the last place of ours that it came through."""
    ours = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "/r1q/" in frame.filename or "/main/" in frame.filename
    ]
    place = ours[-1] if ours else traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} {Path(place.filename).stem} {place.name} {place.lineno}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target")
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--length", type=int, default=4096, help="of the longest input, in bytes")
    parser.add_argument("--work", type=Path, required=True, help="a folder, best in memory (/dev/shm)")
    return parser.parse_args()


def main() -> None:
    """Run atheris on one target."""
    asked = _arguments()
    sys.path.insert(0, str(HERE.parents[1]))
    atheris: Any = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["r1q", "tomllib"]):
        targets = runpy.run_path(str(HERE / "targets.py"), run_name="fuzz_targets")
    seeds = runpy.run_path(str(HERE / "seeds.py"), run_name="fuzz_seeds")
    asked.work.mkdir(parents=True, exist_ok=True)
    corpus = asked.work / f"{asked.target}-corpus"
    corpus.mkdir(exist_ok=True)
    starts = seeds["seeds"](targets["CONFIG"], targets["WEIGHT_MAP"])[asked.target]
    for number, data in enumerate(starts):
        (corpus / f"seed-{number}").write_bytes(data)
    words = asked.work / f"{asked.target}.dict"
    words.write_text(
        "".join('"' + "".join(f"\\x{byte:02x}" for byte in word) + '"\n' for word in seeds["words"](asked.target))
    )
    run = Run(asked.target, targets["feed"], targets["TARGETS"][asked.target], asked.work, asked.runs)

    def mutate(data: bytes, size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        act = rng.random()
        if act < 0.45:
            return bytes(atheris.Mutate(data, size))
        data = seeds["change"](asked.target, rng, data if act < 0.8 else rng.choice(starts))
        return bytes(atheris.Mutate(data, size)) if act > 0.95 and data else data[:size]

    warnings.simplefilter("error")
    for data in starts:
        run.one(data)
    space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (space + _ADDRESS_SPACE, resource.RLIM_INFINITY))
    options = [
        f"-runs={asked.runs}",
        f"-seed={asked.seed}",
        f"-max_len={asked.length}",
        f"-dict={words}",
        "-timeout=10",
    ]
    options += [
        "-rss_limit_mb=2048",
        f"-artifact_prefix={asked.work}/{asked.target}-",
        "-print_final_stats=1",
        str(corpus),
    ]
    atheris.Setup([sys.argv[0], *options], run.one, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
