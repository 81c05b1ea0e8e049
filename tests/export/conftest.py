"""From a tiny Hugging Face folder to a checkpoint and a GGUF file; and the logits that llama.cpp computes from one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from r1q.core.artifact import OutputFolder
from r1q.core.checkpoint import QuantizedCheckpoint
from r1q.core.formats import parse_formats
from r1q.core.recipe import Recipe
from r1q.models.embedded import OpenedModel
from r1q.models.source import ModelSource
from r1q.plan.choose import Wish, choose_recipe
from r1q.plan.plan import make_plan
from r1q.plan.walk import quantize_model
from r1q.quantize.run import Request, quantize_checkpoint

Floats = NDArray[np.float32]


def make_checkpoint(model: Path, folder: Path, preset: str, name: str | None = None) -> QuantizedCheckpoint:
    """Quantize the Hugging Face folder `model` with `preset` into `folder`."""
    source = ModelSource.open(model)
    plan = make_plan(source, Recipe.named(preset), ())
    request = Request(
        model=name or plan.model,
        recipe=plan.recipe,
        planned=plan.tensors,
        method="rtn",
        versions={"r1q": "1.2.3", "numpy": "x"},
    )
    for _ in quantize_checkpoint(source, request, folder):
        pass
    return QuantizedCheckpoint.open(folder)


@pytest.fixture
def checkpoint_of(tmp_path: Path) -> Callable[..., QuantizedCheckpoint]:
    """Return `make(model_folder, preset="f32", name=None) -> QuantizedCheckpoint`."""
    made = 0

    def make(model: Path, preset: str = "f32", name: str | None = None) -> QuantizedCheckpoint:
        nonlocal made
        made += 1
        return make_checkpoint(model, tmp_path / f"checkpoint-{made}", preset, name)

    return make


@pytest.fixture(scope="session")
def llama_logits() -> Callable[[Path, NDArray[np.int64]], Floats]:
    """Return `logits(gguf, tokens [length]) -> float32 [length, vocabulary]` by llama.cpp: float32 cache, no flash attention."""
    llama_cpp = pytest.importorskip("llama_cpp")
    quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_backend_init()

    def logits(path: Path, tokens: NDArray[np.int64]) -> Floats:
        llama_cpp.llama_log_set(quiet, None)
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        assert model, f"llama.cpp refuses {path}"
        params: Any = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = len(tokens)
        params.n_threads = params.n_threads_batch = 2
        params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        context = llama_cpp.llama_init_from_model(model, params)
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = int(token), i, 1, 0
                batch.logits[i] = 1
            assert llama_cpp.llama_decode(context, batch) == 0
            size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
            rows = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (len(tokens), size))
            return np.array(rows, dtype=np.float32)
        finally:
            llama_cpp.llama_batch_free(batch)
            llama_cpp.llama_free(context)
            llama_cpp.llama_model_free(model)

    return logits


Made = Callable[..., OutputFolder]
MADE_SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_layers": 2, "vocab_size": 320}


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """Where sound outputs are kept, by what was asked: each is made once, and damaged as a copy."""
    return tmp_path_factory.mktemp("originals"), {}


@pytest.fixture
def made(make_model: Callable[..., Path], tmp_path: Path, originals: tuple[Path, dict[str, Path]]) -> Made:
    """Return `make(family, to="gguf", scheme=None, model=…, **wish)`: a fresh output folder of the real walk."""
    root, kept = originals

    def make(family: str, to: str = "gguf", scheme: str | None = None, model: Any = None, **wish: Any) -> OutputFolder:
        key = repr((family, to, scheme, model, wish))
        if key not in kept:
            source, formats = ModelSource.open(make_model(family, **{**MADE_SIZES, **(model or {})})), parse_formats(to)
            chosen = choose_recipe(Wish(formats=formats, **wish), source.tensors).recipe
            plan = make_plan(source, Recipe.named(scheme) if scheme else chosen, formats)
            list(quantize_model(OpenedModel(source), plan, OutputFolder(root / str(len(kept)))))
            kept[key] = root / str(len(kept))
        copy = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        return OutputFolder(Path(shutil.copytree(kept[key], copy)))

    return make
