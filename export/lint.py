"""Lint: what makes a model file slow or heavy, whoever made it, with what it costs and how to mend it."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from r1q.core.artifact import OutputFolder
from r1q.core.errors import CheckError, InputError
from r1q.core.onnx_file import CONFIG, MODEL
from r1q.core.untrusted import printable


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing in a file that costs time or memory: `what`, in how many tensors (operators), the `cost`, how to `mend` it."""

    what: str
    count: int
    cost: str
    mend: str

    def text(self) -> str:
        """Return the finding as one line."""
        tensors = f"{self.count} × " if self.count > 1 else ""
        return printable(f"{tensors}{self.what}: {self.cost}; {self.mend}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Linted:
    """What was found in one artifact, and where."""

    format: str
    path: Path
    findings: tuple[Finding, ...]

    def text(self) -> str:
        """Return the result in lines: the verdict, then the findings."""
        count = len(self.findings)
        verdict = f"{count} finding{'s' if count > 1 else ''}" if count else "nothing that makes it slow or heavy"
        lines = [printable(f"{self.format} {self.path}: {verdict}"), *(f"      {f.text()}" for f in self.findings)]
        return "\n".join(lines)

    def json(self) -> str:
        """Return the result as one line of JSON."""
        found = [{"what": f.what, "count": f.count, "cost": f.cost, "mend": f.mend} for f in self.findings]
        return json.dumps({"format": self.format, "path": str(self.path), "findings": found})


def lint_path(path: Path, features: Collection[str]) -> Iterator[Linted]:
    """Yield what is found in `path`: a GGUF file, a GPTQ or ONNX folder, or an output folder, each artifact of it.

    `features` are the processor's, as /proc/cpuinfo spells them. Raises `InputError` for what cannot be read or is none of these.
    """
    from r1q.export.lint_gguf import lint_gguf
    from r1q.export.lint_gptq import lint_gptq
    from r1q.export.lint_onnx import lint_onnx

    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if path.is_file() and path.suffix.lower() == ".gguf":
        yield Linted(format="gguf", path=path, findings=tuple(lint_gguf(path, features)))
    elif path.suffix.lower() == ".onnx" or any((path / name).is_file() for name in (CONFIG, MODEL)):
        yield Linted(format="onnx", path=path, findings=tuple(lint_onnx(path)))
    elif path.is_dir() and (listed := OutputFolder(path).listed()):
        for artifact in listed.values():
            yield from lint_path(path / artifact.name, features)
    elif path.is_dir() and (path / "config.json").is_file():
        yield Linted(format="gptq", path=path, findings=tuple(lint_gptq(path)))
    else:
        raise InputError(f"{path} is neither a .gguf file, nor a GPTQ or ONNX folder, nor an output folder of r1q")


def refuse_found(results: Sequence[Linted]) -> None:
    """Raise `CheckError` when anything was found."""
    count = sum(len(result.findings) for result in results)
    if count:
        first = next(finding for result in results for finding in result.findings)
        more = f" ({count} findings in all)" if count > 1 else ""
        raise CheckError(f"lint: {first.text()}{more}")


def megabytes(size: float) -> str:
    """Return a number of bytes as users read it."""
    return f"{size / 1e6:.1f} MB" if size < 1e9 else f"{size / 1e9:.2f} GB"
