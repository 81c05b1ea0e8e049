"""How far a checkpoint is from its float model on text it was calibrated on, on more of the same text, and on other text.

Usage: seen.py CHECKPOINT FLOAT CALIBRATION OTHER WINDOWS: the checkpoint folder of r1q quantize, its float model, the text whose first
WINDOWS windows of 512 tokens were seen, another text. Four windows of each; mean divergence in nats a token, a JSON line.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from r1q.calibration.windows import make_windows
from r1q.core.checkpoint import QuantizedCheckpoint
from r1q.distill.divergence import divergence
from r1q.distill.network import load_network, product_dtype
from r1q.models.forward import Configured
from r1q.models.source import ModelSource
from r1q.models.tokenizer import Tokenizer

LENGTH, TAKEN = 512, 4


def main(checkpoint: Path, folder: Path, calibration: str, other: str, windows: int) -> dict[str, list[float]]:
    """Return the divergence of each window by kind of text."""
    source = ModelSource.open(folder)
    tokenizer = Tokenizer.open(folder)
    same = make_windows(calibration, tokenizer, samples=2 * windows, length=LENGTH).tokens
    texts = {
        "seen": same[:windows],
        "more of the same": same[windows:],
        "other": make_windows(other, tokenizer, samples=TAKEN, length=LENGTH).tokens,
    }
    teacher, student = (
        load_network(reader, matrices=product_dtype())
        for reader in (source, Configured(source.config, QuantizedCheckpoint.open(checkpoint)))
    )
    found: dict[str, list[float]] = {}
    with torch.no_grad():
        for kind, tokens in texts.items():
            taken = np.array(tokens[:: max(1, len(tokens) // TAKEN)][:TAKEN])
            found[kind] = [
                round(float(divergence(student, teacher, torch.from_numpy(window[None]), torch.ones(1, LENGTH))), 5)
                for window in taken
            ]
    return found


if __name__ == "__main__":
    checkpoint, folder, calibration, other, windows = sys.argv[1:]
    print(json.dumps(main(Path(checkpoint), Path(folder), calibration, other, int(windows))))
