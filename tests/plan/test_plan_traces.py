"""Traces from end to end: every kind of MODEL, killed and gone on, and calibration text at the end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from r1q.calibration.windows import make_windows
from r1q.core.errors import UsageError
from r1q.models.embedded import EMBEDDED
from r1q.models.tokenizer import Tokenizer
from r1q.plan.job import Job, open_job, plan_job, run_job
from r1q.plan.traces import TraceJob, make_traces


def run(job: TraceJob) -> list[tuple[int, bool]]:
    return [(step.done, step.trace is not None) for step in make_traces(job)]


@pytest.fixture
def echo(tmp_path: Path) -> Path:
    """An echo artifact with the embedded model's vocabulary, and enough context for its questions."""
    path = tmp_path / "model.echo"
    path.write_text(json.dumps({"vocab": Tokenizer.open(EMBEDDED).vocab_size, "context": 2048}))
    return path


def test_an_artifact_file_with_a_tokenizer_named(tmp_path: Path, echo: Path) -> None:
    job = TraceJob(
        output=tmp_path / "out" / "traces.jsonl",
        model=str(echo),
        tokenizer=EMBEDDED,
        runtime="echo",
        count=3,
        max_tokens=4,
    )
    assert run(job) == [(0, False), (1, True), (2, True), (3, True)]
    assert run(job) == [(3, False)]
    with pytest.raises(UsageError, match="another run"):
        run(TraceJob(output=job.output, model=str(echo), tokenizer=EMBEDDED, runtime="echo", count=3, max_tokens=5))


def test_a_tokenizer_that_is_nowhere_is_asked_for(tmp_path: Path, echo: Path) -> None:
    with pytest.raises(UsageError, match="--tokenizer"):
        run(TraceJob(output=tmp_path / "t.jsonl", model=str(echo), runtime="echo"))


def test_a_float_model_needs_a_runtime_that_reads_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="echo opens echo files only"):
        run(TraceJob(output=tmp_path / "t.jsonl", runtime="echo"))


@pytest.mark.runtime
def test_the_embedded_model_and_its_quantized_self(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llama_cpp")
    job = TraceJob(output=tmp_path / "float.jsonl", count=6, max_tokens=60, sequences=3, threads=1)
    whole = list(make_traces(job))
    assert [step.done for step in whole] == list(range(7))
    assert list(tmp_path.iterdir()) == [job.output]  # the GGUF that was made for it is gone
    text = job.output.read_bytes()

    # Stopped after two and gone on, one at a time.
    stopped = TraceJob(output=tmp_path / "again.jsonl", count=6, max_tokens=60, sequences=1, threads=1)
    steps = make_traces(stopped)
    assert [next(steps).done for _ in range(3)] == [0, 1, 2]
    steps.close()  # type: ignore[attr-defined]
    assert not stopped.output.exists()
    assert run(stopped)[0] == (2, False)
    ours, theirs = ([json.loads(line) for line in data.splitlines()] for data in (stopped.output.read_bytes(), text))
    assert [line["messages"][0] for line in ours] == [line["messages"][0] for line in theirs]

    # The output folder of quantize brings its tokenizer along.
    opened = open_job(Job(bits=8, output=tmp_path / "q8"))
    for _ in run_job(opened, plan_job(opened)):
        pass
    quantized = TraceJob(output=tmp_path / "q8.jsonl", model=str(tmp_path / "q8"), count=2, max_tokens=40, threads=1)
    assert len(run(quantized)) == 3
    (gguf,) = (tmp_path / "q8").glob("*.gguf")
    shutil.copy(gguf, tmp_path / "q8" / "copy.gguf")
    assert len(run(TraceJob(output=tmp_path / "c.jsonl", model=str(gguf), count=1, max_tokens=8, threads=1))) == 2

    windows = make_windows(str(job.output), Tokenizer.open(EMBEDDED), samples=2, length=64)
    record: Any = windows.record
    assert record["sources"][0]["documents"] >= 1
