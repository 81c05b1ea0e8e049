"""Artifact: a finished foreign file and where it came from; and the output folder that `r1q quantize` fills.

<output>/checkpoint/      the QuantizedCheckpoint
<output>/<Name>.gguf      the artifact
<output>/gptq/            another artifact, a folder
<output>/artifacts.json   format, name, bytes, sha256 sums of every artifact, and of the manifest it was written from
<output>/where.json       the source's path on this machine; nothing hashes it, and deleting it loses only that
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from r1q.core.activations import ACTIVATIONS
from r1q.core.checkpoint import JOB, MANIFEST
from r1q.core.errors import InputError, UsageError
from r1q.core.files import TEMP_PREFIX, is_bare_name, sha256_file, write_json

ARTIFACTS, CHECKPOINT, WHERE = "artifacts.json", "checkpoint", "where.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A finished foreign file or folder: `name` beside artifacts.json, total `bytes`, and the sha256 of every file in it.

    `manifest_sha256` is that of the checkpoint's manifest it was written from; `notes` are lines for the user; `settings` are what was
    asked of the format beyond the weights.
    """

    format: str
    name: str
    bytes: int
    files: Mapping[str, str]
    manifest_sha256: str
    notes: tuple[str, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class OutputFolder:
    """The folder one `r1q quantize` fills. `elsewhere` is the checkpoint's folder where it does not lie in this one."""

    path: Path
    elsewhere: Path | None = None

    @property
    def checkpoint(self) -> Path:
        """Where the QuantizedCheckpoint is or will be."""
        return self.elsewhere or self.path / CHECKPOINT

    def refuse_foreign(self) -> None:
        """Raise `UsageError` when the folder exists and was not made by r1q."""
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise UsageError(f"{self.path} is a file; choose another folder with -o")
        names = {entry.name for entry in self.path.iterdir() if not entry.name.startswith(TEMP_PREFIX)}
        started = (self.checkpoint / JOB).is_file()
        # A run killed before job.json leaves at most an empty checkpoint folder, and what was measured before.
        untouched = names <= {CHECKPOINT, ACTIVATIONS} and not _foreign_files(self.checkpoint)
        if not started and not untouched:
            raise UsageError(f"{self.path} exists and was not made by r1q; choose another folder with -o")

    def artifacts(self) -> dict[str, Artifact]:
        """Return the recorded artifacts by format; files that are gone or changed in size are left out."""
        return {fmt: artifact for fmt, artifact in self.listed().items() if self._whole(artifact)}

    def listed(self) -> dict[str, Artifact]:
        """Return the recorded artifacts by format, whatever became of their files.

        Raises `InputError` for a list that is damaged or names files outside the folder.
        """
        path = self.path / ARTIFACTS
        try:
            value = json.loads(path.read_bytes())
            found = {
                fmt: Artifact(**{**entry, "format": fmt, "notes": tuple(entry["notes"])})
                for fmt, entry in value.items()
            }
            names = [name for entry in found.values() for name in (entry.name, *entry.files)]
            outside = [name for name in names if not is_bare_name(name)]
            texts = [
                text
                for entry in found.values()
                for text in (*entry.files.values(), *entry.notes, *entry.settings.values(), entry.manifest_sha256)
            ]
            sized = all(type(entry.bytes) is int and 0 <= entry.bytes < 1 << 63 for entry in found.values())
            if not sized or not all(isinstance(text, str) for text in texts):
                raise TypeError("a size is not a number, or a hash or note not text")
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            raise InputError(f"{path} is damaged ({error}); delete it and run r1q quantize again") from error
        if outside:
            raise InputError(f"{path} names a file outside its folder; delete it and run r1q quantize again")
        return found

    def _whole(self, artifact: Artifact) -> bool:
        files = artifact_files(self.path / artifact.name)
        return (
            set(files) == set(artifact.files) and sum(path.stat().st_size for path in files.values()) == artifact.bytes
        )

    def current(self, format: str, settings: Mapping[str, str] | None = None) -> Artifact | None:
        """Return the artifact of `format` if it was written from the checkpoint as it is now, with `settings` (None: with any)."""
        artifact = self.artifacts().get(format)
        manifest = self.checkpoint / MANIFEST
        if artifact is None or not manifest.is_file() or sha256_file(manifest) != artifact.manifest_sha256:
            return None
        return artifact if settings is None or dict(artifact.settings) == dict(settings) else None

    def record(
        self, format: str, path: Path, notes: tuple[str, ...], settings: Mapping[str, str] | None = None
    ) -> Artifact:
        """Hash a finished artifact and list it in artifacts.json."""
        files = artifact_files(path)
        artifact = Artifact(
            format=format,
            name=path.name,
            bytes=sum(file.stat().st_size for file in files.values()),
            files={name: sha256_file(file) for name, file in files.items()},
            manifest_sha256=sha256_file(self.checkpoint / MANIFEST),
            notes=notes,
            settings=dict(settings or {}),
        )
        listed = {**self.artifacts(), format: artifact}
        write_json(self.path / ARTIFACTS, {name: asdict(value) for name, value in listed.items()})
        return artifact

    def remember_source(self, source: Path) -> None:
        """Write where the source checkpoint is on this machine, for `r1q bench` to compare with."""
        write_json(self.path / WHERE, {"source": str(source.resolve())})


def artifact_files(path: Path) -> dict[str, Path]:
    """Return the files of an artifact by their path inside it: a file is itself, a folder all that lie directly in it."""
    if path.is_dir():
        return {entry.name: entry for entry in sorted(path.iterdir()) if entry.is_file()}
    return {path.name: path} if path.is_file() else {}


def find_reference(artifact: Path) -> Path | None:
    """Return the float checkpoint an artifact (file or output folder) was made from, if it is still there."""
    folder = artifact if artifact.is_dir() else artifact.parent
    try:
        where = json.loads((folder / WHERE).read_bytes())
    except (OSError, ValueError):
        return None
    source = where.get("source") if isinstance(where, Mapping) else None
    path = Path(source) if isinstance(source, str) else None
    return path if path is not None and path.is_dir() else None


def newest_output(root: Path) -> Path | None:
    """Return the output folder under `root` whose artifact was written last, or None."""
    folders = [path.parent for path in root.glob(f"*/{ARTIFACTS}")] if root.is_dir() else []
    return max(folders, key=lambda folder: (folder / ARTIFACTS).stat().st_mtime, default=None)


def _foreign_files(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return [entry.name for entry in folder.iterdir() if not entry.name.startswith(TEMP_PREFIX)]
