"""What a plan makes of --workers: threads of each, memory of all, and where they have nothing to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from r1q.core.errors import UsageError
from r1q.plan.effort import choose_engine, workers_beside
from r1q.plan.job import Job, open_job, plan_job, planned_engine, workload
from r1q.plan.memory import PROGRAM, memory_parts
from r1q.plan.surroundings import look_around

MakeModel = Callable[..., Path]


def test_threads_of_all_cores_are_shared_by_the_workers_unless_said(tmp_path: Path) -> None:
    cores = look_around(tmp_path).cores

    def threads(**options: object) -> int:
        return choose_engine(Job(effort="fast", **options), tmp_path)[0].threads  # type: ignore[arg-type]

    assert threads() == threads(workers="ray") == threads(workers="ray://head:1") == cores
    assert threads(workers="2") == max(1, cores // 2)
    assert threads(workers=str(8 * cores)) == 1
    assert threads(workers="2", threads=3) == 3


def test_workers_on_this_machine_are_counted() -> None:
    assert [workers_beside(Job(workers=text)) for text in ("1", "2", "7", "ray:auto", "ray://head:1")] == [
        0,
        2,
        7,
        1,
        1,
    ]
    assert workers_beside(Job(workers="ray")) == 1
    assert workers_beside(Job(workers="ray", threads=1)) >= 1


def test_each_worker_takes_the_program_and_its_rows_and_statistics_are_shared(make_model: MakeModel) -> None:
    model = make_model("llama", hidden_size=256, intermediate_size=1024, num_layers=1)
    opened = open_job(Job(model=str(model), scheme="q4_0", effort="fast", samples=2, seq_len=32, formats=()))
    plan = plan_job(opened)
    work, engine = workload(opened, plan), planned_engine(opened, plan)
    assert work.workers == 0
    alone, two, three = (memory_parts(replace(work, workers=count), engine) for count in (0, 2, 3))
    each = three["workers"] - two["workers"]
    assert "workers" not in alone
    assert two["workers"] == 2 * each
    assert 0 < each - PROGRAM < 256 * 1024 * 44
    assert two["statistics"] == 4 * 1024**2


def test_a_run_that_only_rounds_has_no_work_for_them(make_model: MakeModel) -> None:
    opened = open_job(Job(model=str(make_model("llama")), scheme="q4_0", workers="2"))
    with pytest.raises(UsageError, match="--workers share the coding of a calibrated run: give --effort"):
        plan_job(opened)


def test_what_is_no_number_of_workers_is_refused_before_anything(make_model: MakeModel) -> None:
    opened = open_job(Job(model=str(make_model("llama")), scheme="q4_0", effort="fast", workers="many"))
    with pytest.raises(UsageError, match="--workers 'many'"):
        plan_job(opened)
