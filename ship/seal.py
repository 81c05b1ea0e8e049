"""The seal of a parcel: sums that name whatever is not as it was sent, down to one bit, themselves included.

r1q.lock.json   every other file's size and sha256, and a sum over its own content, so that it needs nobody to vouch for it
SHA256SUMS      the same for `sha256sum -c`, the lock included; what it must say follows from the lock, byte for byte
tensors.json    sha256 of every tensor in the artifacts, so that a damaged file is named down to the tensor
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from r1q.core.errors import InputError, R1qError
from r1q.core.files import atomic_write, is_bare_name, json_bytes, sha256_file, write_json
from r1q.core.gguf_file import GgufFile
from r1q.core.safetensors_file import SafetensorsFile

LOCK, SUMS, TENSORS = "r1q.lock.json", "SHA256SUMS", "tensors.json"
_MOST_BYTES = 1 << 26
_MOST_DEPTH = 4
_SLAB = 1 << 24


@dataclass(frozen=True, slots=True)
class Defect:
    """What is not as it was sent: a file (and the tensor in it), and what is wrong."""

    where: str
    what: str

    def text(self) -> str:
        """Return one line."""
        return f"{self.where}: {self.what}"


def list_files(parcel: Path) -> dict[str, Path]:
    """Return every file of a folder by its path inside it, sorted. Raises `InputError` for links and what is no plain file."""
    found: dict[str, Path] = {}
    for path in sorted(parcel.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise InputError(f"{path} is neither a file nor a folder; a parcel holds nothing else: unpack it again")
        if path.is_file():
            found[path.relative_to(parcel).as_posix()] = path
    return found


def tensor_sums(files: Mapping[str, Path]) -> dict[str, dict[str, str]]:
    """Return the sha256 of every tensor's stored bytes, by file, for those formats that name their tensors."""
    readers = {".gguf": gguf_tensor_sums, ".safetensors": safetensors_tensor_sums}
    return {name: readers[path.suffix](path) for name, path in files.items() if path.suffix in readers}


def gguf_tensor_sums(path: Path) -> dict[str, str]:
    """Return the sha256 of every tensor in a GGUF file."""
    file = GgufFile.open(path)
    sums = {}
    for name in file.tensors:
        data, digest = file.read_bytes(name), hashlib.sha256()
        for start in range(0, len(data), _SLAB):
            digest.update(data[start : start + _SLAB].data)
        sums[name] = digest.hexdigest()
    return sums


def safetensors_tensor_sums(path: Path) -> dict[str, str]:
    """Return the sha256 of every tensor in a safetensors file."""
    with SafetensorsFile.open(path) as file:
        return {name: hashlib.sha256(file.read(name).tobytes()).hexdigest() for name in file.tensors}


def seal(parcel: Path, lock: Mapping[str, object]) -> None:
    """Write tensors.json, r1q.lock.json with `lock` in it, and SHA256SUMS, in that order; nothing may be written after."""
    write_json(parcel / TENSORS, dict(tensor_sums(list_files(parcel))))
    files = {
        name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for name, path in list_files(parcel).items()
    }
    body = {**lock, "files": files}
    write_json(parcel / LOCK, {**body, "seal": hashlib.sha256(json_bytes(body)).hexdigest()})
    with atomic_write(parcel / SUMS) as file:
        file.write(_sums_text(parcel, {name: str(facts["sha256"]) for name, facts in files.items()}))


def _sums_text(parcel: Path, sums: Mapping[str, str]) -> bytes:
    whole = {**sums, LOCK: sha256_file(parcel / LOCK)}
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(whole.items())).encode()


def check_parcel(parcel: Path) -> Iterator[Defect]:
    """Yield everything that is not as it was sent. Raises `InputError` for a folder that is no parcel at all."""
    if not (parcel / LOCK).is_file() and not (parcel / SUMS).is_file():
        raise InputError(f"{parcel} is no parcel: it has neither {LOCK} nor {SUMS}")
    present = list_files(parcel)
    wanted, broken = _read_lock(parcel)
    if broken:
        yield Defect(LOCK, broken)
        wanted = _read_sums(parcel)
    elif SUMS not in present:
        yield Defect(SUMS, "is missing")
    elif (parcel / SUMS).read_bytes() != _sums_text(parcel, wanted):
        yield Defect(SUMS, f"does not say what {LOCK} says")
    known = {*wanted, LOCK, SUMS}
    yield from (Defect(name, "is not part of the parcel") for name in present if name not in known)
    for name, digest in wanted.items():
        if name == LOCK:
            continue
        if name not in present:
            yield Defect(name, "is missing")
        elif sha256_file(present[name]) != digest:
            yield from _damage(parcel, name, present[name])


def _damage(parcel: Path, name: str, path: Path) -> Iterator[Defect]:
    """Yield what is damaged in a file, by tensor where it has some and their sums are there."""
    try:
        listed = json.loads((parcel / TENSORS).read_bytes()) if name != TENSORS else {}
        sums = listed.get(name, {})
        found = tensor_sums({name: path})[name] if sums else {}
    except (R1qError, OSError, ValueError, AttributeError, RecursionError):
        yield Defect(name, "is not what was sent; its header is damaged")
        return
    changed = [tensor for tensor in sums if found.get(tensor) != sums[tensor]]
    yield from (Defect(f"{name}: {tensor}", "is not what was sent") for tensor in changed)
    if not changed:
        yield Defect(name, "is not what was sent" + ("; its tensors are, its header is not" if sums else ""))


def _read_lock(parcel: Path) -> tuple[dict[str, str], str]:
    """Return the sums of r1q.lock.json and an empty text, or what is wrong with it."""
    path = parcel / LOCK
    if not path.is_file():
        return {}, "is missing"
    try:
        if path.stat().st_size > _MOST_BYTES:
            return {}, "is larger than a lock can be"
        data = path.read_bytes()
        value = json.loads(data)
        stated = value.pop("seal")
        body = json_bytes(value)
        # The sum is over the content; the spelling must be the canonical one too, or white space could change unseen.
        spelled = json_bytes({**value, "seal": stated}) == data
        if not spelled or hashlib.sha256(body).hexdigest() != stated:
            return {}, "is not what was sent"
        sums = {name: facts["sha256"] for name, facts in value["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}, "is not what was sent"
    outside = [name for name in sums if not is_inside(name)]
    return ({}, f"names {outside[0]!r}, which lies outside the parcel") if outside else (sums, "")


def _read_sums(parcel: Path) -> dict[str, str]:
    """Return what SHA256SUMS says, as far as it can be read; used where the lock is damaged."""
    path = parcel / SUMS
    if not path.is_file() or path.stat().st_size > _MOST_BYTES:
        return {}
    lines: Sequence[str] = path.read_text(encoding="utf-8", errors="replace").splitlines()
    pairs = [(line[66:], line[:64]) for line in lines if line[64:66] == "  "]
    return {name: digest for name, digest in pairs if is_inside(name)}


def is_inside(name: str) -> bool:
    """Return whether a file's name, read from a parcel, can only lie inside it."""
    parts = name.split("/")
    return len(parts) <= _MOST_DEPTH and all(is_bare_name(part) for part in parts)
