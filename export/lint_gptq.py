"""What makes a GPTQ folder slow to run or easy to misread."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from r1q.core.gptq_folder import GptqFolder
from r1q.export.lint import Finding


def lint_gptq(path: Path) -> Iterator[Finding]:
    """Yield what is slow in a GPTQ folder. Raises `InputError` for one that our reader refuses."""
    folder = GptqFolder.open(path)
    ordered = [name for name in folder.layers if _is_ordered(folder, name)]
    if ordered:
        yield Finding(
            what="layer with a g_idx (act-order)",
            count=len(ordered),
            cost="inputs are gathered at every product, about 2.5 % (vLLM #8135), and vLLM ignores the order since #54809",
            mend="quantize without desc_act; r1q export FOLDER --to onnx keeps it as a permutation of inputs",
        )
    if folder.settings.version == 2:
        yield Finding(
            what="checkpoint_format gptq_v2",
            count=1,
            cost="readers that look at the bits alone add one to every zero point (onnxruntime-genai 0.18's builder does): garbage",
            mend="store version 1 (checkpoint_format gptq), which every reader knows",
        )


def _is_ordered(folder: GptqFolder, name: str) -> bool:
    key = f"{name}.g_idx"
    if key not in folder.file(f"{name}.qweight").tensors:
        return False
    shape = folder.layers[name]
    plain = np.arange(shape.inputs) // -(-shape.inputs // shape.groups)
    return bool((folder.file(key).read(key) != plain).any())
