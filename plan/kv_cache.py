"""`--kv int8`: the steps of an 8-bit cache, found on calibration text once and kept beside the artifacts for later exports."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from r1q.core.artifact import OutputFolder
from r1q.core.cache_scales import CACHE_SCALES, CacheScales
from r1q.core.checkpoint import MANIFEST, QuantizedCheckpoint
from r1q.core.errors import UsageError
from r1q.core.files import sha256_file
from r1q.quantize.run import Event

if TYPE_CHECKING:
    from r1q.models.config import ModelConfig

CACHES = ("float", "int8")
MAX_WINDOWS = 32  # with a quarter of them the divergence that 8 bits cost at 8,192 tokens was 0.0020 instead of 0.0015
_RULE = "greatest magnitude of each channel, keys at any position"


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheText:
    """What an 8-bit cache is calibrated on: `calibration` as `--calibration` says it, up to `samples` windows of `length` tokens."""

    calibration: str = "builtin"
    samples: int = MAX_WINDOWS
    length: int = 512


def cache_text(kv: str, formats: tuple[str, ...], text: CacheText) -> CacheText | None:
    """Return the text that `--kv` needs, None for a float cache.

    Raises `UsageError` for an unknown cache, and where no format has one of its own.
    """
    if kv not in CACHES:
        raise UsageError(f"--kv is {' or '.join(CACHES)}, not {kv}")
    if kv == "float":
        return None
    if "onnx" not in formats:
        raise UsageError(
            "--kv int8 is of ONNX folders: add --to onnx; llama.cpp is told when it runs (-ctk q8_0 -ctv q8_0)"
        )
    return text


def refuse_latents(config: ModelConfig) -> None:
    """Raise `UsageError` for a model whose cache holds latents: one vector for all heads, which are few bytes already."""
    if config.latent is not None:
        raise UsageError(
            "--kv int8 is for keys and values of heads; of latent attention the cache holds latents, which stay float: leave it out"
        )


def cache_scales(output: OutputFolder, text: CacheText) -> Iterator[Event | CacheScales]:
    """Yield an event for each block of the pass over the text, at last the scales; those kept already are not made again."""
    from r1q.calibration.windows import make_windows
    from r1q.export.onnx import served_context
    from r1q.models.config import ModelConfig
    from r1q.models.tokenizer import Tokenizer

    checkpoint = QuantizedCheckpoint.open(output.checkpoint)
    config = ModelConfig.read(checkpoint.sidecar, checkpoint.model_name)
    refuse_latents(config)
    samples = min(text.samples, MAX_WINDOWS)
    windows = make_windows(text.calibration, Tokenizer.open(checkpoint.sidecar), samples=samples, length=text.length)
    positions = served_context(config)
    record: dict[str, object] = {
        "manifest": sha256_file(output.checkpoint / MANIFEST),
        "rule": _RULE,
        "positions": positions,
        "calibration": json.loads(json.dumps(windows.record)),
    }
    path = output.path / CACHE_SCALES
    if path.is_file():
        kept = CacheScales.read(path, (config.num_layers, config.num_kv_heads, config.head_dim))
        if kept.record == record:
            yield kept
            return
    import numpy as np

    from r1q.calibration.cache import cache_ranges
    from r1q.models.forward import Configured

    found = []
    for layer, ranges in enumerate(cache_ranges(Configured(config, checkpoint), windows.tokens, positions)):
        found.append(ranges)
        yield Event(what="stage", name=f"blk.{layer}.kv", count=1)
    keys, values = (np.stack([ranges[part] for ranges in found]) for part in (0, 1))
    scales = CacheScales.of_ranges(keys, values, record)
    scales.write(path)
    yield scales
