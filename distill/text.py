"""What a student learns from: rows of token ids and how much each position counts, the same for the same step of the same run."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from r1q.calibration.windows import make_windows
from r1q.core.errors import InputError
from r1q.models.tiny_r1_tasks import LEVELS, draw
from r1q.models.tokenizer import Tokenizer

PROBLEMS = "problems"
PROMPT_WEIGHT = 0.1
"""Weight of a question's positions: what is asked is drawn by chance, and only how it is asked can be learned."""
_VALIDATION_SHARE = 16


class Text(Protocol):
    """Text to distil on. Batches are (token ids int64 [rows, length], weights float32 of the same shape: of what each predicts)."""

    @property
    def record(self) -> Mapping[str, object]:
        """What tells this text from another in a job: JSON."""

    def batch(self, step: int, rows: int) -> tuple[Tensor, Tensor]:
        """Return the rows to learn from at `step`; they hang on nothing else."""

    def validation(self) -> list[tuple[Tensor, Tensor]]:
        """Return rows that are never learned from."""


@dataclass(frozen=True, slots=True)
class WindowText:
    """Windows of calibration text in an order drawn anew for every pass; every sixteenth is kept for validation."""

    windows: NDArray[np.int64]
    seed: int
    record: Mapping[str, object]

    def batch(self, step: int, rows: int) -> tuple[Tensor, Tensor]:
        """Return `rows` windows; a pass over all begins where the one before ended."""
        held = np.delete(self.windows, slice(None, None, _VALIDATION_SHARE), axis=0)
        places = [
            np.random.default_rng([self.seed, number // len(held)]).permutation(len(held))[number % len(held)]
            for number in range(step * rows, (step + 1) * rows)
        ]
        return _even(held[places])

    def validation(self) -> list[tuple[Tensor, Tensor]]:
        """Return every sixteenth window."""
        return [_even(window[None]) for window in self.windows[::_VALIDATION_SHARE]]


@dataclass(frozen=True, slots=True)
class ProblemText:
    """Problems of the embedded model with their traces, one after the other, from the side of the split it was trained on."""

    tokenizer: Tokenizer
    length: int
    seed: int

    @property
    def record(self) -> Mapping[str, object]:
        """What tells this text from another."""
        return {"source": PROBLEMS, "length": self.length, "seed": self.seed}

    def batch(self, step: int, rows: int) -> tuple[Tensor, Tensor]:
        """Return `rows` rows of problems drawn for this step."""
        return self._drawn(f"{self.seed}:{step}", rows)

    def validation(self) -> list[tuple[Tensor, Tensor]]:
        """Return rows drawn from another seed: other problems, but for a chance meeting."""
        return [self._drawn(f"{self.seed}:validation:{number}", 4) for number in range(4)]

    def _drawn(self, seed: str, rows: int) -> tuple[Tensor, Tensor]:
        rng = random.Random(seed)
        tokens, weights = [], []
        for _ in range(rows):
            ids: list[int] = []
            counts: list[float] = []
            while len(ids) <= self.length:
                problem = draw(rng, rng.choice(tuple(LEVELS)), held_out=False)
                prompt = self.tokenizer.encode(problem.prompt, add_special=False)
                completion = self.tokenizer.encode(problem.completion, add_special=False)
                ids += prompt + completion
                # The first token, BOS, follows whatever stood before.
                counts += [0.0] + [PROMPT_WEIGHT] * (len(prompt) - 1) + [1.0] * len(completion)
            tokens.append(ids[: self.length])
            weights.append(counts[1 : self.length + 1])
        return torch.tensor(tokens), torch.tensor(weights)


def open_text(spec: str, tokenizer: Tokenizer, *, samples: int, length: int, seed: int) -> Text:
    """Return the text that `spec` names: what calibration takes, or `problems`, the embedded model's own.

    Raises `InputError` where the text is too short to keep some of it for validation, and what calibration raises.
    """
    if spec == PROBLEMS:
        return ProblemText(tokenizer, length, seed)
    windows = make_windows(spec, tokenizer, samples=samples, length=length)
    if len(windows.tokens) < 2:
        raise InputError(
            f"{spec!r} has one window of {length} tokens, and some are kept for validation; give more text"
        )
    return WindowText(windows.tokens, seed, {**windows.record, "seed": seed})


def _even(windows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(np.array(windows)), torch.ones(windows.shape)
