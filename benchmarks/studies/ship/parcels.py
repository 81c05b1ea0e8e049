"""Parcels as a stranger meets them: packed, checked, one bit turned in every file, run in an empty environment, read by others.

    python benchmarks/studies/ship/parcels.py OUTPUT… [--promtool PATH] > benchmarks/results/parcels.jsonl

OUTPUT: a folder that r1q quantize wrote. Prints a line of JSON for each; ends with 1 if anything was not as it should be.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml

from r1q.ship.parcel import pack
from r1q.ship.seal import check_parcel

ROOT = Path(__file__).resolve().parents[3]
TOOLS = ("sh", "dirname", "sha256sum", "env")
QUESTION = "What is 17 + 25?"


def flips(parcel: Path, rng: random.Random) -> dict[str, object]:
    """Turn one bit at a random place of every file over, and back; return which were found, and what was not named rightly."""
    wrong: list[str] = []
    seconds = 0.0
    files = sorted(path for path in parcel.rglob("*") if path.is_file())
    for path in files:
        place, bit = rng.randrange(path.stat().st_size), rng.randrange(8)
        with open(path, "r+b") as file:
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes((byte ^ 1 << bit,)))
            file.flush()
            began = time.perf_counter()
            named = [defect.where for defect in check_parcel(parcel)]
            seconds += time.perf_counter() - began
            file.seek(place)
            file.write(bytes((byte,)))
        name = path.relative_to(parcel).as_posix()
        if not named or any(where.partition(": ")[0] != name for where in named):
            wrong.append(f"{name}, byte {place}, bit {bit}: {named}")
    return {
        "files": len(files),
        "found": len(files) - len(wrong),
        "wrong": wrong,
        "check_seconds": seconds / len(files),
    }


def ask(parcel: Path, folder: Path) -> dict[str, object]:
    """Run run.sh with an empty environment but for four tools and r1q."""
    tools = folder / "bin"
    tools.mkdir()
    for tool in TOOLS:
        (tools / tool).symlink_to(str(shutil.which(tool)))
    (tools / "r1q").write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -m r1q "$@"\n')
    (tools / "r1q").chmod(0o755)
    began = time.perf_counter()
    done = subprocess.run(
        ["env", "-i", f"PATH={tools}", f"HOME={folder}", str(parcel / "run.sh"), QUESTION],
        cwd="/", capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    return {"rc": done.returncode, "answer": done.stdout.strip()[:300], "seconds": time.perf_counter() - began}


def read_by_others(parcel: Path, promtool: str | None) -> dict[str, object]:
    """Return what Kubernetes' schemas and Prometheus' own tool say."""
    objects = list(yaml.safe_load_all((parcel / "kubernetes.yaml").read_text()))
    for item in objects:
        kubernetes_validate.validate(item, "1.30", strict=True)
    said: dict[str, object] = {"kubernetes": [item["kind"] for item in objects]}
    if promtool:
        done = subprocess.run(
            [promtool, "check", "config", str(parcel / "prometheus.yml")], capture_output=True, text=True, check=False
        )
        said["promtool"] = done.returncode
    return said


def main() -> None:
    """Pack each output for a server and for a laptop, and look at both."""
    parser = argparse.ArgumentParser()
    parser.add_argument("output", nargs="+", type=Path)
    parser.add_argument("--promtool")
    asked = parser.parse_args()
    rng, good = random.Random(9), True
    for output in asked.output:
        for target in ("server", "laptop"):
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch)
                packed = pack(output, target, folder / "parcel")
                line: dict[str, Any] = {"target": target, "files": dict(packed.files)}
                line["defects"] = [defect.text() for defect in check_parcel(packed.path)]
                line["one_bit"] = flips(packed.path, rng)
                line["defects_after"] = [defect.text() for defect in check_parcel(packed.path)]
                line["run_sh"] = ask(packed.path, folder)
                if target == "server":
                    line |= read_by_others(packed.path, asked.promtool)
                good &= not line["defects"] and not line["one_bit"]["wrong"] and not line["defects_after"]
                good &= line["run_sh"]["rc"] == 0 and bool(line["run_sh"]["answer"]) and not line.get("promtool")
                print(json.dumps(line), flush=True)
    sys.exit(not good)


if __name__ == "__main__":
    main()
