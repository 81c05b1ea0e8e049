"""64 tokens that onnxruntime takes greedily are those that our forward pass of the same codes takes, and predictions are the same.

With float activations (accuracy level 1) nothing is rounded but sums. Ours is not asked token by token: if at every position of a text
its most likely next token is the text's own, then it would have written that text.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r1q.core.metrics import score
from r1q.models.tokenizer import Tokenizer
from r1q.runtimes.base import Options
from r1q.runtimes.table import load_runtime

pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.runtime
TOKENS = 64
QUESTIONS = ["What is 38 + 47?", "Tom has 4 boxes with 7 marbles each. He gives 9 away. How many are left?"]


@pytest.mark.parametrize("question", QUESTIONS)
def test_greedy_tokens_are_our_forward_passs(
    question: str, onnx_folder: Callable[..., Path], forward_logits: Callable[[str, list[int]], Any]
) -> None:
    folder = onnx_folder("int4", 1)
    tokenizer = Tokenizer.open(folder)
    prompt = tokenizer.encode(tokenizer.render_chat([{"role": "user", "content": question}]), add_special=False)
    with load_runtime("onnxruntime").open(folder, Options(context=256, threads=1)) as session:
        rows = [session.prefill(0, prompt)]
        taken = [int(rows[0].argmax())]
        while len(taken) < TOKENS:
            rows.append(session.step([(0, taken[-1])])[0])
            taken.append(int(rows[-1].argmax()))
    ours = forward_logits("int4", prompt + taken[:-1])[len(prompt) - 1 :]
    assert ours.argmax(-1).tolist() == taken
    kld = score(np.stack(rows), np.array(taken), ours).kld
    assert kld is not None
    assert kld.max() < 1e-5
    # Something was said: an answer in its own words, and not one token over and over.
    assert len(set(taken)) > 10
