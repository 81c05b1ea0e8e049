"""A QuantizedCheckpoint as the folder that ONNX Runtime and onnxruntime-genai open: codes are copied, never made again.

onnx/model.onnx             the graph for generation: logits of the last position
onnx/model_all_logits.onnx  the same for evaluation: logits of every position
onnx/model.onnx.data        the weights of both, one tensor of it in memory at a time
onnx/genai_config.json      onnxruntime-genai's; written last, the folder is no model without it
and the model's own tokenizer files.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from r1q.core.activations import ACTIVATIONS
from r1q.core.cache_scales import CacheScales
from r1q.core.checkpoint import QuantizedCheckpoint
from r1q.core.files import atomic_path, atomic_write, remove_leftovers, write_json, writing
from r1q.core.formats import refuse_unfit
from r1q.core.recipe import PlannedTensor
from r1q.export.onnx_config import genai_config
from r1q.export.onnx_data import DataFile
from r1q.export.onnx_graph import build_graph
from r1q.export.onnx_nodes import Shape
from r1q.export.onnx_weights import place_weights
from r1q.models.config import ModelConfig

FOLDER, GRAPH, EVERY, DATA, CONFIG = (
    "onnx",
    "model.onnx",
    "model_all_logits.onnx",
    "model.onnx.data",
    "genai_config.json",
)
MAX_CONTEXT = 32768  # R1's own answers are cut there; a rotary table of more positions only takes memory


def write_onnx(
    checkpoint: QuantizedCheckpoint, folder: Path, *, accuracy_level: int = 4, cache: CacheScales | None = None
) -> Path:
    """Write `folder`/onnx from a checkpoint of integers and floats (floats become float32).

    `accuracy_level` is MatMulNBits' own: 4 computes with int8 activations, 1 with float32 ones (slow, to compare with).
    `cache` keeps keys and values in 8 bits with these scales, None in float32.
    Raises `UsageError` for a grid that ONNX Runtime has no kernel for.
    """
    records = checkpoint.records.values()
    refuse_unfit((PlannedTensor(spec=r.spec, scheme=r.scheme, wanted=r.wanted) for r in records), ["onnx"])
    config = ModelConfig.read(checkpoint.sidecar, checkpoint.model_name)
    context = served_context(config)
    data = DataFile()
    weights = place_weights(checkpoint, config, data, context, cache)
    out = folder / FOLDER
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        remove_leftovers(out)
        (out / CONFIG).unlink(
            missing_ok=True
        )  # of an earlier export: until the last file is new, the folder is no model
    for path in sorted(checkpoint.sidecar.iterdir()):
        if path.name == ACTIVATIONS:
            continue  # what is in it stands in the graph
        with atomic_path(out / path.name) as temporary:
            shutil.copyfile(path, temporary)
    with atomic_write(out / DATA) as file:
        data.write(file)
    for name, every in ((GRAPH, False), (EVERY, True)):
        model = build_graph(config, weights, data.placed, DATA, Shape(every=every, accuracy_level=accuracy_level))
        with atomic_write(out / name) as file:
            file.write(model.SerializeToString(deterministic=True))
    write_json(out / CONFIG, genai_config(config, checkpoint.sidecar, context, GRAPH))
    return out


def served_context(config: ModelConfig) -> int:
    """Return how many positions the graph has a rotary table for."""
    return min(config.max_position_embeddings, MAX_CONTEXT)
