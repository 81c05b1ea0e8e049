"""The embedded model in four bits, and parcels of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from r1q.plan.job import Job, open_job, plan_job, run_job
from r1q.ship.parcel import pack

NAME = "Tiny-R1-4.9M-Q4_K_M"


@pytest.fixture(scope="session")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output folder of `r1q quantize --bits 4` on the embedded model. Shared: do not write to it."""
    folder = tmp_path_factory.mktemp("ship") / "tiny"
    opened = open_job(Job(bits=4, output=folder))
    list(run_job(opened, plan_job(opened)))
    return folder


@pytest.fixture(scope="session")
def packed(output: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a parcel for a server. Shared: do not write to it."""
    return pack(output, "server", tmp_path_factory.mktemp("parcel") / "p").path


@pytest.fixture
def parcel(packed: Path, tmp_path: Path) -> Path:
    """Return a parcel that a test may damage."""
    return Path(shutil.copytree(packed, tmp_path / "parcel"))


Flip = Callable[[Path, int], None]


@pytest.fixture
def flip() -> Flip:
    """Return `flip(path, bit)`, which turns one bit of a file over."""

    def turn(path: Path, bit: int) -> None:
        with open(path, "r+b") as file:
            file.seek(bit // 8)
            byte = file.read(1)[0]
            file.seek(bit // 8)
            file.write(bytes((byte ^ 1 << bit % 8,)))

    return turn
