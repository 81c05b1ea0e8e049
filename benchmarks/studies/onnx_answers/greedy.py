"""Greedy answers of an ONNX folder at accuracy level 1 beside our forward pass of the same codes: greedy.py OUTPUT [--tokens 64].

OUTPUT is what `r1q quantize` made. The folder with float activations is written for this run alone. Prints a JSON line for each
question: how many tokens are equal, divergence at each, and by how much the taken token led where it was closest.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from r1q.core.checkpoint import QuantizedCheckpoint
from r1q.core.metrics import score
from r1q.export.onnx import write_onnx
from r1q.models.config import ModelConfig
from r1q.models.forward import Configured, logits
from r1q.models.tokenizer import Tokenizer
from r1q.runtimes.base import Options
from r1q.runtimes.table import load_runtime

QUESTIONS = [
    "What is 38 + 47?",
    "Why is the sky blue? Answer in three sentences.",
    "Write a Python function that returns the n-th Fibonacci number.",
]


def main() -> None:
    """Write the folder, ask each question, hold the answer against one forward pass over it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    asked = parser.parse_args()
    checkpoint = QuantizedCheckpoint.open(asked.output / "checkpoint")
    source = Configured(ModelConfig.read(checkpoint.sidecar, checkpoint.model_name), checkpoint)
    tokenizer = Tokenizer.open(checkpoint.sidecar)
    with tempfile.TemporaryDirectory() as work:
        folder = write_onnx(checkpoint, Path(work), accuracy_level=1)
        session = load_runtime("onnxruntime").open(folder, Options(context=512))
        for question in QUESTIONS:
            prompt = tokenizer.encode(tokenizer.render_chat([{"role": "user", "content": question}]), add_special=False)
            session.drop(0)
            rows = [session.prefill(0, prompt)]
            taken = [int(rows[0].argmax())]
            while len(taken) < asked.tokens:
                rows.append(session.step([(0, taken[-1])])[0])
                taken.append(int(rows[-1].argmax()))
            # If at every position of a text its most likely next token is the text's own, it would have written that text.
            tokens = np.array([prompt + taken[:-1]], dtype=np.int64)
            ours = next(logits(source, tokens, first=len(prompt) - 1)).astype(np.float32)
            kld = score(np.stack(rows), np.array(taken), ours).kld
            assert kld is not None
            best = np.sort(ours, axis=-1)[:, -2:]
            line = {
                "question": question,
                "tokens": len(taken),
                "equal": int((ours.argmax(-1) == taken).sum()),
                "mean kld": float(kld.mean()),
                "max kld": float(kld.max()),
                "closest lead": float((best[:, 1] - best[:, 0]).min()),
                "answer": tokenizer.decode(taken),
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
