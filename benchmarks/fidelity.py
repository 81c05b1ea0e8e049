"""Fidelity, from the parent: the reference's logits once for all artifacts of one checkpoint, then every artifact's scores."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from r1q.benchmarks import isolate
from r1q.benchmarks.course import Course, Event, Steps
from r1q.benchmarks.quality import LENGTH
from r1q.benchmarks.result import Floor, Quality
from r1q.core.artifact import find_reference
from r1q.core.errors import R1qError
from r1q.core.metrics import TokenScores, summarize

TEXT = Path(__file__).resolve().parent / "texts" / "evaluation.txt"
OWN_TEXT = "evaluation.txt"  # beside a checkpoint's config.json: the text that suits this model


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A float checkpoint's logits on disk, its own scores, and its noise floor where that was made."""

    path: Path
    facts: Mapping[str, Any]
    nll: tuple[float, ...]
    floor: Floor | None


class Shelf:
    """The latest reference's logits: computed once, kept while artifacts of the same reference follow each other."""

    def __init__(self, logits: int) -> None:
        self.logits = logits
        self._kept: tuple[tuple[Path, Path], Reference | R1qError] | None = None

    def get(self, course: Course, path: Path, text: Path) -> Generator[Event, None, Reference | R1qError]:
        """Return the reference for this checkpoint and text, or the error that it ended with."""
        key = (path.resolve(), text.resolve())
        if self._kept is not None and self._kept[0] == key:
            return self._kept[1]
        try:
            made: Reference | R1qError = yield from _compute_reference(course, path, text, self.logits)
        except R1qError as error:
            made = error
        self._kept = (key, made)
        return made


def measure_quality(course: Course, shelf: Shelf) -> Steps:
    """Score a course's artifact; a failure is kept in it, with what was scored before."""
    plan, subject = course.plan, course.subject
    path = plan.reference or _reference_of(course)
    text = plan.text or _default_text(path)
    made: Reference | R1qError | None = None
    if path is None:
        course.note(
            "no float checkpoint to compare with is known, so there is perplexity only: give one with --reference"
        )
    else:
        made = yield from shelf.get(course, path, text)
    if isinstance(made, R1qError):
        course.fail("reference", made)
        made = None
    length = min(LENGTH, course.context) if made is None else made.facts["length"]
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


def _reference_of(course: Course) -> Path | None:
    """Return the float checkpoint that an artifact was made from: a float folder is its own."""
    path = course.subject.path
    return path if course.subject.format == "hf" else find_reference(path) or find_reference(path.parent)


def _default_text(reference: Path | None) -> Path:
    own = None if reference is None else reference / OWN_TEXT
    return own if own is not None and own.is_file() else TEXT


def _compute_reference(course: Course, path: Path, text: Path, logits: int) -> Generator[Event, None, Reference]:
    plan = course.plan
    job = {
        "checkpoint": str(path),
        "text": str(text),
        "windows": plan.windows,
        "logits": logits,
        "limit": plan.logits_limit,
        "noise_floor": plan.noise_floor,
    }
    facts: dict[str, Any] = {}
    nll: list[float] = []
    floor: list[isolate.Message] = []
    yield Event(stage="reference", artifact=path.name, done=0, total=plan.windows)
    os.truncate(logits, 0)  # of the reference before
    what = f"the reference {path.name}"
    for message in isolate.run("r1q.benchmarks.quality:reference", job, what=what, files=(logits,)):
        facts |= message.get("reference", {})
        if "floor" in message:
            floor.append(message)
            yield Event(stage="noise floor", artifact=path.name, done=len(floor), total=facts["windows"])
        elif "nll" in message:
            nll += message["nll"]
            yield Event(stage="reference", artifact=path.name, done=message["window"] + 1, total=facts["windows"])
    return Reference(path=path, facts=facts, nll=tuple(nll), floor=_floor(floor, nll) if floor else None)


def _floor(rounds: list[isolate.Message], nll: list[float]) -> Floor:
    def flat(key: str) -> list[Any]:
        return [value for message in rounds for value in message[key]]

    scores = TokenScores(
        nll=np.asarray(flat("nll"), dtype=np.float64),
        kld=np.asarray(flat("kld"), dtype=np.float64),
        same_top=np.asarray(flat("same_top"), dtype=np.bool_),
    )
    found = summarize(scores, np.asarray(nll, dtype=np.float64))
    if found.kld is None or found.kld_median is None or found.top1 is None:
        raise ValueError("a noise floor has divergences")
    if found.kld_p99 is None or found.perplexity_ratio is None:
        raise ValueError("a noise floor has divergences")
    return Floor(
        kld=found.kld,
        kld_median=found.kld_median,
        kld_p99=found.kld_p99.value,
        top1=found.top1,
        perplexity_ratio=found.perplexity_ratio,
    )


def _score(course: Course, job: Mapping[str, Any], text: Path, made: Reference | None) -> Steps:
    facts: dict[str, Any] = {}
    rounds: list[isolate.Message] = []
    yield Event(stage="quality", artifact=course.label, done=0, total=course.plan.windows)
    try:
        run = isolate.run(
            "r1q.benchmarks.quality:scores",
            job,
            what=f"scoring {course.label}",
            files=(job["logits"],),
            # The rows of a window's logits belong to the measurement and not to the device, whose ceiling is for speed.
        )
        for message in run:
            facts |= message.get("opened", {})
            if "nll" in message:
                rounds.append(message)
                yield Event(stage="quality", artifact=course.label, done=len(rounds), total=facts["windows"])
    except R1qError as error:
        course.fail("quality", error)
    for note in (*(made.facts["notes"] if made else ()), *facts.get("notes", ())):
        course.note(note)
    if rounds:
        course.quality = _assemble(facts, rounds, text, made)


def _assemble(facts: Mapping[str, Any], rounds: list[isolate.Message], text: Path, made: Reference | None) -> Quality:
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
        floor=made.floor if made else None,
    )
