"""Facts of artifacts from their headers: sizes against numpy's own count, names, refusals."""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Type

from r1q.benchmarks.subjects import find_subjects, gguf_subject
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
