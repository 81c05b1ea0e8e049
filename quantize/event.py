"""What a run says of itself on its way."""

from __future__ import annotations

from dataclasses import dataclass

from r1q.core.checkpoint import TensorRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One step of a run. `what` is `kept` (a block file of `count` tensors from an earlier run), `stage` (a stage of a block is
    coded), `note` (`name` says what was done otherwise than asked), `tensor`, `file`, `healing` (`count` steps of training are done),
    `healed` (`name` says what came of it), `done` or `already done`.
    """

    what: str
    name: str = ""
    count: int = 0
    record: TensorRecord | None = None
