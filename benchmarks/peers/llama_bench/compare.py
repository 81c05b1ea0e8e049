"""r1q's speeds beside llama-bench's on the same file, taking turns, so that a machine that slows down slows both.

Usage: compare.py TOOLS FILE.gguf [ROUNDS [REPETITIONS]]; TOOLS holds llama.cpp's programs (../llama_cpp_kld/build.sh makes them in
FOLDER/bin). Runs in r1q's environment; prints a JSON line: tokens/s of every round of both, their medians, and the ratio.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean, median

from r1q.benchmarks import isolate
from r1q.runtimes.cores import physical_cores


def theirs(tools: Path, file: Path, repetitions: int) -> dict[str, float]:
    """Return llama-bench's tokens/s of prefill 512, decode 128, and decode after 512."""
    command = [
        tools / "llama-bench",
        "-m",
        file,
        "-p",
        "512",
        "-n",
        "128",
        "-d",
        "0,512",
        "-r",
        str(repetitions),
        "-o",
        "json",
    ]
    environment = os.environ | {"LD_LIBRARY_PATH": str(tools)}
    command += ["-t", str(physical_cores())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    rows = {(row["n_prompt"], row["n_gen"], row["n_depth"]): row["avg_ts"] for row in json.loads(done.stdout)}
    return {"prefill": rows[512, 0, 0], "decode": rows[0, 128, 0], "decode@512": rows[0, 128, 512]}


def ours(file: Path, repetitions: int) -> dict[str, float]:
    """Return the same of the measurement that `r1q bench` makes."""
    job = {
        "path": str(file), "runtime": "llama-cpp", "options": {"context": 640}, "prompt": 128, "prefill": 512, "generate": 128,
        "depths": [0, 512], "repetitions": repetitions, "seed": 1,
    }  # fmt: skip
    timed = [m["seconds"] for m in isolate.run("r1q.benchmarks.measure:speed", job, what="r1q") if "seconds" in m][1:]
    names = {"prefill": ("prefill", 512), "decode": ("decode@0", 128), "decode@512": ("decode@512", 128)}
    return {key: mean(tokens / row[name] for row in timed) for key, (name, tokens) in names.items()}


def main() -> None:
    """Take turns and compare."""
    tools, file = (Path(argument).resolve() for argument in sys.argv[1:3])
    rounds, repetitions = (int(value) for value in [*sys.argv[3:5], "3", "3"][:2])
    found = [(ours(file, repetitions), theirs(tools / "bin", file, repetitions)) for _ in range(rounds)]
    report = {}
    for name in found[0][0]:
        one, two = ([row[side][name] for row in found] for side in (0, 1))
        report[name] = {
            "r1q": one, "llama_bench": two, "medians": [median(one), median(two)],
            "ratio": median(one) / median(two),
        }  # fmt: skip
    print(
        json.dumps(
            {"file": file.name, "threads": physical_cores(), "rounds": rounds, "repetitions": repetitions, **report}
        )
    )


if __name__ == "__main__":
    main()
