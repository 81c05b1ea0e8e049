"""The bench: every artifact's speed and fidelity, one child process a measurement, one result an artifact.

A measurement that fails is a line in its artifact's result; the others go on. Everything that can be refused without measuring (an
unknown target, a damaged header, a text that cannot be read) is refused before the first child starts.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import tempfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from r1q.benchmarks import isolate
from r1q.benchmarks.machine import busy, machine, versions
from r1q.benchmarks.measure import TIMINGS
from r1q.benchmarks.quality import LENGTH, read_text
from r1q.benchmarks.result import BenchResult, Failure, Quality, Samples, Speed
from r1q.benchmarks.subjects import Subject, find_subjects
from r1q.benchmarks.targets import Target, find_target
from r1q.core.artifact import find_reference
from r1q.core.errors import R1qError, UsageError
from r1q.runtimes.cores import physical_cores
from r1q.runtimes.table import runtime_name

TEXT = Path(__file__).resolve().parent / "texts" / "evaluation.txt"
OWN_TEXT = "evaluation.txt"  # beside a checkpoint's config.json: the text that suits this model
SEED = 20
LOGITS_LIMIT = 4 << 30
QUIET = 0.15  # of the processor: more than that in use by others is said


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Progress: `done` of `total` steps of a stage (speed, reference, quality) for an artifact."""

    stage: str
    artifact: str
    done: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is measured, in tokens; see `bench`."""

    target: Target
    runtime: str | None
    threads: int | None
    reference: Path | None
    text: Path | None
    windows: int
    repetitions: int
    prompt: int
    prefill: int
    generate: int
    logits_limit: int
    command: tuple[str, ...]

    def __post_init__(self) -> None:
        for name in ("windows", "repetitions", "prompt", "prefill", "generate", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}: it must be at least 1")


@dataclass(slots=True)
class _Course:
    """One artifact's way through the bench: what has been found so far."""

    plan: Plan
    subject: Subject
    runtime: str
    opened: dict[str, Any] = field(default_factory=dict)
    speed: Speed | None = None
    quality: Quality | None = None
    failures: list[Failure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def fail(self, stage: str, error: R1qError) -> None:
        if str(error) not in {failure.message for failure in self.failures}:
            self.failures.append(Failure(stage=stage, exit_code=error.exit_code, message=str(error)))

    def options(self, context: int) -> dict[str, Any]:
        target = self.plan.target
        return {
            "device": target.device,
            "gpu_layers": target.gpu_layers,
            "threads": self.plan.threads,
            "context": min(context, self.subject.context),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reference:
    """A float checkpoint's logits on disk, and its own scores."""

    path: Path
    facts: Mapping[str, Any]
    nll: tuple[float, ...]


Steps = Generator[Event, None, None]


def bench(
    artifacts: Sequence[Path],
    *,
    target: str = "cpu",
    threads: int | None = None,
    reference: Path | None = None,
    text: Path | None = None,
    windows: int = 8,
    repetitions: int = 5,
    prompt: int = 128,
    prefill: int = 512,
    generate: int = 128,
    runtime: str | None = None,
    logits_limit: int = LOGITS_LIMIT,
    command: Sequence[str] = (),
) -> Iterator[Event | BenchResult]:
    """Bench artifacts (GGUF files, or folders that hold some) and yield progress, and each artifact's result when it is done.

    `prompt` tokens before the first token that is timed, `prefill` and `generate` tokens for the two rates; less where the model's
    context is shorter. `reference` is a float checkpoint, by default the one that an artifact's folder remembers; `text` a file,
    by default the reference's own evaluation.txt, else the built-in one; at most `windows` windows of it are scored.
    `logits_limit`: bytes of reference logits that may lie in the temporary folder. `command` is kept in the results.

    Raises UsageError or InputError for what can be refused before anything is measured.
    """
    plan = Plan(
        target=find_target(target),
        runtime=runtime,
        threads=threads,
        reference=reference,
        text=text,
        windows=windows,
        repetitions=repetitions,
        prompt=prompt,
        prefill=prefill,
        generate=generate,
        logits_limit=logits_limit,
        command=tuple(command),
    )
    courses = [_Course(plan, subject, runtime_name(subject.format, runtime)) for subject in find_subjects(artifacts)]
    if text is not None:
        read_text(text)
    # A file without a name: however this process ends, gigabytes of logits do not outlive it.
    with tempfile.TemporaryFile() as logits:
        shelf = _Shelf(logits.fileno())
        for course in courses:
            yield from _speed(course)
            yield from _quality(course, shelf)
            yield _result(course)


def _speed(course: _Course) -> Steps:
    plan, name = course.plan, course.subject.name
    sizes = {size: min(getattr(plan, size), course.subject.context) for size in ("prompt", "prefill", "generate")}
    for size, tokens in sizes.items():
        if tokens < getattr(plan, size):
            course.notes.append(f"{size} is {tokens} tokens, the model's whole context")
    job = {
        "path": str(course.subject.path),
        "runtime": course.runtime,
        "options": course.options(max(sizes.values())),
        "repetitions": plan.repetitions,
        "seed": SEED,
        **sizes,
    }
    rounds: list[isolate.Message] = []
    if (others := busy()) > QUIET:
        course.notes.append(f"other programs kept {others:.0%} of the processor busy: times are long and scatter")
    try:
        for message in isolate.run("r1q.benchmarks.measure:speed", job, what=f"measuring {name}"):
            course.opened |= message.get("opened", {})
            if "seconds" in message:
                rounds.append(message)  # the first is the warm-up
                yield Event(stage="speed", artifact=name, done=len(rounds) - 1, total=plan.repetitions)
    except R1qError as error:
        course.fail("speed", error)
    if course.opened:
        course.speed = _assemble_speed(course.opened, rounds, sizes)


def _assemble_speed(opened: Mapping[str, Any], rounds: list[isolate.Message], sizes: Mapping[str, int]) -> Speed:
    tokens = {"first_token": sizes["prompt"], "prefill": sizes["prefill"], "decode": sizes["generate"]}
    samples = {
        name: Samples(
            tokens=tokens[name],
            warm_up=tuple(message["seconds"][name] for message in rounds[:1]),
            seconds=tuple(message["seconds"][name] for message in rounds[1:]),
        )
        for name in TIMINGS
    }
    return Speed(
        load_seconds=opened["load_seconds"],
        context=opened["context"],
        base_memory=opened["base_memory"],
        peak_memory=max((message["peak_memory"] for message in rounds), default=opened["base_memory"]),
        **samples,
    )


class _Shelf:
    """The latest reference's logits: computed once, kept while artifacts of the same reference follow each other."""

    def __init__(self, logits: int) -> None:
        self.logits = logits
        self._kept: tuple[tuple[Path, Path], _Reference | R1qError] | None = None

    def get(self, course: _Course, path: Path, text: Path) -> Generator[Event, None, _Reference | R1qError]:
        """Return the reference for this checkpoint and text, or the error that it ended with."""
        key = (path.resolve(), text.resolve())
        if self._kept is not None and self._kept[0] == key:
            return self._kept[1]
        try:
            made: _Reference | R1qError = yield from _compute_reference(course, path, text, self.logits)
        except R1qError as error:
            made = error
        self._kept = (key, made)
        return made


def _compute_reference(course: _Course, path: Path, text: Path, logits: int) -> Generator[Event, None, _Reference]:
    plan = course.plan
    job = {
        "checkpoint": str(path),
        "text": str(text),
        "windows": plan.windows,
        "logits": logits,
        "limit": plan.logits_limit,
    }
    facts: dict[str, Any] = {}
    nll: list[float] = []
    yield Event(stage="reference", artifact=path.name, done=0, total=plan.windows)
    os.truncate(logits, 0)  # of the reference before
    what = f"the reference {path.name}"
    for message in isolate.run("r1q.benchmarks.quality:reference", job, what=what, files=(logits,)):
        facts |= message.get("reference", {})
        if "nll" in message:
            nll += message["nll"]
            yield Event(stage="reference", artifact=path.name, done=message["window"] + 1, total=facts["windows"])
    return _Reference(path=path, facts=facts, nll=tuple(nll))


def _quality(course: _Course, shelf: _Shelf) -> Steps:
    plan, subject = course.plan, course.subject
    path = plan.reference or find_reference(subject.path)
    text = plan.text or _default_text(path)
    made: _Reference | R1qError | None = None
    if path is None:
        course.notes.append(
            "no float checkpoint to compare with is known, so there is perplexity only: give one with --reference"
        )
    else:
        made = yield from shelf.get(course, path, text)
    if isinstance(made, R1qError):
        course.fail("reference", made)
        made = None
    length = min(LENGTH, subject.context) if made is None else made.facts["length"]
    job = {
        "path": str(subject.path),
        "runtime": course.runtime,
        "options": course.options(length),
        "text": str(text),
        "windows": plan.windows,
        "length": length,
        "reference": None if made is None else made.facts,
        "logits": shelf.logits,
    }
    yield from _score(course, job, text, made)


def _score(course: _Course, job: Mapping[str, Any], text: Path, made: _Reference | None) -> Steps:
    name = course.subject.name
    facts: dict[str, Any] = {}
    rounds: list[isolate.Message] = []
    yield Event(stage="quality", artifact=name, done=0, total=course.plan.windows)
    try:
        run = isolate.run("r1q.benchmarks.quality:scores", job, what=f"scoring {name}", files=(job["logits"],))
        for message in run:
            facts |= message.get("opened", {})
            if "nll" in message:
                rounds.append(message)
                yield Event(stage="quality", artifact=name, done=len(rounds), total=facts["windows"])
    except R1qError as error:
        course.fail("quality", error)
    course.notes += [*(made.facts["notes"] if made else ()), *facts.get("notes", ())]
    if rounds:
        course.quality = _assemble_quality(facts, rounds, text, made)


def _assemble_quality(
    facts: Mapping[str, Any], rounds: list[isolate.Message], text: Path, made: _Reference | None
) -> Quality:
    nll = tuple(value for message in rounds for value in message["nll"])
    compared = made is not None
    return Quality(
        text=text.name,
        text_sha256=hashlib.sha256(text.read_bytes()).hexdigest(),
        windows=len(rounds),
        length=facts["length"],
        first=facts["first"],
        nll=nll,
        kld=tuple(value for message in rounds for value in message["kld"]) if compared else None,
        same_top=tuple(value for message in rounds for value in message["same_top"]) if compared else None,
        reference=made.path.name if made else None,
        # Where scoring broke off, the reference is judged on the same windows.
        reference_nll=made.nll[: len(nll)] if made else None,
    )


def _default_text(reference: Path | None) -> Path:
    own = None if reference is None else reference / OWN_TEXT
    return own if own is not None and own.is_file() else TEXT


def _result(course: _Course) -> BenchResult:
    subject, plan, opened = course.subject, course.plan, course.opened
    return BenchResult(
        artifact=str(subject.path),
        name=subject.name,
        format=subject.format,
        grid=subject.grid,
        bytes=subject.bytes,
        weights=subject.weights,
        bits_per_weight=subject.bits_per_weight,
        target=plan.target.name,
        runtime=course.runtime,
        device=opened.get("device", plan.target.device),
        threads=opened.get("threads", plan.threads or physical_cores()),
        machine=machine(),
        versions=opened.get("versions", versions({})),
        command=plan.command,
        time=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        speed=course.speed,
        quality=course.quality,
        failures=tuple(course.failures),
        notes=tuple(course.notes),
    )
