"""Threads are found by how long batches take: all of them where they help, one where they only wait for each other."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from r1q.serve import pace as module
from r1q.serve.pace import EVERY, RARELY, WINDOW, is_crowded

Pace = functools.partial(module.Pace, crowded=lambda: False)


def serve(pace: module.Pace, cost: Callable[[int], float], steps: int, tokens: int = 4) -> Counter[int]:
    """Take steps that cost `cost(threads)` seconds; return how often each count of threads was taken."""
    taken: Counter[int] = Counter()
    for _ in range(steps):
        threads = pace.threads("step", tokens)
        taken[threads] += 1
        pace.note("step", tokens, cost(threads))
    return taken


def test_threads_that_help_stay_and_trials_are_rare() -> None:
    steps = 100 * WINDOW * EVERY
    taken = serve(Pace(8), lambda threads: 1 / threads, steps)
    assert set(taken) == {8, 4}
    assert taken[8] / steps > 0.97


@pytest.mark.parametrize(("best", "most"), [(1, 2), (1, 8), (2, 8), (3, 6)])
def test_the_fastest_count_is_found_from_above(best: int, most: int) -> None:
    pace = Pace(most)
    serve(pace, lambda threads: 1 + abs(threads - best), 8 * WINDOW)
    taken = serve(pace, lambda threads: 1 + abs(threads - best), 40 * WINDOW)
    assert taken.most_common(1)[0][0] == best


def test_it_comes_back_when_the_machine_is_free_again() -> None:
    pace = Pace(2)
    serve(pace, lambda threads: float(threads), 10 * WINDOW)
    assert pace.threads("step", 4) == 1
    serve(pace, lambda threads: 1 / threads, 3 * EVERY * WINDOW)
    assert serve(pace, lambda threads: 1 / threads, EVERY * WINDOW)[2] > 0.9 * EVERY * WINDOW


def test_where_trials_never_help_they_become_rarer_and_end_at_once() -> None:
    pace = Pace(2)
    # Another program has a core: whenever two threads wait for each other, a step takes fifty times as long.
    taken = serve(pace, lambda threads: 50.0 if threads == 2 else 1.0, 200 * EVERY * WINDOW)
    assert WINDOW < taken[2] <= WINDOW + 4 + 200 / RARELY + 1


def test_when_another_program_takes_a_core_it_is_noticed_within_two_windows() -> None:
    pace = Pace(2)
    serve(pace, lambda threads: 1 / threads, 10 * WINDOW)
    assert pace.threads("step", 4) == 2
    taken = serve(pace, lambda threads: 50.0 if threads == 2 else 1.0, 20 * WINDOW)
    assert taken[2] <= 2 * WINDOW


def test_a_difference_that_is_noise_changes_nothing() -> None:
    pace = Pace(2)
    taken = serve(pace, lambda threads: 1.0 if threads == 2 else 0.97, 20 * EVERY * WINDOW)
    assert taken[1] <= 21 * WINDOW


def test_batches_of_other_sizes_have_their_own() -> None:
    pace = Pace(2)
    for _ in range(4 * WINDOW):
        pace.note("step", 1, pace.threads("step", 1))
        pace.note("prompt", 500, 1 / pace.threads("prompt", 500))
    assert (pace.threads("step", 1), pace.threads("prompt", 500)) == (1, 2)
    # One that was never seen begins with what was found last.
    assert pace.threads("step", 8) == 1


@pytest.mark.parametrize(("every", "bound"), [(5, 1.25), (40, 1.6), (400, 1.6)])
def test_stalls_cost_little_however_rare(every: int, bound: float) -> None:
    """Two threads are nearly twice as fast, but now and then wait for each other a hundred times as long."""
    pace, seconds, steps, two = Pace(2), 0.0, 40_000, 0
    for _ in range(steps):
        threads = pace.threads("step", 4)
        two += threads == 2
        cost = 1.8 if threads == 1 else 100.0 if two % every == 0 else 1.0
        seconds += cost
        pace.note("step", 4, cost)
    always_two = 1.0 + 99.0 / every
    assert seconds / steps < bound * min(1.8, always_two)


def test_in_a_crowd_it_begins_with_one_and_waits_until_there_is_room() -> None:
    crowd = [True]
    pace = module.Pace(4, crowded=lambda: crowd[0])
    assert set(serve(pace, lambda threads: 1 / threads, 3 * EVERY * WINDOW)) == {1}
    crowd.clear()
    crowd.append(False)
    serve(pace, lambda threads: 1 / threads, 3 * EVERY * WINDOW)
    assert pace.threads("step", 4) == 4


def test_a_crowd_is_what_the_system_counts() -> None:
    running = int(Path("/proc/loadavg").read_text().split()[3].split("/")[0]) if Path("/proc/loadavg").exists() else 0
    # It changes from moment to moment; far from the bound it does not matter.
    cores = os.cpu_count() or 1
    if not cores <= running <= 4 * cores:
        assert is_crowded() == (running > 4 * cores)
