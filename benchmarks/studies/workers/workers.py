"""Time `r1q quantize` with other numbers of workers, and compare the bytes; with --kill, shoot a worker now and then.

Usage: workers.py WORK MODEL [--variants "1:1 2:1 1:2"] [--kill SECONDS] [-- OPTIONS of r1q quantize]. A variant is WORKERS:THREADS;
those of the same number of threads have to write the same bytes. Memory is the largest sum seen of what the processes hold for
themselves (USS), asked every quarter of a second.
"""

import argparse
import hashlib
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

BESIDE = ("where.json", "journal.jsonl")  # the path of the source; as long as there were kills


def digest(folder: Path) -> str:
    """Return one sha256 of all files of a checkpoint."""
    whole = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in BESIDE):
        whole.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return whole.hexdigest()[:16]


def held(process: psutil.Process) -> int:
    """Return the bytes that a process and its children hold for themselves."""
    total = 0
    for one in (process, *process.children(recursive=True)):
        try:
            total += one.memory_full_info().uss
        except psutil.Error:
            continue
    return total


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    """Return the workers of a run."""
    try:
        return [one for one in process.children() if "spawn_main" in " ".join(one.cmdline())]
    except psutil.Error:  # one that is ending
        return []


def run(model: str, output: Path, variant: str, options: list[str], every: float | None) -> tuple[float, int, int]:
    """Return seconds, bytes and kills of one run."""
    workers, _, threads = variant.rpartition(":")
    words = [sys.executable, "-m", "r1q", "quantize", model, *options, "--to", "checkpoint", "-q", "-o", str(output)]
    began, most, kills = time.monotonic(), 0, 0
    running = psutil.Popen([*words, "--workers", workers, "--threads", threads], stdout=subprocess.DEVNULL)
    last = began
    while running.poll() is None:
        time.sleep(0.25)
        if running.is_running():
            try:
                most = max(most, held(running))
            except psutil.Error:
                continue
        victims = workers_of(running) if every else []
        if every and victims and time.monotonic() - last > every:
            victims[kills % len(victims)].send_signal(signal.SIGKILL)
            kills, last = kills + 1, time.monotonic()
    if running.returncode:
        raise SystemExit(f"{variant}: ended with {running.returncode}")
    return time.monotonic() - began, most, kills


def main() -> None:
    """Print a line for each variant."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("model")
    parser.add_argument("--variants", default="1:1 2:1 1:2")
    parser.add_argument("--kill", type=float)
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    asked, options = parser.parse_args(sys.argv[1:cut]), sys.argv[cut + 1 :]
    seen: dict[str, str] = {}
    for variant in asked.variants.split():
        output = asked.work / f"workers-{variant.replace(':', '-').replace('/', '-')}"
        shutil.rmtree(output, ignore_errors=True)
        seconds, most, kills = run(asked.model, output, variant, options, asked.kill)
        found = digest(output / "checkpoint")
        threads = variant.rpartition(":")[2]
        same = seen.setdefault(threads, found) == found
        told = f", {kills} workers killed" if asked.kill else ""
        print(f"workers:threads {variant}: {seconds:.1f} s, {most / 1e6:.0f} MB, {found}{told}", flush=True)
        shutil.rmtree(output)
        if not same:
            raise SystemExit("the bytes differ")


if __name__ == "__main__":
    main()
