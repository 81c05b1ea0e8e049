"""Who does the tasks of a run: this process, processes beside it, or machines (`quantize/ray_workers.py`); the bytes are the same.

A crew is given tasks as they are needed, some ahead of what is done, and answers in their order. Tasks only write parts, so one whose
worker died is simply done again, a few times.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Protocol

from torch import Tensor

from r1q.core.errors import ResourceError
from r1q.quantize.computing import computing
from r1q.quantize.tasks import Arrays, Site
from r1q.quantize.witness import refuse_elsewhere

TRIES = 3
"""How often a task is begun before the death of its worker counts as its own fault."""
_NO_MEMORY = "memory"  # in every message of torch's allocators


class Task(Protocol):
    """Something to do at a site with arrays that are lent to it. It can be pickled."""

    @property
    def name(self) -> str:
        """The tensor that it is about."""

    def do(self, site: Site, arrays: Arrays) -> None:
        """Do it, twice if need be: the result is the same."""


class Crew(Protocol):
    """Who does tasks. `sliced` says that every task is better lent its own rows of an array than all of them the whole."""

    sliced: bool

    def lend(self, arrays: Mapping[str, Tensor]) -> Any:
        """Return what stands for the arrays in `do`, until it is given back."""

    def take_back(self, lent: Any) -> None:
        """Give up what was lent."""

    def do(self, site: Site, calls: Iterable[tuple[Task, Any]]) -> Iterator[Task]:
        """Do tasks, each with what is lent to it, and yield them in order as they are done. Calls are taken some ahead.

        Raises what a task raised, when it would be its turn; `ResourceError` where its workers died again and again.
        """

    def close(self) -> None:
        """End all workers."""


class Here:
    """This process, one task at a time."""

    sliced = False

    def lend(self, arrays: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the arrays as they are."""
        return arrays

    def take_back(self, lent: Mapping[str, Tensor]) -> None:
        """Do nothing: nothing was copied."""

    def do(self, site: Site, calls: Iterable[tuple[Task, Mapping[str, Tensor]]]) -> Iterator[Task]:
        """Do each task when it is asked for."""
        for task, arrays in calls:
            task.do(site, arrays)
            yield task

    def close(self) -> None:
        """Do nothing."""


@contextmanager
def lending(crew: Crew, arrays: Mapping[str, Tensor]) -> Iterator[Any]:
    """Lend arrays to a crew for a while."""
    lent = crew.lend(arrays)
    try:
        yield lent
    finally:
        crew.take_back(lent)


def perform(site: bytes, task: Task, arrays: Arrays) -> None:
    """Do a task in a worker, at a pickled site.

    Raises what the task raises, and `ResourceError` with the task's tensor where memory is short.
    """
    here = _opened(site)
    try:
        with computing(here.engine):
            task.do(here, {name: array.to(here.engine.device) for name, array in arrays.items()})
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or _NO_MEMORY in str(error):
            raise ResourceError(f"{task.name}: no memory is left for a worker; take fewer --workers") from error
        raise


@lru_cache(maxsize=1)
def _opened(site: bytes) -> Site:
    # Once for each process: to open a checkpoint of many shards takes longer than many a task.
    found: Site = pickle.loads(site)
    refuse_elsewhere(found.numbers, found.job, found.folder)
    return found


def died(task: Task) -> ResourceError:
    """Return what a run ends with whose workers cannot get through a task."""
    return ResourceError(
        f"{task.name}: {TRIES} workers died at it, mostly of too little memory; take fewer --workers, and the same command goes on"
    )
