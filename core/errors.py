"""Every error raised on purpose, and the exit code that each one ends a command with.

R1qError                 the base; never raised itself
├── UsageError       2   options that do not go together, an unknown name
├── InputError       3   a file that is corrupt, unsupported or unsafe
├── MissingError     4  a runtime or a device is missing, or a runtime crashed
├── ResourceError    5   not enough memory or disk, a budget that nothing fits
└── CheckError       6   a verification or a gate failed
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class R1qError(Exception):
    """Something the user can mend. The message is one line: what, where, how to mend."""

    exit_code = 1


class UsageError(R1qError):
    """Options that do not go together, or a name nobody knows."""

    exit_code = 2


class InputError(R1qError):
    """A file that is corrupt, unsupported or unsafe."""

    exit_code = 3


class MissingError(R1qError):
    """A runtime or a device is missing, or a runtime crashed."""

    exit_code = 4


class ResourceError(R1qError):
    """Not enough memory or disk, or a budget that nothing fits."""

    exit_code = 5


class CheckError(R1qError):
    """A verification or a regression gate failed."""

    exit_code = 6


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Return the sentence for a name that is not in a table, with the nearest known names.

    >>> unknown_name("preset", "q4_km", ["q4_0", "q4_k_m"])
    "no preset named 'q4_km'; did you mean q4_k_m or q4_0? (known: q4_0, q4_k_m)"
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    hint = f"; did you mean {' or '.join(near)}?" if near else ";"
    return f"no {kind} named {name!r}{hint} (known: {', '.join(names)})"
