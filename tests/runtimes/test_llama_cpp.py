"""The llama.cpp adapter on real files: refusals carry llama.cpp's reason, its log stays off the terminal, batches are cut rightly."""

import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from r1q.core.checkpoint import QuantizedCheckpoint
from r1q.core.errors import InputError, MissingError, UsageError
from r1q.export.gguf import write_gguf as write_our_gguf
from r1q.runtimes.base import Options
from r1q.runtimes.table import load_runtime

pytestmark = pytest.mark.runtime
ROOT = Path(__file__).resolve().parents[2]


def test_facts_are_the_files(tiny_gguf: Path, write_gguf: Callable[..., Path], tmp_path: Path) -> None:
    with load_runtime("llama-cpp").open(tiny_gguf, Options(threads=1)) as session:
        assert (session.vocab, session.context, session.bos, session.device) == (264, 128, 256, "cpu")
        assert 0 < session.load_seconds < 60
    bare = write_gguf(tmp_path / "bare.gguf", add_bos=False)
    with load_runtime("llama-cpp").open(bare, Options(threads=1)) as session:
        assert session.bos is None


def test_encode_merges_and_reads_special_spellings(tiny_gguf: Path) -> None:
    with load_runtime("llama-cpp").open(tiny_gguf, Options(threads=1)) as session:
        # "he"=258, "ll"=259, "th"=262, "in"=263, "<s>"=256.
        assert session.encode("hell") == [258, 259]
        assert session.encode("in<s>the") == [263, 256, ord("t"), 258]  # "he" is the earlier merge
        assert session.encode("") == []


def test_texts_longer_than_a_batch_equal_steps(tmp_path: Path, write_gguf: Callable[..., Path]) -> None:
    path = write_gguf(tmp_path / "long.gguf", context=4096)
    tokens = np.random.default_rng(3).integers(0, 256, 2100).tolist()
    with load_runtime("llama-cpp").open(
        path, Options(context=4096, cache="f32", flash_attention=False, threads=1)
    ) as session:
        tail = session.logits(tokens, first=2090)
        whole = session.prefill(0, tokens)  # 2048 + 52
        np.testing.assert_allclose(tail[-1], whole, atol=1e-4)
        session.drop(0, start=2095)
        for position in range(2095, 2100):
            row = session.step([(0, tokens[position])])[0]
            np.testing.assert_allclose(row, tail[position - 2090], atol=1e-4)


def test_rows_asked_for_in_several_batches_equal_the_same_rows_asked_for_alone(
    tmp_path: Path, write_gguf: Callable[..., Path]
) -> None:
    path = write_gguf(tmp_path / "mid.gguf", context=1024)
    tokens = np.random.default_rng(4).integers(0, 256, 700).tolist()
    with load_runtime("llama-cpp").open(path, Options(cache="f32", flash_attention=False, threads=1)) as session:
        rows = session.logits(tokens)
        assert rows.shape == (700, 264)
        for position in (0, 255, 256, 511, 512, 699):
            session.drop(0)
            np.testing.assert_allclose(session.prefill(0, tokens[: position + 1]), rows[position], atol=1e-4)


def test_our_reader_refuses_before_llama_cpp_sees_the_file(tmp_path: Path, tiny_gguf: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2**60, 1) + tiny_gguf.read_bytes()[24:])
    with pytest.raises(InputError, match="tensors claimed"):
        load_runtime("llama-cpp").open(bad, Options(threads=1))


def test_what_llama_cpp_refuses_says_its_reason(tmp_path: Path, tiny_gguf: Path) -> None:
    # A pre-tokenizer that only llama.cpp can know about: sound for a reader of headers.
    data = tiny_gguf.read_bytes()
    other = tmp_path / "other.gguf"
    other.write_bytes(data.replace(b"llama-bpe", b"llama-xyz"))
    with pytest.raises(InputError, match=r"llama\.cpp refuses to load it: .*llama-xyz"):
        load_runtime("llama-cpp").open(other, Options(threads=1))


def test_context_beyond_the_model_is_refused_and_frees_the_model(tiny_gguf: Path) -> None:
    with pytest.raises(UsageError, match="trained for 128"):
        load_runtime("llama-cpp").open(tiny_gguf, Options(context=129))


def test_gpu_is_refused_by_a_build_without_one(tiny_gguf: Path) -> None:
    import llama_cpp

    if llama_cpp.llama_supports_gpu_offload():
        pytest.skip("this build has a GPU")
    with pytest.raises(MissingError, match="built without a GPU: reinstall"):
        load_runtime("llama-cpp").open(tiny_gguf, Options(device="gpu", gpu_layers=-1))


def test_nothing_reaches_the_terminal(tiny_gguf: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from r1q.runtimes.table import load_runtime; from r1q.runtimes.base import Options\n"
        "with load_runtime('llama-cpp').open(Path(sys.argv[1]), Options(threads=1)) as s: s.logits([1, 2, 3]); s.prefill(0, [1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_gguf)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("", "")


def test_versions_name_the_wrapper_and_the_wrapped() -> None:
    versions = load_runtime("llama-cpp").versions()
    assert versions["llama-cpp-python"][0].isdigit()
    assert "CPU" in versions["llama.cpp build"]


def test_several_sequences_step_together_as_they_would_alone(tiny_gguf: Path) -> None:
    options = Options(cache="f32", flash_attention=False, threads=1, sequences=4, context=32)
    texts = np.random.default_rng(5).integers(0, 256, (4, 12))
    with load_runtime("llama-cpp").open(tiny_gguf, options) as session:
        alone = [session.logits(text.tolist()) for text in texts]
        for position in range(12):
            rows = session.step([(sequence, int(texts[sequence, position])) for sequence in (2, 0, 3, 1)])
            for row, sequence in zip(rows, (2, 0, 3, 1), strict=True):
                np.testing.assert_allclose(row, alone[sequence][position], atol=1e-4)


def test_a_cache_of_8_bits_is_kept(tmp_path: Path, onnx_checkpoint: Callable[[str], QuantizedCheckpoint]) -> None:
    path = write_our_gguf(onnx_checkpoint("f32"), tmp_path)  # heads of 64: q8_0 needs blocks of 32
    tokens = np.random.default_rng(6).integers(0, 512, 200).tolist()
    found = {}
    for cache in ("f32", "f16", "q8_0"):
        with load_runtime("llama-cpp").open(path, Options(cache=cache, threads=1)) as session:
            found[cache] = session.logits(tokens)[1:]
    # Steps of 1/127 of the largest of 32 numbers, where half precision has 2^-11 of each one.
    spread = float(found["f32"].std())
    half, eight = (float(np.abs(found[cache] - found["f32"]).mean()) / spread for cache in ("f16", "q8_0"))
    assert half < eight < 0.1
