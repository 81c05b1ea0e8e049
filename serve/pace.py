"""How many threads compute: fewer than there are cores where that is faster, found while serving.

A step of a small model is over so soon that threads wait for each other longer than they compute, above all where clients and the
server itself want the same cores. Whether that is so depends on the model, the number of answers at once and what else the machine
does; so it is measured, not guessed: now and then a few steps are taken with half or twice as many threads, and what was
faster stays.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

WINDOW = 4  # batches whose median is compared
EVERY = 96  # windows between two trials: half the threads for one of them costs about a hundredth
SOON = 8  # windows until the first trial of a size that began with what was found for another
RARELY = 16  # times as long between trials, at most, where none has helped lately
CLEARLY = 0.95  # of the time: what is not faster by this much is no reason to change
HOPELESS = 2.0  # times as long: a trial ends early, and what was best is put to the test again


@runtime_checkable
class Adjustable(Protocol):
    """A session whose number of threads can be changed between two calls."""

    threads: int

    def set_threads(self, count: int) -> None:
        """Let `count` threads compute from now on."""


@dataclass(slots=True)
class _Course:
    """What is known of batches of about one size: the place of the best count, its seconds a token, and the trial going on."""

    best: int = 0
    seconds: float = 0.0  # of the latest window
    least: float = 0.0  # of the latest two, which more threads must beat: the later one may have been disturbed
    window: list[float] = field(default_factory=list)
    trial: int | None = None
    down: bool = True  # the direction of the next trial
    left: int = 0  # windows until it
    wait: int = EVERY  # windows between trials


class Pace:
    """Counts of threads for batches of every size, at most `most`, by halves."""

    def __init__(self, most: int) -> None:
        self._counts = [most]
        while self._counts[-1] > 1:
            self._counts.append(self._counts[-1] // 2)
        self._courses: dict[tuple[str, int], _Course] = {}
        self._latest = 0  # the place that was found best last, for batches of whatever size

    def threads(self, kind: str, tokens: int) -> int:
        """Return how many threads shall compute a batch of `tokens` tokens; `kind` tells steps from prompts."""
        course = self._course(kind, tokens)
        return self._counts[course.best if course.trial is None else course.trial]

    def note(self, kind: str, tokens: int, seconds: float) -> None:
        """Learn that a batch, computed with as many threads as `threads` said, took `seconds`."""
        course = self._course(kind, tokens)
        course.window.append(seconds / tokens)
        hopeless = course.trial is not None and sum(course.window) > HOPELESS * WINDOW * course.seconds
        if len(course.window) < WINDOW and not hopeless:
            return
        found = statistics.median(course.window)
        course.window.clear()
        if course.trial is None:
            self._settle(course, found)
        elif found < CLEARLY * (course.seconds if course.trial > course.best else course.least) and not hopeless:
            # It may go on in this direction, so the next trial comes at once.
            course.best = self._latest = course.trial
            course.seconds, course.least, course.trial, course.wait = found, found, None, EVERY
        else:
            course.trial, course.down, course.left = None, not course.down, course.wait
            course.wait = min(2 * course.wait, RARELY * EVERY)
        if course.left <= 0 and course.trial is None:
            course.trial = self._next(course)

    def _settle(self, course: _Course, found: float) -> None:
        """Learn that a window without a trial took `found` seconds a token."""
        # Something else wants the cores now: fewer threads may wait less for each other. More would only wait longer.
        disturbed = found > HOPELESS * course.seconds > 0 and course.best + 1 < len(self._counts)
        course.least = min(found, course.seconds) if course.seconds else found
        course.seconds = found
        course.left -= 1
        if disturbed:
            course.down, course.left = True, 0

    def _next(self, course: _Course) -> int | None:
        """Return the place to try next: the one below or above the best, in turn; None where there is none."""
        for down in (course.down, not course.down):
            place = course.best + (1 if down else -1)
            if 0 <= place < len(self._counts):
                course.down = down
                return place
        return None

    def _course(self, kind: str, tokens: int) -> _Course:
        return self._courses.setdefault(
            (kind, tokens.bit_length()), _Course(best=self._latest, left=SOON if self._courses else 0)
        )
