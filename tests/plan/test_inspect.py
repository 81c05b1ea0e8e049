"""Inspect on real files: ours, GGUF files by gguf's own writer, folders as other quantizers leave them, and hostile text in all."""

import io
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from rich.console import Console
from safetensors.numpy import save_file

from r1q import __version__
from r1q.core.artifact import OutputFolder
from r1q.core.errors import InputError
from r1q.core.formats import parse_formats
from r1q.core.recipe import Recipe
from r1q.models.embedded import OpenedModel
from r1q.models.source import ModelSource
from r1q.plan.choose import Wish, choose_recipe
from r1q.plan.inspect import inspect_path
from r1q.plan.inspection import Inspection
from r1q.plan.plan import make_plan
from r1q.plan.render_inspect import show_inspection
from r1q.plan.walk import quantize_model

MakeModel = Callable[..., Path]
SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_layers": 2, "vocab_size": 320}
EVIL = "x\x1b[2J\x1b]0;owned\x07[bold]\u202e\x00"


def shown(found: Inspection, **options: bool) -> str:
    console = Console(file=io.StringIO(), width=80, force_terminal=False, soft_wrap=True)
    show_inspection(console, found, **options)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert not {c for c in text if ord(c) < 32 or ord(c) == 127} - {"\n", "\t"}
    return text


def facts(text: str) -> dict[str, str]:
    """Return the first line of each fact."""
    lines = [line for line in text.split("\n\n")[0].splitlines()[1:] if not line.startswith(" ")]
    return {line[:14].strip(): line[15:].strip() for line in lines}


def quantized(model: Path, folder: Path, to: str, scheme: str | None = None, **wish: Any) -> OutputFolder:
    source, formats = ModelSource.open(model), parse_formats(to)
    recipe = Recipe.named(scheme) if scheme else choose_recipe(Wish(formats=formats, **wish), source.tensors).recipe
    list(quantize_model(OpenedModel(source), make_plan(source, recipe, formats), OutputFolder(folder)))
    return OutputFolder(folder)


def write_foreign(path: Path, **texts: str) -> dict[str, tuple[tuple[int, ...], Type]]:
    """Write a GGUF as other tools do: two types, keys of an importance matrix, arrays of every kind, no r1q in it."""
    tensors = {
        "token_embd.weight": ((40, 256), Type.Q6_K),
        "blk.0.attn_norm.weight": ((256,), Type.F32),
        "blk.0.attn_q.weight": ((256, 256), Type.Q4_K),
        "blk.0.ffn_down.weight": ((256, 96), Type.Q5_0),
        "output_norm.weight": ((256,), Type.F32),
        "output.weight": ((40, 256), Type.Q6_K),
    }
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(texts.get("name", "Foreign"))
    writer.add_quantized_by(texts.get("by", "somebody"))
    writer.add_string("quantize.imatrix.file", "m.imatrix")
    writer.add_string("quantize.imatrix.dataset", "calibration.txt")
    writer.add_int32("quantize.imatrix.entries_count", 224)
    writer.add_int32("quantize.imatrix.chunks_count", 125)
    writer.add_file_type(15)
    writer.add_context_length(2048)
    writer.add_block_count(1)
    writer.add_embedding_length(256)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(39)] + [b"\xff\xfe"])
    writer.add_array("x.scores", [0.5] * 9)
    writer.add_array("x.few", [1, 2])
    writer.add_float32("x.nan", math.nan)
    writer.add_chat_template(texts.get("template", "one\ntwo\nthree\nfour\nfive"))
    for name, (shape, kind) in tensors.items():
        size = gguf.GGML_QUANT_SIZES[kind]
        data = np.zeros((*shape[:-1], shape[-1] // size[0] * size[1]), dtype=np.uint8)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_a_gguf_we_did_not_write(tmp_path: Path) -> None:
    path = tmp_path / "foreign.gguf"
    tensors = write_foreign(path)
    found = inspect_path(path)
    stored = {t.name: int(t.n_bytes) for t in gguf.GGUFReader(path).tensors}
    assert {row.name: row.bytes for row in found.tensors} == stored
    weights = sum(math.prod(shape) for shape, _ in tensors.values())
    assert found.weights == weights
    assert found.bits_per_weight == 8 * sum(stored.values()) / weights
    assert found.file_bytes == path.stat().st_size
    assert [(row.grid, row.tensors) for row in found.grids()] == [("q4_k", 1), ("q5_0", 1), ("q6_k", 2), ("f32", 2)]
    assert (found.model.context, found.model.vocabulary, found.model.tied) == (2048, 40, False)
    assert found.made_by[:2] == (
        "quantized by somebody",
        "importance matrix m.imatrix, data calibration.txt, 224 entries, 125 chunks",
    )
    assert found.fallbacks == ("1 tensor with rows of 96: q4_k_m's blocks of 256 do not divide them, stored as q5_0",)
    assert found.metadata["tokenizer.ggml.tokens"] == {"count": 40, "first": ["t0", "t1", "t2"]}
    assert found.metadata["x.scores"] == {"count": 9, "first": [0.5, 0.5, 0.5]}
    assert found.metadata["x.few"] == [1, 2]


def test_the_report_reads_well_at_80_columns(tmp_path: Path) -> None:
    write_foreign(tmp_path / "foreign.gguf")
    text = shown(inspect_path(tmp_path / "foreign.gguf"), tensors=True)
    assert max(map(len, text.splitlines())) <= 80
    told = facts(text)
    assert told["format"] == "gguf (version 3, q4_k_m)"
    assert told["architecture"] == "llama"
    assert told["parameters"] == "111,104 in 6 tensors, a head of its own (not tied)"
    assert told["context"] == "2,048 tokens"
    assert told["made by"] == "quantized by somebody"
    assert told["chat template"] == "23 characters, 5 lines; --template shows it whole"
    assert "               four  " in text
    assert "five" not in text
    assert any(line.split() == ["blk.0.ffn_down.weight", "q5_0", "256×96", "16.90", "kB"] for line in text.splitlines())
    assert any(
        line.split() == ["q4_k", "1", "65,536", "36.86", "kB", "50.8", "%", "4.500"] for line in text.splitlines()
    )
    whole = shown(inspect_path(tmp_path / "foreign.gguf"), template=True)
    assert whole.endswith("chat template\none\ntwo\nthree\nfour\nfive\n")


def test_json_has_everything_and_no_number_that_is_none(tmp_path: Path) -> None:
    write_foreign(tmp_path / "foreign.gguf")
    value = json.loads(json.dumps(inspect_path(tmp_path / "foreign.gguf").to_dict(), allow_nan=False))
    assert value["metadata"]["x.nan"] == "nan"
    assert value["chat_template"] == "one\ntwo\nthree\nfour\nfive"
    assert (value["weights"], len(value["tensors"]), value["tied"]) == (111104, 6, False)
    assert value["grids"][0]["bits_per_weight"] == 4.5


def test_hostile_text_in_a_gguf_does_not_reach_the_terminal(tmp_path: Path) -> None:
    write_foreign(tmp_path / "foreign.gguf", name=EVIL, by=EVIL, template=EVIL + "\n" + EVIL)
    found = inspect_path(tmp_path / "foreign.gguf")
    for options in ({}, {"template": True}, {"tensors": True}):
        text = shown(found, **options)
        assert "␛]0;owned␇[bold]\ufffd␀" in text


def test_our_own_gguf_says_who_made_it_and_what_fell_back(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("qwen2", **{**SIZES, "hidden_size": 128, "num_heads": 2}, tied=True)
    output = quantized(model, tmp_path / "out", "gguf", "q4_k_m")
    found = inspect_path(output.path / output.artifacts()["gguf"].name)
    assert found.made_by[0] == f"r1q {__version__}, recipe q4_k_m"
    assert found.model.tied is True
    assert found.model.sizes == {"blocks": 2, "width": 128, "ffn": 512, "heads": 2, "kv heads": 2}
    whole = inspect_path(output.path)
    assert whole.format == "r1q output"
    assert whole.bits_per_weight == found.bits_per_weight
    assert all("with rows of 128:" in line for line in (*whole.fallbacks, *found.fallbacks))
    fell = sum(record["wanted"] != record["grid"] for record in manifest(output)["tensors"])
    assert sum(int(line.split()[0]) for line in whole.fallbacks) == fell > 0
    # A tied head whose rows do not split goes to 8 bits at once; its file cannot tell that from a fallback.
    assert sum(int(line.split()[0]) for line in found.fallbacks) == fell + 1
    assert f"r1q {__version__} from {model.name}, recipe q4_k_m, method rtn, no calibration data" in whole.made_by


def test_a_file_quantized_again_by_another_tool_is_not_called_ours(make_model: MakeModel, tmp_path: Path) -> None:
    output = quantized(make_model("llama", **SIZES), tmp_path / "out", "gguf", "bf16")
    path = output.path / output.artifacts()["gguf"].name
    offset = gguf.GGUFReader(path).fields["general.file_type"].offset + 8 + len("general.file_type") + 4
    data = bytearray(path.read_bytes())
    data[offset : offset + 4] = (15).to_bytes(4, "little")
    path.write_bytes(data)
    expected = f"another tool, from a file of r1q {__version__}, recipe bf16: it is q4_k_m now"
    assert inspect_path(path).made_by[0] == expected


def manifest(output: OutputFolder) -> Any:
    return json.loads((output.checkpoint / "manifest.json").read_text())


def test_an_output_folder_lists_its_artifacts_and_what_became_of_them(make_model: MakeModel, tmp_path: Path) -> None:
    output = quantized(make_model("llama", **SIZES), tmp_path / "out", "gguf,gptq", bits=4)
    artifacts = output.artifacts()
    name = artifacts["gguf"].name
    lines = [
        f"gguf: {name}, {artifacts['gguf'].bytes / 1e6:.1f} MB",
        f"gptq: gptq, {artifacts['gptq'].bytes / 1e6:.1f} MB",
    ]
    found = inspect_path(output.path)
    assert found.beside == tuple(lines)
    assert lines[0] in shown(found)
    assert inspect_path(output.checkpoint).format == "r1q checkpoint"
    (output.path / name).unlink()
    assert inspect_path(output.path).beside[0].startswith(f"{lines[0]}, but it is gone")
    (output.checkpoint / "block-00001.safetensors").unlink()
    assert inspect_path(output.path).notes == ("block-00001.safetensors is missing: run the same r1q quantize again",)
    (output.checkpoint / "manifest.json").unlink()
    with pytest.raises(InputError, match="unfinished: run the same"):
        inspect_path(output.path)


def test_errors_of_each_tensor_are_listed_where_the_manifest_has_them(make_model: MakeModel, tmp_path: Path) -> None:
    output = quantized(make_model("llama", **SIZES), tmp_path / "out", "checkpoint", "q4_0")
    text = shown(inspect_path(output.path), tensors=True)
    error = next(
        r["error"] for r in manifest(output)["tensors"] if r["name"] == "model.layers.0.self_attn.q_proj.weight"
    )
    line = next(line for line in text.splitlines() if "model.layers.0.self_attn.q_proj.weight" in line)
    assert line.split()[1:] == ["q4_0", "256×256", "36.86", "kB", f"{100 * error:.2f}"]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_hugging_face_folder(make_model: MakeModel, family: str, shards: int) -> None:
    model = make_model(family, **SIZES, shards=shards, tied=family == "qwen2")
    found = inspect_path(model)
    source = ModelSource.open(model)
    assert found.format == "safetensors (float)"
    assert found.weights == sum(spec.size for spec in source.tensors)
    assert found.bits_per_weight == 16
    assert (found.model.context, found.model.vocabulary) == (256, 320)
    assert found.model.tied is (family == "qwen2")
    assert found.model.chat_template is not None
    assert found.notes == ((f"{shards} files of weights",) if shards > 1 else ())
    assert found.metadata["rope_parameters.rope_type"] == "default"
    shown(found)


def test_a_model_that_r1q_does_not_support_is_inspected_all_the_same(make_model: MakeModel) -> None:
    model = make_model("llama", config={"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
                                        "n_routed_experts": 256, "quantization_config": {"quant_method": "fp8"}})  # fmt: skip
    found = inspect_path(model)
    assert found.model.architecture == "DeepseekV3ForCausalLM"
    assert found.model.sizes["experts"] == 256
    assert found.format == "fp8 (safetensors)"


def test_settings_full_of_nonsense_and_nesting(make_model: MakeModel) -> None:
    model = make_model("llama")
    config = json.loads((model / "config.json").read_text())
    config |= {"deep": {"a": ["NESTED"]}, "list": ["NESTED", EVIL], "long": [0] * 99, "empty": {}, EVIL: 1}
    config |= {"vocab_size": "many", "architectures": 3, "evil": EVIL, "lone": "\ud800"}
    nested = '{"a": [' * 300 + "1" + "]}" * 300
    (model / "config.json").write_text(json.dumps(config).replace('"NESTED"', nested))
    (model / "chat_template.jinja").write_bytes(b"\xff" + EVIL.encode())
    found = inspect_path(model)
    assert found.model.vocabulary is None
    assert found.model.architecture == "llama"
    assert found.metadata["deep.a"] == ["{…}"]
    assert found.metadata["long"] == {"count": 99, "first": [0, 0, 0]}
    assert found.metadata["empty"] == "{}"
    shown(found, template=True)
    json.dumps(found.to_dict())


@pytest.mark.parametrize(("bits", "group"), [(4, 64), (3, 32), (8, -1)])
def test_our_gptq_folder_shows_layers_and_not_their_parts(
    make_model: MakeModel, tmp_path: Path, bits: int, group: int
) -> None:
    output = quantized(make_model("llama", **SIZES), tmp_path / "out", "gptq", bits=bits, group_size=group)
    found = inspect_path(output.path / "gptq")
    source = ModelSource.open(tmp_path / "tiny-llama-1")
    assert {row.name: row.shape for row in found.tensors} == {spec.name: spec.shape for spec in source.tensors}
    assert found.weights == sum(spec.size for spec in source.tensors)
    assert found.made_by == (f"r1q {__version__}",)
    grids = {row.grid for row in found.grids()}
    assert grids == ({f"int{bits} g{group}", "f16"} if group > 0 else {"int8 g256", "int8 g512", "f16"})
    row = next(row for row in found.tensors if row.name == "model.layers.0.self_attn.q_proj.weight")
    groups = 256 // (group if group > 0 else 256)
    # Codes, zeros of as many bits a group and column, float16 scales, int32 g_idx.
    assert row.bytes == 256 * 256 * bits // 8 + groups * 256 * bits // 8 + 2 * groups * 256 + 4 * 256


def write_folder(folder: Path, tensors: Mapping[str, Any], quantization: Mapping[str, Any]) -> Path:
    folder.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "quantization_config": quantization, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(dict(tensors), folder / "model.safetensors")
    return folder


def test_foreign_gptq_awq_and_packings_that_hide_their_size(tmp_path: Path) -> None:
    layer = "model.layers.0.mlp.up_proj"
    gptq = {  # 256 inputs, 512 outputs, 4 bits, groups of 128, in activation order
        f"{layer}.qweight": np.zeros((32, 512), np.int32),
        f"{layer}.qzeros": np.zeros((2, 64), np.int32),
        f"{layer}.scales": np.zeros((2, 512), np.float16),
        f"{layer}.g_idx": np.zeros(256, np.int32),
        "model.norm.weight": np.zeros(256, np.float16),
    }
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "sym": False,
                    "meta": {"quantizer": ["gptqmodel:1.4.0"]}}  # fmt: skip
    found = inspect_path(write_folder(tmp_path / "gptq", gptq, quantization))
    assert [(row.name, row.grid, row.shape) for row in found.tensors if row.weights != 256] == [
        (f"{layer}.weight", "int4 g128 asym", (512, 256))
    ]
    assert found.made_by == ("gptqmodel 1.4.0",)
    assert found.metadata["quantization_config.desc_act"] is True

    awq = {  # packed along the outputs
        f"{layer}.qweight": np.zeros((256, 64), np.int32),
        f"{layer}.qzeros": np.zeros((4, 64), np.int32),
        f"{layer}.scales": np.zeros((4, 512), np.float16),
    }
    found = inspect_path(write_folder(tmp_path / "awq", awq, {"quant_method": "awq", "bits": 4, "zero_point": True}))
    assert [(row.grid, row.shape) for row in found.tensors] == [("int4 g64 asym", (512, 256))]

    packed = {f"{layer}.weight": np.zeros((65536, 1), np.uint8), f"{layer}.weight.absmax": np.zeros(64, np.uint8),
              "model.norm.weight": np.zeros(256, np.float16)}  # fmt: skip
    found = inspect_path(write_folder(tmp_path / "bnb", packed, {"quant_method": "bitsandbytes", "load_in_4bit": True}))
    assert found.weights is found.bits_per_weight is None
    assert "not told for 1 of the tensors" in found.notes[0]
    text = shown(found)
    assert facts(text)["parameters"] == "unknown in 3 tensors, a head of its own (not tied)"


def test_one_safetensors_file_and_folders_without_settings(make_model: MakeModel) -> None:
    model = make_model("llama")
    (model / "config.json").unlink()
    assert "no config.json" in inspect_path(model).notes[0]
    found = inspect_path(model / "model.safetensors")
    assert found.weights == inspect_path(model).weights
    assert found.metadata == {"format": "pt"}
    shown(found)


def test_folders_of_gguf_files(tmp_path: Path) -> None:
    write_foreign(tmp_path / "a.gguf")
    assert inspect_path(tmp_path).path.name == "a.gguf"
    write_foreign(tmp_path / "b.gguf")
    with pytest.raises(InputError, match=r"holds 2 artifacts: name one of a\.gguf, b\.gguf"):
        inspect_path(tmp_path)


def test_what_is_nothing_is_refused_with_what_it_is(tmp_path: Path) -> None:
    cases = {"gone": "no such file", "empty": "holds no weights", "x.txt": "no file that r1q knows",
             "x.bin": "pickled", "x.gguf": "too short", "pickles": "only pickled weights",
             "onnx": "r1q verify and r1q bench"}  # fmt: skip
    (tmp_path / "onnx").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickles").mkdir()
    for name in ("x.txt", "x.bin", "x.gguf", "pickles/pytorch_model.bin", "onnx/model.onnx"):
        (tmp_path / name).write_bytes(b"12345")
    for name, said in cases.items():
        with pytest.raises(InputError, match=said):
            inspect_path(tmp_path / name)


def test_a_missing_shard_is_named(make_model: MakeModel) -> None:
    model = make_model("llama", shards=2)
    (model / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-00002-of-00002\.safetensors is missing"):
        inspect_path(model)
