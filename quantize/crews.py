"""From what `--workers` says to a crew: a number of processes here, or machines behind an address of Ray."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from r1q.core.errors import UsageError

if TYPE_CHECKING:
    from r1q.quantize.engine import Engine
    from r1q.quantize.workers import Crew

RAY, LOCAL = "ray", "local"
AUTO = f"{RAY}:auto"
_MOST = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """`count` processes, this one alone for 1; or, with an `address`, what Ray offers there, `local` for a Ray of this run's own."""

    count: int = 1
    address: str | None = None


def parse_workers(text: str) -> Workers:
    """Return what `--workers` means: a number, `ray`, `ray:auto` or `ray://host:port`. Raises `UsageError` for anything else.

    >>> parse_workers("2"), parse_workers("ray").address
    (Workers(count=2, address=None), 'local')
    """
    if text.isascii() and text.isdigit() and 0 < int(text) <= _MOST:
        return Workers(count=int(text))
    if text == RAY:
        return Workers(address=LOCAL)
    if text == AUTO:
        return Workers(address="auto")
    if text.startswith(f"{RAY}://") and len(text) > len(f"{RAY}://"):
        return Workers(address=text)
    raise UsageError(
        f"--workers {text!r}: give a number of processes (1 to {_MOST}), {RAY} for a Ray on this machine, {AUTO} for the Ray cluster "
        f"that this machine is part of, or {RAY}://HOST:PORT for another"
    )


@contextmanager
def crew_of(workers: str, engine: Engine, folder: Path) -> Iterator[Crew]:
    """Give the crew that `--workers` asks for, and end it afterwards. Raises what `parse_workers` and `make_crew` raise."""
    crew = make_crew(parse_workers(workers), engine, folder)
    try:
        yield crew
    finally:
        crew.close()


def make_crew(workers: Workers, engine: Engine, folder: Path) -> Crew:
    """Return the crew; what is lent on this machine is written to `folder`. Raises `MissingError` where Ray is not to be had."""
    if workers.address is not None:
        from r1q.quantize.ray_workers import RayCrew

        return RayCrew(workers.address, engine)
    if workers.count > 1:
        from r1q.quantize.processes import Processes

        return Processes(workers.count, folder)
    from r1q.quantize.workers import Here

    return Here()
