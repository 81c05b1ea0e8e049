"""A job is what the options of `r1q quantize` say: same names, same defaults, same folder."""

from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from r1q.commands.quantize import quantize
from r1q.core.artifact import OutputFolder
from r1q.core.formats import parse_formats
from r1q.plan.choose import Wish
from r1q.plan.job import Job, job_folder, newest_or_embedded, open_job, plan_job, run_job
from r1q.plan.walk import Exported

MakeModel = Callable[..., Path]
OF_THE_SCREEN = {
    "log_json",
    "dry_run",
    "quiet",
    "fit",
    "bpw",
    "swaps",
}  # the last three become a scheme before there is a job


def test_every_option_is_a_field_with_the_same_default() -> None:
    defaults = quantize.make_context("quantize", []).params
    asked = {name: value for name, value in defaults.items() if name not in OF_THE_SCREEN}
    assert set(asked) == {field.name for field in fields(Job)}
    assert {**asked, "formats": parse_formats(asked["formats"])} == asdict(Job())


def test_the_wish_is_what_the_options_say() -> None:
    job = Job(bits=3, group_size=64, asymmetric=True, formats=("gptq",))
    assert job.wish == Wish(bits=3, group_size=64, symmetric=False, formats=("gptq",))
    assert Job(scheme="q4_k").wish == Wish(scheme="q4_k")
    assert Job().wish == Wish()


def test_a_job_runs_from_its_model_to_its_files(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = make_model("llama")
    opened = open_job(Job(model=str(model), scheme="q8_0"))
    plan = plan_job(opened)
    folder = Path("r1q-out") / f"{model.name}-q8_0"
    assert job_folder(opened.job, plan) == folder
    *_, last = run_job(opened, plan)
    assert isinstance(last, Exported)
    assert last.path.parent == folder
    assert set(OutputFolder(folder).artifacts()) == {"gguf"}
    # With an output folder here, the embedded model is not made: the newest is taken.
    assert newest_or_embedded() == folder
    chosen = Job(output=tmp_path / "mine")
    assert job_folder(chosen, plan) == tmp_path / "mine"


def test_without_an_output_folder_the_embedded_model_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = newest_or_embedded()
    assert folder == Path("r1q-out/tiny-r1-q4_k_m")
    assert set(OutputFolder(folder).artifacts()) == {"gguf"}
    assert newest_or_embedded() == folder
