"""Row order and frequency factors against transformers' own rotation and initialisation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from r1q.core.tensors import TensorSpec
from r1q.export.rope import frequency_factors, interleave_heads, is_permuted
from r1q.models.config import ModelConfig


def test_rotating_neighbours_of_interleaved_rows_is_rotating_halves() -> None:
    """ggml's rotation of (2i, 2i+1) on the new rows gives the new order of Hugging Face's rotation of (i, i + d/2)."""
    heads, dim = 3, 8
    x = np.random.default_rng(0).standard_normal((heads, dim))
    angles = np.linspace(0.1, 1.3, dim // 2)
    half = np.concatenate([-x[:, dim // 2 :], x[:, : dim // 2]], axis=1)
    rotated = x * np.cos(np.tile(angles, 2)) + half * np.sin(np.tile(angles, 2))  # transformers' rotate_half
    new = interleave_heads(x.reshape(-1), dim).reshape(heads, dim)
    pairs = (new[:, 0::2] + 1j * new[:, 1::2]) * np.exp(1j * angles)  # ggml's normal rope
    found = np.stack([pairs.real, pairs.imag], axis=2).reshape(heads, dim)
    np.testing.assert_allclose(found, interleave_heads(rotated.reshape(-1), dim).reshape(heads, dim), atol=1e-12)


def test_rows_keep_their_bytes() -> None:
    rows = np.arange(2 * 4 * 3, dtype=np.uint8).reshape(8, 3)
    moved = interleave_heads(rows, 4)
    assert moved.tolist() == rows[[0, 2, 1, 3, 4, 6, 5, 7]].tolist()


@pytest.mark.parametrize(("family", "kind", "expected"), [("llama", "attn_q", True), ("llama", "attn_k", True),
                                                          ("llama", "attn_v", False), ("qwen2", "attn_q", False),
                                                          ("qwen3", "attn_k", False)])  # fmt: skip
def test_who_is_permuted(family: str, kind: str, expected: bool) -> None:
    spec = TensorSpec(name="x", kind=kind, layer=0, part="bias", shape=(8,), dtype="F32")
    assert is_permuted(family, spec) is expected


@pytest.mark.parametrize("scaling", [None, {"original_max_position_embeddings": 8192, "factor": 32.0}, {}])
def test_frequency_factors_are_transformers_frequencies(
    scaling: dict[str, float] | None, make_model: Callable[..., Path]
) -> None:
    import torch
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    folder = make_model("llama", llama3_scaling=scaling is not None, hidden_size=256, num_heads=2, num_kv_heads=1)
    if scaling:
        import json

        path = folder / "config.json"
        raw = json.loads(path.read_text())
        raw["rope_parameters"] |= scaling
        path.write_text(json.dumps(raw))
    factors = frequency_factors(ModelConfig.read(folder))
    if scaling is None:
        assert factors is None
        return
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig.from_pretrained(folder), torch.device("cpu"))
    plain = 500000.0 ** -(np.arange(0, 128, 2) / 128)
    assert factors is not None
    assert factors.shape == (64,)
    assert len(np.unique(factors)) > 5  # both ends and the blend between them
    np.testing.assert_allclose(plain / factors, theirs.numpy(), rtol=2e-6)
