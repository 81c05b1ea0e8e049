"""What a teacher said, kept: its likeliest next tokens and the rest as one, for text that is passed over more than once.

Over k tokens and the rest, KL = Σ p·(ln p − ln q) has k + 1 terms. It is never more than that over the whole vocabulary (data
processing: outcomes were merged), and equal where the teacher's tail has the student's shape.

A window is run through the teacher by itself, so that its numbers hang on nothing else in the batch: whether they come from the disk
or were made a moment ago, they are the same to the bit, and so is a run that was killed and went on.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from r1q.core.files import writing
from r1q.distill.divergence import mean_over_positions
from r1q.distill.network import Network

_HASH = 32  # bytes of a sha256
_SLICE = 1 << 24  # logits of the teacher that exist at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Top:
    """`ids` int64, `logs` float32 [rows, length, k]: the likeliest tokens, ln p of each; `rest` [rows, length]: ln p of all others."""

    ids: Tensor
    logs: Tensor
    rest: Tensor


def top_of(teacher: Network, tokens: Tensor, count: int) -> Top:
    """Return what the teacher says behind each token of one window [length]: its `count` likeliest, fewer than it has words."""
    with torch.no_grad():
        states, found = teacher.hidden(tokens[None])[0], []
        step = max(1, _SLICE // teacher.config.vocab_size)
        for start in range(0, len(states), step):
            logits = F.linear(states[start : start + step].to(teacher.head.dtype), teacher.head).float()
            best = logits.topk(count, dim=-1)
            whole = logits.logsumexp(-1)
            rest = logits.scatter(-1, best.indices, -torch.inf).logsumexp(-1)
            found.append((best.indices, best.values - whole[:, None], rest - whole))
        ids, logs, rests = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Top(ids=ids, logs=logs, rest=rests)


def top_divergence(student: Network, said: Top, tokens: Tensor, weights: Tensor) -> Tensor:
    """Return the mean divergence from what the teacher `said` of `tokens` [rows, length], by `weights` of the same shape."""
    truth = (said.ids.flatten(0, 1), said.logs.flatten(0, 1), said.rest.flatten())
    return mean_over_positions(student, tokens, weights, _summed, truth)


def _summed(states: Tensor, head: Tensor, weights: Tensor, ids: Tensor, logs: Tensor, rest: Tensor) -> Tensor:
    """Return Σ weight · KL over positions: states [n, hidden] against what was said of each [n, k], [n, k] and [n]."""
    logits = F.linear(states.to(head.dtype), head).float()
    whole = logits.logsumexp(-1)
    given = logits.gather(-1, ids) - whole[:, None]
    # Not 1 − Σ: of a tail of 1e-9 nothing would be left, and its gradient would be noise.
    others = logits.scatter(-1, ids, -torch.inf).logsumexp(-1) - whole
    return (weights * ((logs.exp() * (logs - given)).sum(-1) + rest.exp() * (rest - others))).sum()


class Shelf:
    """A file of what the teacher said of windows of `length` tokens, at most `limit` bytes; a window beyond is asked anew each time.

    Records are of one size: the sha256 of a window's tokens, its numbers, and the sha256 of both. What a kill cut short is dropped
    when the file is opened, what is damaged is made again when it is read.
    """

    def __init__(self, path: Path, teacher: Network, count: int, length: int, limit: int) -> None:
        self._path, self._teacher, self._limit = path, teacher, limit
        self._count, self._length = min(count, teacher.config.vocab_size - 1), length
        self._size = 2 * _HASH + length * (8 * self._count + 4)
        self._places: dict[bytes, int] = {}
        with writing(path):
            self._file = open(path, "a+b")  # noqa: SIM115  # closed with the shelf
            self._end = self._file.seek(0, os.SEEK_END) // self._size * self._size
            self._file.truncate(self._end)
        for place in range(0, self._end, self._size):
            self._places[os.pread(self._file.fileno(), _HASH, place)] = place

    @property
    def taken(self) -> int:
        """Bytes on the disk."""
        return self._end

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def loss(self, student: Network, tokens: Tensor, weights: Tensor) -> Tensor:
        """Return the student's divergence from what the teacher says of `tokens` [rows, length]."""
        dtype = self._teacher.head.dtype
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            rows = [self._said(window) for window in tokens]
            said = Top(
                ids=torch.stack([row.ids for row in rows]),
                logs=torch.stack([row.logs for row in rows]),
                rest=torch.stack([row.rest for row in rows]),
            )
            return top_divergence(student, said, tokens, weights)

    def _said(self, window: Tensor) -> Top:
        key = hashlib.sha256(window.numpy().tobytes()).digest()
        place = self._places.get(key)
        record = b"" if place is None else os.pread(self._file.fileno(), self._size, place)
        if len(record) == self._size and record[:_HASH] == key and _sealed(record[:-_HASH]) == record:
            return self._read(record[_HASH:-_HASH])
        said = top_of(self._teacher, window, self._count)
        if self._end + self._size <= self._limit:
            self._write(key, said)
        return said

    def _write(self, key: bytes, said: Top) -> None:
        values = (said.ids.to(torch.int32), said.logs, said.rest)
        with writing(self._path):
            self._file.write(_sealed(key + b"".join(value.numpy().tobytes() for value in values)))
            self._file.flush()
        self._places[key] = self._end
        self._end += self._size

    def _read(self, values: bytes) -> Top:
        shape, many = (self._length, self._count), 4 * self._length * self._count
        ids = np.frombuffer(values[:many], dtype=np.int32).astype(np.int64).reshape(shape)
        logs = np.frombuffer(values[many : 2 * many], dtype=np.float32).reshape(shape)
        rest = np.frombuffer(values[2 * many :], dtype=np.float32)
        return Top(ids=torch.from_numpy(ids), logs=torch.from_numpy(logs.copy()), rest=torch.from_numpy(rest.copy()))


def _sealed(record: bytes) -> bytes:
    return record + hashlib.sha256(record).digest()
