"""What every runtime must keep, as a list of checks that an adapter's own tests can run.

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
    def test_contract(check): check.run(Case(runtime=Mine(), path=artifact, tolerance=1e-3))

The artifact needs a vocabulary of at least 16 and a context of 24 tokens. `tolerance` is the largest absolute difference of a logit
that batching may cause: 0 for arithmetic that does not depend on the batch, about 1e-4 for float32 weights, more for coarse ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from r1q.core.errors import InputError, R1qError, UsageError
from r1q.runtimes.base import Floats, Options, Runtime, Session

TEXT = (3, 1, 4, 1, 5, 9, 2, 6)
OTHER = (2, 7, 1, 8, 2, 8)
CONTEXT = 24


class ContractError(AssertionError):
    """A runtime breaks the contract; the message says which sentence of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A runtime and an artifact it opens. `options` are those of every session but for context and sequences."""

    runtime: Runtime
    path: Path
    tolerance: float
    options: Options = field(default_factory=Options)

    def open(self) -> Session:
        """Open the artifact for two sequences of 24 tokens."""
        return self.runtime.open(self.path, replace(self.options, context=CONTEXT, sequences=2))

    def same(self, left: Floats, right: Floats, sentence: str) -> None:
        """Raise ContractError unless two arrays of logits agree within the tolerance."""
        if left.shape != right.shape:
            raise ContractError(f"{sentence}: shapes {left.shape} and {right.shape}")
        worst = float(np.abs(left - right).max())
        if not worst <= self.tolerance:
            raise ContractError(f"{sentence}: logits differ by {worst:.3g}, the tolerance is {self.tolerance:.3g}")


@dataclass(frozen=True, slots=True)
class Check:
    """One sentence of the contract: `run` raises ContractError where a runtime breaks it."""

    name: str
    body: Callable[[Case, Session], None]

    def run(self, case: Case) -> None:
        """Open a session, try the sentence, close."""
        with case.open() as session:
            self.body(case, session)


def _facts(case: Case, session: Session) -> None:
    _hold(session.runtime == case.runtime.name, "a session names its runtime")
    _hold(bool(session.device), "a session says which device it runs on")
    _hold(session.threads >= 1, "a session says how many threads compute")
    _hold(session.vocab >= 16, "the artifact has a vocabulary of at least 16")
    _hold(session.context == CONTEXT, "a session has the context asked for")
    _hold(session.sequences == 2, "a session has the sequences asked for")
    _hold(session.load_seconds >= 0.0, "a session says how long the runtime took to open the artifact")
    _hold(bool(case.runtime.formats), "a runtime names the formats it opens")
    _hold(all(isinstance(value, str) for value in case.runtime.versions().values()), "versions are strings")


def _shapes(case: Case, session: Session) -> None:
    rows = {
        "prefill": (session.prefill(0, TEXT), (session.vocab,)),
        "step": (session.step([(0, 1), (1, 2)]), (2, session.vocab)),
        "logits": (session.logits(TEXT, first=3), (len(TEXT) - 3, session.vocab)),
    }
    for name, (values, shape) in rows.items():
        _hold(values.shape == shape, f"{name} returns {shape}, not {values.shape}")
        _hold(values.dtype == np.float32, f"{name} returns float32, not {values.dtype}")
        _hold(bool(np.isfinite(values).all()), f"{name} returns finite logits")


def _prefill_splits(case: Case, session: Session) -> None:
    whole = session.prefill(0, TEXT)
    session.prefill(1, TEXT[:3])
    case.same(session.prefill(1, TEXT[3:]), whole, "a prefill in two parts equals one")
    session.drop(1)
    session.prefill(1, TEXT[:1])
    for token in TEXT[1:]:
        stepped = session.step([(1, token)])[0]
    case.same(stepped, whole, "steps equal a prefill")


def _logits_rows(case: Case, session: Session) -> None:
    rows = session.logits(TEXT)
    _hold(len(rows) == len(TEXT), "logits returns a row for every token")
    for end in range(1, len(TEXT) + 1):
        session.drop(0)
        case.same(session.prefill(0, TEXT[:end]), rows[end - 1], "row i of logits equals a prefill of tokens 0…i")
    case.same(session.logits(TEXT, first=5), rows[5:], "logits from a position on are the tail of all of them")


def _sequences_apart(case: Case, session: Session) -> None:
    alone = session.logits(OTHER)
    session.prefill(0, TEXT[:2])
    session.prefill(1, OTHER[:1])
    for position in range(1, len(OTHER)):
        rows = session.step([(1, OTHER[position]), (0, TEXT[position + 1])])
        case.same(rows[0], alone[position], "a sequence does not see what another holds")
    expected = session.logits(TEXT[: len(OTHER) + 1])[-1]
    case.same(rows[1], expected, "rows of a step come in the order of its pairs")


def _drop_forgets(case: Case, session: Session) -> None:
    fresh = session.prefill(0, OTHER)
    session.drop(0)
    session.prefill(0, TEXT)
    session.drop(0)
    case.same(session.prefill(0, OTHER), fresh, "a dropped sequence starts afresh")
    session.drop(0, start=2)
    case.same(session.prefill(0, OTHER[2:]), fresh, "a sequence dropped from a position on goes on from there")


def _logits_leave_no_trace(case: Case, session: Session) -> None:
    expected = session.logits(TEXT)[-1]
    session.prefill(0, TEXT[:-1])
    session.logits(OTHER)
    case.same(session.step([(0, TEXT[-1])])[0], expected, "logits leaves the sequences as they were")


def _results_are_copies(case: Case, session: Session) -> None:
    first = session.prefill(0, TEXT)
    kept = first.copy()
    session.step([(0, 1), (1, 2)])
    _hold(bool((first == kept).all()), "a later call does not change the logits that an earlier one returned")


def _misuse_is_refused(case: Case, session: Session) -> None:
    session.prefill(0, TEXT)
    calls: list[tuple[str, Callable[[], object]]] = [
        ("a token equal to the vocabulary's size", lambda: session.prefill(0, [session.vocab])),
        ("a negative token", lambda: session.step([(0, -1)])),
        ("no tokens", lambda: session.prefill(0, [])),
        ("a prefill past the context", lambda: session.prefill(0, [1] * (CONTEXT - len(TEXT) + 1))),
        ("logits past the context", lambda: session.logits([1] * (CONTEXT + 1))),
        ("a sequence that was not opened", lambda: session.prefill(2, TEXT)),
        ("one sequence twice in a step", lambda: session.step([(0, 1), (0, 2)])),
    ]
    for what, call in calls:
        _refused(call, UsageError, what)
    expected = session.logits((*TEXT, 1))[-1]
    case.same(session.step([(0, 1)])[0], expected, "a refused call leaves the session as it was")


def _context_is_whole(case: Case, session: Session) -> None:
    tokens = [index % 16 for index in range(CONTEXT)]
    for sequence in (0, 1):
        session.prefill(sequence, tokens[:-1])
    rows = session.step([(0, tokens[-1]), (1, tokens[-1])])
    case.same(rows[0], session.logits(tokens)[-1], "every sequence holds the whole context")
    _refused(lambda: session.step([(0, 1)]), UsageError, "a step past the context")


def _closed_is_closed(case: Case, session: Session) -> None:
    session.close()
    session.close()
    calls: list[Callable[[], object]] = [
        lambda: session.prefill(0, TEXT),
        lambda: session.step([(0, 1)]),
        lambda: session.logits(TEXT),
        lambda: session.drop(0),
    ]
    for call in calls:
        _refused(call, UsageError, "use after close")


def _bad_files_are_refused(case: Case, session: Session) -> None:
    absent = case.path.with_name(f"absent{case.path.suffix}")
    _refused(lambda: case.runtime.open(absent, Options()), InputError, "a file that is not there")


def _hold(kept: bool, sentence: str) -> None:
    if not kept:
        raise ContractError(sentence)


def _refused(call: Callable[[], object], kind: type[R1qError], what: str) -> None:
    try:
        call()
    except kind:
        return
    except Exception as error:
        raise ContractError(f"{what} raises {kind.__name__}, not {error!r}") from error
    raise ContractError(f"{what} raises {kind.__name__}, and it was accepted")


CHECKS: tuple[Check, ...] = (
    Check("facts", _facts),
    Check("shapes", _shapes),
    Check("prefill-splits", _prefill_splits),
    Check("logits-rows", _logits_rows),
    Check("sequences-apart", _sequences_apart),
    Check("drop-forgets", _drop_forgets),
    Check("logits-leave-no-trace", _logits_leave_no_trace),
    Check("results-are-copies", _results_are_copies),
    Check("misuse-is-refused", _misuse_is_refused),
    Check("context-is-whole", _context_is_whole),
    Check("closed-is-closed", _closed_is_closed),
    Check("bad-files-are-refused", _bad_files_are_refused),
)
