"""Drawing the next token: temperature, then the nucleus of the most likely tokens, in the order of DeepSeek-R1's own settings.

(llama.cpp's default chain cuts the nucleus before the temperature; vLLM and transformers, with which R1 was measured, after it.)
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from r1q.core.errors import InputError

Floats = NDArray[np.float32]


def draw_token(logits: Floats, rng: np.random.Generator, *, temperature: float, top_p: float) -> int:
    """Return one token of `logits` [vocab]; the most likely one at temperature 0, where of equals the first is taken.

    The nucleus is the smallest set of most likely tokens whose probabilities sum to `top_p` or more (Holtzman 2020). One number is
    taken from `rng` for each token drawn. Raises `InputError` for logits that are not finite.
    """
    if not np.isfinite(logits).all():
        raise InputError("the model made logits that are not finite; the file is broken, take another")
    if temperature == 0:
        return int(np.argmax(logits))
    scaled = logits.astype(np.float64) / temperature
    chances = np.exp(scaled - scaled.max())
    chances /= chances.sum()
    # All tokens rarer than this have less than 1 − top_p together, so the nucleus lies within the others: no full sort is needed.
    likely = np.flatnonzero(chances >= (1 - top_p) / len(chances))
    order = likely[np.argsort(-chances[likely], kind="stable")]
    sums = np.cumsum(chances[order])
    count = min(int(np.searchsorted(sums, top_p)) + 1, len(order))
    chosen = np.searchsorted(sums[:count], rng.random() * sums[count - 1], side="right")
    return int(order[min(int(chosen), count - 1)])
