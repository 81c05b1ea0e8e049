"""Job: all that `r1q quantize` is asked, as one value; opened, planned and run in three calls."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from r1q.core.artifact import OutputFolder, newest_output
from r1q.core.errors import CheckError, ResourceError, UsageError
from r1q.models.embedded import OpenedModel, open_model
from r1q.plan.activations import ActivationText, refuse_sparse
from r1q.plan.choose import W8A8, Choice, Wish, choose_recipe
from r1q.plan.effort import choose_engine, workers_beside
from r1q.plan.healing import refuse_healing
from r1q.plan.kv_cache import CacheText, cache_text, refuse_latents
from r1q.plan.memory import Workload, ceiling, fit_engine, memory_parts, rounding_parts, short_of
from r1q.plan.plan import Plan, make_plan
from r1q.plan.walk import Exported, quantize_model
from r1q.quantize.crews import Workers, parse_workers
from r1q.quantize.engine import Engine
from r1q.quantize.run import Calibration, Event

OUTPUT_ROOT = Path("r1q-out")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is asked, under the names and with the defaults of the command's options.

    `model` None is the embedded model, `output` None a folder under ./r1q-out, `formats` empty the checkpoint alone.
    """

    model: str | None = None
    bits: int | None = None
    scheme: str | None = None
    formats: tuple[str, ...] = ("gguf",)
    group_size: int | None = None
    asymmetric: bool = False
    head_bits: int | None = None
    kv: str = "float"
    activations: str | None = None
    method: str | None = None
    imatrix: Path | None = None
    effort: str | None = None
    heal: int | None = None
    calibration: str | None = None
    samples: int = 128
    seq_len: int = 512
    damp: float = 0.05
    moe_calibration: Literal["routed", "all", "hybrid"] = "routed"
    threads: int | None = None
    workers: str = "1"
    device: str = "cpu"
    max_ram: str | None = None
    output: Path | None = None
    strict: bool = False
    lora: Path | None = None

    @property
    def calibrated(self) -> bool:
        """Whether the model sees text: asked for by `method`, or by an option that means nothing without it."""
        text = self.calibration and not self.static
        return self.method == "gptq" or (self.method is None and bool(self.effort or text or self.heal))

    @property
    def static(self) -> bool:
        """Whether inputs become integers too, in ranges found beforehand."""
        return self.scheme is not None and self.scheme.lower() == W8A8

    @property
    def inputs(self) -> ActivationText | None:
        """The text that inputs are measured on, None where they stay floats."""
        if not self.static:
            return None
        text = {"calibration": self.calibration or "builtin", "method": self.activations or "minmax"}
        return ActivationText(samples=self.samples, length=self.seq_len, **text)

    @property
    def wish(self) -> Wish:
        """The part that decides the recipe."""
        return Wish(
            bits=self.bits,
            scheme=self.scheme,
            group_size=self.group_size,
            symmetric=not self.asymmetric,
            head_bits=self.head_bits,
            formats=self.formats,
        )

    @property
    def cache(self) -> CacheText | None:
        """The text that an 8-bit cache is calibrated on, None for a float cache."""
        text = CacheText(calibration=self.calibration or "builtin", samples=self.samples, length=self.seq_len)
        return cache_text(self.kv, self.formats, text)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedJob:
    """A job, the model that it names, and the recipe that it means for this model."""

    job: Job
    model: OpenedModel
    choice: Choice


def open_job(job: Job, *, progress: bool = False) -> OpenedJob:
    """Open the model (`progress` shows a download) and choose the recipe; reads headers alone.

    Raises what `open_model`, `adapted` and `choose_recipe` raise.
    """
    model = open_model(job.model, progress=progress)
    if job.lora is not None:
        from r1q.distill.lora import adapted

        model = adapted(model, job.lora)
    return OpenedJob(job=job, model=model, choice=choose_recipe(job.wish, model.source.tensors))


def plan_job(opened: OpenedJob) -> Plan:
    """Return what every tensor will become; raises what `make_plan` raises."""
    job = opened.job
    refuse_contradictions(job)
    source, recipe = opened.model.source, opened.choice.recipe
    if job.cache is not None:
        refuse_latents(source.config)
    if job.static:
        refuse_sparse(source.config)
    return make_plan(source, recipe, job.formats, job.imatrix, calibrated=job.calibrated)


def refuse_contradictions(job: Job) -> None:
    """Raise `UsageError` for options that do not go together."""
    cache_text(job.kv, job.formats, CacheText())
    if parse_workers(job.workers) != Workers() and not job.calibrated:
        raise UsageError("--workers share the coding of a calibrated run: give --effort too, or leave it out")
    if job.activations is not None and not job.static:
        raise UsageError("--activations says how ranges of inputs are found: it goes with --scheme w8a8")
    if job.heal and (job.static or job.method == "rtn"):
        raise UsageError(
            "--heal trains scales behind a calibrated run, of weights alone: leave it out, or --method rtn and w8a8"
        )
    if job.method == "rtn" and (job.effort or (job.calibration and job.cache is None and not job.static)):
        raise UsageError("--method rtn looks at no text: leave --effort and --calibration out, or the method")
    if job.calibrated and job.imatrix is not None:
        raise UsageError(
            "--imatrix weighs errors of plain rounding; a calibrated run makes its own statistics: leave one out"
        )


def job_folder(job: Job, plan: Plan) -> Path:
    """Return the output folder: the one asked for, or r1q-out/<model>-<recipe> in the working directory."""
    return job.output or OUTPUT_ROOT / f"{plan.model}-{plan.recipe.name}"


def run_job(opened: OpenedJob, plan: Plan) -> Iterator[Event | Exported]:
    """Quantize and export as `quantize_model` does, yielding its events.

    Raises `CheckError` with --strict at the first thing that had to be done otherwise than asked.
    """
    job = opened.job
    output = OutputFolder(job_folder(job, plan))
    refuse_little_memory(opened, plan)
    calibration = _calibration(opened, plan) if job.calibrated else None
    for event in quantize_model(opened.model, plan, output, calibration, job.cache, job.inputs):
        if job.strict and isinstance(event, Event) and event.what == "note":
            raise CheckError(f"--strict: {event.name}")
        yield event


def refuse_little_memory(opened: OpenedJob, plan: Plan) -> None:
    """Raise `ResourceError` where --max-ram is less than rounding takes; a calibrated run finds out with its engine."""
    job = opened.job
    if job.max_ram is None or job.calibrated:
        return
    need, limit = sum(rounding_parts(opened.model.source.config, plan.formats).values()), ceiling(job.max_ram)
    if need > limit:
        raise ResourceError(short_of(need, limit))


def _calibration(opened: OpenedJob, plan: Plan) -> Calibration:
    """Return the windows that the model will see, and the engine: that of the run which is in `output` already, or a new one."""
    from r1q.calibration.windows import make_windows
    from r1q.models.tokenizer import Tokenizer

    job = opened.job
    windows = make_windows(
        job.calibration or "builtin", Tokenizer.open(opened.model.source.path), samples=job.samples, length=job.seq_len
    )
    engine = planned_engine(opened, plan, len(windows.tokens))
    return Calibration(tokens=windows.tokens, record=windows.record, engine=engine, workers=job.workers)


def workload(opened: OpenedJob, plan: Plan, windows: int | None = None) -> Workload:
    """Return what a calibrated job is over; `windows` None takes as many as are asked for, though the text may have fewer."""
    job = opened.job
    config = opened.model.source.config
    return Workload(
        config=config,
        tensors=plan.tensors,
        windows=windows or job.samples,
        length=job.seq_len,
        workers=workers_beside(job),
    )


def planned_engine(opened: OpenedJob, plan: Plan, windows: int | None = None) -> Engine:
    """Return how the calibrated job computes here within --max-ram, or what memory there is (`windows` as in `workload`).

    A run that was begun keeps its own tiles and slabs, which decide last bits. Raises `ResourceError` where it does not fit.
    """
    job = opened.job
    engine, begun = choose_engine(job, OutputFolder(job_folder(job, plan)).checkpoint)
    work, limit = workload(opened, plan, windows), ceiling(job.max_ram)
    fitted = fit_engine(work, engine, limit)
    if begun and (fitted.tile, fitted.slab) != (engine.tile, engine.slab):
        need = sum(memory_parts(work, replace(engine, spill=True)).values())
        raise ResourceError(
            f"the run in {job_folder(job, plan)} was begun with tiles and slabs that need about {need} bytes of memory, and may take "
            f"{limit}; others would change its last bits: give it a larger --max-ram, or choose another -o"
        )
    refuse_healing(work, fitted, limit)
    return fitted


def newest_or_embedded() -> Path:
    """Return the newest output folder under ./r1q-out; without one, quantize the embedded model in 4 bits and return that."""
    newest = newest_output(OUTPUT_ROOT)
    if newest is not None:
        return newest
    opened = open_job(Job())
    plan = plan_job(opened)
    for _ in run_job(opened, plan):
        pass
    return job_folder(opened.job, plan)
