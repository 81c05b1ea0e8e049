"""Several processes that train as one: each takes its share of every batch, and torch's DistributedDataParallel averages gradients.

Started by `torchrun`, which says through its own environment who is who. One process alone is a group of one, and nothing is wrapped.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from r1q.core.errors import CheckError, UsageError

Loss = Callable[[Tensor, Tensor], Tensor]
"""(token ids int64 [rows, length], weights float32 of the same shape) to the mean divergence by these weights, in nats a token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """`size` processes, of which this is number `rank`, `local` of them on this machine. The first one writes and speaks."""

    rank: int = 0
    size: int = 1
    local: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    def share(self, rows: Tensor) -> Tensor:
        """Return this process's rows of a batch: every `size`-th."""
        return rows[self.rank :: self.size]

    def total(self, values: Sequence[float]) -> list[float]:
        """Return the sums of `values` over all processes: the same numbers, to the bit, in each."""
        if self.size == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums)
        return sums.tolist()

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.size > 1:
            dist.barrier()

    def averaged(self, parameters: Mapping[str, Tensor], loss: Loss) -> Loss:
        """Return `loss` so that its gradient is the mean over all processes. `parameters` are then `torch.nn.Parameter`."""
        return loss if self.size == 1 else DistributedDataParallel(_Learner(parameters, loss))

    def require_equal(self, parameters: Mapping[str, Tensor]) -> None:
        """Raise `CheckError` where the processes do not hold the same weights, to the bit."""
        if self.size == 1:
            return
        digest = hashlib.sha256()
        for tensor in parameters.values():
            digest.update(tensor.detach().contiguous().numpy().tobytes())
        found: list[str | None] = [None] * self.size
        dist.all_gather_object(found, digest.hexdigest())
        if len(set(found)) > 1:
            raise CheckError(
                f"the {self.size} processes do not hold the same weights; are they on machines of different kinds? "
                "Delete the student's folder and train on equal ones"
            )


ALONE = Group()


class _Learner(torch.nn.Module):
    """What DistributedDataParallel wraps: the parameters, and a loss that reads these same tensors."""

    def __init__(self, parameters: Mapping[str, Tensor], loss: Loss) -> None:
        super().__init__()
        for number, parameter in enumerate(parameters.values()):
            assert isinstance(parameter, torch.nn.Parameter)
            self.register_parameter(f"tensor{number}", parameter)
        self._loss = loss

    def forward(self, tokens: Tensor, weights: Tensor) -> Tensor:
        return self._loss(tokens, weights)


@contextmanager
def joined(rows: int) -> Iterator[Group]:
    """Give the group that `torchrun` started this process in, else a group of one; leave it at the end.

    Gradients go over gloo. Raises `UsageError` where a batch has fewer `rows` than there are processes.
    """
    if not dist.is_torchelastic_launched():
        yield ALONE
        return
    dist.init_process_group("gloo")
    try:
        group = Group(rank=dist.get_rank(), size=dist.get_world_size(), local=_local())
        if rows < group.size:
            raise UsageError(f"{group.size} processes and --rows {rows}: each takes a share of a batch; give more rows")
        yield group
        # gloo's threads may still be giving back tensors of Python's, for which they want its lock: a process that ends meanwhile is
        # ended with SIGABRT (pytorch/pytorch#179291). Who waits for the others here has given up the lock for as long.
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _local() -> int:
    """Return how many of the processes are on this machine."""
    names: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(names, socket.gethostname())
    return names.count(socket.gethostname())
