"""The torch adapter: the contract, transformers' own logits, our block-by-block forward pass, and the three formats it opens.

Tolerances. float32: as in tests/models/test_forward.py, 5e-5 for other orders of the same sums. bfloat16: two orders of summing
differ by no more than each differs from exact arithmetic, so twice the largest distance from the float32 logits, measured on the
same texts, bounds what batching may cause; a leak between sequences or a wrong position moves logits by far more.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from r1q.core.checkpoint import QuantizedCheckpoint
from r1q.core.errors import InputError, MissingError, ResourceError, UsageError
from r1q.core.metrics import log_softmax
from r1q.core.recipe import Recipe
from r1q.models import decoder, decoder_layer
from r1q.models.config import ModelConfig
from r1q.models.embedded import EMBEDDED, OpenedModel, open_model
from r1q.models.forward import Configured, logits
from r1q.models.gptq_source import GptqSource
from r1q.models.source import ModelSource
from r1q.plan.choose import Wish, choose_recipe
from r1q.plan.plan import make_plan
from r1q.runtimes.base import Options
from r1q.runtimes.contract import CHECKS, OTHER, TEXT, Case, Check
from r1q.runtimes.table import load_runtime, runtime_name
from r1q.runtimes.torch import Torch, TorchSession, _within_memory

MakeModel = Callable[..., Path]
Floats = NDArray[np.float32]
TOLERANCE = 5e-5
FLOAT32 = Options(compute="f32", threads=1)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama tied, scaled": ("llama", {"tied": True, "llama3_scaling": True}),
    "llama one kv head, biases": ("llama", {"num_kv_heads": 1, "config": {"attention_bias": True, "mlp_bias": True}}),
    "qwen2": ("qwen2", {}),
    "qwen3 own head_dim": ("qwen3", {"tied": True}),
}


def open_torch(path: Path, options: Options = FLOAT32) -> TorchSession:
    return Torch().open(path, options)


def some_tokens(length: int = 96) -> list[int]:
    return [int(token) for token in np.random.default_rng(7).integers(0, 320, length)]


@cache
def transformers_logits(folder: Path, dtype: torch.dtype) -> Floats:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    with torch.no_grad():
        return np.asarray(model(torch.tensor([some_tokens()])).logits[0].float().numpy(), dtype=np.float32)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_contract_in_float32(make_model: MakeModel, check: Check) -> None:
    check.run(Case(runtime=Torch(), path=make_model("qwen2"), tolerance=1e-4, options=FLOAT32))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_contract_in_bfloat16(make_model: MakeModel, check: Check) -> None:
    path, options = make_model("llama"), Options(threads=1)
    texts = [TEXT, (*TEXT, 1), OTHER, tuple(index % 16 for index in range(24))]
    with open_torch(path) as exact, open_torch(path, options) as rounded:
        noise = max(float(np.abs(exact.logits(text) - rounded.logits(text)).max()) for text in texts)
        apart = float(np.abs(exact.logits(TEXT)[-1] - exact.logits(OTHER)[-1]).max())
    assert 0 < 2 * noise < 0.1 * apart
    check.run(Case(runtime=Torch(), path=path, tolerance=2 * noise, options=options))


@pytest.mark.parametrize("case", CASES)
def test_logits_are_transformers_and_our_forward_passs_by_every_route(make_model: MakeModel, case: str) -> None:
    family, options = CASES[case]
    folder = make_model(family, **options)
    tokens, theirs = some_tokens(), transformers_logits(folder, torch.float32)
    blocks = next(logits(ModelSource.open(folder), np.array([tokens])))
    with open_torch(folder) as session:
        whole = session.logits(tokens)
        rows = [session.prefill(0, tokens[:90]), *(session.step([(0, token)])[0] for token in tokens[90:])]
        tail = session.logits(tokens, first=90)
    assert np.abs(theirs).max() > 1
    np.testing.assert_allclose(whole, theirs, atol=TOLERANCE)
    np.testing.assert_allclose(whole, blocks, atol=TOLERANCE)
    np.testing.assert_allclose(np.stack(rows), theirs[89:], atol=TOLERANCE)
    np.testing.assert_allclose(tail, theirs[90:], atol=TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_bfloat16_is_as_near_to_float32_as_transformers_bfloat16(make_model: MakeModel, family: str) -> None:
    folder = make_model(family)
    exact = transformers_logits(folder, torch.float32)
    with open_torch(folder, Options(threads=1)) as session:
        ours = np.abs(session.logits(some_tokens()) - exact).mean()
    theirs = np.abs(transformers_logits(folder, torch.bfloat16) - exact).mean()
    assert 0.3 * theirs < ours < 1.3 * theirs


@pytest.mark.parametrize("chosen", [(0, 1, 2, 3), (3, 1, 2), (0, 2), (3,)], ids=str)
@pytest.mark.parametrize("lengths", [(5, 5, 5, 5), (1, 9, 4, 7)], ids=["even", "ragged"])
def test_a_step_of_several_sequences_is_each_ones_own(
    make_model: MakeModel, chosen: tuple[int, ...], lengths: tuple[int, ...]
) -> None:
    texts = [np.random.default_rng(seed).integers(0, 320, length + 3).tolist() for seed, length in enumerate(lengths)]
    with open_torch(make_model("qwen3"), Options(compute="f32", threads=1, sequences=4, context=16)) as session:
        for sequence, text in enumerate(texts):
            session.prefill(sequence, text[:-3])
        for place in (-3, -2, -1):
            rows = session.step([(sequence, texts[sequence][place]) for sequence in chosen])
        for row, sequence in zip(rows, chosen, strict=True):
            np.testing.assert_allclose(row, session.logits(texts[sequence])[-1], atol=TOLERANCE)


def test_a_prompt_longer_than_a_chunk_is_the_same_prompt(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = some_tokens(50)
    with open_torch(make_model()) as session:
        whole = session.prefill(0, tokens)
        monkeypatch.setattr(decoder, "CHUNK", 7)
        session.drop(0)
        np.testing.assert_allclose(session.prefill(0, tokens), whole, atol=TOLERANCE)


def test_packed_weights_plain_ones_and_plain_attention_compute_the_same(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, tokens = make_model("qwen2"), some_tokens()
    with open_torch(folder, Options(compute="f32", threads=1, flash_attention=False)) as session:
        plain = session.logits(tokens)
    monkeypatch.setattr(decoder_layer, "_packs", lambda dtype, device: False)
    with open_torch(folder) as session:
        assert session._decoder is not None
        assert not session._decoder.layers[0].output.packed
        np.testing.assert_allclose(session.logits(tokens), plain, atol=TOLERANCE)


@pytest.fixture
def quantized(make_model: MakeModel, tmp_path: Path) -> tuple[QuantizedCheckpoint, Path]:
    """Return an int4 checkpoint and the GPTQ folder written from it."""
    from r1q.core.artifact import OutputFolder
    from r1q.plan.walk import quantize_model

    source = ModelSource.open(make_model("qwen2", hidden_size=128, intermediate_size=256))
    recipe = choose_recipe(Wish(formats=("gptq",), bits=4, group_size=64), source.tensors).recipe
    list(quantize_model(OpenedModel(source), make_plan(source, recipe, ("gptq",)), OutputFolder(tmp_path / "out")))
    return QuantizedCheckpoint.open(tmp_path / "out/checkpoint"), tmp_path / "out/gptq"


def test_a_checkpoint_and_a_gptq_folder_are_the_weights_they_mean(quantized: tuple[QuantizedCheckpoint, Path]) -> None:
    checkpoint, folder = quantized
    tokens = some_tokens()
    config = ModelConfig.read(checkpoint.sidecar)
    meant = next(logits(Configured(config, checkpoint), np.array([tokens])))
    with open_torch(checkpoint.path) as session:
        np.testing.assert_allclose(session.logits(tokens), meant, atol=TOLERANCE)
    of_folder = next(logits(GptqSource.open(folder), np.array([tokens])))
    with open_torch(folder) as session:
        found = session.logits(tokens)
    np.testing.assert_allclose(found, of_folder, atol=TOLERANCE)
    # The folder keeps embedding, head and norms in float16, the checkpoint embedding and head in eight bits: close, not equal.
    assert 0 < np.abs(found - meant).max() < 0.05


def test_formats_choose_this_runtime() -> None:
    assert {runtime_name(name) for name in Torch.formats} == {"torch"}
    assert load_runtime("torch").versions()["torch"].startswith(torch.__version__)


def test_encode_is_the_folders_tokenizer(make_model: MakeModel) -> None:
    with open_torch(make_model("llama")) as session:
        ids = session.encode("the quick brown fox<|eot_id|>")
        assert session.bos is not None
        assert ids[-1] == session.bos + 1
        assert session.encode("") == []


def test_threads_of_the_process_are_left_as_they_were(make_model: MakeModel) -> None:
    before = torch.get_num_threads()
    with open_torch(make_model(), Options(threads=before + 1)) as session:
        assert session.threads == before + 1
        session.prefill(0, [1, 2])
        assert torch.get_num_threads() == before


def test_options_that_do_not_go_together_are_refused(make_model: MakeModel) -> None:
    path = make_model()
    with pytest.raises(UsageError, match="cache of f32 needs compute f32"):
        open_torch(path, Options(compute="bf16", cache="f32"))
    with pytest.raises(UsageError, match=r"q8_0 is llama\.cpp's cache"):
        open_torch(path, Options(cache="q8_0"))
    with pytest.raises(UsageError, match="trained for 256"):
        open_torch(path, Options(context=257))
    with open_torch(path, Options(cache="f32", threads=1)) as session:
        assert session._cache.keys[0].dtype == torch.float32


def test_without_a_gpu_the_gpu_is_refused_with_what_is_missing(make_model: MakeModel) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(MissingError, match=r"pytorch\.org"):
        open_torch(make_model(), Options(device="gpu"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_contract_on_the_gpu(make_model: MakeModel, check: Check) -> None:
    options = Options(device="gpu", compute="f32", gpu_layers=-1)
    check.run(Case(runtime=Torch(), path=make_model("qwen2"), tolerance=1e-4, options=options))


def test_logits_that_are_no_numbers_are_refused_and_nothing_is_appended(make_model: MakeModel) -> None:
    folder = make_model("llama", dtype="F32", num_layers=1)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][7] = 3e38
    save_file(weights, folder / "model.safetensors")
    with open_torch(folder) as session:
        calls: list[Callable[[], Floats]] = [
            lambda: session.prefill(0, [1, 2]),
            lambda: session.step([(0, 3)]),
            lambda: session.logits([1]),
        ]
        for call in calls:
            with pytest.raises(InputError, match="not finite"):
                call()
        assert session._held == [0]


def test_an_allocation_that_fails_is_a_lack_of_memory() -> None:
    with pytest.raises(ResourceError, match="tokens on the cpu: a shorter context"), _within_memory("tokens", "cpu"):
        torch.empty(1 << 50)
    with pytest.raises(RuntimeError, match="shape"), _within_memory("tokens", "cpu"):
        torch.empty(3) @ torch.empty(2, 2)


@pytest.mark.runtime
def test_llama_cpp_on_our_float32_file_diverges_by_rounding_alone(tmp_path: Path) -> None:
    """Both through the same calls: float32 weights, float32 keys and values; the embedded model's own kind of text."""
    pytest.importorskip("llama_cpp")
    from r1q.core.artifact import OutputFolder
    from r1q.plan.walk import Exported, quantize_model

    opened = open_model(None)
    *_, exported = quantize_model(
        opened, make_plan(opened.source, Recipe.named("f32"), ("gguf",)), OutputFolder(tmp_path / "f32")
    )
    assert isinstance(exported, Exported)
    options = Options(context=256, cache="f32", flash_attention=False)
    with open_torch(EMBEDDED, options) as ours, load_runtime("llama-cpp").open(exported.path, options) as theirs:
        assert (ours.vocab, ours.bos, ours.context) == (theirs.vocab, theirs.bos, theirs.context)
        text = (EMBEDDED / "evaluation.txt").read_text()[:4000]
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        wanted, found = (log_softmax(session.logits(ids[:256])) for session in (ours, theirs))
    divergence = (np.exp(wanted) * (wanted - found)).sum(axis=1)
    assert float(np.abs(divergence).mean()) < 1e-5
