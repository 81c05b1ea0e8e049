"""Targets: what kind of machine a parcel is for, which formats it takes, and how it is run there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from r1q.core.errors import UsageError, unknown_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One row. `formats` that are of use there, best first; `context` tokens a run begins with, `parallel` requests at once."""

    name: str
    about: str
    formats: tuple[str, ...]
    context: int
    parallel: int = 1
    cluster: bool = False


TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        row.name: row
        for row in (
            Target(name="laptop", about="Ollama, llama.cpp or r1q on one machine", formats=("gguf", "onnx"), context=8192),
            Target(name="phone", about="llama.cpp or ONNX Runtime in an app", formats=("gguf", "onnx"), context=4096),
            Target(
                name="gpu", about="one GPU, alone or in a cluster", formats=("gguf", "gptq"), context=16384, parallel=8,
                cluster=True,
            ),
            Target(
                name="server", about="processors in a cluster", formats=("gguf",), context=8192, parallel=4, cluster=True
            ),
        )
    }
)  # fmt: skip


def find_target(name: str) -> Target:
    """Return the row of `name`. Raises `UsageError` with the near names."""
    if name not in TARGETS:
        raise UsageError(unknown_name("target", name, TARGETS))
    return TARGETS[name]
