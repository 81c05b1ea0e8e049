"""How many threads compute: fewer than there are cores where that is faster, found while serving.

A step of a small model is over so soon that threads wait for each other longer than they compute, above all where clients and the
server itself want the same cores. Whether that is so depends on the model, the number of answers at once and what else the machine
does; so it is measured, not guessed: now and then a few steps are taken with half or twice as many threads, and what was
faster stays.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

WINDOW = 4  # batches whose mean is compared: a median would not see the few that stall
CAREFUL = 4  # windows that more threads must be faster over
EVERY = 96  # windows between two trials: half the threads for one of them costs about a hundredth
SOON = 8  # windows until the first trial of a size that began with what was found for another
RARELY = 16  # times as long between trials, at most, where none has helped lately
CLEARLY = 0.95  # of the time: what is not faster by this much is no reason to change
DISTURBED = 2.0  # times as long as the window before: what was best is put to the test again


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
    rose: bool = False  # to more threads, and was not disturbed since


def is_crowded() -> bool:
    """Return whether more threads want to run just now than twice the processors can; False where the system does not tell."""
    try:
        running = int(Path("/proc/loadavg").read_text(encoding="ascii").split()[3].partition("/")[0])
    except (OSError, ValueError, IndexError):
        return False
    return running > 2 * (os.cpu_count() or 1)


class Pace:
    """Counts of threads for batches of every size, at most `most`, by halves; never more at a moment when the machine is `crowded`."""

    def __init__(self, most: int, crowded: Callable[[], bool] = is_crowded) -> None:
        self._counts = [most]
        while self._counts[-1] > 1:
            self._counts.append(self._counts[-1] // 2)
        self._crowded = crowded
        self._courses: dict[tuple[str, int], _Course] = {}
        # The place that was found best last, for batches of whatever size.
        self._latest = len(self._counts) - 1 if crowded() else 0

    def threads(self, kind: str, tokens: int) -> int:
        """Return how many threads shall compute a batch of `tokens` tokens; `kind` tells steps from prompts."""
        course = self._course(kind, tokens)
        return self._counts[course.best if course.trial is None else course.trial]

    def note(self, kind: str, tokens: int, seconds: float) -> None:
        """Learn that a batch, computed with as many threads as `threads` said, took `seconds`."""
        course = self._course(kind, tokens)
        course.window.append(seconds / tokens)
        more = course.trial is not None and course.trial < course.best
        # A trial that has already lost a window's time is over.
        hopeless = course.trial is not None and sum(course.window) > (len(course.window) + WINDOW) * course.seconds
        if len(course.window) < WINDOW * (CAREFUL if more else 1) and not hopeless:
            return
        found = statistics.fmean(course.window)
        course.window.clear()
        if course.trial is None:
            self._settle(course, found)
        elif found < CLEARLY * (course.least if more else course.seconds) and not hopeless:
            course.best = self._latest = course.trial
            course.seconds, course.least, course.trial, course.rose = found, found, None, more
            # It may go on in this direction at once; what had to be taken back is tried again after ever longer times.
            course.left = 0 if 0 < course.best < len(self._counts) - 1 else course.wait
        else:
            course.trial, course.down, course.left = None, not course.down, course.wait
            course.wait = min(2 * course.wait, RARELY * EVERY)
        if course.left <= 0 and course.trial is None:
            course.trial = self._next(course)

    def _settle(self, course: _Course, found: float) -> None:
        """Learn that a window without a trial took `found` seconds a token."""
        # Something else wants the cores now: fewer threads may wait less for each other. More would only wait longer.
        disturbed = found > DISTURBED * course.seconds > 0 and course.best + 1 < len(self._counts)
        course.least = min(found, course.seconds) if course.seconds else found
        course.seconds = found
        course.left -= 1
        if disturbed:
            course.down, course.left, course.rose = True, 0, False
            course.wait = min(2 * course.wait, RARELY * EVERY)
        elif course.left <= 0 and course.rose:  # more threads stood the test of time
            course.wait, course.rose = EVERY, False

    def _next(self, course: _Course) -> int | None:
        """Return the place to try next: the one below or above the best, in turn; None where there is none."""
        for down in (course.down, not course.down):
            place = course.best + (1 if down else -1)
            if not 0 <= place < len(self._counts):
                continue
            if not down and self._crowded():
                # One step of threads that are never run at the same time can take seconds: not now.
                course.left = course.wait
                return None
            course.down = down
            return place
        return None

    def _course(self, kind: str, tokens: int) -> _Course:
        return self._courses.setdefault(
            (kind, tokens.bit_length()), _Course(best=self._latest, left=SOON if self._courses else 0)
        )
