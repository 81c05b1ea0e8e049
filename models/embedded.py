"""The embedded model, and the one door through which a MODEL argument becomes a source."""

from __future__ import annotations

from pathlib import Path

from r1q.models.source import ModelSource

EMBEDDED = Path(__file__).resolve().parent / "tiny_r1"


def open_model(model: Path | None) -> ModelSource:
    """Open a checkpoint folder, or the embedded model for None. Raises `InputError` for what cannot be opened."""
    return ModelSource.open(EMBEDDED if model is None else model)
