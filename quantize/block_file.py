"""A block's file of a checkpoint, which grows tensor by tensor, in its own order, while what comes next is still being coded.

So what was just coded is still in the system's memory when it is copied into the file, and no file is read again for its hash.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from r1q.core.checkpoint import TensorRecord, stored_entry
from r1q.core.errors import InputError
from r1q.core.recipe import PlannedTensor
from r1q.core.safetensors_file import Digest, SafetensorsWriter, writing_safetensors
from r1q.quantize.event import Event
from r1q.quantize.storing import Slab

Store = Callable[[PlannedTensor], Iterable[Slab]]


class BlockFile:
    """A block file in writing: `records` of the tensors that are in it; its `sha256`, that of the file once it is whole."""

    def __init__(self, name: str, tensors: Sequence[PlannedTensor], writer: SafetensorsWriter, digest: Digest) -> None:
        self.records: list[TensorRecord] = []
        self._name, self._tensors, self._writer, self._digest = name, tensors, writer, digest

    @property
    def sha256(self) -> str:
        """The sha256 of what is written so far."""
        return self._digest.hexdigest()

    def grow(self, store: Store, ready: Callable[[PlannedTensor], bool] = lambda planned: True) -> Iterator[Event]:
        """Write the tensors that come next, as `store` gives them, up to the first that is not `ready`; an event follows each.

        Raises `InputError` with the tensor's name where what is stored of one is not finite.
        """
        while len(self.records) < len(self._tensors) and ready(self._tensors[len(self.records)]):
            planned = self._tensors[len(self.records)]
            record = self._write(planned, store(planned))
            self.records.append(record)
            yield Event(what="tensor", name=record.spec.name, count=1, record=record)

    def _write(self, planned: PlannedTensor, slabs: Iterable[Slab]) -> TensorRecord:
        digest, squared_error, squared_weight = hashlib.sha256(), 0.0, 0.0
        for slab in slabs:
            squared_error += slab.squared_error
            squared_weight += slab.squared_weight
            data = slab.stored.tobytes()
            digest.update(data)
            self._writer.write(data)
        refuse_unfit(planned, squared_error)
        return TensorRecord(
            spec=planned.spec,
            scheme=planned.scheme,
            wanted=planned.wanted,
            file=self._name,
            sha256=digest.hexdigest(),
            error=math.sqrt(squared_error / squared_weight) if squared_weight else 0.0,
        )


@contextmanager
def writing_block(path: Path, tensors: Sequence[PlannedTensor]) -> Iterator[BlockFile]:
    """Give a block file of `tensors` that becomes `path` when the block ends without an error and all of them are in it."""
    digest = hashlib.sha256()
    with writing_safetensors(path, [stored_entry(tensor) for tensor in tensors], {"format": "r1q"}, digest) as writer:
        yield BlockFile(path.name, tensors, writer, digest)


def refuse_unfit(planned: PlannedTensor, squared_error: float) -> None:
    """Raise `InputError` with the tensor's name where what is stored of it is not finite."""
    if not math.isfinite(squared_error):
        raise InputError(
            f"{planned.spec.name}: a value does not fit {planned.scheme} (not finite once stored); keep it in bf16 or f32"
        )
