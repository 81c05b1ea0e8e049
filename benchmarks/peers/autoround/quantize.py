"""AutoRound's own run: a Hugging Face folder to a GGUF file in Q4_0, calibrated on windows that r1q and the other peers see too.

Usage: quantize.py CHECKPOINT CALIBRATION FOLDER ITERATIONS [WINDOWS [LENGTH]]; ITERATIONS 0 is AutoRound's optimised round-to-nearest.
Runs in AutoRound's environment and imports nothing of r1q. Everything but windows and iterations is AutoRound's default.
"""

import sys
from pathlib import Path

import torch
from auto_round import AutoRound
from transformers import AutoTokenizer


def windows(checkpoint: Path, text: Path, count: int, length: int) -> list[torch.Tensor]:
    """Return the first windows of the text, each [1, length]: consecutive tokens, without BOS."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    # 64 bytes a token is more than any prose has: what the windows cannot hold is not tokenized.
    head = text.read_text(encoding="utf-8")[: count * length * 64]
    ids = tokenizer(head, add_special_tokens=False)["input_ids"][: count * length]
    if len(ids) < count * length:
        sys.exit(f"{text} has {len(ids)} tokens; {count} windows of {length} were asked for")
    return list(torch.tensor(ids).reshape(count, 1, length))


def main(checkpoint: Path, text: Path, folder: Path, iterations: int, count: int = 32, length: int = 512) -> None:
    """Quantize and write FOLDER/*.gguf."""
    # A ready list is taken as it is; a path would go through a shuffle and a filter of AutoRound's own. One window each, so that
    # its batches (8 windows a step by default) are drawn as for its own data sets.
    rounder = AutoRound(
        str(checkpoint),
        scheme="gguf:q4_0",
        iters=iterations,
        dataset=windows(checkpoint, text, count, length),
        nsamples=count,
        seqlen=length,
        device_map="cpu",
        trust_remote_code=False,
    )
    rounder.quantize_and_save(str(folder), format="gguf:q4_0")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), *map(int, sys.argv[4:]))
