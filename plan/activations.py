"""`--scheme w8a8`: inputs of linear layers measured on calibration text, balanced and fitted into 8 bits, before weights are coded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from r1q.core.activations import ACTIVATIONS, STAGES, Activations
from r1q.core.artifact import OutputFolder
from r1q.core.checkpoint import JOB, SIDECAR
from r1q.core.errors import UsageError
from r1q.models.source import ModelSource
from r1q.plan.choose import W8A8
from r1q.quantize.run import Event

if TYPE_CHECKING:
    from r1q.models.config import ModelConfig
    from r1q.quantize.balance import BalancedSource

MAX_WINDOWS = 32  # ranges need fewer tokens than second moments do


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationText:
    """What inputs are measured on, as `--calibration` says it: up to `samples` windows of `length` tokens. `method`: of ranges."""

    calibration: str = "builtin"
    samples: int = MAX_WINDOWS
    length: int = 512
    method: str = "minmax"


def refuse_sparse(config: ModelConfig) -> None:
    """Raise `UsageError` for a model with experts or latent attention."""
    if config.experts is not None or config.latent is not None:
        raise UsageError(
            f"{config.name}: {W8A8} is for dense models; experts and latent attention are quantized with --bits 4 or 8"
        )


def balanced_source(
    source: ModelSource, output: OutputFolder, text: ActivationText
) -> Iterator[Event | BalancedSource]:
    """Yield an event for each block that is measured, a note for each input that stays a float, at last the balanced model.

    What was found is kept in the output folder, and goes into the checkpoint: a run that was killed does not measure again.
    Raises `UsageError` for a model with experts or latent attention, and where the folder holds the ranges of another job.
    """
    from r1q.quantize.balance import BalancedSource

    refuse_sparse(source.config)
    wanted, windows = _record(source, text)
    path = output.path / ACTIVATIONS
    kept = next((p for p in (path, output.checkpoint / SIDECAR / ACTIVATIONS) if p.is_file()), None)
    activations = None if kept is None else Activations.read(kept)
    if kept is None or activations is None or activations.record != wanted:
        if (output.checkpoint / JOB).is_file():
            raise UsageError(
                f"{output.path} holds another job (different: activations); choose another folder with -o or delete it"
            )
        kept, found = path, []
        from r1q.calibration.activations import Method, block_activations

        for layer, block in enumerate(block_activations(source, windows, Method(name=text.method))):
            found.append(block)
            yield Event(what="stage", name=f"blk.{layer}.inputs", count=len(STAGES))
        activations = Activations(
            ranges={(layer, stage): ranges[stage] for layer, (ranges, _) in enumerate(found) for stage in STAGES},
            exponents={(layer, stage): powers[stage] for layer, (_, powers) in enumerate(found) for stage in STAGES},
            record=wanted,
        )
        output.path.mkdir(parents=True, exist_ok=True)
        activations.write(path)
    yield from (Event(what="note", name=line) for line in activations.weight_only())
    yield BalancedSource(source, activations, kept)


def _record(source: ModelSource, text: ActivationText) -> tuple[dict[str, object], NDArray[np.int64]]:
    """Return what decides the ranges, and the windows of token ids."""
    from r1q.calibration.activations import ALPHA, LIMIT
    from r1q.calibration.windows import make_windows
    from r1q.models.tokenizer import Tokenizer

    samples = min(text.samples, MAX_WINDOWS)
    windows = make_windows(text.calibration, Tokenizer.open(source.path), samples=samples, length=text.length)
    record: dict[str, object] = {
        "ranges": text.method,
        "alpha": ALPHA,
        "limit": LIMIT,
        "calibration": json.loads(json.dumps(windows.record)),
        "source": dict(source.fingerprint()),
    }
    return record, windows.tokens
