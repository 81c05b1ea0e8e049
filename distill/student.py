"""A student from end to end: pruned from its teacher, distilled, and left behind as an ordinary Hugging Face folder."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from r1q import __version__
from r1q.core import journal
from r1q.core.checkpoint import JOB
from r1q.core.errors import InputError
from r1q.core.files import TEMP_PREFIX, json_bytes, remove_leftovers, write_json, writing
from r1q.core.grids import float_bytes
from r1q.core.safetensors_file import write_safetensors
from r1q.distill.network import Network, load_network, product_dtype
from r1q.distill.prune import choose_kept, write_student
from r1q.distill.sizes import Sizes, check_sizes, sizes_of
from r1q.distill.text import Text
from r1q.distill.train import Plan, Progress, distill, load_best
from r1q.models.source import SINGLE, ModelSource

RECORD, WORK = "distillation.json", "distilling"
_IMPORTANCE_WINDOWS = 32
_CUT = 2 / 3
_TOKENS_A_CUT = (80e9, 100e9)
"""Minitron's guide: at most a third of the weights at a time, and 80 to 100 billion tokens after each cut."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What was made: the folder, the student's and the teacher's number of weights, and how far training came (None: only pruned)."""

    folder: Path
    parameters: int
    teacher_parameters: int
    reached: Progress | None


def tokens_needed(before: float, after: float) -> tuple[int, float, float]:
    """Return for a cut from `before` to `after` weights how many cuts of a third it is, and the fewest and most tokens to recover.

    >>> cuts, fewest, most = tokens_needed(7e9, 1.5e9)
    >>> cuts, round(fewest / 1e9), round(most / 1e9)
    (4, 320, 400)
    """
    cuts = max(1, math.ceil(math.log(after / before) / math.log(_CUT) - 1e-9))
    return cuts, cuts * _TOKENS_A_CUT[0], cuts * _TOKENS_A_CUT[1]


def make_student(
    source: ModelSource, sizes: Sizes, text: Text, plan: Plan, folder: Path
) -> Iterator[Progress | Outcome]:
    """Fill `folder` with the student, yielding how far it is and at last the outcome; go on where a killed run stopped.

    `plan.steps` 0 prunes and stops. The teacher (16 bits a weight where the processor multiplies them) and the student with AdamW's
    two moments (16 bytes a weight with gradients) are in memory. Raises `InputError` for impossible sizes, `UsageError` where the
    folder holds something else, `ResourceError` for a full disk.
    """
    check_sizes(source.config, sizes)
    _refuse_foreign(folder)
    work = folder / WORK
    with writing(folder):
        work.mkdir(parents=True, exist_ok=True)
    job = _job(source, sizes, text, plan)
    whole = sizes_of(source.config).parameters(source.config)
    small = sizes.parameters(source.config)
    if _is_done(folder, job):
        yield Outcome(folder=folder, parameters=small, teacher_parameters=whole, reached=_reached(folder))
        return
    journal.open_job(work, job)
    for place in (folder, work):
        remove_leftovers(place)
    pruned = work / "pruned"
    if not (pruned / "config.json").is_file():
        windows = torch.cat([text.batch(step, 1)[0] for step in range(_IMPORTANCE_WINDOWS)]).numpy()
        write_student(source, sizes, choose_kept(source, windows, sizes), pruned)
    now = None
    if plan.steps:
        student = load_network(ModelSource.open(pruned))
        teacher = load_network(source, matrices=product_dtype())
        for now in distill(teacher, student, student.tensors, text, plan, work):
            yield now
        load_best(work, student.tensors)
        _write_weights(pruned, student)
    _finish(folder, job, now)
    yield Outcome(folder=folder, parameters=small, teacher_parameters=whole, reached=now)


def _job(source: ModelSource, sizes: Sizes, text: Text, plan: Plan) -> dict[str, object]:
    return {
        "r1q": __version__,
        "torch": torch.__version__,
        "teacher": source.fingerprint(),
        "sizes": asdict(sizes),
        "text": dict(text.record),
        "plan": asdict(plan),
        "threads": torch.get_num_threads(),
    }


def _refuse_foreign(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        ours = folder.is_dir() and ((folder / WORK / JOB).is_file() or (folder / RECORD).is_file())
        left = folder.is_dir() and all(
            path.name == WORK or path.name.startswith(TEMP_PREFIX) for path in folder.iterdir()
        )
        if not ours and not left:
            raise InputError(f"{folder} exists and holds something else; choose another folder with -o")


def _is_done(folder: Path, job: dict[str, object]) -> bool:
    """Return whether the folder holds the outcome of this job. Raises `InputError` where it is that of another."""
    if not (folder / RECORD).is_file():
        return False
    if _record(folder).get("job") != hashlib.sha256(json_bytes(job)).hexdigest():
        raise InputError(f"{folder} holds a student of another run; choose another folder with -o")
    return True


def _record(folder: Path) -> dict[str, object]:
    try:
        value = json.loads((folder / RECORD).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{folder / RECORD} is damaged ({error}); delete the folder") from error
    return value if isinstance(value, dict) else {}


def _reached(folder: Path) -> Progress | None:
    reached = _record(folder).get("reached")
    try:
        return Progress(**reached) if isinstance(reached, dict) else None
    except TypeError as error:
        raise InputError(f"{folder / RECORD} is damaged ({error}); delete the folder") from error


def _write_weights(folder: Path, student: Network) -> None:
    entries = [(spec.name, spec.dtype, spec.shape) for spec in student.specs]
    rows = (student.tensors[spec.name].detach().reshape(1, -1).numpy() for spec in student.specs)
    pieces = (float_bytes(spec.dtype.lower(), values) for spec, values in zip(student.specs, rows, strict=True))
    write_safetensors(folder / SINGLE, entries, pieces, metadata={"format": "pt"})


def _finish(folder: Path, job: dict[str, object], now: Progress | None) -> None:
    """Move the student into its place, config.json after the weights and the record last; then drop the state of the training."""
    pruned = folder / WORK / "pruned"
    files = sorted(pruned.iterdir(), key=lambda path: path.name == "config.json")
    with writing(folder):
        for path in files:
            shutil.copyfile(path, folder / path.name)
        record = {"job": hashlib.sha256(json_bytes(job)).hexdigest(), "asked": job}
        write_json(folder / RECORD, record | ({"reached": asdict(now)} if now else {}))
        shutil.rmtree(folder / WORK)
