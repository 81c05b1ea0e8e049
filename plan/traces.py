"""Traces from end to end: find the model's file and its tokenizer, open a runtime, let the model answer, fill the file.

A float model is first written as a BF16 GGUF where the runtime reads that, beside the output and only for as long as it is needed.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from r1q import __version__
from r1q.calibration.problems import draw_problem
from r1q.calibration.trace_file import Step, write_traces
from r1q.calibration.traces import TEMPERATURE, TOP_P, Trace, generate_traces
from r1q.core.artifact import ARTIFACTS, CHECKPOINT, OutputFolder, find_reference
from r1q.core.checkpoint import SIDECAR
from r1q.core.errors import InputError, UsageError
from r1q.core.files import TEMP_PREFIX, sha256_file, writing
from r1q.models.config import ModelConfig
from r1q.models.embedded import open_model
from r1q.models.tokenizer import Tokenizer
from r1q.plan.job import Job, open_job, plan_job, run_job
from r1q.plan.walk import Exported
from r1q.runtimes.base import Options, Runtime
from r1q.runtimes.table import load_runtime

_QUESTION_TOKENS = 1024  # room in the context beside the answer


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceJob:
    """What `r1q traces` is asked.

    `model` is a float checkpoint (folder, hub id, None for the embedded model), an output folder of `r1q quantize`, or an artifact
    file; `tokenizer` a folder with the model's tokenizer and config, needed where they do not lie with the file.
    """

    output: Path
    model: str | None = None
    tokenizer: Path | None = None
    runtime: str = "llama-cpp"
    count: int = 256
    seed: int = 0
    max_tokens: int = 4096
    temperature: float = TEMPERATURE
    top_p: float = TOP_P
    sequences: int = 4
    threads: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """The model as found: a file to open (None: one has to be made), its tokenizer's folder, what tells it from another."""

    file: Path | None
    folder: Path
    identity: Mapping[str, object]


def make_traces(job: TraceJob, *, progress: bool = False) -> Iterator[Step]:
    """Fill `job.output` with the model's traces, going on where a killed run stopped; yield where it is (`progress` shows a download).

    The same call on a finished file does nothing. Raises `InputError` for a model that cannot be opened, `UsageError` where the
    tokenizer is not found or the file holds other traces, and what the runtime and the disk raise.
    """
    adapter = load_runtime(job.runtime)
    found = _find(job, adapter, progress=progress)
    config, tokenizer = ModelConfig.read(found.folder), Tokenizer.open(found.folder)
    run = {
        "model": dict(found.identity),
        "runtime": {"name": job.runtime, **adapter.versions()},
        "settings": [job.seed, job.max_tokens, job.temperature, job.top_p],
        "r1q": __version__,  # which problems there are
    }

    def generate(missing: Sequence[int]) -> Iterator[Trace]:
        context = min(job.max_tokens + _QUESTION_TOKENS, config.max_position_embeddings)
        options = Options(context=context, sequences=min(job.sequences, len(missing)), threads=job.threads)
        with _file(job, found) as file, adapter.open(file, options) as session:
            yield from generate_traces(
                session,
                tokenizer,
                ((index, draw_problem(job.seed, index)) for index in missing),
                seed=job.seed,
                max_tokens=job.max_tokens,
                temperature=job.temperature,
                top_p=job.top_p,
                stops=config.eos_ids,
            )

    yield from write_traces(job.output, job.count, generate, run=run)


def _find(job: TraceJob, adapter: Runtime, *, progress: bool) -> _Found:
    path = None if job.model is None else Path(job.model)
    if path is not None and path.is_file():
        return _Found(file=path, folder=_tokenizer_of(job, path), identity={"file": sha256_file(path)})
    if path is not None and (path / ARTIFACTS).is_file():
        artifact = OutputFolder(path).artifacts().get("gguf")
        if artifact is None:
            raise UsageError(f"{path} holds no GGUF file; write one with r1q export {path} --to gguf")
        file = path / artifact.name
        return _Found(file=file, folder=_tokenizer_of(job, file), identity={"file": artifact.files[artifact.name]})
    if "gguf" not in adapter.formats:
        raise UsageError(f"{job.runtime} opens {', '.join(adapter.formats)} files only; give one as MODEL")
    source = open_model(job.model, progress=progress).source
    return _Found(file=None, folder=source.path, identity={"source": source.fingerprint()})


def _tokenizer_of(job: TraceJob, file: Path) -> Path:
    """Return the folder with tokenizer and config of an artifact: the one given, the checkpoint's beside it, or its source."""
    beside = (job.tokenizer, file.parent / CHECKPOINT / SIDECAR, find_reference(file))
    for folder in beside:
        if folder is not None and (folder / "tokenizer.json").is_file():
            return folder
    raise UsageError(f"no tokenizer lies with {file}; name the model's own folder with --tokenizer FOLDER")


@contextlib.contextmanager
def _file(job: TraceJob, found: _Found) -> Iterator[Path]:
    """Give the file to open; one that had to be made is removed afterwards."""
    if found.file is not None:
        yield found.file
        return
    with writing(job.output):
        job.output.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=TEMP_PREFIX, dir=job.output.absolute().parent) as folder:
        opened = open_job(Job(model=job.model, scheme="bf16", output=Path(folder) / "float"))
        events = [event for event in run_job(opened, plan_job(opened)) if isinstance(event, Exported)]
        if not events:
            raise InputError(f"{found.folder} could not be written as GGUF; quantize it first and give that folder")
        yield events[-1].path
