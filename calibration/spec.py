"""What `--calibration` says: files, folders and `builtin`, mixed by weight.

    a.txt                          one text, from its start
    traces.jsonl:0.7,builtin:0.3   a mixture
    texts/                         every .txt and .jsonl of a folder, as one source

Sources are split at commas. A number after the last colon is a weight; any other colon belongs to the path. Weights count by their
ratio; they are given to all sources or to none (then all count alike).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from r1q.core.errors import InputError, UsageError

Kind = Literal["text", "jsonl", "folder", "builtin"]
BUILTIN: Final = "builtin"
BUILTIN_FOLDER = Path(__file__).resolve().parent / "texts"
BUILTIN_FILES = ("english.jsonl", "chinese.jsonl", "code.jsonl", "reasoning.jsonl")
KINDS: dict[str, Kind] = {".txt": "text", ".jsonl": "jsonl"}
MAX_FILE_BYTES = 1 << 30
MAX_FILES = 4096
_WEIGHT = re.compile(r"(?P<name>.*):(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|[+-]?(?:nan|inf))", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One part of a mixture: its files in order, and its share of the windows asked for (all shares sum to 1).

    `name` is a file's bare name; `ignored` counts files of a folder that are neither .txt nor .jsonl.
    """

    name: str
    kind: Kind
    share: float
    files: tuple[Path, ...]
    ignored: int = 0


def parse_spec(spec: str) -> tuple[Source, ...]:
    """Return the sources that `spec` names, checked to exist and to be of a readable size.

    Raises `UsageError` for a spec that says nothing clear, `InputError` for a file that is missing, of another kind or too large.
    """
    parts = [_weighted(part.strip(), spec) for part in spec.split(",")]
    names = [name for name, _ in parts]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"the calibration names {repeated[0]} twice; name it once, with a weight")
    given = [weight for _, weight in parts if weight is not None]
    if given and len(given) != len(parts):
        raise UsageError(f"the calibration {spec!r} gives weights to some sources only; give one to each, or to none")
    total = math.fsum(given)
    shares = [weight / total for weight in given] if given else [1 / len(parts)] * len(parts)
    return tuple(source for name, share in zip(names, shares, strict=True) for source in _sources(name, share))


def _weighted(part: str, spec: str) -> tuple[str, float | None]:
    found = _WEIGHT.fullmatch(part)
    name = found["name"] if found else part
    if not name:
        raise UsageError(
            f"the calibration {spec!r} has an empty part; give FILE.txt, FILE.jsonl, a folder or {BUILTIN}"
        )
    if found is None:
        return name, None
    weight = float(found["weight"])
    if not (0 < weight < math.inf):
        raise UsageError(f"the weight of {name} is {found['weight']}; a weight is a positive number")
    return name, weight


def _sources(name: str, share: float) -> list[Source]:
    if name == BUILTIN:
        each = share / len(BUILTIN_FILES)
        return [
            Source(name=file, kind=BUILTIN, share=each, files=(_checked(BUILTIN_FOLDER / file),))
            for file in BUILTIN_FILES
        ]
    path = Path(name)
    if path.is_dir():
        return [_folder(path, share)]
    kind = KINDS.get(path.suffix.lower())
    if not path.exists():
        raise InputError(
            f"the calibration file {path} does not exist; give FILE.txt, FILE.jsonl, a folder or {BUILTIN}"
        )
    if kind is None:
        raise InputError(f"the calibration file {path} is neither .txt nor .jsonl; rename it to what it holds")
    return [Source(name=path.name, kind=kind, share=share, files=(_checked(path),))]


def _folder(path: Path, share: float) -> Source:
    try:
        entries = sorted(entry for entry in path.iterdir() if entry.is_file() and not entry.name.startswith("."))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    files = tuple(_checked(entry) for entry in entries if entry.suffix.lower() in KINDS)
    if not files:
        raise InputError(f"{path} holds no .txt and no .jsonl file; give a folder with text for the calibration")
    if len(files) > MAX_FILES:
        raise InputError(f"{path} holds {len(files)} texts, more than {MAX_FILES}; join them into fewer files")
    ignored = len(entries) - len(files)
    return Source(name=f"{len(files)} files", kind="folder", share=share, files=files, ignored=ignored)


def _checked(path: Path) -> Path:
    try:
        if not path.is_file():
            # A pipe would wait for ever, and a device never end.
            raise InputError(f"cannot read {path}: not a regular file")
        size = path.stat().st_size
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    if size > MAX_FILE_BYTES:
        raise InputError(f"{path} has {size} bytes, more than {MAX_FILE_BYTES}; take a part of it for the calibration")
    return path
