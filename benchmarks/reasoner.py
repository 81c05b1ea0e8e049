"""The reasoner: asks every artifact of a bench the same problems, and puts its answers beside those of its float model.

The float model is the first artifact of the same model in bf16, f16 or f32; it is asked before the others, once. An artifact that
dies half way keeps the answers it has given, and is compared on those.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from r1q.benchmarks import isolate
from r1q.benchmarks.reasoning import SEEDS, Answers, Reasoning
from r1q.benchmarks.tasks import GENERATED, TaskSet, default_spec, load_tasks
from r1q.calibration.traces import TEMPERATURE, TOP_P
from r1q.core.artifact import CHECKPOINT, find_reference
from r1q.core.checkpoint import SIDECAR
from r1q.core.errors import InputError, R1qError, UsageError

FLOATS = ("f32", "bf16", "f16")
Steps = Generator[tuple[str, int, int], None, "Found"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningPlan:
    """What is asked: `count` problems of `tasks` (None: what suits the model) with `seeds` seeds each.

    `max_tokens` of an answer, None as the tasks say; `sequences` answers side by side; `tokenizer` a folder with the model's
    tokenizer, None where it lies with the artifact. Raises UsageError for numbers out of range.
    """

    count: int
    tasks: str | None = None
    seeds: int = SEEDS
    temperature: float = TEMPERATURE
    top_p: float = TOP_P
    max_tokens: int | None = None
    sequences: int = 4
    tokenizer: Path | None = None

    def __post_init__(self) -> None:
        for name in ("count", "seeds", "max_tokens", "sequences"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}: it must be at least 1")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise UsageError(
                f"temperature {self.temperature}, top_p {self.top_p}: they must be at least 0, and in (0, 1]"
            )
        if self.tasks is not None:
            load_tasks(self.tasks, 1 if self.tasks in GENERATED else self.count)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entrant:
    """One artifact in one runtime: what the reasoner needs to know of it. `context`: the longest its model was trained for."""

    path: Path
    name: str
    grid: str
    weights: int
    runtime: str
    options: Mapping[str, Any]
    context: int


@dataclass(frozen=True, slots=True)
class Found:
    """What came of it: the answers (None without one), the error it ended with if it did, and what is to be said."""

    reasoning: Reasoning | None
    error: R1qError | None = None
    notes: tuple[str, ...] = ()


class Reasoner:
    """Asks the artifacts of one bench, each once."""

    def __init__(self, plan: ReasoningPlan, entrants: Sequence[Entrant]) -> None:
        self._plan, self._entrants = plan, entrants
        self._kept: dict[tuple[Path, str], Found] = {}
        self._tasks: dict[str, TaskSet] = {}

    def ask(self, entrant: Entrant) -> Steps:
        """Return what `entrant` answered, beside its float model's; yield (artifact, answers done, of how many)."""
        base = self._reference(entrant)
        if base is not None:
            yield from self._answered(base)
        found = yield from self._answered(entrant)
        theirs = None if base is None else self._kept[_key(base)].reasoning
        if found.reasoning is None or base is entrant:
            return found
        if base is None or theirs is None:
            why = "no float artifact of this model is in this bench" if base is None else f"{base.name} did not answer"
            return replace(found, notes=(*found.notes, f"{why}: flips and token inflation need its BF16 file"))
        return replace(found, reasoning=found.reasoning.compared(base.name, theirs.answers))

    def _reference(self, entrant: Entrant) -> Entrant | None:
        floats = [one for one in self._entrants if one.grid.lower() in FLOATS and _same_model(one, entrant)]
        # One that runs in the same runtime differs by its weights alone.
        floats.sort(key=lambda one: one.runtime != entrant.runtime)
        return entrant if entrant.grid.lower() in FLOATS else floats[0] if floats else None

    def _answered(self, entrant: Entrant) -> Steps:
        key = _key(entrant)
        if key not in self._kept:
            try:
                self._kept[key] = yield from self._run(entrant)
            except R1qError as error:
                self._kept[key] = Found(None, error)
        return self._kept[key]

    def _run(self, entrant: Entrant) -> Steps:
        plan = self._plan
        folder = find_tokenizer(entrant.path, plan.tokenizer)
        tasks = self._load(plan.tasks or default_spec(folder))
        total = len(tasks.tasks) * plan.seeds
        settings: dict[str, Any] = {
            "seeds": plan.seeds,
            "temperature": plan.temperature,
            "top_p": plan.top_p,
            "max_tokens": plan.max_tokens or tasks.max_tokens,
        }
        job = {
            "path": str(entrant.path),
            "runtime": entrant.runtime,
            "options": dict(entrant.options),
            "context": entrant.context,
            "tokenizer": str(folder),
            "tasks": [asdict(task) for task in tasks.tasks],
            "sequences": plan.sequences,
            **settings,
        }
        opened: dict[str, Any] = {}
        records: list[dict[str, Any]] = []
        error: R1qError | None = None
        yield entrant.name, 0, total
        try:
            for message in isolate.run("r1q.benchmarks.thinking:think", job, what=f"asking {entrant.name}"):
                opened |= message.get("opened", {})
                if "answer" in message:
                    records.append(message["answer"])
                    yield entrant.name, len(records), total
        except R1qError as raised:
            error = raised
        if not records:
            return Found(None, error)
        reasoning = Reasoning(
            tasks=tasks.name,
            tasks_sha256=tasks.sha256,
            kinds=tuple(task.kind for task in tasks.tasks),
            sequences=opened["sequences"],
            answers=Answers.of(records),
            **settings,
        )
        fewer = len(tasks.tasks) < plan.count
        said = (f"{tasks.name} has {len(tasks.tasks)} problems of the {plan.count} asked for",) if fewer else ()
        return Found(reasoning, error, said)

    def _load(self, spec: str) -> TaskSet:
        if spec not in self._tasks:
            self._tasks[spec] = load_tasks(spec, self._plan.count)
        return self._tasks[spec]


def find_tokenizer(artifact: Path, given: Path | None = None) -> Path:
    """Return the folder with an artifact's tokenizer: the one given, its own, its checkpoint's, or the source's.

    Raises InputError where none is found.
    """
    folder = artifact if artifact.is_dir() else artifact.parent
    places = (folder, folder / SIDECAR, folder / CHECKPOINT / SIDECAR, folder.parent / CHECKPOINT / SIDECAR)
    sources = (find_reference(artifact), find_reference(folder.parent))
    for place in (given,) if given is not None else (*places, *sources):
        if place is not None and (place / "tokenizer.json").is_file():
            return place
    raise InputError(
        f"no tokenizer.json lies with {given or artifact}; name the model's own folder with --tokenizer FOLDER"
    )


def _key(entrant: Entrant) -> tuple[Path, str]:
    return entrant.path, entrant.runtime


def _same_model(one: Entrant, other: Entrant) -> bool:
    """Return whether two artifacts are of one model: made from the same checkpoint, or, where that is not known, of one size."""
    sources = [find_reference(entrant.path) for entrant in (one, other)]
    if None not in sources:
        return sources[0] == sources[1]
    return one.weights == other.weights
