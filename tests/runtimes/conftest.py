"""ONNX folders of the embedded model by the real exporter, each made once, and copies of them to damage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from r1q.core.checkpoint import QuantizedCheckpoint
from r1q.export.onnx import write_onnx
from r1q.models.config import ModelConfig
from r1q.models.embedded import EMBEDDED
from r1q.models.forward import Configured, logits
from r1q.models.source import ModelSource
from r1q.plan.choose import Wish, choose_recipe
from r1q.plan.plan import make_plan
from r1q.quantize.run import Request, quantize_checkpoint

Floats = NDArray[np.float32]
Exported = Callable[..., Path]


@pytest.fixture(scope="session")
def onnx_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], QuantizedCheckpoint]:
    """Return `make("f32" or "int4")`: the embedded model, as it is or rounded to 4 bits in groups of 32 with an 8-bit head."""
    root = tmp_path_factory.mktemp("checkpoints")

    def make(kind: str) -> QuantizedCheckpoint:
        if not (root / kind).exists():
            source = ModelSource.open(EMBEDDED)
            wish: dict[str, Any] = {"scheme": "f32"} if kind == "f32" else {"bits": 4, "group_size": 32}
            choice = choose_recipe(Wish(formats=("onnx",), **wish), source.tensors)
            plan = make_plan(source, choice.recipe, ())
            request = Request(
                model=plan.model,
                recipe=plan.recipe,
                planned=plan.tensors,
                method="rtn",
                versions={"r1q": "1", "numpy": "x"},
            )
            for _ in quantize_checkpoint(source, request, root / kind):
                pass
        return QuantizedCheckpoint.open(root / kind)

    return make


@pytest.fixture(scope="session")
def onnx_folder(
    tmp_path_factory: pytest.TempPathFactory, onnx_checkpoint: Callable[[str], QuantizedCheckpoint]
) -> Exported:
    """Return `make(kind="f32", accuracy_level=1) -> folder`. It is shared: do not write to it."""
    root = tmp_path_factory.mktemp("onnx")

    def make(kind: str = "f32", accuracy_level: int = 1) -> Path:
        folder = root / f"{kind}-{accuracy_level}"
        if not folder.exists():
            write_onnx(onnx_checkpoint(kind), folder, accuracy_level=accuracy_level)
        return folder / "onnx"

    return make


@pytest.fixture
def onnx_copy(onnx_folder: Exported, tmp_path: Path) -> Callable[..., Path]:
    """Return `copy(kind="f32", accuracy_level=1) -> folder` for a test to change."""

    def copy(kind: str = "f32", accuracy_level: int = 1) -> Path:
        return Path(shutil.copytree(onnx_folder(kind, accuracy_level), tmp_path / f"copy-{kind}-{accuracy_level}"))

    return copy


@pytest.fixture(scope="session")
def forward_logits(onnx_checkpoint: Callable[[str], QuantizedCheckpoint]) -> Callable[[str, list[int]], Floats]:
    """Return `logits(kind, tokens) -> [length, vocab]` by our float32 forward pass over the same weights: no ONNX in it."""

    def compute(kind: str, tokens: list[int]) -> Floats:
        checkpoint = onnx_checkpoint(kind)
        source = Configured(ModelConfig.read(checkpoint.sidecar), checkpoint)
        return next(logits(source, np.array([tokens], dtype=np.int64)))

    return compute


@pytest.fixture
def edit_config() -> Callable[[Path, str, Any], None]:
    """Return `edit(folder, "model.decoder.head_size", 7)`, which sets one key of genai_config.json; None takes it out."""

    def edit(folder: Path, key: str, value: Any) -> None:
        path = folder / "genai_config.json"
        config = json.loads(path.read_text())
        *parents, last = key.split(".")
        inner = config
        for parent in parents:
            inner = inner[parent]
        if value is None:
            del inner[last]
        else:
            inner[last] = value
        path.write_text(json.dumps(config))

    return edit
