"""The forward pass against transformers in float32 with eager attention, and against itself where the answer must not change.

Tolerance: both sides compute the same sums in another order. A logit here is a sum of 64 products of numbers of order one whose
inputs went through two blocks; float32 rounding (6e-8 relative) grows to a few 1e-6. 5e-5 is refused by any wrong formula (a
missing bias, epsilon or frequency moves logits by more than 1e-3, as the last tests show).
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from r1q.core.errors import InputError
from r1q.core.tensors import TensorSpec
from r1q.models import forward
from r1q.models.block import run_block
from r1q.models.forward import Configured, logits
from r1q.models.linear import rms_norm
from r1q.models.rope import frequencies, rotation
from r1q.models.source import ModelSource

MakeModel = Callable[..., Path]
TOLERANCE = 5e-5
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama old config": ("llama", {"old_config": True, "dtype": "F16"}),
    "llama tied": ("llama", {"tied": True, "shards": 2}),
    "llama one kv head, own head_dim": ("llama", {"num_kv_heads": 1, "head_dim": 24}),
    "llama attention and mlp bias": ("llama", {"config": {"attention_bias": True, "mlp_bias": True}}),
    "yarn": (
        "qwen3",
        {
            "config": {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 1e6,
                    "factor": 4.0,
                    "original_max_position_embeddings": 32,
                }
            }
        },
    ),
    "llama3 scaling": ("llama", {"llama3_scaling": True}),
    "llama3 scaling, old config": ("llama", {"llama3_scaling": True, "old_config": True}),
    "qwen2": ("qwen2", {"dtype": "F32"}),
    "qwen2 tied": ("qwen2", {"tied": True}),
    "qwen3": ("qwen3", {}),
    "qwen3 tied, biases": ("qwen3", {"tied": True, "config": {"attention_bias": True}}),
}


def some_tokens(windows: int = 3, length: int = 96) -> NDArray[np.int64]:
    return np.random.default_rng(7).integers(0, 320, (windows, length))


def reference_logits(folder: Path, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return np.asarray(model(torch.from_numpy(tokens)).logits.numpy(), dtype=np.float32)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers_within_rounding(make_model: MakeModel, case: str) -> None:
    family, options = CASES[case]
    folder = make_model(family, **options)
    tokens = some_tokens()
    ours = np.stack(list(logits(ModelSource.open(folder), tokens)))
    theirs = reference_logits(folder, tokens)
    assert ours.shape == theirs.shape == (3, 96, 320)
    assert ours.dtype == np.float32
    assert np.abs(theirs).max() > 1
    assert np.abs(ours - theirs).max() < TOLERANCE


def test_first_drops_leading_positions_and_nothing_else(make_model: MakeModel) -> None:
    source = ModelSource.open(make_model())
    tokens = some_tokens()
    whole = list(logits(source, tokens))
    tail = list(logits(source, tokens, first=60))
    assert [part.shape for part in tail] == [(36, 320)] * 3
    np.testing.assert_allclose(np.stack(tail), np.stack(whole)[:, 60:], atol=TOLERANCE)


def test_rounded_blocks_are_those_of_a_loop_that_rounds_every_number(make_model: MakeModel) -> None:
    source = ModelSource.open(make_model("llama"))
    tokens = np.arange(40, dtype=np.int64).reshape(1, 40)
    hidden = forward.embed(source, tokens)
    turn = rotation(source.config, 40, "cpu")
    for layer in range(source.config.num_layers):
        weights = forward.load_block(source, layer)
        exact = run_block(weights, source.config, hidden[0], turn).numpy().view(np.uint32).astype(np.uint64)
        # To nearest, ties to even, on the bits: what bfloat16 keeps are the upper sixteen.
        upper = (exact + 0x7FFF + ((exact >> 16) & 1)) >> 16 << 16
        hidden = torch.from_numpy(upper.astype(np.uint32).view(np.float32))[None]
    head = torch.from_numpy(source.read_rows("lm_head.weight", 0, 320))
    norm = torch.from_numpy(source.read_rows("model.norm.weight", 0, 1)).reshape(-1)
    expected = rms_norm(hidden[0], norm, source.config.rms_norm_eps) @ head.T
    (found,) = logits(source, tokens, rounded=True)
    np.testing.assert_allclose(found, expected.numpy(), atol=TOLERANCE)
    (plain,) = logits(source, tokens)
    assert np.abs(found - plain).max() > 10 * TOLERANCE


def test_later_tokens_do_not_reach_earlier_logits(make_model: MakeModel) -> None:
    source = ModelSource.open(make_model("qwen3"))
    tokens = some_tokens(1)
    changed = tokens.copy()
    changed[:, 50:] = (changed[:, 50:] + 1) % 320
    before, after = next(logits(source, tokens)), next(logits(source, changed))
    np.testing.assert_array_equal(before[:50], after[:50])
    assert np.abs(before[50:] - after[50:]).max() > 0.1


def test_slabs_and_memory_do_not_change_the_logits(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ModelSource.open(make_model("qwen2", tied=True))
    tokens = some_tokens()
    whole = np.stack(list(logits(source, tokens)))
    monkeypatch.setattr(forward, "_SLAB_BYTES", 4 * 64 * 7)
    monkeypatch.setattr(forward, "_EMBEDDING_ROWS", 5)
    pieces = np.stack(list(logits(source, tokens, memory=1)))
    np.testing.assert_allclose(pieces, whole, atol=TOLERANCE)


class CountingReader:
    """A source that notes what is read."""

    def __init__(self, source: ModelSource) -> None:
        self.source, self.config, self.tensors = source, source.config, source.tensors
        self.reads: list[tuple[str, int, int]] = []

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        self.reads.append((name, start, stop))
        return self.source.read_rows(name, start, stop)


def test_blocks_are_read_once_in_order_and_the_embedding_only_where_used(make_model: MakeModel) -> None:
    reader = CountingReader(ModelSource.open(make_model(num_layers=3, vocab_size=4096)))
    tokens = np.array([[5, 7, 3000], [6, 5, 3001]])
    list(logits(reader, tokens))
    assert [read for read in reader.reads if read[0] == "model.embed_tokens.weight"] == [
        ("model.embed_tokens.weight", 5, 8),
        ("model.embed_tokens.weight", 3000, 3002),
    ]
    layers = [name.split(".")[2] for name, _, _ in reader.reads if ".layers." in name]
    assert layers == ["0"] * 9 + ["1"] * 9 + ["2"] * 9


class LiveReader(CountingReader):
    """A source that knows how many bytes of what it read are still alive."""

    live = peak = 0

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        rows = super().read_rows(name, start, stop)
        self.live += rows.nbytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(rows, self._gone, rows.nbytes)
        return rows

    def _gone(self, size: int) -> None:
        self.live -= size


def test_never_more_than_one_block_of_weights_is_alive(make_model: MakeModel) -> None:
    reader = LiveReader(ModelSource.open(make_model("qwen2", num_layers=6, vocab_size=320)))
    list(logits(reader, some_tokens()))
    block = sum(4 * spec.size for spec in reader.tensors if spec.layer == 0)
    assert max(block, 4 * 320 * 64) <= reader.peak <= max(block, 4 * 320 * 64 + 4 * 64)
    assert reader.live == 0


def test_weights_without_a_config_run_with_one(make_model: MakeModel) -> None:
    source = ModelSource.open(make_model())

    class Bare:
        tensors: tuple[TensorSpec, ...] = source.tensors

        def read_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
            rows = source.read_rows(name, start, stop)
            rows.flags.writeable = False  # as memory that a checkpoint lends may be
            return rows

    tokens = some_tokens(1)
    np.testing.assert_array_equal(next(logits(Configured(source.config, Bare()), tokens)), next(logits(source, tokens)))


@pytest.mark.parametrize("token", [-1, 320])
def test_a_token_outside_the_vocabulary_is_refused(make_model: MakeModel, token: int) -> None:
    source = ModelSource.open(make_model())
    with pytest.raises(InputError, match=rf"token {token} is outside .* 320"):
        list(logits(source, np.array([[1, token, 2]])))


def test_overflow_names_the_block(make_model: MakeModel) -> None:
    source = ModelSource.open(make_model())

    class Huge(CountingReader):
        def read_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
            rows = super().read_rows(name, start, stop)
            return rows * np.float32(1e25) if "layers.1.mlp" in name else rows

    with pytest.raises(InputError, match="block 1 made numbers that are not finite"):
        list(logits(Huge(source), some_tokens(1)))


def test_llama3_frequencies_of_three_worked_pairs(make_model: MakeModel) -> None:
    """factor 8, low 1, high 4, original context 64: a pair turns 64·f/2π times; ≥ 4 is kept, ≤ 1 is divided by 8."""
    config = ModelSource.open(make_model(llama3_scaling=True, num_heads=2, num_kv_heads=1)).config
    plain = frequencies(dataclasses.replace(config, rope_scaling=None))
    stretched = frequencies(config)
    turns = 64 * plain / (2 * np.pi)
    assert plain[1] == pytest.approx(500000 ** (-1 / 16))
    assert turns[1] > 4 > turns[2] > 1 > turns[3]
    assert stretched[1] == plain[1]
    share = (turns[2] - 1) / 3
    torch.testing.assert_close(stretched[2], (1 - share) * plain[2] / 8 + share * plain[2])
    torch.testing.assert_close(stretched[3], plain[3] / 8)


@pytest.mark.parametrize(
    "change",
    [{"rms_norm_eps": 1e-2}, {"rope_theta": 10000.0}, {"rope_scaling": None}],
    ids=["epsilon", "base", "scaling"],
)
def test_each_number_of_the_config_moves_the_logits_beyond_the_tolerance(
    make_model: MakeModel, change: dict[str, Any]
) -> None:
    source = ModelSource.open(make_model(llama3_scaling=True))
    other = Configured(dataclasses.replace(source.config, **change), source)
    tokens = some_tokens(1)
    assert np.abs(next(logits(source, tokens)) - next(logits(other, tokens))).max() > 20 * TOLERANCE
