"""Healing moves scales and norms alone: the same codes, the same size, less divergence on text never trained on."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from r1q.cli import main
from r1q.core.checkpoint import QuantizedCheckpoint
from r1q.core.metrics import score
from r1q.distill.scales import load_healing
from r1q.models.forward import Configured, TensorReader, logits
from r1q.models.source import ModelSource
from r1q.models.tokenizer import Tokenizer

MakeModel = Callable[..., Path]


def _quantized(path: Path, out: Path, *options: str) -> QuantizedCheckpoint:
    done = CliRunner().invoke(main, ["quantize", str(path), "-o", str(out), *options])
    assert done.exit_code == 0, done.output
    return QuantizedCheckpoint.open(out / "checkpoint")


@pytest.mark.parametrize(
    "options",
    [
        ("--scheme", "q4_0"),
        ("--scheme", "q4_1"),
        ("--scheme", "q2_k"),
        ("--scheme", "q4_k_m"),
        ("--scheme", "q3_k_m"),
        ("--scheme", "iq4_xs"),
        ("--bits", "4", "--asymmetric", "--group-size", "64", "--to", "checkpoint"),
    ],
    ids=lambda options: options[1],
)
def test_numbers_times_units_are_what_the_file_says(
    make_model: MakeModel, tmp_path: Path, options: tuple[str, ...]
) -> None:
    path = make_model("llama", hidden_size=256, intermediate_size=256, num_layers=1, vocab_size=300)
    checkpoint = _quantized(path, tmp_path / "out", *options)
    network, changes = load_healing(checkpoint, ModelSource.open(path).config)
    assert any("/" in name for name in changes)
    for spec in checkpoint.tensors:
        stored = checkpoint.read_rows(spec.name, 0, spec.rows).reshape(spec.shape)
        np.testing.assert_allclose(network.tensors[spec.name].numpy(), stored, rtol=1e-6, atol=1e-7)


def _divergence(reader: TensorReader, source: ModelSource, tokens: np.ndarray) -> float:
    ours, truth = (np.concatenate(list(logits(model, tokens))) for model in (reader, source))
    found = score(ours, tokens.reshape(-1), truth).kld
    assert found is not None
    return float(found.mean())


@pytest.mark.parametrize("options", [("--scheme", "q4_0"), ("--bits", "2", "--group-size", "32", "--to", "gptq")])
def test_a_healed_file_is_nearer_its_model_with_the_same_codes_and_size(
    make_model: MakeModel, tmp_path: Path, options: tuple[str, ...]
) -> None:
    path, words = make_model("qwen2"), tmp_path / "words.txt"
    drawn = ["".join(np.random.default_rng(seed).choice(list("abcdefgh ,."), 6000)) for seed in range(2)]
    words.write_text(drawn[0])
    before = _quantized(path, tmp_path / "out", *options)
    heal = ["heal", str(tmp_path / "out"), "--text", str(words), "--seq-len", "32", "--steps", "24", "--every", "8"]
    done = CliRunner().invoke(main, [*heal, "--lr", "3e-3"])
    assert done.exit_code == 0, done.output
    after = QuantizedCheckpoint.open(tmp_path / "out-healed" / "checkpoint")
    assert after.damaged_files() == []
    for spec in before.tensors:
        if before.scheme(spec.name).facts.family != "float":
            rows = (0, spec.rows)
            np.testing.assert_array_equal(after.read(spec.name, *rows).codes, before.read(spec.name, *rows).codes)
    source = ModelSource.open(path)
    ids = Tokenizer.open(path).encode(drawn[1], add_special=False)  # the same letters, and no text that was trained on
    tokens = np.array(ids[:1024]).reshape(32, 32)
    klds = [_divergence(Configured(source.config, reader), source, tokens) for reader in (before, after)]
    assert klds[1] < klds[0]
    if "q4_0" in options:
        old, new = (next((tmp_path / name).glob("*.gguf")) for name in ("out", "out-healed"))
        assert old.stat().st_size == new.stat().st_size
        assert old.read_bytes() != new.read_bytes()
    proven = CliRunner().invoke(main, ["verify", str(tmp_path / "out-healed")])
    assert proven.exit_code == 0, proven.output


def test_what_does_not_help_is_not_written(make_model: MakeModel, tmp_path: Path) -> None:
    path = make_model("llama")
    _quantized(path, tmp_path / "out", "--scheme", "q4_0")
    words = tmp_path / "words.txt"
    words.write_text("one two three four five six seven " * 60)
    heal = ["heal", str(tmp_path / "out"), "--text", str(words), "--seq-len", "16", "--every", "1", "--lr", "50"]
    done = CliRunner().invoke(main, heal)
    assert done.exit_code == 6, done.output
    assert "did not help" in done.output
    assert not (tmp_path / "out-healed").exists()


def test_another_models_float_weights_are_refused(make_model: MakeModel, tmp_path: Path) -> None:
    _quantized(make_model("llama"), tmp_path / "out", "--scheme", "q4_0")
    heal = ["heal", str(tmp_path / "out"), "--reference", str(make_model("llama", num_layers=1)), "--seq-len", "16"]
    done = CliRunner().invoke(main, heal)
    assert done.exit_code == 3, done.output
    assert "is not the model" in done.output
