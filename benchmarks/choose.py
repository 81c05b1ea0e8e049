"""Which runtimes open which artifact here: ours from a table, others' by asking their code in a child, for it may crash."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from r1q.benchmarks import isolate
from r1q.core.errors import R1qError, UsageError
from r1q.core.registry import Entry
from r1q.runtimes.table import RUNTIMES, load_runtime

UNSEEN = ("echo",)  # for tests: it opens nothing that a user has
# What ours open, so that nothing is imported to find out; tests hold it against the adapters.
OWN: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "llama-cpp": ("gguf",),
        "torch": ("hf", "checkpoint", "gptq"),
        "onnxruntime": ("onnx",),
        "onnxruntime-genai": ("onnx",),
        "echo": ("echo",),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """One runtime: the `formats` it opens, empty where it cannot be asked, and then `missing`: why, and how to mend it."""

    name: str
    formats: tuple[str, ...]
    missing: str = ""


def offers(asked: str | None = None) -> list[Offer]:
    """Return an offer for every runtime, or for the one asked for. Raises UsageError for a name that nobody offers."""
    names = RUNTIMES.names() if asked is None else (asked,)
    entries = {name: RUNTIMES.entry(name) for name in names if asked is not None or name not in UNSEEN}
    absent = {name: _absent(name, entry) for name, entry in entries.items()}
    present = [name for name in entries if not absent[name]]
    ours = {name for name in present if entries[name].package is None and name in OWN}
    answers = {name: Offer(name=name, formats=OWN[name]) for name in ours} | _ask([n for n in present if n not in ours])
    return [
        answers.get(name) or Offer(name=name, formats=(), missing=absent[name] or "it does not say what it opens")
        for name in entries
    ]


def formats(job: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Say what each runtime opens, in a child; the job: names. Yields a message each: name, and formats or missing."""
    for name in job["names"]:
        try:
            yield {"name": name, "formats": list(load_runtime(name).formats), "missing": ""}
        except R1qError as error:
            yield {"name": name, "formats": [], "missing": str(error)}


def suited(found: Sequence[Offer], format_name: str) -> tuple[list[str], list[str]]:
    """Return the runtimes that open a format here, and a line for each that cannot be had."""
    fitting = [offer.name for offer in found if format_name in offer.formats]
    return fitting, [f"{offer.name}: {offer.missing}" for offer in found if offer.missing]


def _absent(name: str, entry: Entry) -> str:
    if entry.needs is None or importlib.util.find_spec(entry.needs.partition(".")[0]) is not None:
        return ""
    how = f"pip install 'r1q[{entry.extra}]'" if entry.extra else f"install {entry.needs}"
    return f"{entry.needs} is not installed ({how})"


def _ask(names: Sequence[str]) -> dict[str, Offer]:
    """Ask all in one child; one that ends it is left out with its reason, and the others are asked again."""
    answers: dict[str, Offer] = {}
    waiting = list(names)
    while waiting:
        try:
            for message in isolate.run("r1q.benchmarks.choose:formats", {"names": waiting}, what=waiting[0]):
                name = message["name"]
                answers[name] = Offer(name=name, formats=tuple(message["formats"]), missing=message["missing"])
        except R1qError as error:
            culprit = next(name for name in waiting if name not in answers)
            answers[culprit] = Offer(name=culprit, formats=(), missing=f"does not load: {error}")
        waiting = [name for name in waiting if name not in answers]
    return answers


def refuse_unknown(asked: str | None) -> None:
    """Raise UsageError for a runtime that nobody offers."""
    if asked is not None:
        RUNTIMES.entry(asked)


def require_format(found: Sequence[Offer], asked: str, format_name: str, path: str) -> None:
    """Raise UsageError where the one runtime asked for does not open an artifact's format."""
    for offer in found:
        if offer.name == asked and offer.formats and format_name not in offer.formats:
            raise UsageError(
                f"{asked} opens {', '.join(offer.formats)}, and {path} is {format_name}: leave --runtime out, or choose another"
            )
