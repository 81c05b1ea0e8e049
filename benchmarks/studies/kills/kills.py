"""Kill `r1q quantize --effort default` again and again; say whether the bytes are those of an undisturbed run, and what it cost.

Usage: kills.py WORK [--kills N] [--model CHECKPOINT]. Half of the kills come at a random moment after the start, the other half as
soon as a temporary file is seen, that is between its creation and its rename. A job that gets through is compared and begun anew until
all kills are spent. At last one resume with another OMP_NUM_THREADS and little address space left.
"""

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

OPTIONS = ["--scheme", "q4_k_m", "--effort", "default", "--samples", "24", "--seq-len", "256", "-q"]


def command(model: list[str], output: Path) -> list[str]:
    """Return the command line of one attempt."""
    return [sys.executable, "-m", "r1q", "quantize", *model, *OPTIONS, "-o", str(output)]


def hashes(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file; where.json holds the source's path and journal.jsonl is as long as there were kills."""
    skipped = ("where.json", "journal.jsonl")
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in skipped)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def cpu() -> float:
    """Return the CPU seconds of all children that ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def finished_blocks(output: Path) -> list[str]:
    """Return the block files in the journal, torn lines left out."""
    journal = output / "checkpoint" / "journal.jsonl"
    found = []
    for line in journal.read_bytes().split(b"\n") if journal.exists() else ():
        try:
            found.append(json.loads(line)["file"])
        except (ValueError, KeyError):
            continue
    return found


def attempt(model: list[str], output: Path, when: float, on_temporary: bool) -> tuple[int, str]:
    """Run once, kill after `when` seconds or at the first temporary file after that; return the exit code and where it was."""
    process = subprocess.Popen(command(model, output), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    began = time.monotonic()
    while process.poll() is None:
        late = time.monotonic() - began > when
        if late and (not on_temporary or any(output.rglob(".r1q-tmp-*"))):
            process.kill()
            break
        time.sleep(0.0005 if late else 0.01)
    said = process.communicate()[1].decode(errors="replace")
    where = "inside a rename" if any(output.rglob(".r1q-tmp-*")) else f"after {len(finished_blocks(output))} files"
    if process.returncode not in (0, -9):
        sys.exit(f"failed with {process.returncode}: {said}")
    return process.returncode, where


def main() -> None:
    """Measure, kill, compare, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--model")
    given = parser.parse_args()
    model = [given.model] if given.model else []
    given.work.mkdir(parents=True, exist_ok=True)
    random.seed(1)
    for _ in range(2):  # the first compiles
        shutil.rmtree(given.work / "whole", ignore_errors=True)
        before, began = cpu(), time.monotonic()
        subprocess.run(command(model, given.work / "whole"), check=True, stdout=subprocess.DEVNULL)
        one, wall = cpu() - before, time.monotonic() - began
    expected = hashes(given.work / "whole")
    before = cpu()
    subprocess.run(command(model, given.work / "whole"), check=True, stdout=subprocess.DEVNULL)
    start_up = cpu() - before
    output, kills, jobs, places, twice, spent = given.work / "killed", 0, 0, Counter(), 0, cpu()
    shutil.rmtree(output, ignore_errors=True)
    while kills < given.kills or jobs == 0:
        code, where = attempt(model, output, random.uniform(0, wall) if kills < given.kills else 1e9, kills % 2 == 1)
        if code:
            kills += 1
            places[where] += 1
            continue
        jobs += 1
        counts = Counter(finished_blocks(output))
        twice += sum(count - 1 for count in counts.values())
        if hashes(output) != expected:
            sys.exit(f"bytes differ: {[n for n in expected if hashes(output).get(n) != expected[n]]}")
        if kills < given.kills:
            shutil.rmtree(output)
    spent = cpu() - spent
    shutil.rmtree(output, ignore_errors=True)
    attempt(model, output, wall * 0.6, False)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    limits = 'ulimit -v $((6 * 1024 * 1024)); exec "$@"'
    done = subprocess.run(
        ["bash", "-c", limits, "_", *command(model, output)], env=environment, capture_output=True, text=True
    )
    other = (
        "same bytes"
        if done.returncode == 0 and hashes(output) == expected
        else f"exit {done.returncode}: {done.stderr.strip()}"
    )
    print(
        json.dumps(
            {
                "kills": kills, "jobs_completed": jobs, "files_compared": len(expected), "journaled_blocks_done_twice": twice,
                "places": dict(places.most_common()), "cpu_one_run": round(one, 1), "cpu_start_up": round(start_up, 1),
                "cpu_all": round(spent, 1), "ratio_without_start_ups": round((spent - kills * start_up) / (jobs * one), 2),
                "resumed_with_one_thread_and_6_GiB_of_address_space": other, "wall_one_run": round(wall, 1),
            },
            indent=1,
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
