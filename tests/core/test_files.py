"""Atomic writing: a reader never sees half a file, and every way a disk says no becomes a sentence."""

import os
import stat
from pathlib import Path

import pytest

from r1q.core.errors import ResourceError, UsageError
from r1q.core.files import (
    TEMP_PREFIX,
    atomic_path,
    atomic_write,
    explain_os_error,
    remove_leftovers,
    sha256_file,
    write_json,
)


def test_a_file_appears_whole_with_ordinary_rights(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file.bin"
    with atomic_write(target) as file:
        file.write(b"half")
        assert not target.exists()
        file.write(b" and half")
    assert target.read_bytes() == b"half and half"
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(target.stat().st_mode) == 0o666 & ~mask
    assert [path.name for path in target.parent.iterdir()] == ["file.bin"]


def test_a_failure_leaves_the_file_before_it(tmp_path: Path) -> None:
    target = tmp_path / "file.bin"
    target.write_bytes(b"before")

    def fail_halfway() -> None:
        with atomic_write(target) as file:
            file.write(b"after")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail_halfway()
    assert target.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [target]


def test_leftovers_of_a_kill_are_removed(tmp_path: Path) -> None:
    (tmp_path / f"{TEMP_PREFIX}abc").write_bytes(b"x")
    (tmp_path / "kept").write_bytes(b"x")
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize(
    ("number", "kind", "says"),
    [
        (28, ResourceError, "disk is full"),
        (30, UsageError, "Read-only"),
        (13, UsageError, "denied"),
        (5, ResourceError, "error"),
    ],
)
def test_what_the_disk_says_becomes_a_sentence(number: int, kind: type[Exception], says: str) -> None:
    error = explain_os_error(OSError(number, os.strerror(number)), Path("x"))
    assert type(error) is kind
    assert says in str(error)


def test_a_file_where_a_folder_should_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match="choose another folder"), atomic_path(tmp_path / "file" / "under"):
        pass


def test_json_is_canonical(tmp_path: Path) -> None:
    write_json(tmp_path / "a", {"b": 1, "a": "ü"})
    write_json(tmp_path / "b", {"a": "ü", "b": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == '{\n  "a": "ü",\n  "b": 1\n}\n'.encode()
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "c", {"x": float("nan")})


def test_sha256_of_the_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    assert sha256_file(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
