"""Targets: what kind of device a measurement stands for, as the options its runtime is opened with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from r1q.core.errors import UsageError, unknown_name
from r1q.runtimes.base import Device


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One row: where it computes, and how many blocks of the model go to a GPU (−1: all)."""

    name: str
    about: str
    device: Device
    gpu_layers: int = 0


TARGETS: Mapping[str, Target] = MappingProxyType(
    {"cpu": Target(name="cpu", about="this machine's processor, all physical cores", device="cpu")}
)


def find_target(name: str) -> Target:
    """Return the row of `name`. Raises UsageError with the near names."""
    if name not in TARGETS:
        raise UsageError(unknown_name("target", name, TARGETS))
    return TARGETS[name]
