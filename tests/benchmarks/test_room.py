"""Room for a file on a device: what the cache of a model's own attention takes is not there."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from r1q.benchmarks.room import room_for_file
from r1q.benchmarks.targets import find_target
from r1q.models.config import ModelConfig


@pytest.mark.parametrize(
    ("family", "values"),
    [("qwen3_moe", 3 * 2 * 2 * 32), ("deepseek_v3", 3 * (32 + 8))],
    ids=["keys and values", "latents"],
)
def test_what_a_position_keeps(moe_models: SimpleNamespace, tmp_path: Path, family: str, values: int) -> None:
    """Two contexts differ by what their positions keep, 2 bytes a number."""
    device = find_target("phone-8g").profile
    assert device is not None
    short = moe_models.write_moe_model(tmp_path / "short", family, max_position_embeddings=100)
    longer = moe_models.write_moe_model(tmp_path / "longer", family, max_position_embeddings=200)
    rooms = [room_for_file(device, ModelConfig.read(folder, name="m")) for folder in (short, longer)]
    assert rooms[0] - rooms[1] == 100 * values * 2
