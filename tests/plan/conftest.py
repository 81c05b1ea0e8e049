"""GPTQ folders that tests edit: written by our own exporter, changed tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from r1q.core.artifact import OutputFolder
from r1q.models.embedded import OpenedModel
from r1q.models.source import ModelSource
from r1q.plan.choose import Wish, choose_recipe
from r1q.plan.plan import make_plan
from r1q.plan.walk import quantize_model

MakeModel = Callable[..., Path]
MakeGptq = Callable[..., Path]
Edit = Callable[[dict[str, Any], dict[str, Any]], None]


@pytest.fixture
def make_gptq(make_model: MakeModel, tmp_path: Path) -> MakeGptq:
    """Return `make(edit=None, **wish)`: a GPTQ folder whose tensors and quantization_config `edit` may change in place."""

    def make(edit: Edit | None = None, *, model: dict[str, Any] | None = None, **wish: Any) -> Path:
        source = ModelSource.open(make_model("qwen2", hidden_size=128, intermediate_size=256, **(model or {})))
        recipe = choose_recipe(Wish(formats=("gptq",), **wish), source.tensors).recipe
        output = OutputFolder(tmp_path / f"made-{len(list(tmp_path.iterdir()))}")
        list(quantize_model(OpenedModel(source), make_plan(source, recipe, ("gptq",)), output))
        folder = output.path / "gptq"
        if edit is not None:
            tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
            edit(tensors, config["quantization_config"])
            save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / "model.safetensors")
            (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make
