"""Verify on GPTQ folders: damage that safetensors' own library wrote is found by name, and a sound folder has none."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from r1q.core.artifact import OutputFolder
from r1q.core.errors import InputError
from r1q.export.verified import Verified, refuse_failed
from r1q.export.verify import verify_path

Made = Callable[..., OutputFolder]


def result_of(output: OutputFolder) -> Verified:
    checkpoint, result = verify_path(output.path)
    assert checkpoint.defects == ()
    return result


def only_defect(output: OutputFolder) -> tuple[str, str, float | None]:
    (defect,) = result_of(output).defects
    return defect.where, defect.what, defect.difference


@pytest.mark.parametrize(
    ("bits", "group"), [(2, 64), (3, 32), (4, 32), (4, 128), (8, 32), (8, -1)], ids=lambda value: str(value)
)
def test_a_gptq_folder_as_written_has_the_same_weights(made: Made, bits: int, group: int) -> None:
    output = made("qwen2", to="gptq", bits=bits, group_size=group)
    result = result_of(output)
    assert result.defects == ()
    assert result.tensors == 27
    assert result.files == 6
    (line,) = [line for line in result.notes if line.startswith("embedding and head")]
    tensors = load_file(output.path / "gptq" / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"].astype(np.float32)
    # A value d·q of q8_0 is rounded to the nearest float16: half a step of its 11 bits at most.
    said = float(line.rsplit(maxsplit=1)[1])
    assert 0 < said <= np.abs(embedding).max() * 2.0**-11
    assert line == f"embedding and head: 8-bit values rounded to float16, by up to {said:.2g}"


def damage_gptq(output: OutputFolder, name: str, change: Callable[[NDArray[Any]], None]) -> None:
    path = output.path / "gptq" / "model.safetensors"
    tensors = load_file(path)
    change(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})
    output.record("gptq", output.path / "gptq", ())


def xor(word: int, bit: int) -> Callable[[NDArray[Any]], None]:
    def change(values: NDArray[Any]) -> None:
        values.reshape(-1).view(f"u{values.dtype.itemsize}")[word] ^= 1 << bit

    return change


LAYER = "model.layers.1.self_attn.k_proj"


@pytest.mark.parametrize(
    ("name", "where", "said"),
    [
        (f"{LAYER}.qweight", f"{LAYER}.weight", "1 code differs"),
        (f"{LAYER}.scales", f"{LAYER}.weight", "1 stored scale differs"),
        (f"{LAYER}.qzeros", f"{LAYER}.weight", "zeros or g_idx"),
        (f"{LAYER}.g_idx", f"{LAYER}.weight", "zeros or g_idx"),
        (f"{LAYER}.bias", f"{LAYER}.bias", "1 value differs"),
        ("model.norm.weight", "model.norm.weight", "1 value differs"),
        ("model.embed_tokens.weight", "model.embed_tokens.weight", "1 value differs"),
    ],
)
def test_one_flipped_bit_of_a_gptq_folder_is_found(made: Made, name: str, where: str, said: str) -> None:
    output = made("qwen2", to="gptq", bits=4)
    damage_gptq(output, name, xor(5, 0))
    found, what, difference = only_defect(output)
    assert found == where
    assert said in what
    assert difference is not None
    assert difference > 0


def test_swapped_rows_of_a_gptq_folder_are_found(made: Made) -> None:
    output = made("llama", to="gptq", bits=4)

    def swap(values: NDArray[Any]) -> None:
        values[:, [3, 4]] = values[:, [4, 3]]

    damage_gptq(output, f"{LAYER}.qweight", swap)
    assert only_defect(output)[0] == f"{LAYER}.weight"


def test_what_stands_beside_a_gptq_folders_weights_is_checked(made: Made) -> None:
    output = made("llama", to="gptq", bits=4)
    folder = output.path / "gptq"
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["desc_act"] = 0  # equal to False, and not the same to a loader that asks `is`
    config["rms_norm_eps"] = 1e-5
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "generation_config.json").unlink()
    output.record("gptq", output.path / "gptq", ())
    (folder / "notes.txt").write_text("mine")
    result = result_of(output)
    assert [str(defect) for defect in result.defects] == [
        "config.json: quantization_config.desc_act: is 0, the weights are False",
        "config.json: rms_norm_eps: is 1e-05, the model's own says 1e-06",
        "generation_config.json: is missing",
        "tokenizer.json: is not byte for byte the model's own",
    ]
    assert "notes.txt is not in artifacts.json and was not checked" in result.notes
    (folder / "config.json").write_text("[")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        refuse_failed(list(verify_path(output.path)))
