"""Reading text: a file that is large and says nothing is refused early, and a large one that says much costs only its beginning."""

from __future__ import annotations

from pathlib import Path

import pytest

from r1q.calibration import corpus
from r1q.calibration.corpus import take_file
from r1q.calibration.spec import MAX_FILE_BYTES
from r1q.calibration.windows import make_windows
from r1q.core.errors import InputError
from r1q.models.embedded import EMBEDDED
from r1q.models.tokenizer import Tokenizer

LINE = "The quick brown fox jumps over the lazy dog.\n"


def test_text_without_end_and_without_tokens_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "_SPARSE_BYTES", 1 << 17)
    path = tmp_path / "texts.txt"
    special = "<｜end▁of▁sentence｜>"  # 27 bytes that are one token
    path.write_text(special * 200_000)
    tokenizer = Tokenizer.open(EMBEDDED)
    monkeypatch.setattr(corpus, "_SPARSE_BYTES_PER_TOKEN", 16)
    with pytest.raises(InputError, match=r"texts\.txt has \d+ tokens in its first \d+ bytes"):
        take_file(path, tokenizer, 20_000)
    monkeypatch.setattr(corpus, "_SPARSE_BYTES_PER_TOKEN", 64)
    assert len(take_file(path, tokenizer, 20_000).ids) >= 20_000


def test_the_largest_file_costs_what_its_beginning_costs(tmp_path: Path) -> None:
    path = tmp_path / "large.txt"
    with open(path, "wb") as file:
        file.write(LINE.encode() * 4000)
        file.truncate(MAX_FILE_BYTES)  # the rest is a hole that takes no disk, and would be a gigabyte of NUL
    taken = take_file(path, Tokenizer.open(EMBEDDED), 1000)
    assert not taken.whole
    assert taken.bytes == 1 << 16
    windows = make_windows(str(path), Tokenizer.open(EMBEDDED), samples=4, length=128)
    assert windows.tokens.shape == (4, 128)
