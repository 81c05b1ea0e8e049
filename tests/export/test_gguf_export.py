"""The written file: its metadata value by value, its tensors byte by byte, its name, and what is refused."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from r1q.core.checkpoint import QuantizedCheckpoint
from r1q.core.errors import InputError, UsageError
from r1q.core.gguf_file import GgufFile, Strings
from r1q.core.scheme import Scheme
from r1q.core.tensors import TensorSpec
from r1q.export import gguf as export
from r1q.export.gguf import plan_gguf, write_gguf
from r1q.export.gguf_metadata import dominant_grid, file_entries, file_name, is_r1_template, name_model

MakeModel = Callable[..., Path]
Checkpoint = Callable[..., QuantizedCheckpoint]


def plain(value: object) -> object:
    return list(value) if isinstance(value, Strings | np.ndarray) else value


def edit(path: Path, **changes: Any) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    value.update(changes)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def test_metadata_of_a_llama_file(make_model: MakeModel, checkpoint_of: Checkpoint, tmp_path: Path) -> None:
    model = make_model("llama", vocab_size=330)
    checkpoint = checkpoint_of(model, "q4_0", name="DeepSeek-R1-Distill-Llama-104K")
    file = GgufFile.open(write_gguf(checkpoint, tmp_path))
    tokenizer = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    found = dict(file.metadata)
    tokens, types, merges = (found.pop(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type", "merges"))
    assert found.pop("tokenizer.chat_template").startswith("{{ bos_token }}")  # type: ignore[union-attr]
    assert found == {
        "general.architecture": "llama",
        "general.type": "model",
        "general.sampling.temp": pytest.approx(0.6),
        "general.sampling.top_p": pytest.approx(0.95),
        "general.name": "DeepSeek R1 Distill Llama 104K",
        "general.basename": "DeepSeek-R1-Distill-Llama",
        "general.size_label": "104K",
        "general.file_type": 2,
        "general.quantization_version": 2,
        "llama.block_count": 2,
        "llama.context_length": 256,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "llama.rope.freq_base": 500000.0,
        "llama.rope.dimension_count": 16,
        "llama.vocab_size": 330,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smaug-bpe",
        "tokenizer.ggml.bos_token_id": tokenizer["added_tokens"][0]["id"],
        "tokenizer.ggml.eos_token_id": tokenizer["added_tokens"][1]["id"],
        "tokenizer.ggml.add_bos_token": True,
        "r1q.version": "1.2.3",
        "r1q.recipe": "q4_0",
    }
    vocabulary = tokenizer["model"]["vocab"]
    known = len(vocabulary) + 2
    assert plain(tokens) == [
        *sorted(vocabulary, key=vocabulary.get), "<|begin_of_text|>", "<|eot_id|>", *(f"[PAD{i}]" for i in range(known, 330))
    ]  # fmt: skip
    assert plain(types) == [1] * len(vocabulary) + [3, 3] + [5] * (330 - known)
    assert plain(merges) == [" ".join(pair) for pair in tokenizer["model"]["merges"]]


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_metadata_of_qwen_files(family: str, make_model: MakeModel, checkpoint_of: Checkpoint, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(make_model(family, tied=True), "bf16", name="tiny")
    path = write_gguf(checkpoint, tmp_path)
    file = GgufFile.open(path)
    assert file.metadata["general.architecture"] == family
    assert file.metadata["general.file_type"] == 32
    assert file.metadata["tokenizer.ggml.pre"] == "qwen2"
    assert file.metadata.get(f"{family}.attention.key_length") == (32 if family == "qwen3" else None)
    assert f"{family}.vocab_size" not in file.metadata
    assert f"{family}.rope.dimension_count" not in file.metadata
    assert file.metadata["tokenizer.ggml.add_bos_token"] is (family == "qwen2")
    assert "output.weight" not in file.tensors
    assert ("blk.0.attn_q.bias" in file.tensors) is (family == "qwen2")
    assert ("blk.0.attn_q_norm.weight" in file.tensors) is (family == "qwen3")
    assert {t.type for t in file.tensors.values()} == {"bf16", "f32"}
    assert all(t.type == ("bf16" if len(t.shape) == 2 else "f32") for t in file.tensors.values())


def test_tensors_stand_in_model_order_and_gguf_reads_their_values(
    make_model: MakeModel, checkpoint_of: Checkpoint, tmp_path: Path
) -> None:
    checkpoint = checkpoint_of(make_model("llama", llama3_scaling=True, hidden_size=256), "q4_k_m")
    path = write_gguf(checkpoint, tmp_path)
    reader = gguf.GGUFReader(path)
    names = [tensor.name for tensor in reader.tensors]
    assert names[:3] == ["rope_freqs.weight", "token_embd.weight", "blk.0.attn_norm.weight"]
    assert names[-2:] == ["output_norm.weight", "output.weight"]
    assert len(names) == len(checkpoint.tensors) + 1
    for spec in checkpoint.tensors:
        if spec.kind in ("attn_q", "attn_k"):
            continue
        stored = reader.tensors[names.index(spec.gguf_name)]
        values = gguf.dequantize(stored.data, stored.tensor_type)
        expected = checkpoint.read_rows(spec.name, 0, spec.rows)
        np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-7, err_msg=spec.name)


def test_slabs_change_no_byte_and_equal_input_gives_equal_files(
    make_model: MakeModel, checkpoint_of: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = checkpoint_of(make_model("llama", config={"attention_bias": True}), "q8_0")
    whole = write_gguf(checkpoint, tmp_path / "a").read_bytes()
    assert write_gguf(checkpoint, tmp_path / "b").read_bytes() == whole
    for slab in (1, 2000):
        monkeypatch.setattr(export, "SLAB_BYTES", slab)
        assert write_gguf(checkpoint, tmp_path / f"slab-{slab}").read_bytes() == whole


def test_memory_holds_one_slab(
    make_model: MakeModel, checkpoint_of: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of 20 MB is written with a slab of 256 KB: the peak is a few slabs and the vocabulary, not a tensor (4 MB)."""
    checkpoint = checkpoint_of(make_model("llama", vocab_size=4096, hidden_size=256, intermediate_size=1024), "f32")
    monkeypatch.setattr(export, "SLAB_BYTES", 1 << 18)
    write_gguf(checkpoint, tmp_path / "warm")
    tracemalloc.start()
    path = write_gguf(checkpoint, tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 14 << 20
    assert peak < 3 << 20


def test_a_failure_leaves_no_file_and_the_previous_one_whole(
    make_model: MakeModel, checkpoint_of: Checkpoint, tmp_path: Path
) -> None:
    checkpoint = checkpoint_of(make_model("llama"), "f32")
    folder = tmp_path / "out"
    path = write_gguf(checkpoint, folder)
    before = path.read_bytes()
    block = sorted(checkpoint.path.glob("block-*"))[-1]
    block.write_bytes(block.read_bytes()[:-1000])
    with pytest.raises(InputError, match=block.name):
        write_gguf(QuantizedCheckpoint.open(checkpoint.path), folder)
    assert [entry.name for entry in folder.iterdir()] == [path.name]
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("model", "weights", "expected"),
    [
        ("DeepSeek-R1-Distill-Qwen-1.5B", 1_777_088_000, "DeepSeek-R1-Distill-Qwen-1.5B-Q4_K_M.gguf"),
        ("DeepSeek-R1-0528-Qwen3-8B", 8_190_735_360, "DeepSeek-R1-0528-Qwen3-8B-Q4_K_M.gguf"),
        ("SmolLM2-135M-Instruct", 134_515_008, "SmolLM2-135M-Instruct-Q4_K_M.gguf"),
        ("Meta-Llama-3.1-8B-Instruct", 8_030_261_248, "Meta-Llama-3.1-8B-Instruct-Q4_K_M.gguf"),
        ("tiny_r1", 1_500_000, "Tiny_R1-1.5M-Q4_K_M.gguf"),
        ("../../etc", 1_000, "Etc-1.0K-..-etc-Q4_K_M.gguf"),
        ("", 1_000, "Model-1.0K-Q4_K_M.gguf"),
    ],
)
def test_file_names_follow_the_convention(model: str, weights: int, expected: str, tmp_path: Path) -> None:
    assert file_name(name_model(model, weights, tmp_path), "Q4_K_M") == expected


def test_the_model_card_gives_the_license(tmp_path: Path) -> None:
    assert name_model("x", 1, tmp_path).card == ()
    (tmp_path / "README.md").write_text("---\nlicense: mit\nlicense_link: 'LICENSE'\ntags:\n- a\n---\nlicense: no\n")
    card = {entry.key: entry.value for entry in name_model("x", 1, tmp_path).card}
    assert card == {"general.license": "mit", "general.license_link": "LICENSE"}


def test_the_license_of_the_source_reaches_the_file(
    make_model: MakeModel, checkpoint_of: Checkpoint, tmp_path: Path
) -> None:
    model = make_model("qwen2")
    (model / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    file = GgufFile.open(write_gguf(checkpoint_of(model), tmp_path))
    assert file.metadata["general.license"] == "mit"


def test_sampling_of_r1_is_written_where_nothing_else_is_said(make_model: MakeModel, checkpoint_of: Checkpoint) -> None:
    r1 = "{{ bos_token }}<｜User｜>{{ messages[0]['content'] }}<｜Assistant｜><think>\n"
    assert is_r1_template(r1)
    assert not is_r1_template("<think>")
    assert not is_r1_template(None)

    def sampling(**generation: Any) -> dict[str, object]:
        model = make_model("qwen2")
        (model / "generation_config.json").write_text(json.dumps(generation))
        edit(model / "tokenizer_config.json", chat_template=template)
        entries = plan_gguf(checkpoint_of(model)).entries
        return {e.key.removeprefix("general.sampling."): e.value for e in entries if "sampling" in e.key}

    template = r1
    assert sampling() == {"temp": 0.6, "top_p": 0.95}
    assert sampling(temperature=0.7, top_k=20, min_p=True) == {"temp": 0.7, "top_p": 0.95, "top_k": 20}
    template = "no thoughts"
    assert sampling() == {}
    assert sampling(top_p=1) == {"top_p": 1.0}


def test_file_type_of_a_recipe_that_is_no_preset() -> None:
    def spec(rows: int) -> TensorSpec:
        return TensorSpec(name="x", kind="ffn_up", layer=0, part="weight", shape=(rows, 256), dtype="F32")

    schemes = [(spec(1), Scheme(grid="q8_0")), (spec(5), Scheme(grid="q4_k")), (spec(3), Scheme(grid="q8_0"))]
    assert dominant_grid(schemes) == "q4_k"
    assert next(iter(file_entries("mine", schemes))).value == 15
    assert next(iter(file_entries("q5_k_s", schemes))).value == 16


def test_several_chat_templates_keep_their_names(
    make_model: MakeModel, checkpoint_of: Checkpoint, tmp_path: Path
) -> None:
    model = make_model("llama")
    listed = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    edit(model / "tokenizer_config.json", chat_template=listed)
    found = GgufFile.open(write_gguf(checkpoint_of(model), tmp_path)).metadata
    assert found["tokenizer.chat_template"] == "D"
    assert found["tokenizer.chat_template.tool_use"] == "T"
    assert plain(found["tokenizer.chat_templates"]) == ["tool_use"]


def test_added_tokens_become_control_or_user_defined(make_model: MakeModel, checkpoint_of: Checkpoint) -> None:
    model = make_model("llama", vocab_size=400)
    data = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    size = len(data["model"]["vocab"]) + len(data["added_tokens"])
    new = [("<think>", False), ("<｜User｜>", False), ("<|tool|>", False), ("<eom>", True)]
    data["added_tokens"] += [
        {"id": size + i, "content": text, "special": special, **flags} for i, (text, special) in enumerate(new)
    ]
    (model / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    entries = {entry.key: entry.value for entry in plan_gguf(checkpoint_of(model)).entries}
    types: Any = entries["tokenizer.ggml.token_type"]
    assert types[size : size + 4] == [4, 3, 3, 3]


def change_model(data: dict[str, Any], **changes: Any) -> None:
    data["model"].update(changes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: change_model(d, type="Unigram"), "not a readable tokenizer|a Unigram tokenizer"),
        (lambda d: change_model(d, dropout=0.5), "dropout = 0.5"),
        (lambda d: d.update(normalizer={"type": "Lowercase"}), "normalizer 'Lowercase' changes texts"),
        (lambda d: d.update(pre_tokenizer={"type": "Whitespace"}), "neither byte-level BPE nor"),
        (lambda d: d["added_tokens"][0].update(id=5000), "id 5000 has no row|not a readable tokenizer"),
        (
            lambda d: d.update(
                post_processor={
                    "type": "TemplateProcessing",
                    "single": [
                        {"SpecialToken": {"id": "<|eot_id|>", "type_id": 0}},
                        {"Sequence": {"id": "A", "type_id": 0}},
                    ],
                    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                    "special_tokens": {"<|eot_id|>": {"id": "<|eot_id|>", "ids": [319], "tokens": ["<|eot_id|>"]}},
                }
            ),
            "only say that BOS or EOS",
        ),
    ],
)
def test_tokenizers_that_a_gguf_cannot_carry_are_refused(
    change: Callable[[dict[str, Any]], None], words: str, make_model: MakeModel, checkpoint_of: Checkpoint
) -> None:
    model = make_model("llama")
    data = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    change(data)
    (model / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    settings = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings.pop("add_bos_token")
    (model / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(InputError, match=words) as caught:
        plan_gguf(checkpoint_of(model))
    assert "\n" not in str(caught.value)


def test_a_grid_that_gguf_has_no_type_for_is_refused(
    make_model: MakeModel, checkpoint_of: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = checkpoint_of(make_model("llama"))
    monkeypatch.setattr(QuantizedCheckpoint, "scheme", lambda self, name: Scheme(grid="int3", group_size=32))
    with pytest.raises(UsageError, match="int3 g32, which a GGUF file cannot hold"):
        plan_gguf(checkpoint)
