"""What tokens say: token by token as llama.cpp spells them, and the same from a folder as from a file."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import pytest

from r1q.core.errors import InputError
from r1q.models.embedded import EMBEDDED
from r1q.models.tokenizer import Tokenizer
from r1q.runtimes.base import Options
from r1q.runtimes.table import load_runtime
from r1q.serve.vocabulary import Vocabulary, folder_vocabulary, gguf_vocabulary, open_vocabulary

TEXTS = ["What is 17 + 25?", "naïve café — “quotes”", "思考一下：3×4", "🤔 hmm\n\n\tdef f(x):", "</think>\n42"]


def test_every_token_is_spelled_as_llama_cpp_spells_it(tiny: Path) -> None:
    import llama_cpp

    vocabulary = gguf_vocabulary(tiny)
    session = load_runtime("llama-cpp").open(tiny, Options(threads=1))
    inner = session._vocabulary  # type: ignore[attr-defined]
    with session:
        buffer = ctypes.create_string_buffer(256)
        for token in range(vocabulary.size):
            length = llama_cpp.llama_token_to_piece(inner, token, buffer, 256, 0, False)
            assert vocabulary.spell(token) == buffer.raw[:length], vocabulary.name(token)
            assert (token in vocabulary.ends) == llama_cpp.llama_vocab_is_eog(inner, token)


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_what_its_tokens_say(text: str, tiny: Path) -> None:
    vocabulary = gguf_vocabulary(tiny)
    ids = Tokenizer.open(EMBEDDED).encode(text, add_special=False)
    assert b"".join(map(vocabulary.spell, ids)).decode() == text


def test_a_folder_says_the_same_as_the_file_made_of_it(tiny: Path) -> None:
    folder, file = folder_vocabulary(EMBEDDED), gguf_vocabulary(tiny)
    assert [folder.spell(token) for token in range(folder.size)] == [file.spell(token) for token in range(folder.size)]
    for key in ("model", "ends", "template", "bos", "eos"):
        assert getattr(folder, key) == getattr(file, key)
    assert (folder.temperature, folder.top_p) == (0.6, 0.95)
    assert (file.temperature, file.top_p) == pytest.approx((0.6, 0.95))
    assert open_vocabulary(EMBEDDED, "onnx").tokens == folder.tokens
    assert open_vocabulary(tiny.parent / "checkpoint", "checkpoint").tokens == folder.tokens


def test_what_is_no_token_says_nothing(tiny: Path) -> None:
    vocabulary = gguf_vocabulary(tiny)
    assert vocabulary.spell(vocabulary.size) == vocabulary.spell(-1) == b""
    (end, *_) = vocabulary.ends
    assert vocabulary.spell(end) == b""
    assert vocabulary.name(end) == "<｜end▁of▁sentence｜>"


def test_sentencepiece_tokens_are_bytes_and_spaces() -> None:
    tokens = ["<unk>", "<s>", "<0xF0>", "▁the", "the", "<think>"]
    vocabulary = Vocabulary(
        model="llama", tokens=tokens, types=[2, 3, 6, 1, 1, 4], ends=frozenset(), template=None, bos="", eos="",
        temperature=0.6, top_p=0.95,
    )  # fmt: skip
    assert [vocabulary.spell(token) for token in range(6)] == [b"", b"", b"\xf0", b" the", b"the", b"<think>"]


def test_a_file_without_its_own_settings_gets_r1s(tiny_gguf: Path) -> None:
    vocabulary = gguf_vocabulary(tiny_gguf)
    assert (vocabulary.temperature, vocabulary.top_p, vocabulary.template) == (0.6, 0.95, None)
    assert vocabulary.spell(258) == b"he"
    assert vocabulary.spell(0x20) == b" "


def test_a_tokenizer_that_cannot_be_spelled_is_refused(write_gguf: Callable[..., Path], tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "wpm.gguf")
    data = path.read_bytes()
    path.write_bytes(data.replace(b"\x04\0\0\0\0\0\0\0gpt2", b"\x04\0\0\0\0\0\0\0bert"))
    with pytest.raises(InputError, match="its tokenizer is 'bert'"):
        gguf_vocabulary(path)
