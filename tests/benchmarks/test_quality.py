"""Windows by hand, the disk's limit, and an artifact's scores against a slow loop over single prefills."""

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from numpy.typing import NDArray

from r1q.benchmarks import quality
from r1q.core.errors import InputError, ResourceError
from r1q.core.metrics import Logits
from r1q.runtimes.base import Options
from r1q.runtimes.table import load_runtime


def test_windows_without_bos_are_the_text_cut_up() -> None:
    table = quality.cut(list(range(100, 123)), length=5, windows=8, bos=None)
    np.testing.assert_array_equal(table, np.arange(100, 120).reshape(4, 5))


def test_bos_stands_before_the_text_and_replaces_the_first_token_of_every_window() -> None:
    # llama-perplexity: tokens = [BOS, t0, t1, …]; windows of 4: [BOS t0 t1 t2] [t3→BOS t4 t5 t6].
    table = quality.cut(list(range(10, 20)), length=4, windows=8, bos=1)
    assert table.tolist() == [[1, 10, 11, 12], [1, 14, 15, 16]]


def test_no_more_windows_than_asked_for_and_none_is_refused() -> None:
    assert quality.cut(list(range(50)), length=5, windows=3, bos=None).shape == (3, 5)
    with pytest.raises(InputError, match="the text has 4 tokens and a window needs 5: give a longer one"):
        quality.cut([1, 2, 3, 4], length=5, windows=3, bos=None)


def test_windows_that_fit_the_disk() -> None:
    mib, spare = 1 << 20, quality.SPARE
    assert quality.affordable(8, 10 * mib, limit=1000 * mib, free=spare + 1000 * mib)[0] == 8
    assert quality.affordable(8, 10 * mib, limit=35 * mib, free=spare + 1000 * mib)[0] == 3
    assert quality.affordable(8, 10 * mib, limit=1000 * mib, free=spare + 25 * mib)[0] == 2
    with pytest.raises(ResourceError, match="needs 10 MiB on disk, and 5 MiB is the limit"):
        quality.affordable(8, 10 * mib, limit=5 * mib, free=spare + 1000 * mib)
    with pytest.raises(ResourceError, match="needs 10 MiB on disk, and 261 MiB are free in the temporary folder"):
        quality.affordable(8, 10 * mib, limit=100 * mib, free=spare + 5 * mib)


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "cannot be read"), (b"\xff\xfe caf\xe9", "is not UTF-8"), (b" \n", "is empty")]
)
def test_texts_that_are_refused(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=reason):
        quality.read_text(path)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the hero will hello in the thing that they then tell; " * 12)
    return path


def job(path: Path, text: Path) -> dict[str, object]:
    options = {"context": 64, "cache": "f32", "flash_attention": False, "threads": 1}
    base = {
        "path": str(path),
        "runtime": "llama-cpp",
        "options": options,
        "text": str(text),
        "windows": 3,
        "length": 64,
    }
    return {**base, "reference": None, "logits": None}


@pytest.mark.runtime
def test_nll_equals_one_prefill_for_every_scored_token(tiny_gguf: Path, text: Path) -> None:
    messages = list(quality.scores(job(tiny_gguf, text)))
    assert messages[0]["opened"] == {"windows": 3, "length": 64, "first": 32, "notes": []}
    with load_runtime("llama-cpp").open(tiny_gguf, Options(cache="f32", flash_attention=False, threads=1)) as session:
        stream = [256, *session.encode(text.read_text())]
        for window in range(3):
            tokens = [256, *stream[window * 64 + 1 : window * 64 + 64]]
            expected = []
            for position in range(32, 63):
                session.drop(0)
                row = session.prefill(0, tokens[: position + 1]).astype(np.float64).tolist()
                top = max(row)
                lse = top + math.log(math.fsum(math.exp(x - top) for x in row))
                expected.append(lse - row[tokens[position + 1]])
            assert len(messages[window + 1]["nll"]) == 31
            np.testing.assert_allclose(messages[window + 1]["nll"], expected, atol=1e-4)
            assert messages[window + 1]["kld"] is None


@pytest.fixture
def logits() -> Iterator[BinaryIO]:
    with tempfile.TemporaryFile() as file:
        yield file


def test_a_full_disk_is_a_matter_of_resources() -> None:
    with Path("/dev/full").open("r+b", buffering=0) as full, pytest.raises(ResourceError, match="do not fit"):
        quality._write(full, np.zeros((2, 3), dtype=np.float32))


def against(file: BinaryIO, tokens: NDArray[np.int64], rows: Logits) -> dict[str, object]:
    """Lay out a reference's logits and return what a job says of them."""
    file.seek(0)
    file.write(rows.tobytes())
    file.flush()
    facts = {"length": 64, "first": 32, "windows": len(tokens), "vocab": rows.shape[2], "tokens": tokens.tolist()}
    return {"reference": facts, "logits": file.fileno()}


@pytest.mark.runtime
def test_divergence_from_its_own_logits_is_zero_and_from_others_is_what_they_say(
    tiny_gguf: Path, text: Path, logits: BinaryIO
) -> None:
    with load_runtime("llama-cpp").open(tiny_gguf, Options(cache="f32", flash_attention=False, threads=1)) as session:
        tokens = quality.cut(session.encode(text.read_text()), length=64, windows=2, bos=256)
        own = np.stack([session.logits(row[:-1].tolist(), first=32) for row in tokens])
    messages = list(quality.scores({**job(tiny_gguf, text), **against(logits, tokens, own)}))
    assert messages[0]["opened"]["notes"] == []
    for message in messages[1:]:
        assert max(message["kld"]) < 1e-9
        assert all(message["same_top"])
    # A reference that is uniform: KL(u ‖ p) = −ln V − mean of ln p, with ln p = logits − logsumexp.
    uniform = against(logits, tokens, np.zeros_like(own))
    for window, message in enumerate(list(quality.scores({**job(tiny_gguf, text), **uniform}))[1:]):
        wide = own[window].astype(np.float64)
        expected = np.log(np.exp(wide).sum(axis=1)) - wide.mean(axis=1) - np.log(264)
        np.testing.assert_allclose(message["kld"], expected, rtol=1e-6)


@pytest.mark.runtime
def test_another_tokenizer_is_noted_and_another_vocabulary_refused(
    tiny_gguf: Path, text: Path, logits: BinaryIO
) -> None:
    with load_runtime("llama-cpp").open(tiny_gguf, Options(threads=1)) as session:
        tokens = quality.cut(session.encode(text.read_text()), length=64, windows=2, bos=256)
    tokens[1, 7] = 5
    given = against(logits, tokens, np.zeros((2, 31, 264), dtype=np.float32))
    notes = next(iter(quality.scores({**job(tiny_gguf, text), **given})))["opened"]["notes"]
    assert notes == [
        "the artifact's own tokenizer splits the text otherwise in 1 of 2 windows; the reference's was used"
    ]
    given = against(logits, tokens, np.zeros((2, 31, 300), dtype=np.float32))
    with pytest.raises(
        InputError, match="the artifact has 264 tokens and the reference 300: they are not the same model"
    ):
        list(quality.scores({**job(tiny_gguf, text), **given}))


@pytest.mark.runtime
def test_a_text_for_fewer_windows_is_noted(tiny_gguf: Path, text: Path) -> None:
    asked = {**job(tiny_gguf, text), "windows": 99}
    notes = next(iter(quality.scores(asked)))["opened"]["notes"]
    assert len(notes) == 1
    assert "of the 99 asked for" in notes[0]
