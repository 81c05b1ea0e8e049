"""DeepSeek-R1 planned from its headers alone: 671 billion weights, sizes that others have published, memory of one expert."""

from __future__ import annotations

import json
import math
import runpy
from collections import Counter
from pathlib import Path

import pytest

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


def test_the_dynamic_mix_has_the_grids_and_the_size_of_the_published_file(headers: Path) -> None:
    _, plan = planned(headers, scheme="ud_q2_k_xl")
    # arXiv 2505.02390, table of sizes: UD-Q2_K_XL 212 GiB and 2.70 bits.
    assert abs(plan.bytes / 2**30 - 212) < 1
    assert math.floor(100 * plan.bits_per_weight) == 270
    # llama.cpp, opening that file: 171 tensors of q2_K, 3 of q3_K, 306 of q4_K, 184 of q6_K, 361 of f32. The experts of a block are
    # one tensor there, and kv_b was one, which is k_b (whose rows of 128 fall back to q5_0) and v_b here.
    tensors = {t.spec.gguf_name: t.scheme.grid for t in plan.tensors if "_k_b" not in t.spec.gguf_name}
    counts = Counter(tensors.values())
    assert counts == {"q2_k": 171, "q3_k": 3, "q4_k": 306, "q6_k": 184, "f32": 361}
    raised = [name for name, grid in tensors.items() if grid == "q3_k"]
    assert raised == [f"blk.{layer}.ffn_down_exps.weight" for layer in (3, 4, 5)]


def test_by_default_experts_have_4_bits_and_the_rest_8(headers: Path) -> None:
    opened, plan = planned(headers)
    assert opened.choice.recipe.name == "experts_q4_k"
    assert {t.scheme.grid for t in plan.tensors if t.spec.expert is not None} == {"q4_k"}
    others = {t.scheme.grid for t in plan.tensors if t.spec.expert is None and t.spec.is_matrix}
    assert others == {"q8_0", "f32"}
    assert {t.spec.kind for t in plan.tensors if t.spec.is_matrix and t.scheme.grid == "f32"} == {"ffn_gate_inp"}


def test_memory_holds_one_expert_and_no_codes(headers: Path) -> None:
    opened, plan = planned(headers, effort="fast", samples=64)
    engine = Engine(effort="fast", threads=1, isa="here", compute="bfloat16", spill=True)
    parts = memory_parts(workload(opened, plan), engine)
    # The widest layer reads 18,432: one matrix of float32 moments; and all that a dense block, or attention beside one expert of
    # 3 · 2048 · 7168 weights, has in bfloat16. The codes of 256 experts would be 6.3 GB.
    assert parts["statistics"] == 4 * 18432**2
    assert parts["a block's weights"] < 1.2e9
    assert sum(parts.values()) < 4e9


def test_a_gptq_folder_codes_experts_alone(headers: Path) -> None:
    opened, plan = planned(headers, bits=4, formats=("gptq",))
    # MoE-Quant's tables: 346 GiB with experts alone in 4 bits of groups of 128, 325 GiB with everything.
    assert abs(plan.bytes / 2**30 - 346) < 2
    assert {str(t.scheme) for t in plan.tensors if t.spec.expert is not None} == {"int4 g128"}
    assert {str(t.scheme) for t in plan.tensors if t.spec.kind == "attn_k_b"} == {"bf16"}
    assert "experts alone" in opened.choice.reason


def test_an_onnx_folder_has_experts_in_4_bits_and_the_rest_in_8(headers: Path) -> None:
    opened, plan = planned(headers, bits=4, formats=("onnx",))
    assert {str(t.scheme) for t in plan.tensors if t.spec.expert is not None} == {"int4 g128"}
    grids = {t.spec.kind: str(t.scheme) for t in plan.tensors if t.spec.expert is None and t.spec.is_matrix}
    kept = {"ffn_gate_inp": "f32", "attn_k_b": "bf16", "attn_v_b": "bf16", "token_embd": "q8_0", "output": "q8_0"}
    assert grids == {kind: kept.get(kind, "int8 g128") for kind in grids}
    assert "experts alone have 4 bits, what thinks has 8; kv_b_proj stays bf16" in opened.choice.reason
