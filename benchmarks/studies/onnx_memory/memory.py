"""What a process that runs an ONNX folder holds, beside the file and its keys and values: memory.py FOLDER [--context 2048].

Runs itself as a child for each reading, so that nothing but the runtime is in it, and prints a JSON line. Linux: /proc/self/status.
`anonymous` is what the process alone holds; pages of mapped files (`file`) go back to the system whenever it wants them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

STEPS = 48


def held() -> dict[str, float]:
    """Return MB resident now, of these anonymous and of files, and the most that was resident."""
    names = {"VmRSS": "resident", "RssAnon": "anonymous", "RssFile": "file", "VmHWM": "peak"}
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    pairs = (line.split(":") for line in lines)
    return {names[key]: round(int(value.split()[0]) * 1024 / 1e6, 1) for key, value in pairs if key in names}


def child(folder: Path, runtime: str, context: int) -> dict[str, object]:
    """Open the folder, read a prompt that leaves room for STEPS tokens, write those; return what was held after each."""
    stages = {"python": held()}
    import numpy as np

    from r1q.runtimes.base import Options
    from r1q.runtimes.table import load_runtime

    adapter = load_runtime(runtime)
    stages["libraries"] = held()
    with adapter.open(folder, Options(context=context)) as session:
        stages["opened"] = held()
        tokens = np.random.default_rng(0).integers(10, session.vocab, context - STEPS).tolist()
        began = time.perf_counter()
        session.prefill(0, tokens)
        prefill = len(tokens) / (time.perf_counter() - began)
        stages["prompt read"] = held()
        began = time.perf_counter()
        for token in tokens[:STEPS]:
            session.step([(0, token)])
        decode = STEPS / (time.perf_counter() - began)
        stages["tokens written"] = held()
    return {"prefill": round(prefill, 1), "decode": round(decode, 1), "MB": stages}


def keys_and_values(folder: Path, context: int) -> float:
    """Return MB of keys and values of `context` tokens, by the graph's own types."""
    from r1q.core.onnx_file import OnnxFolder
    from r1q.runtimes.onnx_decoder import read_decoder

    decoder = read_decoder(OnnxFolder.open(folder))
    width = {"float32": 4, "float16": 2, "int8": 1, "uint8": 1}[decoder.kinds.cache]
    return len(decoder.names.past) * decoder.sides.heads * decoder.kinds.cache_width * context * width / 1e6


def main() -> None:
    """Measure in a child, or be that child."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--runtime", default="onnxruntime")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        print(json.dumps(child(asked.folder, asked.runtime, asked.context)))
        return
    done = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--child"], check=True, capture_output=True, text=True
    )
    found = json.loads(done.stdout)
    files = (asked.folder / name for name in ("model.onnx", "model.onnx.data"))
    sizes = {"file": round(sum(path.stat().st_size for path in files) / 1e6, 1)}
    sizes["keys and values"] = round(keys_and_values(asked.folder, asked.context), 1)
    print(
        json.dumps({"folder": asked.folder.name, "runtime": asked.runtime, "context": asked.context, **sizes, **found})
    )


if __name__ == "__main__":
    main()
