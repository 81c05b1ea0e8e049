"""Ranges of keys and values: against every angle tried one by one, and against a forward pass written out."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from r1q.calibration.cache import cache_ranges, turned_range
from r1q.models.block import attention_input, linear, rms_norm, run_block
from r1q.models.forward import embed, load_block
from r1q.models.rope import rotation
from r1q.models.source import ModelSource

MakeModel = Callable[..., Path]


def test_a_pair_reaches_what_the_worst_of_many_angles_gives() -> None:
    generator = torch.Generator().manual_seed(3)
    keys = torch.randn(200, 8, generator=generator)
    angles = torch.tensor([20.0, 3.0, 1.0, 1e-4])
    theta = torch.linspace(0, 1, 4001)[:, None] * angles
    first, second = keys.chunk(2, dim=-1)
    cosine, sine = theta.cos()[:, None], theta.sin()[:, None]
    turned = torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1).abs().amax(0)
    # Between two of 4,000 angles up to 20, the cosine at its top is off by less than (20/8000)²/2.
    np.testing.assert_allclose(turned_range(keys, angles), turned, rtol=5e-6, atol=1e-6)
    assert (turned_range(keys, angles)[:, 3] < keys.norm(dim=-1)).all()


def test_ranges_of_a_model_hold_at_every_position(make_model: MakeModel) -> None:
    source = ModelSource.open(make_model("qwen3", num_layers=2))
    config = source.config
    tokens = np.random.default_rng(5).integers(0, 300, (3, 7))
    found = list(cache_ranges(source, tokens, positions=50))
    hidden, turn = embed(source, tokens), rotation(config, 50)
    for layer, (keys, values) in enumerate(found):
        weights = load_block(source, layer)
        most_key = most_value = torch.zeros(config.num_kv_heads, config.head_dim)
        for window in hidden:
            normed = attention_input(weights, config, window)
            shape = (len(window), config.num_kv_heads, config.head_dim)
            key = rms_norm(
                linear(weights, "attn_k", normed).reshape(shape), weights["attn_k_norm.weight"], config.rms_norm_eps
            )
            everywhere = turn.turn(key[..., None, :].expand(*shape[:2], 50, shape[2]))
            most_key = torch.maximum(most_key, everywhere.abs().amax(dim=(0, 2)))
            most_value = torch.maximum(most_value, linear(weights, "attn_v", normed).reshape(shape).abs().amax(0))
        np.testing.assert_allclose(values, most_value, rtol=1e-5)
        assert (
            keys >= most_key.numpy() * (1 - 1e-6)
        ).all()  # whole positions only: an angle between them may reach a little more
        np.testing.assert_allclose(keys, most_key, rtol=0.02)
        hidden = torch.stack([run_block(weights, config, window, rotation(config, 7)) for window in hidden])
