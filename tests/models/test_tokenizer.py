"""The tokenizer against transformers' own on the same folder, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from r1q.core.errors import InputError
from r1q.models.tokenizer import Tokenizer

MakeModel = Callable[..., Path]
TEXTS = [
    "",
    "the quick brown fox",
    "  two  spaces\n\n\tand 12345 + 678 = ?",
    "naïve café — 你好 🙂 ﬁ",
    "é",
    "a<|eot_id|>b<|x|>",
]


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def add_post_processor(folder: Path, bos: str) -> None:
    tokens = {bos: {"id": bos, "ids": [Tokenizer.open(folder).token_id(bos)], "tokens": [bos]}}
    single = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    processor = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": tokens}
    change(folder / "tokenizer.json", post_processor=processor)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("processor", [False, True], ids=["", "post-processor"])
@pytest.mark.parametrize(
    "added",
    [
        {},
        {"add_bos_token": True},
        {"add_bos_token": False},
        {"add_eos_token": True},
        {"add_bos_token": True, "add_eos_token": True},
    ],
    ids=["unsaid", "bos", "no bos", "eos", "both"],
)
def test_ids_and_texts_are_those_of_transformers_with_what_llama_cpp_adds(
    make_model: MakeModel, family: str, processor: bool, added: dict[str, bool]
) -> None:
    import gguf
    from transformers import PreTrainedTokenizerFast

    folder = make_model(family)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["add_bos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **added}))
    if processor:
        add_post_processor(folder, settings["bos_token"])
    ours, theirs = Tokenizer.open(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    adds = gguf.SpecialVocab(folder).add_special_token
    if added:  # transformers 5 forgets what the file says; told again, it rebuilds its post-processor
        theirs.add_bos_token, theirs.add_eos_token = adds.get("bos", False), adds.get("eos", False)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.vocab_size == len(theirs)
    assert ours.adds_bos == adds.get("bos", False) == added.get("add_bos_token", processor)
    for text in TEXTS:
        for special in (False, True):
            ids = ours.encode(text, add_special=special)
            assert ids == theirs.encode(text, add_special_tokens=special)
            assert ours.decode(ids) == theirs.decode(ids)
            assert ours.decode(ids, skip_special=True) == theirs.decode(ids, skip_special_tokens=True)


def test_bytes_come_back_as_they_went_in(make_model: MakeModel) -> None:
    tokenizer = Tokenizer.open(make_model("llama"))
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text, add_special=False)) == text


def test_ids_of_padding_rows_are_no_text(make_model: MakeModel) -> None:
    tokenizer = Tokenizer.open(make_model())
    assert tokenizer.vocab_size < 320
    assert tokenizer.decode([*tokenizer.encode("fox", add_special=False), 319]) == "fox"


def test_truncation_and_padding_left_in_the_file_do_not_apply(make_model: MakeModel) -> None:
    folder = make_model()
    text = "the lazy dog " * 20
    before = Tokenizer.open(folder).encode(text, add_special=True)
    padding = {
        "strategy": {"Fixed": 500},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
    }
    truncation = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    change(folder / "tokenizer.json", truncation=truncation, padding={**padding, "pad_token": "!"})
    assert Tokenizer.open(folder).encode(text, add_special=True) == before
    assert 5 < len(before) < 500


def test_special_tokens_may_be_objects_or_in_the_older_map(make_model: MakeModel) -> None:
    folder = make_model("llama")
    expected = Tokenizer.open(folder).bos_id
    change(folder / "tokenizer_config.json", bos_token={"content": "<|begin_of_text|>", "lstrip": False})
    assert Tokenizer.open(folder).bos_id == expected
    change(folder / "tokenizer_config.json", bos_token=None)
    assert Tokenizer.open(folder).bos_id is None
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<|begin_of_text|>"}))
    assert Tokenizer.open(folder).bos_id == expected


def test_a_folder_with_tokenizer_json_alone_works(make_model: MakeModel) -> None:
    folder = make_model()
    (folder / "tokenizer_config.json").unlink()
    tokenizer = Tokenizer.open(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos, tokenizer.chat_template) == (
        None,
        None,
        False,
        None,
    )


PANICKING = {
    "version": "1.0",
    "added_tokens": [],
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "continuing_subword_prefix": "##", "merges": [["a", "b"]]},
}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing; fetch it again"),
        (b"", "not a readable tokenizer"),
        (b"{}", "not a readable tokenizer"),
        (b"\xff\xff", "not a readable tokenizer"),
        (json.dumps(PANICKING).encode(), "not a readable tokenizer"),
        (b" " * ((64 << 20) + 1), "that is no tokenizer"),
    ],
    ids=["missing", "empty", "no model", "not text", "a panic in the library", "large"],
)
def test_a_bad_tokenizer_is_refused_by_name(make_model: MakeModel, content: bytes | None, message: str) -> None:
    path = make_model() / "tokenizer.json"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(InputError, match=message) as refused:
        Tokenizer.open(path.parent)
    assert str(path) in str(refused.value)


def test_sentencepiece_alone_says_what_to_do(make_model: MakeModel) -> None:
    folder = make_model()
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    with pytest.raises(InputError, match="convert it once with transformers"):
        Tokenizer.open(folder)


def test_a_special_token_without_an_id_is_refused(make_model: MakeModel) -> None:
    folder = make_model()
    change(folder / "tokenizer_config.json", eos_token="<nowhere>")
    with pytest.raises(InputError, match=r"special token '<nowhere>' is not in tokenizer\.json"):
        Tokenizer.open(folder)


def test_a_tokenizer_outside_the_folder_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    folder = make_model()
    (folder / "tokenizer.json").rename(tmp_path / "elsewhere.json")
    (folder / "tokenizer.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(InputError, match="leaves the folder"):
        Tokenizer.open(folder)
