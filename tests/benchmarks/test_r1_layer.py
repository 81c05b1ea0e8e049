"""The generated checkpoint of R1's layers: its 8-bit floats are torch's, its names are a model's; and what the arithmetic counts."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from r1q.models.fp8 import dequantize
from r1q.models.source import ModelSource

STUDY = Path(__file__).resolve().parents[2] / "benchmarks" / "studies" / "r1_layer"


@pytest.fixture(scope="module")
def generate() -> dict[str, Any]:
    return runpy.run_path(str(STUDY / "generate.py"))


@pytest.fixture(scope="module")
def arithmetic() -> dict[str, Any]:
    return runpy.run_path(str(STUDY / "arithmetic.py"))


def test_codes_are_those_of_torch(generate: dict[str, Any]) -> None:
    random = np.random.default_rng(0)
    values = np.concatenate(
        [random.standard_normal(20_000).astype(np.float32) * scale for scale in (150, 1, 0.01, 1e-4)]
    )
    edges = np.array(
        [448, -448, 0, -0.0, 2**-6, 2**-7, 2**-9, 2**-10, 3 * 2**-10, 232, 248, 2**-6 - 2**-12], np.float32
    )
    values = np.concatenate([values.clip(-448, 448), edges])
    theirs = torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(generate["to_e4m3"](values), theirs)


def test_every_block_uses_the_whole_range(generate: dict[str, Any]) -> None:
    *codes, scales = generate["coded"]((300, 200), np.random.default_rng(1))
    whole = np.concatenate(codes)
    assert (whole.shape, scales.shape) == ((300, 200), (3, 2))
    for row in range(3):
        for column in range(2):
            block = whole[row * 128 : row * 128 + 128, column * 128 : column * 128 + 128]
            assert (block & 0x7F).max() == 0x7E  # 448
    values = dequantize(whole, scales, 0, (128, 128))
    # A log-normal spread over columns of e^±0.35 about 0.6 / √200, and no column of ten times that among so few.
    assert 0.6 < np.median(values.std(0)) * 200**0.5 / 0.6 < 1.5


def test_names_and_shapes_are_those_of_a_model_with_one_dense_layer_and_one_with_experts(
    generate: dict[str, Any], tmp_path: Path
) -> None:
    """Headers alone, as scripts/r1_headers.py writes them."""
    index: dict[str, str] = {}
    for number, tensors in enumerate(generate["shards"](16)):
        generate["HEADERS"]["write_shard"](tmp_path / f"model-{number}.safetensors", tensors)
        index |= dict.fromkeys((name for name, _, _ in tensors), f"model-{number}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    config = {**generate["HEADERS"]["CONFIG"], **generate["CHANGES"], "n_routed_experts": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = ModelSource.open(tmp_path)
    assert source.notes == ()
    assert [source.config.is_sparse(layer) for layer in range(2)] == [False, True]
    published = {"attn_output": (7168, 16384), "ffn_down": (7168, 18432), "ffn_down_exps": (7168, 2048)}
    found = {spec.kind: spec.shape for spec in source.tensors if spec.kind in published}
    assert found == published
    assert sum(spec.expert is not None for spec in source.tensors) == 3 * 16


def test_the_arithmetic_counts_every_weight_of_the_blocks_once(arithmetic: dict[str, Any]) -> None:
    rates = arithmetic["Rates"](products=1e9, exact_products=1e9, coded=1e6, read=1e8)
    dense, sparse = (arithmetic["block"](kind, 1024, 256, rates, 4.5, 4) for kind in (False, True))
    headers = runpy.run_path(str(STUDY.parents[2] / "scripts" / "r1_headers.py"))
    for number, work in ((0, dense), (3, sparse)):
        coded = sum(np.prod(shape) for _, dtype, shape in headers["layer"](number) if dtype == "F8_E4M3")
        assert work.weights == coded
    # q_a with kv_a, k_b with v_b: one slab each; q_b three, o seven; gate and up 15.75, down 7.875.
    assert dense.count == 1 + 3 + 1 + 7 + 16 + 8
    assert sparse.count == 1 + 3 + 1 + 7 + 2 + 1 + 256


def test_a_second_machine_shares_the_tasks_and_nothing_else(arithmetic: dict[str, Any]) -> None:
    rates = arithmetic["Rates"](products=30e9, exact_products=30e9, coded=5e6, read=150e6)
    machine = arithmetic["Machine"](cores=16, network=1e9, disk=1e9, price=1.0)
    blocks = [arithmetic["block"](True, 65536, 512, rates, 4.5, 4)]
    one, two = ([float(cell) for cell in arithmetic["line"](n, blocks * 100, machine).split("|")[2:7]] for n in (1, 2))
    assert two[0] == pytest.approx(one[0] / 2, abs=0.1)
    assert two[1] == one[1]
    assert (one[2], two[3]) == (0.0, one[3])
    assert two[2] > 0
