"""Pre-tokenizer names, and the proof: right names pass on a tokenizer made to notice every cut, wrong ones are refused."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from r1q.core.errors import InputError, MissingError
from r1q.export import gguf as export
from r1q.export import pretokenizer
from r1q.export.gguf import prove_source, write_gguf
from r1q.export.gguf_tokenizer import tokenizer_entries, tokenizer_kind
from r1q.export.pretokenizer import name_by_hash, name_pretokenizer, prove_tokenizer, steps_of
from r1q.export.tokenizer_texts import proof_texts
from r1q.models.tokenizer import Tokenizer

TABLE: Mapping[str, Any] = json.loads(Path(pretokenizer.__file__).with_name("pretokenizers.json").read_text())
ROWS: Mapping[str, Mapping[str, Any]] = {row["name"]: row for row in TABLE["structures"]}
MakeModel = Callable[..., Path]
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
GPT2 = BYTE_LEVEL | {"use_regex": True}


@cache
def merging_across_everything() -> str:
    """A byte-level BPE trained on the proof's own texts without cuts: its merges span every place where a pattern may cut."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=3000, initial_alphabet=alphabet, show_progress=False, max_token_length=10, min_frequency=1
    )
    backend.train_from_iterator(proof_texts(), trainer)
    text: str = backend.to_str()
    return text


def steps_json(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    spelled: list[dict[str, Any]] = []
    for step in row["steps"]:
        if isinstance(step, dict):
            spelled.append(
                {"type": "Split", "pattern": {"Regex": step["split"]}, "behavior": "Isolated", "invert": False}
            )
        elif step == "gpt2":
            spelled.append(GPT2)
        else:
            spelled.append({"type": "Digits", "individual_digits": step == "digit"})
    return spelled if "gpt2" in row["steps"] else [*spelled, BYTE_LEVEL]


@pytest.fixture
def sensitive_model(make_model: MakeModel) -> Callable[..., Path]:
    """Return `make(steps, ignore_merges) -> folder` of a model whose tokens show where texts are cut."""

    def make(steps: list[dict[str, Any]], ignore_merges: bool = False, **changes: Any) -> Path:
        data = json.loads(merging_across_everything())
        data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
        data["model"]["ignore_merges"] = ignore_merges
        special = {"content": "<s>", "special": True, "single_word": False, "lstrip": False, "rstrip": False}
        data["added_tokens"] = [special | {"id": len(data["model"]["vocab"]), "normalized": False}]
        folder = make_model("llama", vocab_size=3008, hidden_size=32)
        (folder / "tokenizer.json").write_text(json.dumps(data | changes))
        (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "add_bos_token": true}')
        return folder

    return make


OURS = ("gpt-2", "smollm", "qwen2", "llama-bpe", "smaug-bpe", "deepseek-v3", "qwen35")


@pytest.mark.runtime
@pytest.mark.parametrize("name", OURS)
def test_a_known_structure_passes_the_proof(name: str, sensitive_model: Callable[..., Path]) -> None:
    pytest.importorskip("llama_cpp")
    folder = sensitive_model(steps_json(ROWS[name]), ROWS[name]["ignore_merges"])
    assert name_pretokenizer(folder, Tokenizer.open(folder)) == name
    assert prove_source(folder).startswith("proven: 2")


@pytest.mark.runtime
@pytest.mark.parametrize(
    ("real", "label"),
    [("gpt-2", "qwen2"), ("qwen2", "llama-bpe"), ("llama-bpe", "qwen2"), ("gpt-2", "smollm"), ("deepseek-v3", "qwen2")],
)
def test_a_wrong_label_is_refused_with_exit_3(
    real: str, label: str, sensitive_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llama_cpp")
    folder = sensitive_model(steps_json(ROWS[real]), ROWS[real]["ignore_merges"])
    monkeypatch.setattr(export, "name_pretokenizer", lambda folder, tokenizer: label)
    with pytest.raises(InputError, match=r"llama\.cpp cuts .* differently") as caught:
        prove_source(folder)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)


@pytest.mark.runtime
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_written_file_is_proven_with_its_special_tokens(
    family: str, make_model: MakeModel, checkpoint_of: Callable[..., Any], tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp")
    checkpoint = checkpoint_of(make_model(family))
    proof = prove_tokenizer(write_gguf(checkpoint, tmp_path), checkpoint.sidecar)
    assert proof.startswith("proven: ")
    assert ("NFC" in proof) is (family != "llama")


@pytest.mark.runtime
def test_a_file_that_adds_another_bos_is_refused(
    make_model: MakeModel, checkpoint_of: Callable[..., Any], tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp")
    checkpoint = checkpoint_of(make_model("llama"))
    path = write_gguf(checkpoint, tmp_path)
    content = path.read_bytes()
    key = b"tokenizer.ggml.add_bos_token" + (7).to_bytes(4, "little")
    assert content.count(key + b"\1") == 1
    path.write_bytes(content.replace(key + b"\1", key + b"\0"))
    with pytest.raises(InputError, match="adds other special tokens"):
        prove_tokenizer(path, checkpoint.sidecar)


@pytest.mark.runtime
def test_a_name_that_llama_cpp_does_not_know_is_refused(
    sensitive_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llama_cpp")
    monkeypatch.setattr(export, "name_pretokenizer", lambda folder, tokenizer: "no-such-thing")
    with pytest.raises(InputError, match=r"llama\.cpp refuses the vocabulary: .*no-such-thing"):
        prove_source(sensitive_model([GPT2]))


def test_without_llama_cpp_it_says_not_proven(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert prove_source(make_model("llama")).startswith("not proven: llama-cpp-python is not installed")


def test_a_native_crash_is_an_error_and_not_ours(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module that aborts as native code does, in the place of llama_cpp."""
    (tmp_path / "llama_cpp.py").write_text(
        "import os, sys\nsys.stderr.write('GGML_ASSERT failed')\nsys.stderr.flush()\nos.abort()\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(MissingError, match=r"crashed on the vocabulary \(exit -6\): GGML_ASSERT failed"):
        prove_source(make_model("llama"))


def llama2_tokenizer() -> dict[str, Any]:
    """A BPE over characters with byte fallback, trained on the ASCII texts of the proof: the others fall back to bytes."""
    backend = Backend(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=1200, special_tokens=special, show_progress=False, max_token_length=12)
    backend.train_from_iterator([text for text in proof_texts() if text.isascii() and len(text) < 30], trainer)
    data: dict[str, Any] = json.loads(backend.to_str())
    data["added_tokens"] = data["added_tokens"][:3]
    return data


@pytest.mark.runtime
def test_llama2_tokenizers_become_llama_cpps_own_kind(make_model: MakeModel) -> None:
    pytest.importorskip("llama_cpp")
    data = llama2_tokenizer()
    folder = make_model("llama", vocab_size=len(data["model"]["vocab"]) + 1, hidden_size=32)
    (folder / "tokenizer.json").write_text(json.dumps(data))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer.open(folder)
    found = {e.key: e.value for e in tokenizer_entries(folder, tokenizer.vocab_size + 1, "default", tokenizer)}
    types: Any = found["tokenizer.ggml.token_type"]
    assert found["tokenizer.ggml.model"] == "llama"
    assert found["tokenizer.ggml.unknown_token_id"] == 0
    assert types[:4] == [2, 3, 3, 6]
    assert types[258:260] == [6, 1]
    assert types[-1] == 5
    assert prove_source(folder).startswith("proven: ")
    del data["normalizer"]["normalizers"][
        0
    ]  # no space in front: llama.cpp must be told, or every text begins differently
    (folder / "tokenizer.json").write_text(json.dumps(data))
    assert prove_source(folder).startswith("proven: ")


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_metaspace_that_sometimes_adds_a_space_is_refused(scheme: str) -> None:
    data = llama2_tokenizer()
    data |= {"normalizer": None}
    data["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    with pytest.raises(InputError, match="neither byte-level BPE nor"):
        tokenizer_kind(data, Path("tokenizer.json"))


def test_unknown_structures_are_refused_with_their_steps(sensitive_model: Callable[..., Path]) -> None:
    splits = {"type": "Split", "pattern": {"Regex": "[aeiou]"}, "behavior": "Isolated", "invert": False}
    folder = sensitive_model([splits, BYTE_LEVEL])
    with pytest.raises(InputError, match=r"no pre-tokenizer like this one .*\[aeiou\]"):
        name_pretokenizer(folder, Tokenizer.open(folder))


@pytest.mark.parametrize(
    "steps",
    [
        [{"type": "Whitespace"}, BYTE_LEVEL],
        [GPT2 | {"add_prefix_space": True}],
        [{"type": "Split", "pattern": {"String": " "}, "behavior": "Isolated", "invert": False}, BYTE_LEVEL],
        [{"type": "Split", "pattern": {"Regex": "x"}, "behavior": "MergedWithNext", "invert": False}, BYTE_LEVEL],
    ],
)
def test_steps_that_no_row_spells_match_no_row(
    steps: list[dict[str, Any]], sensitive_model: Callable[..., Path]
) -> None:
    folder = sensitive_model(steps)
    with pytest.raises(InputError, match="no pre-tokenizer like this one"):
        name_pretokenizer(folder, Tokenizer.open(folder))


def test_newlines_may_be_spelled_as_characters() -> None:
    pattern = ROWS["qwen2"]["steps"][0]["split"].replace("\\r", "\r").replace("\\n", "\n")
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Removed", "invert": True}
    assert steps_of({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, BYTE_LEVEL]}}) == [
        ROWS["qwen2"]["steps"][0]["split"]
    ]


def test_the_table_has_the_published_hashes() -> None:
    """From llama.cpp's converter, as the research notes copied them, not from the table."""
    published = {
        "b3f499bb4255f8ca19fccd664443283318f2fd2414d5e0b040fbdd0cc195d6c5": "deepseek-r1-qwen",
        "877081d19cf6996e2c4ff0e1236341e9b7bde288f5311a56a937f0afbbb3aeb5": "deepseek-v3",
        "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5": "llama-bpe",
        "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea": "qwen2",
        "d4540891389ea895b53b399da6ac824becc30f2fba0e9ddbb98f92e55ca0e97c": "qwen2",
        "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249": "smollm",
    }
    assert published.items() <= TABLE["hashes"].items()


@pytest.mark.parametrize("way", ["plain", "with bos"])
def test_a_hash_is_found_with_and_without_bos(way: str, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model("llama")
    tokenizer = Tokenizer.open(folder)
    ids = tokenizer.encode(TABLE["check_text"], add_special=False)
    ids = ids if way == "plain" else [tokenizer.bos_id or 0, *ids]
    assert name_by_hash(tokenizer) is None
    digest = hashlib.sha256(str(ids).encode()).hexdigest()
    monkeypatch.setattr(pretokenizer, "_table", lambda: {**TABLE, "hashes": {digest: "found"}})
    assert name_by_hash(tokenizer) == "found"
    # The tiny llama tokenizer is Llama 3's pattern without skipped merges: a hash of another kind does not overrule that.
    assert name_pretokenizer(folder, tokenizer) == "smaug-bpe"
    monkeypatch.setattr(pretokenizer, "_table", lambda: {**TABLE, "hashes": {digest: "dbrx"}})
    assert name_pretokenizer(folder, tokenizer) == "dbrx"
