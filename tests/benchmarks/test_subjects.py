"""Facts of artifacts from their headers: sizes against numpy's own count, names, refusals."""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from click.testing import CliRunner
from gguf.constants import GGMLQuantizationType as Type

from r1q.benchmarks.result import BenchResult
from r1q.benchmarks.run import bench
from r1q.benchmarks.subjects import find_subjects, gguf_subject
from r1q.cli import main
from r1q.core.errors import InputError

MATRICES = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128) + 2 * 264 * 64
VECTORS = 5 * 64


@pytest.mark.parametrize(
    ("kind", "bits", "grid"), [(Type.F32, 32.0, "f32"), (Type.Q8_0, 8.5, "q8_0"), (Type.Q4_0, 4.5, "q4_0")]
)
def test_bits_per_weight_count_every_tensor(
    tmp_path: Path, write_gguf: Callable[..., Path], kind: Type, bits: float, grid: str
) -> None:
    subject = gguf_subject(write_gguf(tmp_path / "Some-Model.gguf", kind=kind))
    assert subject.weights == MATRICES + VECTORS
    assert subject.bits_per_weight == pytest.approx((MATRICES * bits + VECTORS * 32) / (MATRICES + VECTORS))
    assert (subject.name, subject.format, subject.grid, subject.context) == ("Some-Model", "gguf", grid, 128)
    assert subject.bytes == subject.path.stat().st_size


def test_a_folder_is_its_files_and_none_comes_twice(tmp_path: Path, write_gguf: Callable[..., Path]) -> None:
    second, first = (write_gguf(tmp_path / f"{name}.gguf") for name in "ba")
    assert [subject.path for subject in find_subjects([second, tmp_path])] == [second, first]


def test_stated_file_type_names_the_preset(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    writer.add_tensor("a", np.zeros((2, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    try:
        assert gguf_subject(path).grid == "q4_k_m"
    except InputError as error:
        pytest.fail(f"our reader asks for more than this test writes: {error}")


def test_a_folder_without_artifacts_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no artifact: give a \.gguf file"):
        find_subjects([tmp_path])


def test_a_damaged_header_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGML" + bytes(100))
    with pytest.raises(InputError, match="not a GGUF file"):
        find_subjects([tmp_path])


def quantize(checkpoint: Path, output: Path, *options: str) -> Path:
    done = CliRunner().invoke(
        main, ["quantize", str(checkpoint), "-o", str(output), "-q", *options], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    return output


@pytest.fixture
def every_format(make_model: Callable[..., Path], tmp_path: Path) -> Path:
    """Return an output folder with int4 in groups of 32 as GGUF, GPTQ and ONNX, and its checkpoint."""
    pytest.importorskip("onnx")
    model = make_model("llama", hidden_size=64, intermediate_size=96, vocab_size=320)
    return quantize(model, tmp_path / "out", "--bits", "4", "--group-size", "32", "--to", "gguf,gptq,onnx")


def test_an_output_folder_is_every_artifact_in_it(every_format: Path) -> None:
    found = {subject.format: subject for subject in find_subjects([every_format])}
    assert set(found) == {"gguf", "gptq", "onnx"}
    weights = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96) + 2 * 320 * 64 + 5 * 64
    for subject in found.values():
        assert subject.context == 256
        assert subject.traffic is not None
        # Two blocks with two heads of 16 for keys and for values.
        assert subject.traffic.cache_values in (2 * 2 * 2 * 16, 2 * 2 * 2 * 2 * 16), subject.format
        assert subject.weights == pytest.approx(weights, rel=0.01), subject.format
        assert subject.files
        assert all(file.is_file() for file in subject.files)
        assert subject.bytes == sum(file.stat().st_size for file in subject.files) or subject.format == "onnx"
    linear = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96)
    # Four bits and a scale of two bytes for 32: 18 bytes; what ONNX and GPTQ spend is near that.
    assert found["gguf"].grid == "q4_0"
    assert found["gptq"].grid == "gptq int4 g32"
    assert found["onnx"].grid.startswith("onnx int4 g32")
    assert found["onnx"].traffic is not None
    assert found["onnx"].traffic.weight_bytes > linear * 18 / 32


def test_a_folder_of_each_format_can_be_named_itself(every_format: Path) -> None:
    for name, kind in (("gptq", "gptq"), ("onnx", "onnx"), ("checkpoint", "checkpoint")):
        (subject,) = find_subjects([every_format / name])
        assert subject.format == kind
        assert subject.bits_per_weight < 20


def test_an_artifact_that_is_listed_and_gone_is_said(every_format: Path) -> None:
    next(every_format.glob("*.gguf")).unlink()
    with pytest.raises(InputError, match=r"gguf is gone, though .* lists it: run r1q export"):
        find_subjects([every_format])


@pytest.mark.runtime
def test_every_format_is_benched_in_one_table(every_format: Path) -> None:
    sizes = {"prompt": 4, "prefill": 8, "generate": 2, "depths": (0,), "repetitions": 2, "windows": 1, "threads": 1}
    rows = [one for one in bench([every_format], **sizes) if isinstance(one, BenchResult)]  # type: ignore[arg-type]
    names = {(row.format, row.runtime) for row in rows}
    assert {("gguf", "llama-cpp"), ("gptq", "torch")} <= names
    for row in rows:
        assert row.failures == (), (row.format, row.runtime)
        assert row.quality is not None
        kld = row.quality.fidelity().kld
        assert kld is not None
        # One set of codes: every format and runtime diverges as much from the float model, up to its own arithmetic.
        assert kld.value == pytest.approx(rows[0].quality.fidelity().kld.value, rel=0.15)  # type: ignore[union-attr]
