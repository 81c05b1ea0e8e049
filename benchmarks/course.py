"""Course: one artifact in one runtime on its way through the bench, and what was asked of all of them."""

from __future__ import annotations

import datetime
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from r1q.benchmarks.bandwidth import Bandwidth
from r1q.benchmarks.machine import Machine, versions
from r1q.benchmarks.profiles import Profile, predict
from r1q.benchmarks.reasoner import ReasoningPlan
from r1q.benchmarks.reasoning import Reasoning
from r1q.benchmarks.result import BenchResult, Failure, Quality, Speed
from r1q.benchmarks.subjects import Subject
from r1q.benchmarks.targets import Target
from r1q.core.errors import R1qError, ResourceError, UsageError
from r1q.runtimes.cores import physical_cores

# Bytes a weight of runtimes that keep floats in memory, whatever the file has.
FLOAT_RUNTIMES = {"torch": 2}
OWN_CONTEXT = 4096  # of an estimate where the target sets none


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Progress: `done` of `total` steps of a stage (speed, reference, quality) for an artifact."""

    stage: str
    artifact: str
    done: int
    total: int


Steps = Generator[Event, None, None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is measured, in tokens; see `run.bench`."""

    target: Target
    runtime: str | None
    reference: Path | None
    text: Path | None
    windows: int
    repetitions: int
    prompt: int
    prefill: int
    generate: int
    depths: tuple[int, ...]
    logits_limit: int
    noise_floor: bool | None
    estimates: tuple[Profile, ...]
    command: tuple[str, ...]
    reasoning: ReasoningPlan | None = None

    def __post_init__(self) -> None:
        for name in ("windows", "repetitions", "prompt", "prefill", "generate"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}: it must be at least 1")
        if self.target.threads is not None and self.target.threads < 1:
            raise UsageError(f"threads is {self.target.threads}: it must be at least 1")
        if not self.depths or min(self.depths) < 0:
            raise UsageError(f"depths are {list(self.depths)}: give at least one, and none below 0")


@dataclass(slots=True)
class Course:
    """One artifact's way in one runtime: what has been found so far."""

    plan: Plan
    subject: Subject
    runtime: str
    machine: Machine
    bandwidth: Bandwidth | None = None
    opened: dict[str, Any] = field(default_factory=dict)
    speed: Speed | None = None
    quality: Quality | None = None
    reasoning: Reasoning | None = None
    ceiling: str | None = None
    failures: list[Failure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        """What messages call this row."""
        return f"{self.subject.name} in {self.runtime}"

    def fail(self, stage: str, error: R1qError) -> None:
        """Keep an error as a failure of `stage`; one that was said already is not said twice."""
        if str(error) not in {failure.message for failure in self.failures}:
            self.failures.append(Failure(stage=stage, exit_code=error.exit_code, message=str(error)))

    def note(self, text: str) -> None:
        """Keep a note once."""
        if text not in self.notes:
            self.notes.append(text)

    @property
    def context(self) -> int:
        """The most tokens that a sequence may have: the model's, or the target's where that is less."""
        return min(self.subject.context, self.plan.target.context or self.subject.context)

    def options(self, context: int) -> dict[str, Any]:
        """Return the runtime's options for a measurement that needs `context` tokens."""
        target = self.plan.target
        return {
            "device": target.device,
            "gpu_layers": target.gpu_layers,
            "threads": target.threads,
            # An emulated device reserves the context it is meant for, whether a measurement needs it or not.
            "context": self.context if target.context else min(context, self.context),
            **({"compute": "bf16"} if self.runtime in FLOAT_RUNTIMES else {}),
        }

    def refuse_unfit(self) -> None:
        """Keep a failure where the target's memory is less than weights, cache and activations, with the figures."""
        target, traffic = self.plan.target, self.subject.traffic
        if target.memory is None or traffic is None:
            return
        weights = self.weights_bytes
        cache, activations = traffic.cache_bytes(self.context), traffic.activation_bytes()
        if (needed := weights + cache + activations) > target.memory:
            mib = [f"{value / 2**20:.0f} MiB" for value in (needed, weights, cache, activations, target.memory)]
            self.fail(
                "fit",
                ResourceError(
                    f"needs {mib[0]} (weights {mib[1]}, keys and values of {self.context} tokens {mib[2]}, activations {mib[3]}) and "
                    f"{target.name} has {mib[4]}: take fewer bits, or allow more with --ram"
                ),
            )

    @property
    def weights_bytes(self) -> int:
        """Bytes of weights in memory: the file's, or floats where the runtime makes them of it."""
        wide = FLOAT_RUNTIMES.get(self.runtime)
        return self.subject.bytes if wide is None else wide * self.subject.weights

    def result(self) -> BenchResult:
        """Return everything found."""
        subject, plan, opened = self.subject, self.plan, self.opened
        target = plan.target
        return BenchResult(
            artifact=str(subject.path),
            name=subject.name,
            format=subject.format,
            grid=subject.grid,
            bytes=subject.bytes,
            weights=subject.weights,
            bits_per_weight=subject.bits_per_weight,
            target=target.name,
            runtime=self.runtime,
            device=opened.get("device", target.device),
            threads=opened.get("threads", target.threads or physical_cores()),
            machine=self.machine,
            versions=opened.get("versions", versions({})),
            command=plan.command,
            time=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            speed=self.speed,
            quality=self.quality,
            reasoning=self.reasoning,
            failures=tuple(self.failures),
            notes=tuple(self.notes),
            context=opened.get("context"),
            traffic=subject.traffic,
            compute_bytes=FLOAT_RUNTIMES.get(self.runtime),
            bandwidth=self.bandwidth,
            emulated=f"emulated on {self.machine.cpu}" if target.emulated else None,
            memory_ceiling=target.memory,
            ceiling=self.ceiling,
            gpu_layers=target.gpu_layers,
            predictions=() if subject.traffic is None else tuple(self._predictions()),
        )

    def _predictions(self) -> Generator[Any, None, None]:
        subject, target = self.subject, self.plan.target
        asked = {profile.name: profile for profile in (*self.plan.estimates, target.profile) if profile is not None}
        for profile in asked.values():
            if subject.traffic is not None:
                context = min(subject.context, target.context or OWN_CONTEXT)
                yield predict(profile, subject.traffic, weights=subject.bytes, context=context)
