"""What a runtime is: something that opens an artifact and hands out a session. Adapters implement these two protocols.

A third party offers its own through the entry-point group `r1q.runtimes` (name = "module:class", the class called without arguments),
and proves it with the checks of `runtimes/contract.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from r1q.core.errors import UsageError

Floats = NDArray[np.float32]
Device = Literal["cpu", "gpu"]
Cache = Literal["f16", "f32", "q8_0"]
Compute = Literal["bf16", "f32"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How an artifact is opened; what an adapter cannot honour it refuses with UsageError or MissingError.

    `threads`: None means every physical core that this process may use. `context`: tokens a sequence can hold; None means what the
    model was trained for, at most 4096. `sequences`: how many can live at once. `cache`: the type of keys and values; q8_0 is
    llama.cpp's alone. `flash_attention`: False never, None as the runtime chooses. `gpu_layers`: blocks that go to the GPU, −1 all; 0
    with device cpu. `compute`: what float weights are multiplied in, None as the runtime chooses; where files decide that it is not
    read.
    """

    device: Device = "cpu"
    threads: int | None = None
    context: int | None = None
    sequences: int = 1
    cache: Cache = "f16"
    flash_attention: Literal[False] | None = None
    gpu_layers: int = 0
    compute: Compute | None = None

    def __post_init__(self) -> None:
        for name, value in (("threads", self.threads), ("context", self.context), ("sequences", self.sequences)):
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}: it must be at least 1")
        if self.device == "cpu" and self.gpu_layers:
            raise UsageError("GPU layers need the device gpu")


DEFAULT_CONTEXT = 4096


class Session(Protocol):
    """An opened artifact. Tokens are ids; logits are raw, float32, one row of `vocab` each.

    Misuse raises UsageError (an id outside the vocabulary, more tokens than the context, a sequence that does not exist, use after
    `close`) and leaves the session as it was.
    """

    @property
    def runtime(self) -> str:
        """The runtime's name."""

    @property
    def device(self) -> str:
        """Where it runs: `cpu`, or the device's own name."""

    @property
    def threads(self) -> int:
        """How many threads compute."""

    @property
    def vocab(self) -> int:
        """Length of a row of logits."""

    @property
    def context(self) -> int:
        """Tokens that one sequence can hold."""

    @property
    def sequences(self) -> int:
        """Sequences that can live at once, numbered from 0."""

    @property
    def bos(self) -> int | None:
        """The id that the artifact's tokenizer puts before a text, None where it puts none."""

    @property
    def load_seconds(self) -> float:
        """Seconds the runtime itself took to open the artifact; our own check of the file is not in it."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text` by the artifact's own tokenizer, nothing put before or after.

        Special tokens spelled out in `text` become their ids, as in `models.tokenizer`.
        """

    def prefill(self, sequence: int, tokens: Sequence[int]) -> Floats:
        """Append `tokens` to `sequence` and return the logits [vocab] after the last of them."""

    def step(self, pairs: Sequence[tuple[int, int]]) -> Floats:
        """Append one token to each of several different sequences; return their logits [pairs, vocab] in the order given."""

    def drop(self, sequence: int, start: int = 0) -> None:
        """Forget the tokens of `sequence` from position `start` on."""

    def logits(self, tokens: Sequence[int], first: int = 0) -> Floats:
        """Return the logits [len(tokens) − first, vocab] after each token from position `first` on. No sequence sees these tokens."""

    def close(self) -> None:
        """Give everything back. A second call does nothing."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Runtime(Protocol):
    """An adapter: knows which formats it reads and opens artifacts."""

    @property
    def name(self) -> str:
        """The name it is registered under."""

    @property
    def formats(self) -> tuple[str, ...]:
        """Artifact formats it can open: `gguf`, …"""

    def versions(self) -> Mapping[str, str]:
        """Return what a result must name to be repeated: the library's version and that of what it wraps."""

    def open(self, path: Path, options: Options) -> Session:
        """Check the file's headers with our own reader, then open it.

        Raises InputError for a file that is refused, ResourceError where memory does not suffice, MissingError where the
        runtime fails.
        """


RuntimeFactory = Callable[[], Runtime]


def check_tokens(tokens: Sequence[int], *, vocab: int, held: int, context: int) -> None:
    """Raise UsageError unless `tokens` is not empty, within the vocabulary, and fits beside `held` tokens in the context."""
    if not tokens:
        raise UsageError("no tokens were given")
    low, high = min(tokens), max(tokens)
    if low < 0 or high >= vocab:
        raise UsageError(f"token {low if low < 0 else high} is outside the vocabulary of {vocab}")
    if held + len(tokens) > context:
        raise UsageError(
            f"{held} + {len(tokens)} tokens do not fit the context of {context}: open it with a longer one"
        )


def check_sequences(sequences: Sequence[int], *, count: int) -> None:
    """Raise UsageError unless every number names one of `count` sequences, each at most once."""
    for sequence in sequences:
        if not 0 <= sequence < count:
            raise UsageError(f"there is no sequence {sequence}: {count} were opened, numbered from 0")
    if len(set(sequences)) != len(sequences):
        raise UsageError("a step takes one token for each sequence, and one sequence is named twice")


def choose_context(asked: int | None, trained: int) -> int:
    """Return the context to open with, given what was asked and what the model was trained for; UsageError if it asks for more."""
    if asked is None:
        return min(trained, DEFAULT_CONTEXT)
    if asked > trained:
        raise UsageError(
            f"a context of {asked} is asked for, but the model was trained for {trained}: ask for at most that"
        )
    return asked
