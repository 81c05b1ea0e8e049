"""What a model never uses can be cut away without a change; sizes fit their budget; what cannot be is refused with its reason."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from r1q.cli import main
from r1q.core.errors import InputError
from r1q.distill.prune import block_influence, choose_kept, write_student
from r1q.distill.sizes import Sizes, check_sizes, choose_sizes, sizes_of
from r1q.distill.student import tokens_needed
from r1q.models.embedded import open_model
from r1q.models.forward import logits
from r1q.models.source import ModelSource

MakeModel = Callable[..., Path]
TOKENS = np.random.default_rng(5).integers(0, 200, (3, 24))
DEAD_HIDDEN = np.random.default_rng(6).permutation(64)[:32]


def _all_logits(source: ModelSource) -> np.ndarray:
    return np.stack(list(logits(source, TOKENS)))


def _silence(path: Path) -> None:
    """Make half of the hidden channels, a third of the inner ones and one kv group of each block carry nothing."""
    file = path / "model.safetensors"
    weights = load_file(file)
    weights["model.embed_tokens.weight"][:, DEAD_HIDDEN] = 0
    for layer in range(2):
        stem = f"model.layers.{layer}."
        inner = np.random.default_rng(layer).permutation(96)[:32]
        weights[f"{stem}mlp.down_proj.weight"][:, inner] = 0
        group = slice(32, 64) if layer == 0 else slice(0, 32)
        weights[f"{stem}self_attn.o_proj.weight"][:, group] = 0
        for name in ("mlp.down_proj", "self_attn.o_proj"):
            weights[f"{stem}{name}.weight"][DEAD_HIDDEN] = 0
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("qwen2", True)])
def test_cutting_what_carries_nothing_changes_no_logit(
    make_model: MakeModel, tmp_path: Path, family: str, tied: bool
) -> None:
    # The norms' ε would weigh differently on the mean of fewer squares.
    path = make_model(family, tied=tied, dtype="F32", config={"rms_norm_eps": 1e-12})
    _silence(path)
    source, sizes = ModelSource.open(path), Sizes(hidden=32, ffn=64, kv_heads=1, layers=2)
    kept = choose_kept(source, TOKENS, sizes)
    assert not set(kept.hidden.tolist()) & set(DEAD_HIDDEN.tolist())
    assert [kept.groups[layer].tolist() for layer in range(2)] == [[0], [1]]
    write_student(source, sizes, kept, tmp_path / "student")
    student = ModelSource.open(tmp_path / "student")
    assert sum(spec.size for spec in student.tensors) == sizes.parameters(source.config)
    np.testing.assert_allclose(_all_logits(student), _all_logits(source), atol=2e-4)


def test_transformers_reads_the_student_as_we_do(make_model: MakeModel, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    source = ModelSource.open(make_model("llama", dtype="F32"))
    sizes = Sizes(hidden=32, ffn=64, kv_heads=1, layers=1)
    write_student(source, sizes, choose_kept(source, TOKENS, sizes), tmp_path / "student")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = model(torch.from_numpy(TOKENS)).logits.numpy()
    np.testing.assert_allclose(_all_logits(ModelSource.open(tmp_path / "student")), theirs, atol=1e-4)


def test_the_block_that_turns_nothing_is_the_one_dropped(make_model: MakeModel, tmp_path: Path) -> None:
    path = make_model("llama", num_layers=4, dtype="F32")
    weights = load_file(path / "model.safetensors")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        weights[f"model.layers.2.{name}.weight"][:] = 0
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    source, sizes = ModelSource.open(path), Sizes(hidden=64, ffn=96, kv_heads=2, layers=3)
    influence = block_influence(source, TOKENS)
    assert influence.argmin() == 2
    assert abs(influence[2]) < 1e-6
    kept = choose_kept(source, TOKENS, sizes)
    assert kept.layers.tolist() == [0, 1, 3]
    write_student(source, sizes, kept, tmp_path / "student")
    np.testing.assert_allclose(_all_logits(ModelSource.open(tmp_path / "student")), _all_logits(source), atol=1e-5)


def test_half_of_the_embedded_model_is_half_of_its_weights_and_runs_in_llama_cpp() -> None:
    source = open_model(None).source
    assert sizes_of(source.config).parameters(source.config) == sum(spec.size for spec in source.tensors)
    half = choose_sizes(source.config, 0.5)
    assert 0.45 < half.parameters(source.config) / sizes_of(source.config).parameters(source.config) <= 0.5
    # llama.cpp's Qwen2 has as wide heads as hidden states.
    assert half.heads(source.config) * source.config.head_dim == half.hidden
    assert half.layers == 6


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"hidden": 96}, "the teacher .* has 64"),
        ({"layers": 3}, "the teacher .* has 2"),
        ({"layers": 0}, "at least one"),
        ({"ffn": 50}, "no multiple of 32"),
        ({}, "sizes of the teacher"),
    ],
)
def test_impossible_sizes_are_refused(make_model: MakeModel, asked: dict[str, int], reason: str) -> None:
    config = ModelSource.open(make_model("llama")).config
    sizes = {"hidden": 64, "ffn": 96, "kv_heads": 2, "layers": 2} | asked
    with pytest.raises(InputError, match=reason):
        check_sizes(config, Sizes(**sizes))


def test_a_seven_billion_model_to_one_and_a_half_is_four_cuts() -> None:
    # 7 · (2/3)^3 = 2.07 > 1.5 ≥ 7 · (2/3)^4 = 1.38
    assert tokens_needed(7e9, 1.5e9) == (4, 320e9, 400e9)
    assert tokens_needed(3.0, 2.0)[0] == 1


@pytest.mark.parametrize(
    ("options", "code", "reason"),
    [
        (["--to", "1.5x"], 3, "smaller than its teacher"),
        (["--to", "0.001x"], 3, "by width alone"),
        (["--ffn", "4096"], 3, "the teacher tiny-r1 has 768"),
        (["--hidden", "192"], 3, "as wide as the hidden states"),
        ([], 2, "say how small"),
        (["--to", "0.5x", "--ffn", "512"], 2, "say how small"),
        (["--to", "0.5x", "--student", "x"], 2, "leave --to and sizes out"),
        (["--to", "0.5x", "--cache", "much"], 2, "is no size"),
    ],
)
def test_the_command_says_what_is_wrong(tmp_path: Path, options: list[str], code: int, reason: str) -> None:
    done = CliRunner().invoke(main, ["distill", "-o", str(tmp_path / "s"), *options])
    assert (done.exit_code, reason in done.output) == (code, True), done.output
    assert not (tmp_path / "s").exists()
