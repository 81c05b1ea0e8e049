"""The embedded model, and the one door through which a MODEL argument becomes a source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from r1q.models.source import ModelSource

EMBEDDED = Path(__file__).resolve().parent / "tiny_r1"
NAME = "tiny-r1"


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """An opened source, and for a hub id which repository at which commit it is (empty for a folder)."""

    source: ModelSource
    origin: Mapping[str, str] = field(default_factory=dict)


def open_model(model: str | None, *, progress: bool = False) -> OpenedModel:
    """Open a checkpoint folder, a hub id (`org/name`, `org/name@revision`), or the embedded model for None.

    Raises `InputError` for what cannot be opened, `MissingError` where the hub cannot be reached.
    """
    if model is None:
        return OpenedModel(ModelSource.open(EMBEDDED, NAME))
    from r1q.models.hub import find_model

    found = find_model(model, progress=progress)
    origin = {"repository": found.repository, "commit": found.commit or ""} if found.repository else {}
    return OpenedModel(ModelSource.open(found.path), origin)
