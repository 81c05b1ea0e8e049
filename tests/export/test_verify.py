"""Verify finds every kind of damage by name, in files whose hashes were made to agree again; and finds none in sound ones.

Files are damaged through gguf's own reader (offsets) or safetensors' own library, never through our readers.
"""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from r1q.core.artifact import OutputFolder
from r1q.core.errors import CheckError, InputError
from r1q.export.verified import Verified, refuse_failed
from r1q.export.verify import verify_path

Made = Callable[..., OutputFolder]


YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}


def file_of(output: OutputFolder, format_name: str = "gguf") -> Path:
    return output.path / output.artifacts()[format_name].name


def relist(output: OutputFolder, format_name: str = "gguf") -> None:
    """Make artifacts.json agree with a damaged artifact, so that only a look inside can tell."""
    path = output.path / output.listed()[format_name].name
    output.record(format_name, path, ())


def results_of(path: Path, format_name: str = "gguf") -> Verified:
    results = {result.format: result for result in verify_path(path)}
    assert results["checkpoint"].defects == ()
    return results[format_name]


def only_defect(path: Path, format_name: str = "gguf") -> tuple[str, str, float | None]:
    (defect,) = results_of(path, format_name).defects
    return defect.where, defect.what, defect.difference


def flip(path: Path, tensor: str, byte: int, bit: int = 0) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Flip one bit of a tensor's bytes; return its values before and after as gguf decodes them."""
    found = next(t for t in gguf.GGUFReader(path).tensors if t.name == tensor)
    before = np.array(found.data)
    data = bytearray(path.read_bytes())
    data[found.data_offset + byte] ^= 1 << bit
    path.write_bytes(data)
    after = np.array(next(t for t in gguf.GGUFReader(path).tensors if t.name == tensor).data)
    decoded = [gguf.quants.dequantize(values, found.tensor_type) for values in (before, after)]
    return decoded[0], decoded[1]


@pytest.mark.parametrize(
    ("family", "options", "scheme"),
    [
        ("llama", {"llama3_scaling": True}, "q4_k_m"),
        ("qwen3", {"config": {"rope_parameters": YARN}}, "q8_0"),
        ("llama", {"tied": True, "config": {"attention_bias": True}}, "q2_k"),
        ("llama", {}, "iq4_xs"),
        ("qwen2", {}, "q3_k_m"),
        ("qwen2", {"tied": True, "shards": 2}, "q5_k_m"),
        ("qwen3", {}, "q6_k"),
        ("qwen3", {}, "q4_0"),
        ("llama", {"dtype": "F16"}, "q8_0"),
        ("qwen2", {}, "bf16"),
        ("llama", {}, "f16"),
        ("llama", {"dtype": "F32"}, "f32"),
        ("llama", {"hidden_size": 64, "intermediate_size": 96}, "q4_k_m"),
    ],
)
def test_a_file_as_written_has_the_same_weights(made: Made, family: str, options: dict[str, Any], scheme: str) -> None:
    output = made(family, scheme=scheme, model=options)
    checkpoint, artifact = verify_path(output.path)
    assert checkpoint.defects == artifact.defects == ()
    assert artifact.tensors == len(gguf.GGUFReader(file_of(output)).tensors)
    assert checkpoint.tensors == artifact.tensors - (1 if options.get("llama3_scaling") else 0)
    assert (artifact.files, checkpoint.files) == (
        1,
        8,
    )  # embedding, two blocks, norm and head; four files of the source
    assert f"same weights: {artifact.tensors} tensors" in artifact.text()
    refuse_failed([checkpoint, artifact])


@pytest.mark.parametrize(
    ("scheme", "tensor", "byte", "what"),
    [
        ("q4_k", "blk.1.ffn_up.weight", 16 + 144, "1 code and no scale"),
        ("q4_k", "blk.1.ffn_up.weight", 0, "1 scale"),  # d
        ("q4_k", "blk.0.attn_v.weight", 2, "1 scale"),  # dmin
        ("q4_k", "blk.0.attn_v.weight", 5, "1 scale"),  # a 6-bit sub-scale
        ("q4_k", "blk.0.attn_v.weight", 10, "1 scale"),  # a 6-bit minimum
        ("q6_k", "blk.0.attn_q.weight", 0, "1 code and no scale"),
        ("q6_k", "blk.0.attn_q.weight", 195, "1 scale"),
        ("q8_0", "token_embd.weight", 2, "1 code and no scale"),
        ("q4_0", "blk.1.attn_k.weight", 1, "1 scale"),
        ("iq4_xs", "blk.1.ffn_down.weight", 4, "1 scale"),
    ],
)
def test_one_flipped_bit_of_a_code_or_scale_is_found_with_its_size(
    made: Made, scheme: str, tensor: str, byte: int, what: str
) -> None:
    output = made("llama", scheme=scheme)
    before, after = flip(file_of(output), tensor, byte)
    relist(output)
    where, said, difference = only_defect(output.path)
    assert where == tensor
    assert said.startswith("1 code, " if "code" in what else "1 stored scale, ")
    changed = int((before != after).sum())
    assert f"{changed} value{'s' if changed > 1 else ''} differ" in said
    assert difference == np.abs(before.astype(np.float64) - after).max() > 0


@pytest.mark.parametrize("scheme", ["q4_k_m", "bf16"])
@pytest.mark.parametrize("tensor", ["blk.0.ffn_norm.weight", "output_norm.weight", "blk.1.attn_q.bias"])
def test_one_flipped_bit_of_a_norm_or_bias_is_found(made: Made, scheme: str, tensor: str) -> None:
    output = made("llama", scheme=scheme, model={"config": {"attention_bias": True}})
    before, after = flip(file_of(output), tensor, 4 * 7)  # the last bit of the eighth float32
    relist(output)
    assert only_defect(output.path) == (
        tensor,
        f"1 value differs, by up to {np.abs(before - after).max():.3g}",
        np.abs(before.astype(np.float64) - after).max(),
    )


def test_the_sign_of_a_zero_and_a_number_that_is_none_are_found(made: Made) -> None:
    output = made("llama", scheme="q4_0")
    path = file_of(output)
    found = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.attn_k.weight")
    data = bytearray(path.read_bytes())
    data[found.data_offset : found.data_offset + 2] = np.float16(np.nan).tobytes()
    path.write_bytes(data)
    relist(output)
    where, said, difference = only_defect(output.path)
    assert (where, difference) == ("blk.0.attn_k.weight", np.inf)
    assert said == "1 stored scale, 32 values differ, by up to inf"
    assert json.loads(results_of(output.path).json())["defects"][0]["difference"] is None


def move_rows(path: Path, tensor: str, order: NDArray[np.int64]) -> None:
    """Put the file's packed rows of a tensor into another order."""
    found = next(t for t in gguf.GGUFReader(path).tensors if t.name == tensor)
    rows = np.array(found.data)
    data = bytearray(path.read_bytes())
    data[found.data_offset : found.data_offset + rows.nbytes] = rows[order].tobytes()
    path.write_bytes(data)


def test_a_swapped_pair_of_rows_in_attn_k_is_found(made: Made) -> None:
    output = made("llama", scheme="q4_k_m")
    rows = 2 * 64  # two key heads of 64
    order = np.arange(rows)
    order[[70, 71]] = [71, 70]
    move_rows(file_of(output), "blk.1.attn_k.weight", order)
    relist(output)
    where, said, _ = only_defect(output.path)
    assert where == "blk.1.attn_k.weight"
    assert "codes" in said


def test_a_file_with_hugging_faces_row_order_is_found(made: Made) -> None:
    """What a writer does that forgets the permutation: head by head, all even rows first."""
    output = made("llama", scheme="q8_0")
    path = file_of(output)
    undo = np.concatenate([64 * head + np.r_[0:64:2, 1:64:2] for head in range(4)])
    move_rows(path, "blk.0.attn_q.weight", undo)
    relist(output)
    assert only_defect(output.path)[0] == "blk.0.attn_q.weight"
    # The other families keep Hugging Face's order, and theirs is what is expected.
    other = made("qwen2", scheme="q8_0")
    move_rows(file_of(other), "blk.0.attn_q.weight", undo)
    relist(other)
    assert only_defect(other.path)[0] == "blk.0.attn_q.weight"


def test_a_wrong_frequency_factor_is_found(made: Made) -> None:
    output = made("llama", scheme="q8_0", model={"llama3_scaling": True})
    flip(file_of(output), "rope_freqs.weight", 4 * 31 + 2, bit=3)
    relist(output)
    assert only_defect(output.path)[0] == "rope_freqs.weight"


@pytest.mark.parametrize(
    ("key", "packed", "said"),
    [
        ("llama.context_length", struct.pack("<I", 255), "is 255, the model's config.json says 256"),
        ("llama.rope.freq_base", struct.pack("<f", 10000.0), "is 10000.0, the model's config.json says 500000.0"),
        ("llama.attention.head_count", struct.pack("<I", 8), "is 8, the model's config.json says 4"),
    ],
)
def test_a_wrong_hyper_parameter_is_found(made: Made, key: str, packed: bytes, said: str) -> None:
    output = made("llama", scheme="q8_0")
    path = file_of(output)
    offset = gguf.GGUFReader(path).fields[key].offset + 8 + len(key) + 4  # behind the key's length, text and type
    data = bytearray(path.read_bytes())
    data[offset : offset + len(packed)] = packed
    path.write_bytes(data)
    relist(output)
    defects = {defect.where: defect.what for defect in results_of(output.path).defects}
    assert defects.pop(key) == said
    # Another number of heads turns the rows otherwise: llama.cpp would read other weights, and so do we.
    turned = {f"blk.{layer}.attn_q.weight" for layer in range(2)} if "head_count" in key else set()
    assert set(defects) == turned


def test_another_quantization_under_the_same_name_is_found(made: Made) -> None:
    output, other = made("llama", scheme="q4_0"), made("llama", scheme="q8_0")
    file_of(output).write_bytes(file_of(other).read_bytes())
    relist(output)
    result = results_of(output.path)
    # Head and embedding have 8 and 6 bits there; norms are the same in both.
    assert "blk.0.attn_k.weight: is q8_0 [128, 256], the checkpoint has q4_0 [128, 256]" in map(str, result.defects)
    assert all(defect.where.endswith(".weight") and "norm" not in defect.where for defect in result.defects)


def test_missing_and_unknown_tensors_are_named(made: Made) -> None:
    output = made("llama", scheme="q8_0")
    path = file_of(output)
    data = path.read_bytes()
    assert data.count(b"blk.0.ffn_norm.weight") == 1
    path.write_bytes(data.replace(b"blk.0.ffn_norm.weight", b"blk.0.ffn\x1bnorm.weight"))
    relist(output)
    result = results_of(output.path)
    assert [defect.what.split()[1] for defect in result.defects] == ["missing", "in"]
    assert "\x1b" not in result.text()
    with pytest.raises(
        CheckError, match=r"verify failed: blk\.0\.ffn_norm\.weight: is missing .* \(2 defects in all\); "
    ):
        refuse_failed([result])


def test_every_changed_hash_is_found(made: Made) -> None:
    output = made("llama", scheme="q8_0")
    listed = json.loads((output.path / "artifacts.json").read_text())
    name = listed["gguf"]["name"]
    digest = listed["gguf"]["files"][name]
    listed["gguf"]["files"][name] = ("0" if digest[0] != "0" else "1") + digest[1:]
    (output.path / "artifacts.json").write_text(json.dumps(listed))
    where, said, difference = only_defect(output.path)
    assert (where, difference) == (name, None)
    assert said.startswith(f"sha256 is {digest[:12]}…, artifacts.json says ")
    with pytest.raises(CheckError, match=f"delete .*{name} and run r1q export"):
        refuse_failed(list(verify_path(output.path)))


def test_a_changed_checkpoint_file_is_found_with_the_tensor(made: Made) -> None:
    output = made("llama", scheme="q8_0")
    block = output.checkpoint / "block-00001.safetensors"
    data = bytearray(block.read_bytes())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    start = header["model.layers.1.mlp.down_proj.weight"]["data_offsets"][0]
    data[8 + int.from_bytes(data[:8], "little") + start + 40] ^= 1
    block.write_bytes(data)
    with (output.checkpoint / "source" / "tokenizer.json").open("a") as file:
        file.write(" ")
    checkpoint, artifact = verify_path(output.path)
    assert {defect.where for defect in checkpoint.defects} == {
        "block-00001.safetensors", "source/tokenizer.json", "model.layers.1.mlp.down_proj.weight",
    }  # fmt: skip
    # The file still is what the sound checkpoint was, so that both sides speak of the one tensor.
    assert {defect.where for defect in artifact.defects} == {"blk.1.ffn_down.weight"}
    with pytest.raises(CheckError, match="run the same r1q quantize again"):
        refuse_failed([checkpoint, artifact])


def test_an_artifact_of_an_older_checkpoint_is_found(made: Made) -> None:
    output = made("llama", scheme="q8_0")
    manifest = output.checkpoint / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"method": "rtn"', '"method": "other"'))
    assert only_defect(output.path)[1].startswith("was written from another checkpoint")


def test_files_that_cannot_be_read_are_refused_as_input(made: Made) -> None:
    output = made("llama", scheme="q8_0")
    path = file_of(output)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    results = list(verify_path(output.path))
    assert [defect.unreadable for defect in results[1].defects] == [False, True]
    with pytest.raises(InputError, match="beyond the file"):
        refuse_failed(results)
    path.unlink()
    with pytest.raises(InputError, match="is missing"):
        refuse_failed(list(verify_path(output.path)))


def test_what_a_path_means(made: Made, tmp_path: Path) -> None:
    output = made("llama", to="gguf,gptq", bits=4)
    path = file_of(output)

    def formats(where: Path) -> list[str]:
        return [result.format for result in verify_path(where)]

    assert formats(output.path) == ["checkpoint", "gguf", "gptq"]
    assert formats(output.checkpoint) == ["checkpoint"]
    assert formats(path) == ["checkpoint", "gguf"]
    assert formats(output.path / "gptq") == ["checkpoint", "gptq"]
    copy = output.path / "copy.gguf"
    copy.write_bytes(path.read_bytes())
    assert "copy.gguf is not in artifacts.json" in next(iter(verify_path(output.path))).text()
    assert results_of(copy).defects == ()
    assert "no hash" in results_of(copy).text()
    alone = tmp_path / "alone.gguf"
    alone.write_bytes(path.read_bytes())
    with pytest.raises(InputError, match="no r1q checkpoint beside it"):
        list(verify_path(alone))
    with pytest.raises(InputError, match="no such file"):
        list(verify_path(tmp_path / "nothing"))
    (output.checkpoint / "manifest.json").unlink()
    for where in (output.path, output.checkpoint, path):
        with pytest.raises(InputError, match="unfinished"):
            list(verify_path(where))
