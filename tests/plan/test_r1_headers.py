"""DeepSeek-R1 planned from its headers alone: 671 billion weights, sizes that others have published, memory of one expert."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from r1q.core.errors import UsageError
from r1q.plan.job import Job, OpenedJob, open_job, plan_job, workload
from r1q.plan.memory import memory_parts
from r1q.plan.plan import Plan
from r1q.quantize.engine import Engine

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "DeepSeek-R1"
    runpy.run_path(str(ROOT / "scripts" / "r1_headers.py"))["write"](folder)
    return folder


def planned(folder: Path, **options: object) -> tuple[OpenedJob, Plan]:
    opened = open_job(Job(model=str(folder), **options))  # type: ignore[arg-type]
    return opened, plan_job(opened)


def test_the_headers_are_those_of_the_published_checkpoint(headers: Path) -> None:
    names = json.loads((headers / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(names) == 91_991
    assert sum(path.stat().st_size for path in headers.glob("*.safetensors")) // 10**9 == 688
    assert sum(path.stat().st_blocks * 512 for path in headers.iterdir()) < 64 << 20


def test_sizes_are_those_that_others_have_published(headers: Path) -> None:
    opened, plan = planned(headers, scheme="q4_k_m")
    assert round(plan.weights / 1e9, 1) == 671.0
    # arXiv 2505.02390, table of sizes: Q4_K_M 377 GiB and 4.82 bits, DQ3_K_M 281 GiB and 3.59 bits.
    assert (round(plan.bytes / 2**30), round(plan.bits_per_weight, 2)) == (377, 4.82)
    _, mixed = planned(headers, scheme="dq3_k_m")
    assert round(mixed.bits_per_weight, 2) == 3.59
    assert abs(mixed.bytes / 2**30 - 281) < 1
    down = [t.scheme.grid for t in mixed.tensors if t.spec.kind == "ffn_down_exps" and t.spec.expert == 0]
    shares = {grid: round(100 * down.count(grid) / len(down), 1) for grid in set(down)}
    assert shares == {"q3_k": 75.9, "q4_k": 20.7, "q6_k": 3.4}
    assert "they predict further tokens" in plan.notes[0]
    assert opened.model.source.config.name == "DeepSeek-R1"


def test_by_default_experts_have_4_bits_and_the_rest_8(headers: Path) -> None:
    opened, plan = planned(headers)
    assert opened.choice.recipe.name == "experts_q4_k"
    assert {t.scheme.grid for t in plan.tensors if t.spec.expert is not None} == {"q4_k"}
    others = {t.scheme.grid for t in plan.tensors if t.spec.expert is None and t.spec.is_matrix}
    assert others == {"q8_0", "f32"}
    assert {t.spec.kind for t in plan.tensors if t.spec.is_matrix and t.scheme.grid == "f32"} == {"ffn_gate_inp"}


def test_memory_holds_one_expert_and_the_codes_of_one_block(headers: Path) -> None:
    opened, plan = planned(headers, effort="fast", samples=64)
    engine = Engine(effort="fast", threads=1, isa="here", compute="bfloat16", spill=True)
    parts = memory_parts(workload(opened, plan), engine)
    # 256 experts of 3 · 2048 · 7168 weights in 4.5 bits; one of them in bfloat16; moments of 7168 columns.
    codes = 256 * 3 * 2048 * 7168 * 144 // 256
    assert codes < parts["a block's weights"] < codes + 2**30
    assert sum(parts.values()) < 12e9


@pytest.mark.parametrize("name", ["onnx", "gptq"])
def test_formats_that_cannot_hold_it_say_why(headers: Path, name: str) -> None:
    with pytest.raises(
        UsageError, match="latent attention, which has no GroupQueryAttention form" if name == "onnx" else "no gptq"
    ):
        planned(headers, bits=4, formats=(name,))
