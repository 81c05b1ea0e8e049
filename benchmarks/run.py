"""The bench: every artifact in every runtime that opens it here, one child process a measurement, one result a row.

A measurement that fails is a line in its row's result; the others go on. Everything that can be refused without measuring (an
unknown target, a damaged header, a text that cannot be read) is refused before the first child starts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

from r1q.benchmarks import isolate
from r1q.benchmarks.bandwidth import Bandwidth, keep, kept, machine_key
from r1q.benchmarks.choose import Offer, offers, refuse_unknown, require_format, suited
from r1q.benchmarks.course import Course, Event, Plan, Steps
from r1q.benchmarks.fidelity import TEXT as TEXT
from r1q.benchmarks.fidelity import Shelf, measure_quality
from r1q.benchmarks.gpu import INSTALL, find_gpus
from r1q.benchmarks.machine import busy, machine
from r1q.benchmarks.profiles import find_profile
from r1q.benchmarks.quality import read_text
from r1q.benchmarks.reasoner import Entrant, Found, Reasoner, ReasoningPlan
from r1q.benchmarks.result import BenchResult
from r1q.benchmarks.speed import QUIET, measure_speed
from r1q.benchmarks.subjects import Subject, find_subjects
from r1q.benchmarks.targets import find_target
from r1q.core.errors import MissingError, R1qError
from r1q.runtimes.cores import physical_cores

LOGITS_LIMIT = 4 << 30
DEPTHS = (0, 512)


def bench(
    artifacts: Sequence[Path],
    *,
    target: str = "cpu",
    ram: int | None = None,
    threads: int | None = None,
    reference: Path | None = None,
    text: Path | None = None,
    windows: int = 8,
    repetitions: int = 5,
    prompt: int = 128,
    prefill: int = 512,
    generate: int = 128,
    depths: Sequence[int] = DEPTHS,
    runtime: str | None = None,
    noise_floor: bool | None = None,
    estimates: Sequence[str] = (),
    logits_limit: int = LOGITS_LIMIT,
    reasoning: ReasoningPlan | None = None,
    command: Sequence[str] = (),
) -> Iterator[Event | BenchResult]:
    """Bench artifacts (see `find_subjects`) and yield progress, and each row's result when it is done.

    A row is an artifact in one of the runtimes that open it here; `runtime` takes one only. `prompt` tokens before the first token
    that is timed, `prefill` and `generate` tokens for the two rates, the latter with each of `depths` tokens in memory; less where the
    model's context is shorter. `reference` is a float checkpoint, by default the one that an artifact's folder remembers; `text` a
    file, by default the reference's own evaluation.txt, else the built-in one; at most `windows` windows of it are scored.
    `noise_floor` None: made where it is cheap. `estimates` names profiles to estimate tokens/s for; `ram` is the ceiling of an
    emulated target. `logits_limit`: bytes of reference logits that may lie in the temporary folder. `reasoning` says what
    problems are to be thought about, if any. `command` is kept in the results.

    Raises UsageError or InputError for what can be refused before anything is measured, MissingError where nothing can be measured.
    """
    refuse_unknown(runtime)
    plan = Plan(
        target=find_target(target, ram=ram, threads=threads),
        runtime=runtime,
        reference=reference,
        text=text,
        windows=windows,
        repetitions=repetitions,
        prompt=prompt,
        prefill=prefill,
        generate=generate,
        depths=tuple(depths),
        logits_limit=logits_limit,
        noise_floor=noise_floor,
        estimates=tuple(find_profile(name) for name in estimates),
        command=tuple(command),
        reasoning=reasoning,
    )
    if text is not None:
        read_text(text)
    subjects = _subjects(artifacts, runtime)
    if plan.target.device == "gpu":
        _require_gpu()
    yield from _walk(_courses(plan, subjects))


def _walk(courses: Sequence[Course]) -> Iterator[Event | BenchResult]:
    """Measure one course after the other."""
    # A file without a name: however this process ends, gigabytes of logits do not outlive it.
    with tempfile.TemporaryFile() as logits:
        shelf = Shelf(logits.fileno())
        bandwidth = None
        entrants = {id(course): _entrant(course) for course in courses}
        asked = courses[0].plan.reasoning
        reasoner = None if asked is None else Reasoner(asked, list(entrants.values()))
        for course in courses:
            course.refuse_unfit()
            if not course.failures:
                if bandwidth is None and course.plan.target.device == "cpu":
                    bandwidth = yield from _bandwidth(course)
                course.bandwidth = bandwidth
                yield from measure_speed(course)
                yield from measure_quality(course, shelf)
                if reasoner is not None:
                    yield from _reason(course, reasoner, entrants[id(course)])
            yield course.result()


def _entrant(course: Course) -> Entrant:
    """Return a course as the reasoner knows it."""
    subject = course.subject
    return Entrant(
        path=subject.path,
        name=subject.name,
        grid=subject.grid,
        weights=subject.weights,
        runtime=course.runtime,
        options=course.options(course.context),
        context=course.context,
    )


def _reason(course: Course, reasoner: Reasoner, entrant: Entrant) -> Steps:
    """Ask one artifact the problems; the float model that it is compared with is asked first, once."""
    steps = reasoner.ask(entrant)
    while True:
        try:
            artifact, done, total = next(steps)
        except StopIteration as end:
            found: Found = end.value
            break
        yield Event(stage="reasoning", artifact=artifact, done=done, total=total)
    course.reasoning = found.reasoning
    if found.error is not None:
        course.fail("reasoning", found.error)
    for note in found.notes:
        course.note(note)


def _subjects(artifacts: Sequence[Path], runtime: str | None) -> list[Subject]:
    """Return every subject; others' formats are asked for only where a file is none of ours."""
    own = (".gguf", ".onnx")
    strange = any(path.is_file() and path.suffix.lower() not in own for path in artifacts)
    known = {name for offer in offers(runtime) for name in offer.formats} if strange else set()
    return find_subjects(artifacts, sorted(known))


def _courses(plan: Plan, subjects: Sequence[Subject]) -> list[Course]:
    """Return a course for each artifact in each runtime that opens it. Raises MissingError where there is not one."""
    found: list[Offer] = offers(plan.runtime)
    here = machine()
    courses, reasons, unopened = [], [], []
    for subject in subjects:
        if plan.runtime is not None:
            require_format(found, plan.runtime, subject.format, str(subject.path))
        fitting, missing = suited(found, subject.format)
        reasons = missing
        if not fitting:
            unopened.append(
                f"{subject.path} ({subject.format}) was not measured: no runtime that is installed opens it"
            )
        courses += [Course(plan=plan, subject=subject, runtime=name, machine=here) for name in fitting]
    if not courses:
        raise MissingError(f"no runtime here opens {subjects[0].path} ({subjects[0].format}); {'; '.join(reasons)}")
    for note in (*unopened, *(f"not measured: {reason}" for reason in reasons)):
        courses[0].note(note)
    return courses


def _require_gpu() -> None:
    names, looked = find_gpus()
    if not names:
        raise MissingError(
            f"no GPU was found to measure on ({looked}). With one: {INSTALL}. Without: --target cpu, or --estimate rtx-4090"
        )


def _bandwidth(course: Course) -> Generator[Event, None, Bandwidth | None]:
    """Return this machine's memory bandwidth, measured now or before, None where the probe fails."""
    cores = physical_cores()
    key = machine_key(course.machine.cpu, cores)
    found = kept(key)
    if found is not None:
        return found
    yield Event(stage="memory bandwidth", artifact="this machine", done=0, total=1)
    quiet = busy() <= QUIET
    try:
        for message in isolate.run("r1q.benchmarks.bandwidth:probe", {"threads": cores}, what="the bandwidth probe"):
            found = Bandwidth(**message["bandwidth"])
    except R1qError as error:
        course.note(f"memory bandwidth was not measured: {error}")
    if found is not None and quiet:
        keep(key, found)
    elif found is not None:
        course.note("memory bandwidth was measured while other programs computed, and will be measured again")
    return found
