"""Closing: what has a `close` and is closed by a `with` statement at its end."""

from __future__ import annotations

from types import TracebackType
from typing import Self


class Closing:
    """A base of what is closed at the end of a `with` statement."""

    def close(self) -> None:
        """Give everything back."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
