"""Calibrate on one kind of text, score on every kind: kinds.py CHECKPOINT WORK RESULTS [--scheme q4_0]. Appends JSON lines."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from r1q.calibration.windows import make_windows
from r1q.core.checkpoint import QuantizedCheckpoint
from r1q.core.metrics import merge, score, summarize
from r1q.models.config import ModelConfig
from r1q.models.forward import Configured, logits
from r1q.models.source import ModelSource
from r1q.models.tokenizer import Tokenizer

TEXTS = Path(__file__).resolve().parents[3] / "calibration" / "texts"
KINDS = {"English": "english", "Chinese": "chinese", "code": "code"}
WINDOWS, LENGTH = 6, 512


def halves(work: Path) -> dict[str, tuple[Path, Path]]:
    """Write every other document of each kind's text to calibrate on, and the rest to score; return both files by kind."""
    made = {}
    for kind, stem in KINDS.items():
        documents = (TEXTS / f"{stem}.jsonl").read_text(encoding="utf-8").splitlines()
        made[kind] = (work / f"{stem}-calibrate.jsonl", work / f"{stem}-score.jsonl")
        for number, path in enumerate(made[kind]):
            path.write_text("\n".join(documents[number::2]), encoding="utf-8")
    return made


def main() -> None:
    """Quantize once a kind (and without calibration), score each on every kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--scheme", default="q4_0")
    parser.add_argument("--effort", default="default")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    source, tokenizer, texts = ModelSource.open(given.checkpoint), Tokenizer.open(given.checkpoint), halves(given.work)
    windows = {k: make_windows(str(s), tokenizer, samples=WINDOWS, length=LENGTH).tokens for k, (_, s) in texts.items()}
    first = LENGTH // 2
    floats = {
        kind: [row.astype(np.float32) for row in logits(source, t[:, :-1], first=first)] for kind, t in windows.items()
    }
    for kind in (None, *KINDS, "builtin"):
        output = given.work / f"{given.scheme}-{given.effort}-{kind or 'none'}"
        spec = "builtin" if kind == "builtin" else str(texts[kind][0]) if kind else ""
        options = ["--effort", given.effort, "--calibration", spec, "--samples", "32"] if kind else []
        command = [
            sys.executable,
            "-m",
            "r1q",
            "quantize",
            str(given.checkpoint),
            "--scheme",
            given.scheme,
            "-o",
            str(output),
        ]
        subprocess.run([*command, "-q", "--to", "checkpoint", *options], check=True)
        model = Configured(ModelConfig.read(given.checkpoint), QuantizedCheckpoint.open(output / "checkpoint"))
        for scored, tokens in windows.items():
            rows = logits(model, tokens[:, :-1], first=first)
            pairs = zip(rows, tokens, floats[scored], strict=True)
            found = summarize(merge(score(row, t[first + 1 :], reference) for row, t, reference in pairs))
            line = {"calibrated": kind, "scored": scored, "kld": found.kld.value, "error": found.kld.error}
            with given.results.open("a") as file:
                file.write(json.dumps({"scheme": given.scheme, "effort": given.effort, **line}) + "\n")
            print(line, flush=True)


if __name__ == "__main__":
    main()
