"""Our files against llama.cpp's own: every tensor byte for byte what llama_model_quantize makes of our BF16 file."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from r1q.core.artifact import OutputFolder
from r1q.core.checkpoint import QuantizedCheckpoint
from r1q.core.gguf_file import GgufFile
from r1q.core.mixtures import FILE_TYPES, MIXTURES
from r1q.core.recipe import Recipe
from r1q.models.embedded import open_model
from r1q.models.tokenizer import Tokenizer
from r1q.plan.plan import make_plan
from r1q.plan.walk import Exported, quantize_model

llama_cpp = pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.runtime

MakeModel = Callable[..., Path]
ROOT = Path(__file__).resolve().parents[1]
SIZES: dict[str, int] = {"hidden_size": 256, "intermediate_size": 512, "num_layers": 9, "vocab_size": 320}


def written(model: Path, scheme: str, output: Path, imatrix: Path | None = None) -> Path:
    """Quantize `model` with our own walk and return the GGUF file."""
    opened = open_model(str(model))
    plan = make_plan(opened.source, Recipe.named(scheme), ("gguf",), imatrix)
    events = list(quantize_model(opened, plan, OutputFolder(output)))
    exported = events[-1]
    assert isinstance(exported, Exported)
    assert exported.artifact.notes[0].startswith("tokenizer: proven")
    return exported.path


LLAMA_QUANTIZE = """
import ctypes, sys, llama_cpp, numpy
source, target, file_type, importance = sys.argv[1:]
options = llama_cpp.llama_model_quantize_default_params()
options.ftype, options.nthread = int(file_type), 2
if importance:
    values = dict(numpy.load(importance))
    entries = (llama_cpp.llama_model_imatrix_data * (len(values) + 1))()
    for entry, (name, row) in zip(entries, values.items()):
        entry.name, entry.data, entry.size = name.encode(), row.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), len(row)
    options.imatrix = entries
sys.exit(llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(options)))
"""


def llama_quantized(bf16: Path, scheme: str, to: Path, importance: dict[str, np.ndarray] | None = None) -> Path:
    """Let llama.cpp quantize `bf16` in a process of its own, as it logs to stderr and aborts on errors."""
    weights = to.with_suffix(".npz")
    if importance:
        np.savez(weights, **importance)  # type: ignore[arg-type]
    arguments = [str(bf16), str(to), str(FILE_TYPES[scheme]), str(weights) if importance else ""]
    subprocess.run([sys.executable, "-c", LLAMA_QUANTIZE, *arguments], check=True, capture_output=True)
    return to


def write_imatrix(path: Path, importance: dict[str, np.ndarray]) -> Path:
    """Write llama-imatrix's GGUF form with gguf's own writer: sums over 8 tokens, and the count."""
    import gguf

    writer = gguf.GGUFWriter(path, "")
    writer.add_string("general.type", "imatrix")
    writer.add_uint32("imatrix.chunk_count", 3)
    for name, row in importance.items():
        writer.add_tensor(f"{name}.in_sum2", (row * 8).reshape(1, -1))
        writer.add_tensor(f"{name}.counts", np.full((1, 1), 8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def assert_same_tensors(ours: Path, theirs: Path) -> None:
    mine, other = GgufFile.open(ours), GgufFile.open(theirs)
    assert list(mine.tensors) == list(other.tensors) or set(mine.tensors) == set(other.tensors)
    for name, tensor in mine.tensors.items():
        assert (tensor.type, tensor.shape) == (other.tensors[name].type, other.tensors[name].shape), name
        different = np.flatnonzero(mine.read_bytes(name) != other.read_bytes(name))
        assert not len(different), f"{name} ({tensor.type}): {len(different)} bytes differ, the first at {different[0]}"


@pytest.mark.parametrize("preset", MIXTURES)
def test_every_preset_equals_llama_quantize(make_model: MakeModel, tmp_path: Path, preset: str) -> None:
    model = make_model("llama" if preset > "q4" else "qwen2", tied=preset in ("q4_k_m", "q6_k"), **SIZES)
    bf16 = written(model, "bf16", tmp_path / "bf16")
    assert_same_tensors(
        written(model, preset, tmp_path / preset), llama_quantized(bf16, preset, tmp_path / "theirs.gguf")
    )


@pytest.mark.parametrize("preset", MIXTURES)
def test_every_preset_equals_llama_quantize_with_an_importance_matrix(
    make_model: MakeModel, tmp_path: Path, preset: str
) -> None:
    model = make_model("llama", **SIZES)
    rng = np.random.default_rng(5)
    inside = [spec for spec in open_model(str(model)).source.tensors if spec.is_matrix and spec.layer is not None]
    # One layer's values have none, as when a file lacks an entry.
    kept = [spec for spec in inside if spec.gguf_name != "blk.4.attn_v.weight"]
    importance = {spec.gguf_name: rng.gamma(0.5, size=spec.columns).astype(np.float32) for spec in kept}
    imatrix = write_imatrix(tmp_path / "imatrix.gguf", importance)
    bf16 = written(model, "bf16", tmp_path / "bf16")
    ours = written(model, preset, tmp_path / preset, imatrix)
    assert_same_tensors(ours, llama_quantized(bf16, preset, tmp_path / "theirs.gguf", importance))
    manifest = QuantizedCheckpoint.open(tmp_path / preset / "checkpoint").manifest
    assert "model.layers.4.self_attn.v_proj.weight: no importance given, plain search" in str(manifest["events"])


def test_grouped_heads_get_what_llama_cpp_gives_them(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("qwen2", num_heads=8, num_kv_heads=2, **{**SIZES, "num_layers": 16})
    bf16 = written(model, "bf16", tmp_path / "bf16")
    for preset in ("q2_k", "iq4_xs"):
        assert_same_tensors(
            written(model, preset, tmp_path / preset), llama_quantized(bf16, preset, tmp_path / f"{preset}.gguf")
        )


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real model of 135M weights, made once and kept in the folder that R1Q_REFERENCE names, else for this session."""
    kept = os.environ.get("R1Q_REFERENCE")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("reference") / "SmolLM2-135M-Instruct"
    if not (folder / "model.safetensors").is_file():
        script = ROOT / "scripts" / "reference_model.py"
        done = subprocess.run(
            [sys.executable, str(script), "smollm2-135m", str(folder)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    return folder


def answer(gguf: Path, model: Path, question: str, length: int) -> str:
    """Return llama.cpp's greedy answer to `question` through our adapter.

    In the model's own turns but without its default system message: with that, the first word hangs on 0.07 of a logit in
    float32, less than bfloat16's rounding, and llama.cpp's own files fall to either side.
    """
    from r1q.runtimes.base import Options
    from r1q.runtimes.table import load_runtime

    tokenizer = Tokenizer.open(model)
    ids = tokenizer.encode(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", add_special=False)
    session = load_runtime("llama-cpp").open(gguf, Options(context=512))
    try:
        logits = session.prefill(0, ids)
        found: list[int] = []
        while len(found) < length:
            found.append(int(np.argmax(logits)))
            logits = session.step([(0, found[-1])])[0]
        return tokenizer.decode(found)
    finally:
        session.close()


@pytest.mark.reference
def test_a_real_model_is_llama_cpps_bytes_and_knows_paris(reference: Path, tmp_path: Path) -> None:
    bf16 = written(reference, "bf16", tmp_path / "bf16")
    for scheme in ("q4_0", "q4_k_m", "q6_k", "q8_0"):
        ours = written(reference, scheme, tmp_path / scheme)
        assert_same_tensors(ours, llama_quantized(bf16, scheme, tmp_path / f"{scheme}.gguf"))
        assert "Paris" in answer(ours, reference, "What is the capital of France?", 12), scheme
