"""A crew of processes on this machine: what is lent to them lies in files that they map, and one that dies is replaced.

They are spawned, not forked (threads of torch and numba do not survive a fork), and end when their pipe does, even where the run was
killed: nobody is left behind.
"""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import tempfile
import traceback
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext
from pathlib import Path

import torch
from torch import Tensor

from r1q.core.allocator import return_freed_memory
from r1q.core.errors import R1qError
from r1q.core.files import TEMP_PREFIX, writing
from r1q.quantize.tasks import Site
from r1q.quantize.workers import TRIES, Task, died, perform

_AHEAD = 8  # tasks for each worker that may be done before one that is slow
_SECONDS = 5.0  # that a worker has to end by itself


@dataclass(frozen=True, slots=True, kw_only=True)
class Mapped:
    """An array in a file that begins with its first byte."""

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    def open(self) -> Tensor:
        """Return the array, mapped: processes share its memory, and pages are read when they are used."""
        size = prod(self.shape)
        if not size:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.from_file(str(self.path), shared=True, size=size, dtype=self.dtype).reshape(self.shape)


Lent = Mapping[str, Mapped]


@dataclass(slots=True)
class _Call:
    number: int
    task: Task
    lent: Lent
    tries: int = 0


class Processes:
    """`count` worker processes; what is lent to them is written to `folder`. They are started with the first task."""

    sliced = False

    def __init__(self, count: int, folder: Path) -> None:
        self._count, self._folder = count, folder
        self._workers: list[_Worker] = []

    def lend(self, arrays: Mapping[str, Tensor]) -> Lent:
        """Write the arrays to files. Raises `ResourceError` for a full disk."""
        return {name: self._write(array) for name, array in arrays.items()}

    def take_back(self, lent: Lent) -> None:
        """Remove the files; who has them mapped keeps them."""
        for mapped in lent.values():
            mapped.path.unlink(missing_ok=True)

    def do(self, site: Site, calls: Iterable[tuple[Task, Lent]]) -> Iterator[Task]:
        """Do tasks on all workers and yield them in order, as `workers.Crew` says."""
        packed = pickle.dumps(site)
        coming = (_Call(number, task, lent) for number, (task, lent) in enumerate(calls))
        again, done, told = deque[_Call](), dict[int, Task | Exception](), 0
        try:
            while True:
                while (worker := self._idle()) and (again or len(done) < self._count * _AHEAD):
                    call = again.popleft() if again else next(coming, None)
                    if call is None:
                        break
                    worker.begin(call, packed)
                if told in done:
                    found = done.pop(told)
                    if isinstance(found, Exception):
                        raise found
                    told += 1
                    yield found
                    continue
                busy = {worker.pipe: worker for worker in self._workers if worker.call is not None}
                if not busy:
                    return
                for pipe in wait(list(busy)):
                    self._finish(busy[pipe], again, done)  # type: ignore[index]  # only pipes are waited for
        finally:
            for worker in [worker for worker in self._workers if worker.call is not None]:
                self._dismiss(worker)

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers:
            worker.pipe.close()
        for worker in list(self._workers):
            worker.process.join(_SECONDS)
            self._dismiss(worker)

    def _write(self, array: Tensor) -> Mapped:
        with writing(self._folder):
            with tempfile.NamedTemporaryFile(prefix=TEMP_PREFIX, dir=self._folder, delete=False) as file:
                array.cpu().contiguous().flatten().view(torch.uint8).numpy().tofile(file)
            return Mapped(path=Path(file.name), shape=tuple(array.shape), dtype=array.dtype)

    def _idle(self) -> _Worker | None:
        """Return a worker that has nothing to do, a new one if there may be more; None where all are at work."""
        for worker in self._workers:
            if worker.call is None:
                return worker
        if len(self._workers) == self._count:
            return None
        self._workers.append(_Worker(multiprocessing.get_context("spawn")))
        return self._workers[-1]

    def _finish(self, worker: _Worker, again: deque[_Call], done: dict[int, Task | Exception]) -> None:
        """Take what a worker has to say: that its task is done, or failed; one that says nothing more has died."""
        call = worker.call
        if call is None:
            raise ValueError("a worker without a task has answered")
        try:
            error = pickle.loads(worker.pipe.recv_bytes())
        except (EOFError, OSError):
            self._dismiss(worker)
            call.tries += 1
            if call.tries < TRIES:
                again.append(call)
            else:
                done[call.number] = died(call.task)
            return
        worker.call = None
        done[call.number] = call.task if error is None else error

    def _dismiss(self, worker: _Worker) -> None:
        worker.process.kill()
        worker.process.join()
        worker.pipe.close()
        self._workers.remove(worker)


class _Worker:
    """One process, and the task that it is at."""

    def __init__(self, context: SpawnContext) -> None:
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        with _deaf_to_ctrl_c():
            self.process.start()
        theirs.close()  # so that its end is heard here
        self.call: _Call | None = None

    def begin(self, call: _Call, site: bytes) -> None:
        """Give it a task. One that has died meanwhile is found out when it does not answer."""
        self.call = call
        try:
            self.pipe.send_bytes(pickle.dumps((site, call.task, call.lent)))
        except OSError:
            return


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """Let a process that is started be deaf to Ctrl-C from the first: it is for the run, which ends its workers."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(pipe: Connection) -> None:
    return_freed_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where signals cannot be masked
    while True:
        try:
            pipe.send_bytes(pickle.dumps(_error(pipe.recv_bytes())))
        except (EOFError, OSError):
            return


def _error(message: bytes) -> Exception | None:
    """Do a task and return what it raised, as it can be sent."""
    try:
        site, task, lent = pickle.loads(message)
        perform(site, task, {name: mapped.open() for name, mapped in lent.items()})
    except R1qError as error:
        return error
    except Exception as error:  # noqa: BLE001  # it is raised where the task was given out
        return RuntimeError("".join(traceback.format_exception(error)))
    return None
