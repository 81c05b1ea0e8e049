"""ModelSource: exact weights from one file or many, and every way a folder can be wrong, refused before a weight is used."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r1q.core.errors import InputError
from r1q.models.source import INDEX, SINGLE, ModelSource

MakeModel = Callable[..., Path]
EMBEDDING = "model.embed_tokens.weight"
Header = dict[str, Any]


def split(path: Path) -> tuple[Header, bytes]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(path: Path, header: Header, data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def rename(path: Path, old: str, new: str) -> None:
    header, data = split(path)
    join(path, {new if name == old else name: facts for name, facts in header.items()}, data)


def reference(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("shards", [1, 4])
def test_weights_are_those_that_torch_reads(make_model: MakeModel, dtype: str, shards: int) -> None:
    folder = make_model("qwen2", dtype=dtype, shards=shards)
    source = ModelSource.open(folder)
    tensors = reference(folder)
    assert {spec.name for spec in source.tensors} == tensors.keys()
    for spec in source.tensors:
        expected = tensors[spec.name]
        assert spec.dtype == dtype
        assert spec.shape == tuple(expected.shape)
        read = source.read_rows(spec.name, 0, spec.rows)
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, expected.float().numpy())
        raw = source.raw_rows(spec.name, 0, spec.rows)
        assert raw.dtype == {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}[dtype]
        assert (
            raw.tobytes()
            == expected.view({"BF16": __import__("torch").int16}.get(dtype, expected.dtype)).numpy().tobytes()
        )


def test_rows_are_slices_and_a_vector_is_one_row(make_model: MakeModel) -> None:
    source = ModelSource.open(make_model())
    whole = source.read_rows(EMBEDDING, 0, 320)
    np.testing.assert_array_equal(source.read_rows(EMBEDDING, 17, 40), whole[17:40])
    assert source.read_rows("model.norm.weight", 0, 1).shape == (64,)
    for start, stop in ((0, 321), (-1, 2), (5, 4)):
        with pytest.raises(ValueError, match=f"rows {start}:{stop} of {EMBEDDING}"):
            source.read_rows(EMBEDDING, start, stop)
    with pytest.raises(KeyError):
        source.spec("nobody")


def test_tensors_come_in_the_order_of_the_model_with_their_roles(make_model: MakeModel) -> None:
    source = ModelSource.open(make_model("qwen3", num_layers=2))
    assert [spec.gguf_name for spec in source.tensors] == [
        "token_embd.weight",
        *[
            f"blk.{layer}.{kind}.weight"
            for layer in range(2)
            for kind in (
                *("attn_norm", "attn_q", "attn_k", "attn_v", "attn_q_norm", "attn_k_norm", "attn_output"),
                *("ffn_norm", "ffn_gate", "ffn_up", "ffn_down"),
            )
        ],
        "output_norm.weight",
        "output.weight",
    ]
    assert source.spec("model.layers.1.mlp.down_proj.weight").shape == (64, 96)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_roles_are_those_of_gguf(make_model: MakeModel, family: str, tied: bool) -> None:
    """gguf's own map of Hugging Face's names to its own is the referee."""
    import gguf

    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family)
    names = gguf.get_tensor_name_map(arch, 2)
    tensors = ModelSource.open(
        make_model(family, tied=tied, config={} if family == "qwen2" else {"attention_bias": True})
    ).tensors
    assert all(spec.gguf_name == names.get_name(spec.name, try_suffixes=(".weight", ".bias")) for spec in tensors)
    assert ("output" in {spec.kind for spec in tensors}) is not tied


def test_stored_rotary_buffers_are_ignored(make_model: MakeModel) -> None:
    folder = make_model()
    header, data = split(folder / SINGLE)
    buffer = {"dtype": "F32", "shape": [8], "data_offsets": [len(data), len(data) + 32]}
    join(folder / SINGLE, {**header, "model.layers.0.self_attn.rotary_emb.inv_freq": buffer}, data + bytes(32))
    assert len(ModelSource.open(folder).tensors) == 21


def with_head(folder: Path, flip: bool) -> Path:
    header, data = split(folder / SINGLE)
    start, stop = header[EMBEDDING]["data_offsets"]
    copy = bytearray(data[start:stop])
    copy[-1] ^= flip
    join(
        folder / SINGLE,
        {**header, "lm_head.weight": {**header[EMBEDDING], "data_offsets": [len(data), len(data) + len(copy)]}},
        data + copy,
    )
    return folder


def test_a_tied_head_that_repeats_the_embedding_is_left_out(make_model: MakeModel) -> None:
    source = ModelSource.open(with_head(make_model(tied=True), flip=False))
    assert "lm_head.weight" not in {spec.name for spec in source.tensors}


def test_a_tied_head_that_differs_is_refused(make_model: MakeModel) -> None:
    with pytest.raises(InputError, match=r"ties the head .* but lm_head\.weight differs"):
        ModelSource.open(with_head(make_model(tied=True), flip=True))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_refused_by_name_where_it_is_read(
    make_model: MakeModel, dtype: str, value: float
) -> None:
    folder = make_model(dtype=dtype)
    name = "model.layers.1.mlp.up_proj.weight"
    header, data = split(folder / SINGLE)
    stored = np.array([value], dtype=np.float16 if dtype == "F16" else np.float32).tobytes()
    stored = stored[2:] if dtype == "BF16" else stored
    place = header[name]["data_offsets"][0] + 3 * len(stored)
    join(folder / SINGLE, header, data[:place] + stored + data[place + len(stored) :])
    source = ModelSource.open(folder)
    source.read_rows(name, 1, 96)
    for read in (source.read_rows, source.raw_rows):
        with pytest.raises(InputError, match=f"{name} holds NaN or infinite weights"):
            read(name, 0, 1)


def test_the_fingerprint_changes_with_every_file_it_names(make_model: MakeModel) -> None:
    folder = make_model(shards=2)
    before = ModelSource.open(folder).fingerprint()
    assert list(before) == sorted(before)
    assert set(before) == {
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
        *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
    }
    copy = folder.with_name("elsewhere")
    shutil.copytree(folder, copy)
    assert ModelSource.open(copy).fingerprint() == before
    for name in before:
        path = copy / name
        content = path.read_bytes()
        if path.suffix == ".safetensors":
            header, data = split(path)
            join(path, {**header, "__metadata__": {"format": "changed"}}, data)
        else:
            path.write_bytes(content + b"\n")
        after = ModelSource.open(copy).fingerprint()
        assert {key for key in before if before[key] != after[key]} == {name}
        path.write_bytes(content)


def test_sidecars_are_the_files_beside_the_weights(make_model: MakeModel) -> None:
    folder = make_model()
    for name in ("merges.txt", "chat_template.jinja", "README.md", "NOTES.md", "modeling_x.py", "pytorch_model.bin"):
        (folder / name).write_text("x")
    found = {path.name for path in ModelSource.open(folder).sidecars()}
    assert found == {
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
        *("merges.txt", "chat_template.jinja", "README.md"),
    }


Break = Callable[[Path], object]


def _index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def _config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


SHARD1, SHARD2 = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
WRONG: dict[str, tuple[int, Break, str]] = {
    "no config": (1, lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "no weights": (
        1,
        lambda f: (f / SINGLE).unlink(),
        "has neither model.safetensors nor model.safetensors.index.json",
    ),
    "pickled only": (
        1,
        lambda f: (f / SINGLE).rename(f / "pytorch_model.bin"),
        "which can run code and are never loaded",
    ),
    "pickled .pt": (1, lambda f: (f / SINGLE).rename(f / "model.pt"), "save_pretrained"),
    "a gguf file": (1, lambda f: (f / SINGLE).rename(f / "model.gguf"), "(only model.gguf)"),
    "another name": (1, lambda f: (f / SINGLE).rename(f / "weights.safetensors"), "(only weights.safetensors)"),
    "cut": (1, lambda f: os.truncate(f / SINGLE, 5000), "fetch it again"),
    "missing tensor": (
        1,
        lambda f: rename(f / SINGLE, "model.norm.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        "lacks tensors: model.norm.weight;",
    ),
    "unexpected tensor": (
        1,
        lambda f: _config(f, num_hidden_layers=1),
        "has unexpected tensors: model.layers.1.input_layernorm.weight, model.layers.1.self_attn.q_proj.weight",
    ),
    "unexpected tensors counted": (1, lambda f: _config(f, num_hidden_layers=1), "and 5 more"),
    "untied without a head": (
        1,
        lambda f: rename(f / SINGLE, "lm_head.weight", "x.rotary_emb.inv_freq"),
        "lacks tensors: lm_head",
    ),
    "another shape": (
        1,
        lambda f: _config(f, intermediate_size=95),
        "has the shape [96, 64], config.json says [95, 64] (inner × hidden)",
    ),
    "missing shard": (2, lambda f: (f / SHARD2).unlink(), f"{SHARD2} is missing, though {INDEX} names it"),
    "cut shard": (2, lambda f: os.truncate(f / SHARD2, 10_000), "fetch it again"),
    "index not JSON": (2, lambda f: (f / INDEX).write_text("{"), "is not valid JSON"),
    "index empty": (2, lambda f: (f / INDEX).write_text("{}"), "weight_map does not map"),
    "index of numbers": (2, lambda f: _index(f, lambda m: m.update({EMBEDDING: 3})), "weight_map does not map"),  # type: ignore[dict-item]
    "index names a pickle": (
        2,
        lambda f: _index(f, lambda m: m.update({EMBEDDING: "a.bin"})),
        "not a .safetensors file",
    ),
    "index names a path": (
        2,
        lambda f: _index(f, lambda m: m.update({EMBEDDING: "../x.safetensors"})),
        "leaves the folder",
    ),
    "index names a root": (
        2,
        lambda f: _index(f, lambda m: m.update({EMBEDDING: "/x.safetensors"})),
        "leaves the folder",
    ),
    "index names Windows": (
        2,
        lambda f: _index(f, lambda m: m.update({EMBEDDING: "..\\x.safetensors"})),
        "leaves the folder",
    ),
    "index names nothing": (2, lambda f: _index(f, lambda m: m.update({EMBEDDING: ""})), "leaves the folder"),
    "index swaps shards": (
        2,
        lambda f: _index(f, lambda m: m.update({EMBEDDING: SHARD2})),
        f"{SHARD1} holds {EMBEDDING}, which",
    ),
    "index forgets": (
        2,
        lambda f: _index(f, lambda m: m.pop(EMBEDDING)),
        f"holds {EMBEDDING}, which {INDEX} places in None",
    ),
    "index dreams": (
        2,
        lambda f: _index(f, lambda m: m.update(x=SHARD1)),
        f"{SHARD1} lacks x, which {INDEX} places there",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_folder_that_is_wrong_is_refused_with_what_and_where(make_model: MakeModel, name: str) -> None:
    shards, damage, message = WRONG[name]
    folder = make_model(shards=shards)
    damage(folder)
    with pytest.raises(InputError) as refused:
        ModelSource.open(folder)
    assert message in str(refused.value)
    assert str(folder) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_dtype_that_is_not_float_is_refused(make_model: MakeModel) -> None:
    folder = make_model(dtype="F16")
    header, data = split(folder / SINGLE)
    header["model.norm.weight"]["dtype"] = "I16"
    join(folder / SINGLE, header, data)
    with pytest.raises(InputError, match=r"model\.norm\.weight is stored as I16; r1q reads BF16, F16, F32"):
        ModelSource.open(folder)


def test_what_is_not_a_folder_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere does not exist; give a folder"):
        ModelSource.open(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"config\.json is a file; give a folder"):
        ModelSource.open(make_model() / "config.json")


@pytest.mark.parametrize("name", [SINGLE, "config.json", "tokenizer.json"])
def test_a_link_out_of_the_folder_is_refused(make_model: MakeModel, tmp_path: Path, name: str) -> None:
    folder = make_model()
    (folder / name).rename(tmp_path / "outside")
    (folder / name).symlink_to(tmp_path / "outside")
    with pytest.raises(InputError, match=f"{name} is a link that leaves the folder; put the file itself there"):
        ModelSource.open(folder)


def test_links_within_the_folder_and_into_a_download_cache_are_followed(make_model: MakeModel, tmp_path: Path) -> None:
    """huggingface_hub's cache: snapshots/<commit>/<name> are links to ../../blobs/<hash>."""
    folder = make_model(shards=2)
    (folder / SHARD1).rename(folder / "data")
    (folder / SHARD1).symlink_to("data")
    assert len(ModelSource.open(folder).tensors) == 21
    cache = tmp_path / "models--a--b"
    (cache / "snapshots" / "0123").mkdir(parents=True)
    shutil.copytree(folder, cache / "blobs", symlinks=False)
    for path in (cache / "blobs").iterdir():
        (cache / "snapshots" / "0123" / path.name).symlink_to(f"../../blobs/{path.name}")
    assert len(ModelSource.open(cache / "snapshots" / "0123").tensors) == 21
