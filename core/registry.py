"""Registry: a literal table of names, each loaded from "module:object" when it is asked for and not before.

Nothing registers itself by being imported. Four failures have four messages: a name nobody knows (the nearest names), a library
that is not installed (the extra that brings it), a library that is installed but does not load (its reason), and a third-party
package whose own module fails. A broken import inside our own module is our mistake: it is raised untouched.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import entry_points
from typing import Generic, TypeVar, cast

from r1q.core.errors import MissingError, UsageError, unknown_name

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One row: `target` is "module:object"; `needs` the module that must be importable first, `extra` what of ours installs it.

    With `prepares`, the target imports `needs` itself, after it has prepared for that, and raises MissingError where it does not load:
    here it only has to be there. `package` is the distribution that offers a third-party entry, None for our own.
    """

    target: str
    about: str = ""
    needs: str | None = None
    extra: str | None = None
    prepares: bool = False
    package: str | None = None

    def __post_init__(self) -> None:
        module, colon, name = self.target.partition(":")
        if not (module and colon and name):
            raise ValueError(f"{self.target!r} is not 'module:object'")


class Registry(Generic[T]):
    """A table of `kind`s by name, widened by the installed packages' entry points of `group`, which are found on the first look."""

    def __init__(self, kind: str, entries: Mapping[str, Entry], *, group: str | None = None) -> None:
        self.kind = kind
        self.group = group
        self._own = dict(entries)

    @cached_property
    def entries(self) -> Mapping[str, tuple[Entry, ...]]:
        """Every offer of every name. Nothing shadows: two offers of one name are kept, and refused when that name is loaded."""
        offers = {name: (entry,) for name, entry in self._own.items()}
        for point in entry_points(group=self.group) if self.group else ():
            package = point.dist.name if point.dist else "an unnamed package"
            entry = Entry(target=point.value, about=f"from {package}", package=package)
            if entry not in offers.get(point.name, ()):
                offers[point.name] = (*offers.get(point.name, ()), entry)
        return offers

    def names(self) -> tuple[str, ...]:
        """Return every name, ours first, third parties' after them."""
        return tuple(self.entries)

    def entry(self, name: str) -> Entry:
        """Return the row of `name`.

        Raises UsageError for a name that nobody or more than one package offers.
        """
        offers = self.entries.get(name)
        if not offers:
            raise UsageError(unknown_name(self.kind, name, self.entries))
        if len(offers) > 1:
            who = " and ".join(entry.package or "r1q" for entry in offers)
            raise UsageError(f"{self.kind} {name!r} is offered by {who}: uninstall one of them")
        return offers[0]

    def load(self, name: str) -> T:
        """Import and return the object that `name` stands for.

        Raises UsageError for an unknown name, MissingError where a library it needs is absent or broken.
        """
        entry = self.entry(name)
        if entry.needs is not None:
            self._check_need(name, entry, entry.needs)
        if entry.package is None:
            return cast(T, _resolve(entry.target))
        try:
            return cast(T, _resolve(entry.target))
        except (ImportError, AttributeError) as error:
            raise MissingError(f"{self.kind} {name!r} of package {entry.package} does not load: {error}") from error

    def _check_need(self, name: str, entry: Entry, needs: str) -> None:
        try:
            if not entry.prepares:
                importlib.import_module(needs)
            elif importlib.util.find_spec(needs) is None:
                raise ModuleNotFoundError(name=needs)
        except ModuleNotFoundError as error:
            if error.name != needs:
                raise MissingError(f"{self.kind} {name!r}: {needs} is installed but does not load: {error}") from error
            how = f"pip install 'r1q[{entry.extra}]'" if entry.extra else f"install {needs}"
            raise MissingError(f"{self.kind} {name!r} needs {needs}: {how}") from error
        except (ImportError, OSError, RuntimeError) as error:
            # A native library that lacks one of its own raises any of these; llama_cpp wraps it in RuntimeError.
            raise MissingError(f"{self.kind} {name!r}: {needs} is installed but does not load: {error}") from error


def _resolve(target: str) -> object:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)
