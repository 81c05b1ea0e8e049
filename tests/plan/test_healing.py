"""Healing inside of a job: the codes that the job had without it, the same bytes after a kill anywhere, memory said and kept to."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from r1q.core.checkpoint import JOURNAL, MANIFEST, QuantizedCheckpoint
from r1q.core.errors import CheckError, ResourceError, UsageError
from r1q.core.metrics import score
from r1q.models.forward import Configured, TensorReader, logits
from r1q.models.source import ModelSource
from r1q.models.tokenizer import Tokenizer
from r1q.plan.healing import WORK, healing_parts, refuse_healing
from r1q.plan.job import Job, open_job, plan_job, planned_engine, run_job, workload
from r1q.plan.outlook import outlook
from r1q.plan.walk import Exported
from r1q.quantize.run import Event

MakeModel = Callable[..., Path]


def _drawn(seed: int) -> str:
    return "".join(np.random.default_rng(seed).choice(list("abcdefgh ,."), 6000))


@pytest.fixture
def asked(make_model: MakeModel, tmp_path: Path) -> Job:
    words = tmp_path / "words.txt"
    words.write_text(_drawn(0))
    return Job(
        model=str(make_model("qwen2")), scheme="q4_0", effort="default", heal=12, calibration=str(words), samples=20, seq_len=32,
        threads=1, output=tmp_path / "whole",
    )  # fmt: skip


def _started(job: Job) -> Iterator[Event | Exported]:
    opened = open_job(job)
    return run_job(opened, plan_job(opened))


def _names(job: Job) -> list[str]:
    return [found.what if isinstance(found, Event) else "exported" for found in _started(job)]


def _contents(job: Job) -> dict[str, bytes]:
    assert job.output is not None
    files = (path for path in sorted(job.output.rglob("*")) if path.is_file() and path.name != "where.json")
    return {str(path.relative_to(job.output)): path.read_bytes() for path in files}


def _divergence(reader: TensorReader, source: ModelSource) -> float:
    ids = Tokenizer.open(source.path).encode(
        _drawn(1), add_special=False
    )  # the same letters, and no text that was seen
    tokens = np.array(ids[:1024]).reshape(32, 32)
    ours, truth = (np.concatenate(list(logits(model, tokens))) for model in (reader, source))
    found = score(ours, tokens.reshape(-1), truth).kld
    assert found is not None
    return float(found.mean())


def test_a_healed_job_has_the_codes_of_one_without_and_less_divergence(asked: Job, tmp_path: Path) -> None:
    plain = replace(asked, heal=None, output=tmp_path / "plain")
    events = _names(asked)
    assert (events.count("healing"), events[-2:]) == (
        7,
        ["done", "exported"],
    )  # before any step, and after every second one
    assert _names(asked) == ["already done", "exported"]
    _names(plain)
    healed, before = (QuantizedCheckpoint.open(tmp_path / name / "checkpoint") for name in ("whole", "plain"))
    for spec in before.tensors:
        if before.scheme(spec.name).facts.family != "float":
            rows = (0, spec.rows)
            np.testing.assert_array_equal(healed.read(spec.name, *rows).codes, before.read(spec.name, *rows).codes)
    source = ModelSource.open(Path(str(asked.model)))
    assert _divergence(Configured(source.config, healed), source) < _divergence(
        Configured(source.config, before), source
    )
    said = healed.manifest["events"]
    assert isinstance(said, list)
    assert said[-1].startswith("healed: ")
    assert healed.damaged_files() == []
    sizes = [next((tmp_path / name).glob("*.gguf")).stat().st_size for name in ("whole", "plain")]
    assert sizes[0] == sizes[1]
    with pytest.raises(UsageError, match="another job"):
        list(_started(replace(asked, heal=None)))
    with pytest.raises(UsageError, match="another job"):
        list(_started(replace(asked, heal=14)))


def test_a_kill_at_any_point_changes_no_byte(asked: Job, tmp_path: Path) -> None:
    events = list(_started(asked))
    whole = _contents(asked)
    points = [number for number, found in enumerate(events) if isinstance(found, Event) and found.what != "tensor"]
    for point in points[-9:]:  # from the last stages of the codes to the end
        killed = replace(asked, output=tmp_path / f"killed-{point}")
        run = _started(killed)
        for _ in range(point + 1):
            next(run)
        run.close()  # type: ignore[attr-defined]
        _names(killed)
        assert _contents(killed) == whole, events[point]


def test_a_kill_while_the_healed_files_are_moved_changes_no_byte(asked: Job, tmp_path: Path) -> None:
    list(_started(asked))
    whole = _contents(asked)
    for moved in range(3):
        killed = replace(asked, output=tmp_path / f"moved-{moved}")
        assert killed.output is not None
        folder, made = killed.output / "checkpoint", killed.output / WORK / "checkpoint"
        run = _started(killed)
        while not (made / MANIFEST).is_file():
            next(run)
        run.close()  # type: ignore[attr-defined]
        for name in (MANIFEST, JOURNAL):
            (folder / name).unlink()
        files = sorted(path for path in made.iterdir() if path.is_file() and path.name != MANIFEST)
        for path in files[: moved * len(files) // 2]:
            path.replace(folder / path.name)
        _names(killed)
        assert _contents(killed) == whole


def test_what_does_not_help_leaves_the_codes_as_they_were_and_says_so(
    asked: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("r1q.plan.healing._RATE", 60.0)
    notes = [found.name for found in _started(asked) if isinstance(found, Event) and found.what == "note"]
    assert [note.partition(":")[0] for note in notes] == ["healing did not help"]
    plain = replace(asked, heal=None, output=tmp_path / "plain")
    list(_started(plain))
    gguf = [next((tmp_path / name).glob("*.gguf")).read_bytes() for name in ("whole", "plain")]
    assert gguf[0] == gguf[1]
    strict = replace(asked, strict=True, output=tmp_path / "strict")
    with pytest.raises(CheckError, match="healing did not help"):
        list(_started(strict))


def test_healing_is_refused_where_there_is_no_memory_or_no_text_for_it(asked: Job) -> None:
    opened = open_job(asked)
    plan = plan_job(opened)
    work, engine = workload(opened, plan), planned_engine(opened, plan)
    assert engine.heal == asked.heal
    need = sum(healing_parts(work, engine.compute).values())
    refuse_healing(work, engine, need)
    with pytest.raises(ResourceError, match=f"about {need / 1e6:.0f} MB"):
        refuse_healing(work, engine, need - 1)
    one = replace(work, windows=1)
    with pytest.raises(UsageError, match="one window"):
        refuse_healing(one, engine, need)
    refuse_healing(one, replace(engine, heal=0), 0)


def test_a_plan_counts_healing_in_memory_and_on_the_disk(asked: Job) -> None:
    opened, plain = (open_job(replace(asked, heal=heal, samples=3, seq_len=4)) for heal in (5, None))
    with_it, without = (outlook(job, plan_job(job), timed=False) for job in (opened, plain))
    assert with_it.disk > without.disk
    assert "logits" in with_it.parts
    assert "logits" not in without.parts


@pytest.mark.parametrize("options", [{"method": "rtn", "effort": None}, {"scheme": "w8a8", "formats": ("onnx",)}])
def test_what_has_no_calibrated_scales_is_not_healed(asked: Job, options: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="--heal trains scales"):
        plan_job(open_job(replace(asked, **options)))  # type: ignore[arg-type]
