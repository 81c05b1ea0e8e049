"""llama.cpp as referee: the divergence of r1q's file of each preset from the float model, beside llama-quantize's own file.

Usage: compare.py TOOLS CHECKPOINT EVALUATION CALIBRATION WORK RESULTS [PRESET …]
TOOLS holds llama.cpp's programs (build.sh makes them in FOLDER/bin). Runs in r1q's environment. Each pair of files, with and
without an importance matrix, is compared tensor by tensor, bytes and types; llama-perplexity scores both. Appends a JSON line a
pair to RESULTS; a pair that is there already is not measured again.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

from r1q.core.gguf_file import GgufFile

PRESETS = ["q4_0", "q4_k_s", "q4_k_m", "q5_k_m", "q3_k_m", "q2_k", "iq4_xs", "q6_k", "q8_0"]
FIGURES = {
    "ppl": r"Mean PPL\(Q\)\s*:\s*(\S+)",
    "ppl_reference": r"Mean PPL\(base\)\s*:\s*(\S+)",
    "kld": r"Mean\s+KLD:\s*(\S+)",
    "kld_error": r"Mean\s+KLD:\s*\S+\s*±\s*(\S+)",
    "kld_median": r"Median\s+KLD:\s*(\S+)",
    "kld_max": r"Maximum KLD:\s*(\S+)",
    "same_top_percent": r"Same top p:\s*(\S+)",
}


def tool(folder: Path, name: str, *arguments: object) -> str:
    """Run one of llama.cpp's programs and return what it said."""
    environment = os.environ | {"LD_LIBRARY_PATH": str(folder)}
    done = subprocess.run(
        [folder / name, *map(str, arguments)], env=environment, capture_output=True, text=True, errors="replace"
    )
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout + done.stderr


def r1q(checkpoint: Path, scheme: str, folder: Path, *options: object) -> Path:
    """Quantize with r1q and return the file."""
    command = ["quantize", str(checkpoint), "--scheme", scheme, "-o", str(folder), "-q", *map(str, options)]
    subprocess.run([sys.executable, "-m", "r1q", *command], check=True, stdout=subprocess.DEVNULL)
    return next(folder.glob("*.gguf"))


def different_tensors(ours: Path, theirs: Path) -> tuple[int, list[str]]:
    """Return how many tensors the files have, and the names of those whose type, shape or bytes differ."""
    one, two = GgufFile.open(ours), GgufFile.open(theirs)
    names = sorted(set(one.tensors) | set(two.tensors))
    return len(names), [name for name in names if _facts(one, name) != _facts(two, name)]


def _facts(file: GgufFile, name: str) -> object:
    tensor = file.tensors.get(name)
    return None if tensor is None else (tensor.type, tensor.shape, bytes(file.read_bytes(name)))


def divergence(tools: Path, file: Path, base: Path) -> dict[str, float]:
    """Return llama-perplexity's figures of a file against the logits in `base`."""
    said = tool(tools, "llama-perplexity", "-m", file, "--kl-divergence-base", base, "--kl-divergence")
    return {name: float(re.search(pattern, said)[1].rstrip("%")) for name, pattern in FIGURES.items()}


def main() -> None:
    """Make what is missing, then measure every pair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("tools", "checkpoint", "evaluation", "calibration", "work", "results"):
        parser.add_argument(name, type=lambda text: Path(text).resolve())
    parser.add_argument("presets", nargs="*", default=PRESETS)
    parser.add_argument("--chunks", type=int, default=16, help="windows of 512 tokens of the evaluation text")
    parser.add_argument(
        "--calibration-chunks", type=int, default=32, help="windows that the importance matrix is made from"
    )
    parser.add_argument(
        "--only", choices=["plain", "imatrix", "both"], default="both", help="with or without statistics"
    )
    parser.add_argument(
        "--ours-only", action="store_true", help="do not score llama-quantize's file where its tensors are ours"
    )
    given = parser.parse_intermixed_args()
    tools, work = given.tools / "bin", given.work
    work.mkdir(parents=True, exist_ok=True)
    reference = r1q(given.checkpoint, "f32", work / "f32")
    base, imatrix = work / "reference.logits", work / "imatrix.gguf"
    if not base.exists():
        options = ("-f", given.evaluation, "-c", 512, "--chunks", given.chunks, "--kl-divergence-base", base)
        tool(tools, "llama-perplexity", "-m", reference, *options)
    found = [json.loads(line) for line in given.results.read_text().splitlines()] if given.results.exists() else []
    done = {(row["preset"], row["imatrix"]) for row in found if "preset" in row}
    for calibrated in {"plain": (False,), "imatrix": (True,), "both": (False, True)}[given.only]:
        if calibrated and not imatrix.exists():
            options = ("-f", given.calibration, "-c", 512, "--chunks", given.calibration_chunks, "-o", imatrix)
            tool(tools, "llama-imatrix", "-m", reference, *options)
        for preset in given.presets:
            if (preset, calibrated) in done:
                continue
            name = f"{preset}{'-imatrix' if calibrated else ''}"
            statistics = ("--imatrix", imatrix) if calibrated else ()
            ours, theirs = r1q(given.checkpoint, preset, work / name, *statistics), work / f"theirs-{name}.gguf"
            if not theirs.exists():
                tool(tools, "llama-quantize", *statistics, reference, theirs, preset.upper())
            tensors, different = different_tensors(ours, theirs)
            scored = divergence(tools, ours, base)
            skip = given.ours_only and not different
            row = {
                "preset": preset,
                "imatrix": calibrated,
                "chunks": given.chunks,
                "tensors": tensors,
                "different_tensors": different,
                "bytes": [ours.stat().st_size, theirs.stat().st_size],
                "r1q": scored,
                "llama_quantize": None if skip else divergence(tools, theirs, base),
                "machine": f"{os.cpu_count()} cores, {platform.machine()}",
            }
            with given.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
