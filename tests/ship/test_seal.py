"""The seal: sha256sum agrees, and one bit turned anywhere is found and named."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from r1q.cli import main
from r1q.core.errors import InputError
from r1q.core.gguf_file import GgufFile
from r1q.ship.seal import LOCK, SUMS, check_parcel, is_inside

NAME = "Tiny-R1-4.9M-Q4_K_M.gguf"
Flip = Callable[[Path, int], None]


def names(parcel: Path) -> list[str]:
    return [defect.where for defect in check_parcel(parcel)]


def test_sha256sum_itself_agrees(packed: Path) -> None:
    done = subprocess.run(["sha256sum", "-c", SUMS], cwd=packed, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    listed = {line.partition(": ")[0] for line in done.stdout.splitlines()}
    assert listed == {path.name for path in packed.iterdir()} - {SUMS}
    assert names(packed) == []


def test_one_bit_anywhere_is_found_and_named(parcel: Path, flip: Flip) -> None:
    rng = np.random.default_rng(12)
    for path in sorted(parcel.iterdir()):
        size = 8 * path.stat().st_size
        bits = {0, size - 1, *rng.integers(0, size, 4 if path.suffix == ".gguf" else 12).tolist()}
        for bit in bits:
            flip(path, bit)
            found = names(parcel)
            assert found, f"bit {bit} of {path.name}"
            assert all(where.partition(": ")[0] == path.name for where in found), f"bit {bit} of {path.name}: {found}"
            flip(path, bit)
    assert names(parcel) == []


def test_the_damaged_tensor_is_named(parcel: Path, flip: Flip) -> None:
    tensor = GgufFile.open(parcel / NAME).tensors["blk.3.ffn_up.weight"]
    flip(parcel / NAME, 8 * (tensor.offset + tensor.nbytes - 1) + 3)
    assert names(parcel) == [f"{NAME}: blk.3.ffn_up.weight"]


def test_a_damaged_header_is_told_from_damaged_weights(parcel: Path, flip: Flip) -> None:
    data = (parcel / NAME).read_bytes()
    flip(parcel / NAME, 8 * data.index(b"Tiny R1"))
    (defect,) = check_parcel(parcel)
    assert "its header is not" in defect.what
    flip(parcel / NAME, 0)  # the magic: the file cannot be read at all
    (defect,) = check_parcel(parcel)
    assert "its header is damaged" in defect.what


def test_what_is_missing_and_what_is_too_much_are_named(parcel: Path) -> None:
    (parcel / "Modelfile").unlink()
    (parcel / "extra.txt").write_text("x")
    assert sorted(names(parcel)) == ["Modelfile", "extra.txt"]


def test_without_the_lock_the_sums_still_tell(parcel: Path, flip: Flip) -> None:
    (parcel / LOCK).unlink()
    flip(parcel / "run.sh", 77)
    assert names(parcel) == [LOCK, "run.sh"]


def test_a_lock_that_was_written_anew_does_not_hide_a_change(parcel: Path) -> None:
    value = json.loads((parcel / LOCK).read_bytes())
    value["files"]["../outside"] = value["files"].pop("README.md")
    (parcel / LOCK).write_text(json.dumps(value))
    assert LOCK in names(parcel)


def test_links_and_other_folders_are_refused(parcel: Path, tmp_path: Path) -> None:
    (parcel / "README.md").unlink()
    (parcel / "README.md").symlink_to("/etc/hostname")
    with pytest.raises(InputError, match="neither a file nor a folder"):
        names(parcel)
    with pytest.raises(InputError, match="is no parcel"):
        names(tmp_path)


@pytest.mark.parametrize("name", ["../x", "/x", "a/../x", "a\\x", "", "a//b", "."])
def test_names_that_lead_outside(name: str) -> None:
    assert not is_inside(name)


def test_the_command_says_what_is_wrong_and_ends_with_6(parcel: Path, flip: Flip) -> None:
    whole = CliRunner().invoke(main, ["ship", "--check", str(parcel)])
    assert whole.exit_code == 0
    assert "all 11 files are as they were sent" in whole.stdout
    flip(parcel / "Modelfile", 100)
    broken = CliRunner().invoke(main, ["ship", "--check", str(parcel)])
    assert broken.exit_code == 6
    assert broken.stdout == "Modelfile: is not what was sent\n"
    assert "1 thing" in broken.stderr
