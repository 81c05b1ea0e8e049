"""Targets: where a measurement takes place, as the options its runtime is opened with. Two are real, one is emulated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from r1q.benchmarks.profiles import Profile, profiles
from r1q.core.errors import UsageError, unknown_name
from r1q.runtimes.base import Device
from r1q.runtimes.cores import physical_cores


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One row: where it computes, and how many blocks of the model go to a GPU (−1: all).

    An emulated target computes here within `memory` bytes, with at most `threads` threads and a context of `context` tokens;
    `profile` is the device that it stands for, where it is one of the table.
    """

    name: str
    about: str
    device: Device
    gpu_layers: int = 0
    emulated: bool = False
    memory: int | None = None
    threads: int | None = None
    context: int | None = None
    profile: Profile | None = None


PHONE_THREADS = 4
PHONE_CONTEXT = 2048
TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        "cpu": Target(name="cpu", about="this machine's processor, all physical cores", device="cpu"),
        "gpu": Target(name="gpu", about="this machine's GPU, every layer on it", device="gpu", gpu_layers=-1),
        "mobile": Target(
            name="mobile",
            about="this machine's processor as a phone's: 4 GiB of memory (--ram), 4 threads, a context of 2048 tokens",
            device="cpu",
            emulated=True,
            memory=4 << 30,
            threads=PHONE_THREADS,
            context=PHONE_CONTEXT,
        ),
    }
)


def find_target(name: str, *, ram: int | None = None, threads: int | None = None) -> Target:
    """Return the target of `name`, one of `TARGETS` or a CPU profile to emulate, with `ram` bytes and `threads` where given.

    Raises UsageError with the near names, for a GPU's profile (which can only be estimated), and for `ram` where nothing is emulated.
    """
    target = TARGETS.get(name) or _emulated(name)
    if ram is not None:
        if not target.emulated:
            raise UsageError(f"--ram is a ceiling for an emulated target such as mobile, and {name} is this machine")
        target = replace(target, memory=ram)
    if target.threads is not None:
        target = replace(target, threads=min(target.threads, physical_cores()))
    return target if threads is None else replace(target, threads=threads)


def _emulated(name: str) -> Target:
    known = profiles()
    if name not in known:
        raise UsageError(unknown_name("target", name, [*TARGETS, *known]))
    profile = known[name]
    if profile.device == "gpu":
        raise UsageError(
            f"{name} can be estimated (--estimate {name}) but not emulated: with such a GPU in this machine, take --target gpu"
        )
    phone = name.startswith("phone")
    return Target(
        name=name,
        about=profile.about,
        device="cpu",
        emulated=True,
        memory=profile.usable,
        threads=PHONE_THREADS if phone else None,
        context=PHONE_CONTEXT if phone else None,
        profile=profile,
    )
