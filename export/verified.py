"""Verified: what a verification found out about one artifact, and how it says so."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from r1q.core.errors import CheckError, InputError
from r1q.core.untrusted import printable

_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Defect:
    """One thing that is not as it should be: `where` (a file, a key or a tensor) and `what`.

    `difference` is the largest difference between two values of a tensor, infinite where they cannot be compared, None for what
    is no tensor. `unreadable`: the file could not be read at all.
    """

    where: str
    what: str
    difference: float | None = None
    unreadable: bool = False

    def __str__(self) -> str:
        """Return the defect as one line."""
        return printable(f"{self.where}: {self.what}")

    @classmethod
    def of_counts(cls, where: str, counts: Mapping[str, int], largest: float) -> Defect | None:
        """Return the defect of a tensor in which so many codes, stored scales, values differ; None where nothing does."""
        said = [f"{count} {what}{'s' if count > 1 else ''}" for what, count in counts.items() if count]
        if not said:
            return None
        verb = "differs" if sum(counts.values()) == 1 else "differ"
        return cls(where=where, what=f"{', '.join(said)} {verb}, by up to {largest:.3g}", difference=largest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What was compared of one artifact, or of the checkpoint (`format` "checkpoint"), and every defect.

    `files` were hashed and are as listed; `tensors` were compared, those with a defect included. `notes` say what was rounded
    and what could not be checked.
    """

    format: str
    path: Path
    files: int
    tensors: int
    defects: tuple[Defect, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def worst(self) -> Defect | None:
        """The tensor that differs most, else the first defect, else None."""
        tensors = [defect for defect in self.defects if defect.difference is not None]
        return max(tensors, key=lambda defect: defect.difference or 0.0, default=next(iter(self.defects), None))

    def text(self) -> str:
        """Return the result in lines: the verdict, then the defects (the worst tensor first), then the notes."""
        lines = [f"{'FAILED' if self.defects else 'ok'}: {self.format} {self.path}: {self._verdict()}"]
        shown = sorted(self.defects, key=lambda d: (d.difference is None, -(d.difference or 0.0)))
        lines += [f"      {defect}" for defect in shown[:_SHOWN]]
        if len(shown) > _SHOWN:
            lines.append(f"      … and {len(shown) - _SHOWN} more (--json lists all)")
        return "\n".join([*map(printable_line, lines), *(f"      {printable(note)}" for note in self.notes)])

    def json(self) -> str:
        """Return the result as one line of JSON; an infinite difference is null."""
        defects = [
            {"where": d.where, "what": d.what, "difference": _finite(d.difference), "unreadable": d.unreadable}
            for d in self.defects
        ]
        value = {
            "format": self.format, "path": str(self.path), "ok": not self.defects, "files": self.files,
            "tensors": self.tensors, "defects": defects, "notes": list(self.notes),
        }  # fmt: skip
        return json.dumps(value)

    def _verdict(self) -> str:
        hashed = f"{self.files} file{'s' if self.files != 1 else ''} as hashed"
        broken = sum(defect.difference is not None for defect in self.defects)
        if broken:
            return f"{hashed}; {broken} of {self.tensors} tensors differ"
        if self.defects:
            return f"{hashed}; {len(self.defects)} defect{'s' if len(self.defects) > 1 else ''}"
        same = "stored bytes as the manifest says" if self.format == "checkpoint" else "same weights"
        return f"{hashed}; {same}: {self.tensors} tensors"


def printable_line(line: str) -> str:
    """Return a line made printable with its indentation kept."""
    return line[: len(line) - len(line.lstrip())] + printable(line)


def refuse_failed(results: Sequence[Verified]) -> None:
    """Raise `InputError` when a file could not be read, `CheckError` when anything else was not as it should be."""
    defects = [defect for result in results for defect in result.defects]
    if not defects:
        return
    first = next((result for result in results if result.defects), results[0])
    unreadable = next((defect for defect in defects if defect.unreadable), None)
    count = f" ({len(defects)} defects in all)" if len(defects) > 1 else ""
    kind = CheckError if unreadable is None else InputError
    raise kind(f"verify failed: {unreadable or first.worst}{count}; {_mend(first)}")


def _mend(result: Verified) -> str:
    if result.format == "checkpoint":
        return "run the same r1q quantize again: it makes what is damaged anew"
    return f"delete {result.path} and run r1q export on its checkpoint again"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
