"""Speed, from the parent: run the child, keep what arrives, and say what about it is less than asked for."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from r1q.benchmarks import isolate
from r1q.benchmarks.course import Course, Event, Plan, Steps
from r1q.benchmarks.gpu import MemoryWatch
from r1q.benchmarks.machine import busy
from r1q.benchmarks.result import Samples, Speed
from r1q.core.errors import R1qError

SEED = 20
QUIET = 0.15  # of the processor: more than that in use by others is said


def measure_speed(course: Course) -> Steps:
    """Measure a course's speed; a failure is kept in it, with what was measured before."""
    job = _job(course)
    rounds: list[isolate.Message] = []
    if (others := busy()) > QUIET:
        course.note(f"other programs kept {others:.0%} of the processor busy: times are long and scatter")
    watch = MemoryWatch()
    facts: dict[str, Any] = {}
    with ExitStack() as stack:
        if course.plan.target.device == "gpu":
            stack.enter_context(watch.watching())
        try:
            run = isolate.run(
                "r1q.benchmarks.measure:speed",
                job,
                what=f"measuring {course.label}",
                ceiling=course.plan.target.memory,
            )
            for message in run:
                course.ceiling = message.get("ceiling", course.ceiling)
                course.opened |= message.get("opened", {})
                facts |= {key: message[key] for key in ("warm_load",) if key in message}
                if "seconds" in message:
                    rounds.append(message)  # the first is the warm-up
                    yield Event(
                        stage="speed",
                        artifact=course.label,
                        done=len(rounds) - 1,
                        total=course.plan.repetitions,
                    )
        except R1qError as error:
            course.fail("speed", error)
    if course.opened:
        course.speed = _assemble(course.opened, rounds, job, facts.get("warm_load"), watch.peak)
        _remark(course, course.speed)


def _job(course: Course) -> dict[str, Any]:
    plan, subject = course.plan, course.subject
    sizes = {size: min(getattr(plan, size), course.context) for size in ("prompt", "prefill", "generate")}
    for size, tokens in sizes.items():
        if tokens < getattr(plan, size):
            course.note(f"{size} is {tokens} tokens, the {_whose(course)} whole context")
    depths = _depths(course, plan, sizes["generate"])
    return {
        "path": str(subject.path),
        "files": [str(path) for path in subject.files],
        "runtime": course.runtime,
        "options": course.options(max(*sizes.values(), *(depth + sizes["generate"] for depth in depths))),
        "repetitions": plan.repetitions,
        "depths": depths,
        "seed": SEED,
        **sizes,
    }


def _depths(course: Course, plan: Plan, generate: int) -> list[int]:
    """Return the depths at which `generate` tokens still fit the context, in order; the others are noted."""
    fitting = sorted({depth for depth in plan.depths if depth + generate <= course.context})
    for depth in sorted(set(plan.depths) - set(fitting)):
        course.note(
            f"no decoding at depth {depth}: with {generate} tokens more it is beyond the {_whose(course)} context of {course.context}"
        )
    return fitting or [0]


def _whose(course: Course) -> str:
    return "model's" if course.context == course.subject.context else "target's"


def _assemble(
    opened: Mapping[str, Any],
    rounds: list[isolate.Message],
    job: Mapping[str, Any],
    warm_load: float | None,
    gpu_memory: int | None,
) -> Speed:
    def samples(name: str, tokens: int, depth: int = 0) -> Samples:
        timed = rounds[1:]
        return Samples(
            tokens=tokens,
            warm_up=tuple(message["seconds"][name] for message in rounds[:1]),
            seconds=tuple(message["seconds"][name] for message in timed),
            depth=depth,
            latencies=tuple(tuple(m["latencies"][name]) for m in timed if name in m["latencies"]),
            joules=tuple(m["joules"][name] for m in timed if name in m["joules"]),
        )

    decode, *deeper = (samples(f"decode@{depth}", job["generate"], depth) for depth in job["depths"])
    return Speed(
        load_seconds=opened["load_seconds"],
        warm_load_seconds=warm_load,
        cold=opened["cold"],
        context=opened["context"],
        base_memory=opened["base_memory"],
        peak_memory=max((message["peak_memory"] for message in rounds), default=opened["base_memory"]),
        first_token=samples("first_token", job["prompt"]),
        prefill=samples("prefill", job["prefill"]),
        decode=decode,
        deeper=tuple(deeper),
        gpu_memory=gpu_memory,
    )


def _remark(course: Course, speed: Speed) -> None:
    if speed.cold:
        course.note(f"the first load was not cold: {speed.cold}")
    if course.plan.target.emulated and course.ceiling:
        course.note(f"its memory was {course.ceiling}")
