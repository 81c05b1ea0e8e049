"""The embedded model through the whole walk: our float32 file in llama.cpp is our own forward pass, and bfloat16 is its noise."""

from pathlib import Path

import numpy as np
import pytest

from r1q.core.artifact import OutputFolder
from r1q.core.metrics import log_softmax
from r1q.core.recipe import Recipe
from r1q.models.embedded import EMBEDDED, open_model
from r1q.models.forward import logits
from r1q.models.tokenizer import Tokenizer
from r1q.plan.plan import make_plan
from r1q.plan.walk import Exported, quantize_model

WINDOWS, LENGTH = 8, 256


def mean_kld(scheme: str, folder: Path) -> float:
    """Return the mean KL divergence, over 2,048 tokens, of llama.cpp on our file of `scheme` from our own forward pass."""
    from r1q.runtimes.base import Options
    from r1q.runtimes.table import load_runtime

    opened = open_model(None)
    plan = make_plan(opened.source, Recipe.named(scheme), ("gguf",))
    *_, exported = quantize_model(opened, plan, OutputFolder(folder))
    assert isinstance(exported, Exported)
    ids = Tokenizer.open(EMBEDDED).encode((EMBEDDED / "evaluation.txt").read_text()[:20000], add_special=False)
    tokens = np.array(ids[: WINDOWS * LENGTH], dtype=np.int64).reshape(WINDOWS, LENGTH)
    session = load_runtime("llama-cpp").open(exported.path, Options(context=LENGTH, cache="f32", flash_attention=False))
    divergences = []
    for window, reference in zip(tokens, logits(opened.source, tokens), strict=True):
        wanted = log_softmax(reference)
        found = log_softmax(session.logits(window.tolist()))
        divergences.append((np.exp(wanted) * (wanted - found)).sum(axis=1))
    session.close()
    return float(np.mean(np.concatenate(divergences)))


@pytest.mark.runtime
def test_our_float32_file_in_llama_cpp_is_our_own_forward_pass(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    assert mean_kld("f32", tmp_path / "f32") < 1e-5


@pytest.mark.runtime
def test_bfloat16_is_the_runtimes_own_noise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("llama_cpp")
    noise = mean_kld("bf16", tmp_path / "bf16")
    with capsys.disabled():
        import sys

        sys.stdout.write(f"\nnoise floor of llama.cpp on the BF16 file: mean KLD {noise:.2e}\n")
    assert noise < 1e-3
