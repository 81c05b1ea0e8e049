"""Our side: cut the text into windows, score a quantized checkpoint in r1q's own forward pass, keep tokens and logits.

Usage: ours.py OUTPUT_FOLDER TEXT WORK [WINDOWS]; OUTPUT_FOLDER is what `r1q quantize … --to gptq -o OUTPUT_FOLDER` made.
Runs in r1q's environment. Writes WORK/tokens.npy, WORK/NAME.ours.npy (logits, float32) and prints one JSON line.
"""

import json
import sys
from pathlib import Path

import numpy as np

from r1q.benchmarks.quality import LENGTH, cut, read_text
from r1q.core.checkpoint import QuantizedCheckpoint
from r1q.core.metrics import merge, score, summarize
from r1q.models.config import ModelConfig
from r1q.models.forward import Configured, logits
from r1q.models.tokenizer import Tokenizer


def main(folder: Path, text: Path, work: Path, windows: int = 8) -> None:
    """Score positions 256…510 of each window, as `r1q bench` does."""
    checkpoint = QuantizedCheckpoint.open(folder / "checkpoint")
    tokenizer = Tokenizer.open(checkpoint.sidecar)
    ids = tokenizer.encode(read_text(text), add_special=False)
    tokens = cut(ids, length=LENGTH, windows=windows, bos=tokenizer.bos_id if tokenizer.adds_bos else None)
    np.save(work / "tokens.npy", tokens)
    first = LENGTH // 2
    model = Configured(ModelConfig.read(checkpoint.sidecar), checkpoint)
    rows = np.stack(list(logits(model, tokens[:, :-1], first=first)))
    np.save(work / f"{folder.name}.ours.npy", rows)
    found = summarize(merge(score(r, t[first + 1 :]) for r, t in zip(rows, tokens, strict=True)))
    print(
        json.dumps(
            {
                "side": "r1q forward, float32",
                "folder": folder.name,
                "tokens": found.tokens,
                "perplexity": found.perplexity.value,
                "error": found.perplexity.error,
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), *map(int, sys.argv[4:]))
