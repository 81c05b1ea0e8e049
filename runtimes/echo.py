"""Echo: the smallest runtime that keeps the contract. It says again what it has read, and needs no library.

Its artifact is a file of JSON, `{"vocab": 16, "context": 64}`, whose name ends in `.echo`. After a history the logit of a token
is how often it was read, and 8 more for the token read last: enough to tell sequences, positions and orders apart.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from r1q.core.closing import Closing
from r1q.core.errors import InputError, MissingError, UsageError
from r1q.runtimes.base import Floats, Options, check_sequences, check_tokens, choose_context

LAST = 8.0


class Echo:
    """The reference adapter."""

    name = "echo"
    formats = ("echo",)

    def versions(self) -> Mapping[str, str]:
        """Return nothing: it is part of r1q."""
        return {}

    def open(self, path: Path, options: Options) -> EchoSession:
        """Open an `.echo` file. Raises InputError for a file that is not one, MissingError for another device than the CPU."""
        if options.device != "cpu":
            raise MissingError("the echo runtime has no GPU: use the device cpu")
        started = time.perf_counter()
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            vocab, trained = int(facts["vocab"]), int(facts["context"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is not an echo artifact ({error}): it is JSON with vocab and context") from error
        if vocab < 1 or trained < 1:
            raise InputError(f"{path}: vocab and context must be at least 1")
        context = choose_context(options.context, trained)
        return EchoSession(vocab, context, options.sequences, load_seconds=time.perf_counter() - started)


class EchoSession(Closing):
    """Histories of tokens, and logits counted from them."""

    runtime = "echo"
    device = "cpu"
    threads = 1
    bos: int | None = None

    def __init__(self, vocab: int, context: int, sequences: int, *, load_seconds: float) -> None:
        self.vocab = vocab
        self.context = context
        self.sequences = sequences
        self.load_seconds = load_seconds
        self._histories: list[list[int]] | None = [[] for _ in range(sequences)]

    def encode(self, text: str) -> list[int]:
        """Return the bytes of `text`, folded into the vocabulary."""
        return [byte % self.vocab for byte in text.encode()]

    def prefill(self, sequence: int, tokens: Sequence[int]) -> Floats:
        """Append `tokens`; return the logits [vocab] after the last."""
        history = self._open([sequence])[sequence]
        check_tokens(tokens, vocab=self.vocab, held=len(history), context=self.context)
        history.extend(tokens)
        return self._after(history)

    def step(self, pairs: Sequence[tuple[int, int]]) -> Floats:
        """Append one token to each named sequence; return logits [pairs, vocab]."""
        histories = self._open([sequence for sequence, _ in pairs])
        for sequence, token in pairs:
            check_tokens([token], vocab=self.vocab, held=len(histories[sequence]), context=self.context)
        return np.stack([self.prefill(sequence, [token]) for sequence, token in pairs])

    def drop(self, sequence: int, start: int = 0) -> None:
        """Forget the tokens of `sequence` from `start` on."""
        del self._open([sequence])[sequence][max(start, 0) :]

    def logits(self, tokens: Sequence[int], first: int = 0) -> Floats:
        """Return the logits [len(tokens) − first, vocab] after each token from `first` on."""
        self._open([])
        check_tokens(tokens, vocab=self.vocab, held=0, context=self.context)
        return np.stack([self._after(tokens[: end + 1]) for end in range(first, len(tokens))])

    def close(self) -> None:
        """Forget everything."""
        self._histories = None

    def _open(self, sequences: Sequence[int]) -> list[list[int]]:
        if self._histories is None:
            raise UsageError("this session is closed: open the artifact again")
        check_sequences(sequences, count=self.sequences)
        return self._histories

    def _after(self, history: Sequence[int]) -> Floats:
        counts = np.bincount(np.asarray(history), minlength=self.vocab).astype(np.float32)
        counts[history[-1]] += np.float32(LAST)
        return counts
