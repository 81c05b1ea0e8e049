"""What drawing tokens costs beside a step, for DeepSeek-R1's vocabulary of 152,064: milliseconds a row, drawn one by one and together.

python benchmarks/studies/serve/sampling.py
"""

from __future__ import annotations

import time

import numpy as np

from r1q.calibration.sampling import draw_token
from r1q.serve.sampling import Sampling, draw_tokens

VOCAB, ROUNDS = 152_064, 10


def main() -> None:
    """Print a row for each shape of the distribution."""
    rng = np.random.default_rng(0)
    flat = (rng.standard_normal((16, VOCAB)) * 2).astype(np.float32)
    peaked = flat.copy()
    peaked[:, :20] += 14
    for name, logits in (("peaked, as a sure model's", peaked), ("flat, as noise", flat)):
        for rows, top_p in ((1, 0.95), (16, 0.95), (16, 1.0)):
            chances = [np.random.default_rng(row) for row in range(rows)]
            wishes = [Sampling(top_p=top_p)] * rows
            copies = [logits[:rows].copy() for _ in range(ROUNDS)]
            began = time.perf_counter()
            for copy in copies:
                draw_tokens(copy, wishes, chances)
            together = (time.perf_counter() - began) / ROUNDS / rows
            began = time.perf_counter()
            for row in range(rows):
                draw_token(logits[row], chances[row], temperature=0.6, top_p=top_p)
            alone = (time.perf_counter() - began) / rows
            print(
                f"{name:26} rows {rows:2} top_p {top_p:4}: {together * 1e3:6.2f} ms a row, one by one {alone * 1e3:6.2f} ms"
            )


if __name__ == "__main__":
    main()
