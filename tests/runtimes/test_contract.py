"""The contract kit over both adapters, and over adapters broken on purpose: each check must be able to fail."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from r1q.core.errors import R1qError, UsageError
from r1q.runtimes.base import Floats, Options, Runtime
from r1q.runtimes.contract import CHECKS, Case, Check, ContractError
from r1q.runtimes.echo import Echo, EchoSession
from r1q.runtimes.table import load_runtime

parametrize = pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)


@parametrize
def test_echo_keeps_the_contract(check: Check, echo_file: Path) -> None:
    check.run(Case(runtime=Echo(), path=echo_file, tolerance=0.0))


@pytest.mark.runtime
@parametrize
def test_llama_cpp_keeps_the_contract(check: Check, tiny_gguf: Path) -> None:
    # float32 weights and cache; sums of 128 products in another order differ by a few units of 2^-24 per layer.
    options = Options(cache="f32", flash_attention=False, threads=1)
    check.run(Case(runtime=load_runtime("llama-cpp"), path=tiny_gguf, tolerance=1e-4, options=options))


@pytest.mark.runtime
@parametrize
def test_llama_cpp_keeps_the_contract_as_users_run_it(check: Check, tiny_gguf: Path) -> None:
    # A float16 cache rounds keys and values (2^-11 of about 3, through two blocks): logits of about 1 move by less than 1e-2.
    check.run(Case(runtime=load_runtime("llama-cpp"), path=tiny_gguf, tolerance=1e-2, options=Options(threads=1)))


class Broken(Echo):
    """Echo whose sessions break one sentence."""

    def __init__(self, session: type[EchoSession]) -> None:
        self._session = session

    def open(self, path: Path, options: Options) -> EchoSession:
        whole = super().open(path, options)
        return self._session(whole.vocab, whole.context, whole.sequences, load_seconds=0.0)


class OtherName(EchoSession):
    runtime = "nobody"


class Doubles(EchoSession):
    def prefill(self, sequence: int, tokens: Sequence[int]) -> Floats:
        return super().prefill(sequence, tokens).astype(np.float64)


class LosesAPrefill(EchoSession):
    def prefill(self, sequence: int, tokens: Sequence[int]) -> Floats:
        self.drop(sequence)
        return super().prefill(sequence, tokens)


class ShiftedLogits(EchoSession):
    def logits(self, tokens: Sequence[int], first: int = 0) -> Floats:
        return np.roll(super().logits(tokens, 0), 1, axis=0)[first:]


class OneMemory(EchoSession):
    def step(self, pairs: Sequence[tuple[int, int]]) -> Floats:
        return super().step([*pairs][::-1])


class NeverForgets(EchoSession):
    def drop(self, sequence: int, start: int = 0) -> None:
        self._open([sequence])


class LogitsDisturb(EchoSession):
    def logits(self, tokens: Sequence[int], first: int = 0) -> Floats:
        rows = super().logits(tokens, first)
        if self._histories:
            self._histories[0].append(0)
        return rows


class SharedBuffer(EchoSession):
    def _after(self, history: Sequence[int]) -> Floats:
        row = super()._after(history)
        if not hasattr(self, "_buffer"):
            self._buffer = row
        self._buffer[:] = row
        return self._buffer


class TakesAnything(EchoSession):
    def prefill(self, sequence: int, tokens: Sequence[int]) -> Floats:
        return super().prefill(sequence, [token % self.vocab for token in tokens])


class WrongError(EchoSession):
    def prefill(self, sequence: int, tokens: Sequence[int]) -> Floats:
        if max(tokens, default=0) >= self.vocab:
            raise IndexError("too high")
        return super().prefill(sequence, tokens)


class ShortContext(EchoSession):
    def prefill(self, sequence: int, tokens: Sequence[int]) -> Floats:
        if len(tokens) > self.context // self.sequences:
            raise UsageError("the context is shared")
        return super().prefill(sequence, tokens)


class StaysOpen(EchoSession):
    def close(self) -> None:
        pass


BREAKS: list[tuple[type[EchoSession], str]] = [
    (OtherName, "facts"),
    (Doubles, "shapes"),
    (LosesAPrefill, "prefill-splits"),
    (ShiftedLogits, "logits-rows"),
    (OneMemory, "sequences-apart"),
    (NeverForgets, "drop-forgets"),
    (LogitsDisturb, "logits-leave-no-trace"),
    (SharedBuffer, "results-are-copies"),
    (TakesAnything, "misuse-is-refused"),
    (WrongError, "misuse-is-refused"),
    (ShortContext, "context-is-whole"),
    (StaysOpen, "closed-is-closed"),
]


@pytest.mark.parametrize(("session", "name"), BREAKS, ids=[session.__name__ for session, _ in BREAKS])
def test_a_broken_runtime_is_caught(session: type[EchoSession], name: str, echo_file: Path) -> None:
    check = next(check for check in CHECKS if check.name == name)
    with pytest.raises((ContractError, R1qError)):
        check.run(Case(runtime=Broken(session), path=echo_file, tolerance=0.0))


def test_a_runtime_that_opens_anything_is_caught(echo_file: Path) -> None:
    class OpensAnything(Echo):
        def open(self, path: Path, options: Options) -> EchoSession:
            return super().open(echo_file, options)

    check = next(check for check in CHECKS if check.name == "bad-files-are-refused")
    with pytest.raises(ContractError, match="it was accepted"):
        check.run(Case(runtime=OpensAnything(), path=echo_file, tolerance=0.0))


def test_every_check_has_a_runtime_that_breaks_it() -> None:
    assert {check.name for check in CHECKS} == {name for _, name in BREAKS} | {"bad-files-are-refused"}


def test_adapters_are_runtimes_to_the_type_checker() -> None:
    make: Callable[[], Runtime] = Echo
    assert make().formats == ("echo",)
