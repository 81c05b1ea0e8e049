"""The exported file computes what the checkpoint computes: llama.cpp's logits against transformers', and the permutation matters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from r1q.core.checkpoint import QuantizedCheckpoint
from r1q.core.gguf_file import GgufFile
from r1q.export import gguf as export
from r1q.export.gguf import write_gguf

pytestmark = pytest.mark.runtime

Logits = Callable[[Path, NDArray[np.int64]], NDArray[np.float32]]
Checkpoint = Callable[..., QuantizedCheckpoint]
LENGTH = 96  # beyond the 64 tokens that the llama3 scaling of the tiny model calls its original context


def tokens_of(vocabulary: int) -> NDArray[np.int64]:
    return np.random.default_rng(7).integers(0, vocabulary, LENGTH)


def transformers_logits(folder: Path, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        found: torch.Tensor = model(torch.from_numpy(tokens)[None]).logits[0]
    return found.float().numpy()


def divergence(reference: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    """Return the mean Kullback–Leibler divergence over the positions, in nats."""
    p, q = (x.astype(np.float64) - x.max(1, keepdims=True) for x in (reference, found))
    p, q = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (p, q))
    return float(np.mean((np.exp(p) * (p - q)).sum(1)))


YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}
CASES: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama"},
    "llama-tied": {"family": "llama", "tied": True},
    "llama-own-head-dim": {"family": "llama", "head_dim": 32},
    "llama-llama3-rope": {"family": "llama", "llama3_scaling": True},
    "llama-biases": {"family": "llama", "config": {"attention_bias": True, "mlp_bias": True}},
    "llama-transformers4-config": {"family": "llama", "old_config": True, "llama3_scaling": True},
    "qwen3-yarn": {"family": "qwen3", "config": {"rope_parameters": YARN}},
    "llama-yarn": {"family": "llama", "config": {"rope_parameters": YARN}},
    "qwen2": {"family": "qwen2"},
    "qwen2-tied": {"family": "qwen2", "tied": True},
    "qwen3": {"family": "qwen3"},
    "qwen3-tied": {"family": "qwen3", "tied": True},
}


@pytest.mark.parametrize("case", CASES)
def test_float_file_computes_what_transformers_computes(
    case: str, make_model: Callable[..., Path], checkpoint_of: Checkpoint, llama_logits: Logits, tmp_path: Path
) -> None:
    model = make_model(**CASES[case])
    path = write_gguf(checkpoint_of(model, "f32"), tmp_path)
    tokens = tokens_of(320)
    reference = transformers_logits(model, tokens)
    found = llama_logits(path, tokens)
    assert np.ptp(reference) > 1
    assert divergence(reference, found) < 1e-9  # float32 rounding in another order; a wrong layout gives more than 1e-3
    np.testing.assert_allclose(found, reference, atol=2e-4)


@pytest.mark.parametrize("case", ["llama", "llama-llama3-rope", "llama-biases"])
def test_a_file_without_the_row_order_or_the_factors_is_caught(
    case: str,
    make_model: Callable[..., Path],
    checkpoint_of: Checkpoint,
    llama_logits: Logits,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model(**CASES[case])
    checkpoint = checkpoint_of(model, "f32")
    reference = transformers_logits(model, tokens_of(320))
    if case == "llama-llama3-rope":
        monkeypatch.setattr(export, "frequency_factors", lambda config: None)
    elif case == "llama":
        monkeypatch.setattr(export, "is_permuted", lambda family, tensor: False)
    else:
        monkeypatch.setattr(
            export, "is_permuted", lambda family, tensor: tensor.kind == "attn_q" and tensor.part == "weight"
        )
    path = write_gguf(checkpoint, tmp_path)
    assert divergence(reference, llama_logits(path, tokens_of(320))) > 1e-4


def test_quantized_rows_are_the_checkpoints_own_in_the_new_order(
    make_model: Callable[..., Path], checkpoint_of: Checkpoint, llama_logits: Logits, tmp_path: Path
) -> None:
    """Bytes of every matrix, row by row; and llama.cpp on the file computes what transformers computes from the same values."""
    model = make_model("llama", hidden_size=256, intermediate_size=256)
    checkpoint = checkpoint_of(model, "q8_0")
    path = write_gguf(checkpoint, tmp_path)
    file, head, moved = GgufFile.open(path), 64, 0
    for spec in checkpoint.tensors:
        if not spec.is_matrix:
            continue
        for row in range(spec.rows):
            within = row % head
            new = row - within + 2 * (within % 32) + within // 32 if spec.kind in ("attn_q", "attn_k") else row
            stored = file.read_rows(spec.gguf_name, new, new + 1)
            np.testing.assert_array_equal(stored, checkpoint.packed_rows(spec.name, row, row + 1))
            moved += new != row
    assert moved > 500
    found, reference = llama_logits(path, tokens_of(320)), dequantized_logits(model, checkpoint, tokens_of(320))
    # llama.cpp rounds the inputs of each product to 8 bits; an unpermuted file is a thousand times further away.
    assert divergence(reference, found) < 2e-3


def dequantized_logits(model: Path, checkpoint: QuantizedCheckpoint, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    values = {s.name: torch.from_numpy(checkpoint.read_rows(s.name, 0, s.rows).copy()) for s in checkpoint.tensors}
    network.load_state_dict(values, strict=False)
    with torch.no_grad():
        found: torch.Tensor = network(torch.from_numpy(tokens)[None]).logits[0]
    return found.float().numpy()
