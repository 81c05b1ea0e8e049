"""Files written whole or not at all, and hashed.

A file is written under a temporary name in its own folder, flushed to the disk, and renamed; then the folder is flushed.
A reader never sees half a file, and a full disk leaves the previous file as it was.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from r1q.core.errors import R1qError, ResourceError, UsageError

TEMP_PREFIX = ".r1q-tmp-"
_HASH_CHUNK = 1 << 22
_LONGEST_NAME = 255  # bytes, on every usual file system


def explain_os_error(error: OSError, path: Path) -> R1qError:
    """Return the error a user should see for a failed write at or under `path`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ResourceError(f"the disk is full while writing {path}; free space or choose another folder with -o")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UsageError(f"cannot write {path}: {os.strerror(error.errno)}; choose another folder with -o")
    if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
        return UsageError(f"cannot write {path}: {os.strerror(error.errno)}; choose another folder with -o")
    return ResourceError(f"cannot write {path}: {error.strerror or error}")


def is_bare_name(name: str) -> bool:
    """Return whether `name`, read from a file, can only mean a file that lies directly in a folder."""
    try:
        raw = name.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell and no file name can
        return False
    return 0 < len(raw) <= _LONGEST_NAME and name not in (".", "..") and not any(c in name for c in "/\\\0")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn operating-system errors of the enclosed writes into errors that name `path` and the way out."""
    try:
        yield
    except OSError as error:
        raise explain_os_error(error, path) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success flush and rename it to `path`, on failure remove it.

    Raises `ResourceError` for a full disk and `UsageError` for a folder that cannot be written; errors of the enclosed code pass.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=TEMP_PREFIX, dir=path.parent)
        os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with writing(path):
            _flush(temporary)
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
            _flush(path.parent)
    finally:
        with writing(path):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Do as `replacing`, for enclosed code that writes and does nothing else: its errors are explained as those of the rest."""
    with replacing(path) as temporary, writing(path):
        yield temporary


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a binary file that becomes `path` only when the block ends without an error (see `atomic_path`)."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        yield file


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Write `value` as sorted, indented JSON, atomically: equal values give equal bytes."""
    with atomic_write(path) as file:
        file.write(json_bytes(value))


def json_bytes(value: Mapping[str, object]) -> bytes:
    """Return the canonical bytes of `value`: sorted keys, two spaces, no NaN, a newline at the end."""
    return (json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def sha256_file(path: Path) -> str:
    """Return the hexadecimal sha256 of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def fill(file: FileIO, start: int, room: memoryview) -> bool:
    """Read bytes of a file from `start` on until `room` is full; return whether there were so many."""
    file.seek(start)
    while room:
        count = file.readinto(room)
        if not count:
            return False
        room = room[count:]
    return True


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files that a killed run left in `folder`."""
    for leftover in folder.glob(f"{TEMP_PREFIX}*"):
        leftover.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    # The mask can only be read by setting it; /proc avoids that race where it exists.
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(status.partition("Umask:")[2].split()[0], 8)
    except (OSError, IndexError, ValueError):
        return 0o022
