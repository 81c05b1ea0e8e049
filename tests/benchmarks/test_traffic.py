"""Bytes that a token touches, counted by hand from the shapes of a tiny model, in every format."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Type

from r1q.benchmarks.subjects import find_subjects, gguf_subject
from r1q.benchmarks.traffic import Traffic, utilization

# tests/tiny_gguf.py: 2 blocks of width 64, 4 heads of 16 with 2 for keys and values, inner 128, 264 tokens, an own head.
BLOCK = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128
READ = 2 * BLOCK + 264 * 64  # the head; of the embedding one row, which is not counted
VECTORS = 5 * 64


@pytest.mark.parametrize(("kind", "bits"), [(Type.F32, 32), (Type.Q8_0, 8.5), (Type.Q4_0, 4.5)])
def test_a_gguf_token_reads_every_matrix_but_the_embedding(
    tmp_path: Path, write_gguf: Callable[..., Path], kind: Type, bits: float
) -> None:
    traffic = gguf_subject(write_gguf(tmp_path / "m.gguf", kind=kind)).traffic
    assert traffic is not None
    assert traffic.weight_bytes == READ * bits / 8 + 4 * VECTORS
    assert traffic.touched_weights == READ + VECTORS
    assert traffic.cache_values == 2 * (2 * 2 * 16)
    assert traffic.token_bytes(100) == traffic.weight_bytes + 100 * 128 * 2


@pytest.mark.parametrize("tied", [False, True])
def test_a_float_folder_reads_its_head_and_a_tied_one_its_embedding(
    make_model: Callable[..., Path], tied: bool
) -> None:
    (subject,) = find_subjects([make_model("llama", tied=tied)])
    block = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96 + 2 * 64
    assert subject.format == "hf"
    assert subject.grid == "bf16"
    assert subject.traffic is not None
    assert subject.traffic.touched_weights == 2 * block + 64 + 320 * 64
    assert subject.traffic.weight_bytes == 2 * subject.traffic.touched_weights
    assert subject.weights == 2 * block + 64 + 320 * 64 * (1 if tied else 2)
    assert subject.bits_per_weight == 16
    # A runtime that keeps float32 reads four bytes a weight whatever is on disk.
    assert subject.traffic.token_bytes(0, compute_bytes=4) == 4 * subject.traffic.touched_weights


def test_memory_is_cache_and_activations() -> None:
    traffic = Traffic(weight_bytes=10, touched_weights=10, cache_values=6, width=8, inner=16, vocab=32)
    assert traffic.cache_bytes(100) == 1200
    assert traffic.cache_bytes(100, "f32") == 2400
    assert traffic.activation_bytes() == 4 * (512 * (4 * 8 + 3 * 16) + 32)


def test_bandwidth_use_is_bytes_a_second_over_bytes_a_second() -> None:
    assert utilization(2e9, 5, 2e10) == 0.5
    assert np.isclose(utilization(91.7e6, 109, 2e10), 0.49976, atol=1e-4)
