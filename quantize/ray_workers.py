"""A crew of machines: tasks run on a Ray cluster, what is lent to them goes through its object store, weights and parts by paths.

Ray schedules, moves objects, and does the tasks of a worker or a machine that is lost again; nothing of that is done here. The model's
folder and the output folder are at the same paths on every machine. This is the one place that imports Ray; it is told to report
nothing about its use to anybody.
"""

from __future__ import annotations

import os
import pickle
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from r1q.core.errors import MissingError, R1qError, ResourceError
from r1q.quantize.engine import Engine
from r1q.quantize.tasks import Site
from r1q.quantize.workers import TRIES, Task, died, perform

_AHEAD = 2  # tasks for each place that the cluster has for one
_SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


Packed = dict[str, tuple[NDArray[np.uint8], str, tuple[int, ...]]]
"""Arrays as their bytes, which workers on one machine share in the object store, with dtype and shape."""


class RayCrew:
    """What the Ray at `address` offers: `local` for one of this run's own on this machine, `auto`, or `ray://host:port`.

    Every task takes as many CPUs as the engine has threads.
    """

    sliced = True

    def __init__(self, address: str, engine: Engine) -> None:
        """Raises `MissingError` without Ray or where it does not answer, `ResourceError` where no machine has enough CPUs."""
        os.environ.update({name: value for name, value in _SETTINGS.items() if name not in os.environ})
        try:
            import ray

            if address.startswith("ray://"):
                import_module("grpc")  # its client's, which Ray does without elsewhere
        except ImportError as error:
            raise MissingError(f"--workers ray needs Ray ({error}): pip install 'r1q[ray]'") from None
        self._ray, self._cpus, self._ours, self._address = ray, engine.threads, not ray.is_initialized(), address
        if self._ours:
            self._join(address)
        self._remote = ray.remote(num_cpus=engine.threads, max_retries=TRIES - 1)(_perform)
        if not self._places():
            self.close()
            raise ResourceError(
                f"no machine of the Ray cluster has {engine.threads} CPUs for a task; take fewer --threads"
            )

    def lend(self, arrays: Mapping[str, Tensor]) -> Any:
        """Put the arrays into the object store. Raises `ResourceError` where the cluster is gone."""
        with self._reached():
            return self._ray.put({name: _packed(array) for name, array in arrays.items()})

    def take_back(self, lent: Any) -> None:
        """Do nothing: Ray drops what nobody refers to."""

    def do(self, site: Site, calls: Iterable[tuple[Task, Any]]) -> Iterator[Task]:
        """Do tasks wherever there is a place and yield them in order, as `workers.Crew` says.

        Raises `ResourceError` where the cluster is gone, besides.
        """
        with self._reached():
            yield from self._do(site, calls)

    @contextmanager
    def _reached(self) -> Iterator[None]:
        """Say of the enclosed code's lost connections what to do."""
        try:
            yield
        except ConnectionError as error:
            raise ResourceError(
                f"the Ray at {self._address} is gone: {_said(error)}; start it, and the same command goes on"
            ) from error

    def _join(self, address: str) -> None:
        for tried in range(TRIES):
            try:
                self._ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="error")
                return
            except (ConnectionError, RuntimeError, ValueError, ImportError) as error:
                # The server for clients forks a process for each, which at times dies of the fork: another one may live.
                if isinstance(error, ConnectionAbortedError) and tried + 1 < TRIES:
                    continue
                raise MissingError(
                    f"no Ray answers at {address}: {_said(error)}; start one, or take --workers N"
                ) from error

    def _do(self, site: Site, calls: Iterable[tuple[Task, Any]]) -> Iterator[Task]:
        packed = self._ray.put(pickle.dumps(site))
        coming, running = iter(calls), deque[tuple[Task, Any]]()
        try:
            while True:
                # Asked each time: machines come and go.
                while len(running) < _AHEAD * max(1, self._places()) and (call := next(coming, None)) is not None:
                    task, lent = call
                    running.append((task, self._remote.options(name=task.name).remote(packed, task, lent)))
                    del call, lent  # what nobody refers to is dropped
                if not running:
                    return
                self._await(*running[0])
                task, _ = running.popleft()
                yield task
        finally:
            for _, result in running:
                self._ray.cancel(result)

    def close(self) -> None:
        """Leave the cluster, if this crew joined it."""
        if self._ours:
            self._ray.shutdown()

    def _await(self, task: Task, result: Any) -> None:
        errors = self._ray.exceptions
        try:
            error = self._ray.get(result)
        except (
            errors.WorkerCrashedError,
            errors.NodeDiedError,
            errors.OutOfMemoryError,
            errors.ObjectLostError,
        ) as gone:
            raise died(task) from gone
        if error is not None:
            raise error

    def _places(self) -> int:
        """Return how many tasks the machines that are there can do at once."""
        machines = [node.get("Resources", {}) for node in self._ray.nodes() if node.get("Alive")]
        return sum(int(resources.get("CPU", 0)) // self._cpus for resources in machines)


def _said(error: Exception) -> str:
    """Return the first line of an error of Ray's, some of which have a page."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _packed(array: Tensor) -> tuple[NDArray[np.uint8], str, tuple[int, ...]]:
    flat = array.cpu().contiguous().flatten().view(torch.uint8).numpy()
    return flat, str(array.dtype).removeprefix("torch."), tuple(array.shape)


def _perform(site: bytes, task: Task, lent: Packed) -> R1qError | None:
    """Do a task in a worker of Ray's; return what is wrong, of what a user can mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about arrays that cannot be written to; nobody does
        arrays = {
            name: torch.from_numpy(flat).view(getattr(torch, dtype)).reshape(shape)
            for name, (flat, dtype, shape) in lent.items()
        }
    try:
        perform(site, task, arrays)
    except R1qError as error:
        return error
    return None
