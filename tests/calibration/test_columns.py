"""Column sums of the float pass equal those of an independent model's layers, and the command writes what llama.cpp reads."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from r1q.calibration.columns import column_sums
from r1q.cli import main
from r1q.core.imatrix_file import read_imatrix
from r1q.models.source import ModelSource

LAYERS = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_sums_are_those_that_hooks_on_transformers_see(make_model: Callable[..., Path], family: str) -> None:
    from transformers import AutoModelForCausalLM

    path = make_model(family)
    source = ModelSource.open(path)
    tokens = np.random.default_rng(0).integers(0, source.config.vocab_size, (3, 17))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).double().eval()
    expected: dict[str, np.ndarray] = {}

    def watch(name: str) -> None:
        def hook(_: object, inputs: tuple[torch.Tensor, ...]) -> None:
            expected[name] = inputs[0].flatten(0, 1).square().sum(0).numpy()

        stem, kind = name.removeprefix("blk.").removesuffix(".weight").split(".")
        model.get_submodule(f"model.layers.{stem}.{LAYERS[kind]}").register_forward_pre_hook(hook)

    for spec in source.tensors:
        if spec.kind in LAYERS and spec.part == "weight":
            watch(spec.gguf_name)
    model.lm_head.register_forward_pre_hook(
        lambda _, inputs: expected.update(head=inputs[0].flatten(0, 1).square().sum(0).numpy())
    )
    with torch.no_grad():
        model(torch.from_numpy(tokens))
    found = {name: sums for block in column_sums(source, tokens, head=True) for name, sums in block.items()}
    head = "token_embd.weight" if source.config.tied else "output.weight"
    expected[head] = expected.pop("head")
    assert found.keys() == expected.keys()
    for name, sums in expected.items():
        np.testing.assert_allclose(found[name], sums, rtol=2e-4, err_msg=name)


def test_the_command_writes_an_importance_matrix_that_quantize_takes(tmp_path: Path) -> None:
    file, out = tmp_path / "stats.gguf", tmp_path / "out"
    run = CliRunner().invoke(main, ["calibrate", "-o", str(file), "--samples", "3", "--seq-len", "64", "-q"])
    assert (run.exit_code, run.output) == (0, f"{file}\n")
    imatrix = read_imatrix(file)
    assert imatrix.chunks == 3
    assert {"blk.0.attn_q.weight", "blk.0.ffn_down.weight"} <= imatrix.columns.keys()
    assert not any(name.startswith("output") for name in imatrix.columns)
    used = CliRunner().invoke(
        main, ["quantize", "--imatrix", str(file), "--scheme", "q4_0", "-o", str(out), "-q", "--to", "checkpoint"]
    )
    assert used.exit_code == 0, used.output


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--calibration", "missing.txt"], 3, "missing.txt"),
        (["--samples", "0"], 2, "samples"),
        (["--calibration", "builtin:-1"], 2, "builtin"),
    ],
)
def test_bad_input_is_told_in_one_line(tmp_path: Path, arguments: list[str], code: int, says: str) -> None:
    run = CliRunner().invoke(main, ["calibrate", "-o", str(tmp_path / "s.gguf"), "-q", *arguments])
    assert run.exit_code == code
    assert says in run.output
    assert not (tmp_path / "s.gguf").exists()


def test_a_folder_as_output_is_refused(tmp_path: Path) -> None:
    run = CliRunner().invoke(main, ["calibrate", "-o", str(tmp_path), "-q", "--samples", "1"])
    assert run.exit_code == 2
    assert "name a file" in run.output
